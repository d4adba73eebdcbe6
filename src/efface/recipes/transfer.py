"""Transfer: which source classes hurt a downstream task, and what forgetting them is worth.

A network is trained on some classes of a task; a linear probe on its features learns the others.
The influence of a source class is what the probe loses when the network is trained without it
(leave-class-out, after Jain et al. 2022, who estimate it over random subsets). Classes are chosen
on one part of the downstream records, and results are reported on the other.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from efface import predict
from efface.data import TensorRecords
from efface.errors import InputError
from efface.seeds import generator
from efface.stats import rate
from efface.task import Task
from efface.trained import TrainedModel


@dataclass(frozen=True)
class Downstream:
    """The downstream task: records of held-out classes, to fit a probe, to choose, to report.

    Args:
        fit: What the probe is fitted on.
        choose: What classes are chosen on.
        report: What results are reported on: test records.
    """

    fit: TensorRecords
    choose: TensorRecords
    report: TensorRecords


def restricted(task: Task, classes: tuple[int, ...]) -> Task:
    """The task with the records of some classes only; labels stay as they are.

    Raises:
        InputError: If its data does not lie in memory, or a class has no record.
    """
    train, test = (_of_classes(r, classes) for r in (task.records, task.test_records))
    inside = torch.isin(task.records.targets, torch.tensor(classes)).nonzero().flatten()
    ids = None if task.ids is None else [task.ids_[i] for i in inside.tolist()]
    name = f"{task.name}, classes {', '.join(map(str, classes))}"
    return replace(
        task,
        train=(train.inputs, train.targets),
        test=(test.inputs, test.targets),
        validation=None,
        ids=ids,
        columns={},
        subjects=None,
        name=name,
    )


def downstream(task: Task, classes: tuple[int, ...], per_class: int, seed: int = 0) -> Downstream:
    """Held-out classes: half of ``2 × per_class`` training records each to fit, half to choose.

    Raises:
        InputError: If a class has too few records.
    """
    pool = _of_classes(task.records, classes)
    mixed = torch.randperm(len(pool), generator=generator(seed, "downstream"))
    fit, choose = [], []
    for c in classes:
        mine = mixed[pool.targets[mixed] == c]
        if len(mine) < 2 * per_class:
            raise InputError(f"class {c} has {len(mine)} records; the probe needs {2 * per_class}.")
        fit.append(mine[:per_class])
        choose.append(mine[per_class : 2 * per_class])
    report = _of_classes(task.test_records, classes)
    return Downstream(_take(pool, torch.cat(fit)), _take(pool, torch.cat(choose)), report)


def _of_classes(records: Any, classes: tuple[int, ...]) -> TensorRecords:
    if not isinstance(records, TensorRecords):
        raise InputError("transfer needs data that fits into memory.")
    missing = [c for c in classes if not bool((records.targets == c).any())]
    if missing:
        raise InputError(f"class {missing[0]} has no record; give classes that the task has.")
    inside = torch.isin(records.targets, torch.tensor(classes)).nonzero().flatten()
    return _take(records, inside)


def _take(records: TensorRecords, where: Tensor) -> TensorRecords:
    return TensorRecords(records.inputs[where], records.targets[where])


def probe(model: TrainedModel, data: Downstream, part: TensorRecords) -> dict[str, Any]:
    """Accuracy of a linear probe (logistic regression on standardised features)."""

    def seen(records: TensorRecords) -> npt.NDArray[np.float32]:
        return predict.features(model.network, model.task, records)

    from sklearn.linear_model import LogisticRegression

    known = seen(data.fit)
    middle, scale = known.mean(0), known.std(0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged in 500 steps is near enough for a probe
        fitted = LogisticRegression(max_iter=500, C=0.1).fit(
            (known - middle) / scale, data.fit.targets.numpy()
        )
    answers = fitted.predict((seen(part) - middle) / scale)
    hits = int((answers == part.targets.numpy()).sum())
    return asdict(rate(hits, len(answers)))


def kept_accuracy(model: TrainedModel, gone: tuple[int, ...]) -> dict[str, Any]:
    """Accuracy on test records of the source classes that were kept."""
    records = model.task.test_records
    answers = predict.logits(model.network, model.task, records).argmax(1)
    labels = records.targets.numpy()
    stays = ~np.isin(labels, gone)
    return asdict(rate(int((answers == labels)[stays].sum()), int(stays.sum())))


def least_useful(
    whole: list[float], without: dict[int, list[float]], remove: int
) -> tuple[tuple[int, ...], dict[int, list[float]]]:
    """The classes whose removal helps most, and the influence of each class per seed.

    Args:
        whole: Probe accuracy with all source classes, per seed.
        without: Class → probe accuracy of models trained without it, per seed.
        remove: How many classes.

    >>> least_useful([0.8, 0.8], {0: [0.7, 0.7], 1: [0.9, 0.8]}, 1)[0]
    (1,)
    """
    influence = {c: [a - b for a, b in zip(whole, v, strict=True)] for c, v in without.items()}
    ranked = sorted(influence, key=lambda c: float(np.mean(influence[c])))
    return tuple(sorted(ranked[:remove])), influence
