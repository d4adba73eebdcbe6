"""What the command line does with update logs: record one, look into it, verify and purge it."""

from __future__ import annotations

from efface.logs.purging import run_purge, run_verify
from efface.logs.recording import Recording, recording
from efface.logs.showing import run_show

__all__ = ["Recording", "recording", "run_purge", "run_show", "run_verify"]
