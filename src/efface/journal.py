"""The sidecar of a long command: the state of its fits, so that a killed command goes on.

A command is a deterministic function of its inputs; its fits run in a fixed order. The journal
keeps, per fit, either its end state or the last commit, under a key that describes the command.
Run again, finished fits are taken from the journal and the one that was cut short goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_bytes
from torch import Tensor

from efface.checkpoint import read_file
from efface.errors import CheckpointError, WriteError
from efface.files import canonical, digest, write_atomic
from efface.trained import weights_digest


@dataclass(frozen=True)
class State:
    """A commit: tensors (network, optimiser, mask) and plain values (epoch, step, history, …)."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Journal:
    """A folder beside the output; removed when the command has finished.

    Args:
        folder: Where commits go.
        key: What the command is: any JSON value. A journal of another key is thrown away.
        seconds: Least time between two commits.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], seconds: float = 10.0) -> None:
        self.folder = Path(folder)
        self.key = digest(dict(key))
        self.seconds = seconds
        self._own: bool | None = None

    @property
    def own(self) -> bool:
        """Whether what lies in the folder is of this key."""
        if self._own is None:
            try:
                value = json.loads((self.folder / "key.json").read_text())
                self._own = isinstance(value, dict) and value.get("key") == self.key
            except (OSError, ValueError):
                self._own = False
        return self._own

    def start(self) -> bool:
        """Whether there is something to go on from.

        Nothing is written, or thrown away, before the first commit: a command with a slip in it
        does not cost the unfinished work of the right one.
        """
        return self.own and any(self.folder.glob("fit-*.safetensors"))

    def read(self, call: int | str) -> State | None:
        """The last commit of a fit (or what was kept under a name); None if absent or damaged."""
        path = self._path(call)
        if not self.own or not path.exists():
            return None
        try:
            tensors, metadata = read_file(path)
            if weights_digest(tensors) != metadata["digest"]:
                return None
            return State(tensors, json.loads(metadata["values"]))
        except (CheckpointError, KeyError, ValueError):
            return None

    def write(self, call: int | str, state: State) -> None:
        """Commit a fit's state, or keep something else under a name."""
        try:
            self._write(call, state)
        except WriteError:
            if not any(self.folder.glob("fit-*.safetensors")):
                self.clear()
            raise

    def _write(self, call: int | str, state: State) -> None:
        if not self.own:
            self.clear()
            write_atomic(self.folder / "key.json", canonical({"key": self.key}).encode())
            self._own = True
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.tensors.items()}
        metadata = {"values": json.dumps(dict(state.values)), "digest": weights_digest(tensors)}
        write_atomic(self._path(call), save_bytes(tensors, metadata))

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._own = False

    def _path(self, call: int | str) -> Path:
        name = call if isinstance(call, str) else f"fit-{call:04d}"
        return self.folder / f"{name}.safetensors"
