"""What the command line prints: messages to stderr, results to stdout, progress on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efface.errors import InputError


@dataclass(frozen=True)
class Run:
    """The options that every command has.

    Args:
        seed: Every random choice derives from it.
        force: Replace outputs that exist.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        threads: Torch threads; 0 picks one on small machines.
        as_json: Print one JSON object on stdout.
        debug: Show tracebacks.
    """

    seed: int = 0
    force: bool = False
    device: str = "auto"
    threads: int = 0
    as_json: bool = False
    debug: bool = False

    def start(self) -> None:
        """Set threads: two torch threads collapse as soon as anything else wants a core."""
        import torch

        if self.threads < 0:
            raise InputError(f"--threads must be 0 or more, not {self.threads}.")
        cores = os.cpu_count() or 1
        torch.set_num_threads(self.threads or (1 if cores <= 4 else min(8, cores // 2)))

    def say(self, text: str) -> None:
        """A message for people, on stderr."""
        print(text, file=sys.stderr)

    def result(self, value: dict[str, Any], text: str) -> None:
        """The result: one JSON object with ``--json``, else text, on stdout."""
        print(json.dumps(value, allow_nan=False) if self.as_json else text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> str:
        """A table as text, as wide as the terminal (or as it needs to be when there is none)."""
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, title=title or None, title_justify="left")
        for row in rows:
            table.add_row(*row)
        width = None if sys.stdout.isatty() else 200
        console = Console(width=width, color_system=None, file=io.StringIO())
        console.print(table)
        return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def progress(self) -> Iterator[Any]:
        """A progress callback ``(label, done, total)``: bars on a terminal, else one estimate."""
        if not sys.stderr.isatty():
            yield _Estimate(self)
            return
        with bars() as bar:
            tasks: dict[str, Any] = {}

            def show(label: str, done: int, total: int) -> None:
                if label not in tasks:
                    tasks[label] = bar.add_task(label, total=total)
                bar.update(tasks[label], completed=done, total=total)

            yield show


class _Estimate:
    """Where there is no terminal: one line, once it is clear that the work takes over a minute."""

    def __init__(self, run: Run) -> None:
        self.run, self.said = run, False
        self.first: tuple[str, float, int] | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None or self.first[0] != label:  # the first step warms up: not counted
            self.first = (label, now, done)
        spent, steps = now - self.first[1], done - self.first[2]
        if self.said or spent < 4 or steps < 1:
            return
        self.said = True
        minutes = spent / steps * (total - done) / 60
        if minutes > 1:
            self.run.say(f"{label}: about {minutes:.0f} minutes.")


def bars() -> Any:
    """Progress bars with the time left, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def read_ids(path: Path) -> list[str]:
    """IDs from a file: JSON (a list), CSV (first column, or the one called ``id``), or a line each.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--ids {path} cannot be read ({error}); give a text file.") from None
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"--ids {path} is not JSON ({error}).") from None
        if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
            raise InputError(f"--ids {path} must hold a JSON list of IDs.")
        return [str(v) for v in value]
    if path.suffix == ".csv":
        return _csv_ids(text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def _csv_ids(text: str) -> list[str]:
    import csv

    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    column = header.index("id") if "id" in header else 0
    body = rows[1:] if "id" in header else rows
    return [row[column].strip() for row in body if len(row) > column and row[column].strip()]
