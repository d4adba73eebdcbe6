"""The command line: parse, call the library, print. Heavy imports wait until they are needed."""

from __future__ import annotations

import sys

import typer

from efface.cli import evidence, log, models, running
from efface.commandline import app

__all__ = ["app", "evidence", "log", "main", "models", "running"]


def main() -> None:
    """Entry point: one-sentence errors and the exit codes 0 to 3."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted.", file=sys.stderr)
        code = 1
    except Exception as error:
        # typer's usage errors, of the click that it brings along or the one that it depends on
        if not hasattr(error, "format_message"):
            raise
        bare = type(error).__name__ == "NoArgsIsHelpError"
        message = error.format_message()
        print(message if bare else f"error: {message}", file=None if bare else sys.stderr)
        code = 0 if bare else 2
    sys.exit(code if isinstance(code, int) else 0)
