"""The log of training updates: what amnesiac unlearning subtracts, and what exact replay needs."""

from __future__ import annotations

from efface.updates.log import UpdateLog
from efface.updates.recorder import Recorder

__all__ = ["Recorder", "UpdateLog"]
