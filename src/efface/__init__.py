"""efface: make a trained network forget named records, and show how well it forgot.

task    = efface.Task(network=make_net, train=train_set, test=test_set, ids=ids)
trained = efface.train(task, seed=0)
split   = efface.Split.by_ids(task, ["p017", "p112"])
forgot  = efface.forget(trained, split, efface.unlearn.L1Sparse(epochs=5))
fresh   = efface.retrain(task, split, seed=1)
efface.audit(trained, forgot, split, references=[fresh]).save("audit/")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "AuditResult": "report",
    "EffaceError": "errors",
    "Fit": "fitting",
    "Mask": "mask",
    "Settings": "task",
    "Split": "task",
    "Stream": "data",
    "Task": "task",
    "TrainedModel": "trained",
    "adopt": "verbs",
    "audit": "verbs",
    "compact": "sparsify",
    "forget": "verbs",
    "load": "checkpoint",
    "patch": "verbs",
    "prune": "verbs",
    "retrain": "retraining",
    "train": "verbs",
}
_ROOMS = ("auditing", "datasets", "errors", "networks", "sparsify", "stats", "unlearn", "updates")

__all__ = [
    "AuditResult",
    "EffaceError",
    "Fit",
    "Mask",
    "Settings",
    "Split",
    "Stream",
    "Task",
    "TrainedModel",
    "adopt",
    "audit",
    "auditing",
    "compact",
    "datasets",
    "errors",
    "forget",
    "load",
    "networks",
    "patch",
    "prune",
    "retrain",
    "sparsify",
    "stats",
    "train",
    "unlearn",
    "updates",
]

if TYPE_CHECKING:
    from efface import auditing, datasets, errors, networks, sparsify, stats, unlearn, updates
    from efface.checkpoint import load
    from efface.data import Stream
    from efface.errors import EffaceError
    from efface.fitting import Fit
    from efface.mask import Mask
    from efface.report import AuditResult
    from efface.retraining import retrain
    from efface.sparsify import compact
    from efface.task import Settings, Split, Task
    from efface.trained import TrainedModel
    from efface.verbs import adopt, audit, forget, patch, prune, train


def __getattr__(name: str) -> Any:
    """Import a public name when it is first touched: ``efface --help`` needs none of them."""
    if name in _PLACES:
        value = getattr(importlib.import_module(f"efface.{_PLACES[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"efface.{name}")
    else:
        raise AttributeError(f"module 'efface' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
