"""Models kept under what they are: data, code, settings and seed.

An entry that is damaged is found by its digests, thrown away and made again. The folder holds
models derived from personal data: it lies in the output folder unless another is named, and can be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from efface.checkpoint import load
from efface.errors import InputError, LogError
from efface.files import digest
from efface.fitting import Fit
from efface.journal import Journal
from efface.keys import key_fingerprint, load_key
from efface.task import Split, Task
from efface.trained import TrainedModel, weights_digest

# What decides how a reference comes out; the rest of the package may change without retraining.
TRAINING = (
    *("augment", "data", "feeds", "fitting", "mask", "networks", "placement", "replay", "seeds"),
    *("steps", "task", "trained", "work", "verbs", "retraining", "sparsify", "unlearn/retrain"),
)
RECORDING = ("updates",)
"""What decides, beside that, what a log of a training holds."""


@cache
def code_digest(parts: tuple[str, ...]) -> str:
    """A digest of the source of some modules and folders of efface; of all where none is named."""
    package = Path(str(resources.files("efface")))
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").as_posix()
        known = {name, name.split("/")[0], path.stem if name.startswith("datasets/") else name}
        if not parts or known & set(parts):
            total.update(name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


@lru_cache(maxsize=64)
def identity(task: Task, seed: int) -> dict[str, Any]:
    """What a model trained on a task from a seed depends on, without saying whose data it is."""
    fresh = Fit(task, seed).fresh()
    return {
        "data": task.data_fingerprint,
        "ids": digest("\n".join(task.ids_))[:32],
        "network": weights_digest(fresh.state_dict())[:32],
        "settings": task.fit.to_dict(),
        "augment": repr(task.augment),
        "seed": seed,
        "torch": torch.__version__,
    }


def records_digest(split: Split | None) -> str | None:
    """A digest of which records are to be forgotten."""
    if split is None:
        return None
    return digest(split.forget.numpy().tobytes())[:32]


class Store:
    """A folder of models, each under the digest of its key.

    Args:
        folder: Where they are kept.
        say: Told, in a sentence, when an entry was damaged.
        seconds: Least time between two commits of a model that is being made.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], seconds: float = 20.0) -> None:
        self.folder, self.say, self.seconds = Path(folder), say, seconds

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the model of a key is, or will be."""
        return self.folder / f"{digest(dict(key))[:32]}.safetensors"

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a file for a key; only reading it shows whether it is whole."""
        return self.path(key).exists()

    def log_path(self, key: Mapping[str, Any]) -> Path:
        """Where the update log of a model's training is, or will be: beside the model."""
        return self.path(key).with_suffix(".log")

    def get(
        self,
        key: Mapping[str, Any],
        task: Task,
        make: Callable[[Journal | None], TrainedModel],
        *,
        logged: bool = False,
        thorough: bool = False,
    ) -> TrainedModel:
        """The model of a key: from its file, or made now, going on where a killed run stopped.

        Args:
            key: What it is.
            task: Its task.
            make: Makes it; a recorded training gets no journal, and begins anew.
            logged: Whether its training is recorded; it then knows its log, which is there and is
                its own.
            thorough: Read the whole log, to find damage in it.
        """
        path, log = self.path(key), self.log_path(key)
        if path.exists():
            try:
                model = load(path, task)
                if logged:
                    check_log(log, model, thorough)
                    model.log = log
                return model
            except InputError as error:
                self.say(f"a kept model is damaged and is made again: {error}")
        if logged:  # model and log are made together, or not at all
            path.unlink(missing_ok=True)
            shutil.rmtree(log, ignore_errors=True)
            model = make(None)
            model.save(path, force=True)
            model.log = log
            return model
        journal = Journal(path.with_suffix(".partial"), dict(key), self.seconds)
        journal.start()
        model = make(journal)
        model.save(path, force=True)
        journal.clear()
        return model


def check_log(folder: Path, model: TrainedModel, thorough: bool = False) -> None:
    """Check that the log beside a kept model is whole, and of its training.

    Args:
        folder: The log.
        model: As its training left it.
        thorough: Read every segment.

    Raises:
        LogError: If it is absent, damaged, not finished, of another key or of another training.
    """
    from efface.updates.log import UpdateLog

    with UpdateLog.open(folder) as log:
        own = key_fingerprint(load_key())
        if log.manifest.get("key") != own:
            raise LogError(f"{folder} was recorded under another key than {own}; record it again.")
        finished = log.info()["finished"] or {}
        if finished.get("weights") != model.digest:
            raise LogError(f"{folder} is not the log of this model; record it again.")
        bad = [part["sentence"] for part in log.verify() if not part["ok"]] if thorough else []
        if bad:
            raise LogError(f"{folder} is damaged ({bad[0].rstrip('.')}); record it again.")
