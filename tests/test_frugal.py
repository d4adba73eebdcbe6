"""A fraction of D_r: by class, nested, the same for every method."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import efface
from efface.data import queue
from efface.errors import MethodError
from efface.fitting import Fit
from efface.unlearn import Chain, FineTune, Frugal, Replay, Unlearner, build, needs_of
from efface.unlearn.frugal import share

NewTask = Callable[..., efface.Task]
SIZES = (2, 3, 40, 55, 100)


@pytest.fixture(scope="module")
def uneven(new_task: NewTask) -> efface.Task:
    """Five classes of very different size."""
    targets = torch.cat([torch.full((n,), c) for c, n in enumerate(SIZES)])
    inputs = torch.randn(len(targets), 6, generator=torch.Generator().manual_seed(0))
    ids = [str(i) for i in range(len(targets))]
    return new_task(train=(inputs, targets), ids=ids, subjects=None, columns={})


def quiet(split: efface.Split, fraction: float, fit: Fit) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return share(split, fraction, fit).retain


def slow_queue(targets: list[int], luck: list[int]) -> list[int]:
    """Seat by seat, with exact fractions: the class with the largest n_c / (2 s_c + 1) is next."""
    left = {
        c: [i for i in sorted(range(len(targets)), key=luck.__getitem__) if targets[i] == c]
        for c in set(targets)
    }
    sizes, seated, found = Counter(targets), Counter[int](), []
    while any(left.values()):
        waiting = [c for c in left if left[c]]
        best = max(
            waiting, key=lambda c: (Fraction(sizes[c], 2 * seated[c] + 1), -luck[left[c][0]])
        )
        found.append(left[best].pop(0))
        seated[best] += 1
    return found


@pytest.mark.parametrize("seed", range(5))
def test_queue_seats_classes_one_by_one(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (60,), generator=draw) ** 2
    luck = torch.randperm(60, generator=draw)
    assert queue(targets, luck).tolist() == slow_queue(targets.tolist(), luck.tolist())


@pytest.mark.parametrize("label", range(len(SIZES)))
@pytest.mark.parametrize("seed", [0, 1])
def test_shares_are_exact_by_class_and_nested(uneven: efface.Task, label: int, seed: int) -> None:
    split, fit = efface.Split.by_class(uneven, label), Fit(uneven, seed=seed)
    n, inside = len(split.retain), set[int]()
    sizes = Counter(uneven.records.targets[split.retain].tolist())
    for percent in range(1, 101):
        part = quiet(split, percent / 100, fit)
        assert len(part) == max(1, round(percent / 100 * n))
        assert part.tolist() == sorted(set(part.tolist()) & set(split.retain.tolist()))
        assert inside <= set(part.tolist())
        inside = set(part.tolist())
        counts = Counter(uneven.records.targets[part].tolist())
        for c, size in sizes.items():
            assert abs(counts[c] - len(part) * size / n) < 1
    assert inside == set(split.retain.tolist())


def test_the_rest_of_the_split_stays(task: efface.Task, class_split: efface.Split) -> None:
    fit = Fit(task, seed=1)
    part = share(class_split, 0.2, fit)
    assert torch.equal(part.forget, class_split.forget)
    assert part.selector == class_split.selector
    assert part.label == 1
    assert share(class_split, 1, fit) is class_split
    assert len(class_split.retain) == 80


def test_records_depend_on_seed_and_split_alone(
    task: efface.Task, class_split: efface.Split
) -> None:
    fit = Fit(task, seed=1)
    part = share(class_split, 0.2, fit).retain
    assert torch.equal(part, share(class_split, 0.2, replace(fit, path="else/where")).retain)
    before = torch.random.get_rng_state()
    assert not torch.equal(part, share(class_split, 0.2, Fit(task, seed=2)).retain)
    assert torch.equal(before, torch.random.get_rng_state())


def test_who_is_forgotten_shifts_nobody_else(uneven: efface.Task) -> None:
    """Within a class, the same records come first whichever other class is forgotten."""
    fit = Fit(uneven, seed=0)
    one = quiet(efface.Split.by_class(uneven, 0), 0.3, fit)
    other = quiet(efface.Split.by_class(uneven, 2), 0.3, fit)
    targets = uneven.records.targets
    for c in (3, 4):
        a, b = (set(p[targets[p] == c].tolist()) for p in (one, other))
        assert a <= b or b <= a


@pytest.mark.parametrize(
    ("fraction", "sentence"),
    [
        (0.2, r"\(20 records of 100\) has none of class 0, which"),
        (0.02, r"\(2 records of 100\) has none of classes 0, 1, which"),
        (0.001, r"\(1 record of 100\) has none of classes 0, 1, 2, which"),
    ],
)
def test_a_class_without_a_record_is_named(
    uneven: efface.Task, fraction: float, sentence: str
) -> None:
    with pytest.warns(UserWarning, match=sentence):
        share(efface.Split.by_class(uneven, 4), fraction, Fit(uneven))


def test_a_fair_share_says_nothing(uneven: efface.Task) -> None:
    """Nor is the forgotten class missed."""
    share(efface.Split.by_class(uneven, 4), 0.4, Fit(uneven))


# --- the wrapper ----------------------------------------------------------------------------------


def forget(model: efface.TrainedModel, split: efface.Split, method: Any) -> efface.TrainedModel:
    return efface.forget(model, split, method, seed=4)


def test_with_all_of_it_the_inner_method_is_what_it_was(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    inner = FineTune(epochs=2)
    plain = forget(trained, class_split, inner)
    assert forget(trained, class_split, Frugal(inner, 1.0)).digest == plain.digest
    assert forget(trained, class_split, Frugal(inner, 0.5)).digest != plain.digest


def test_it_is_the_inner_method_on_the_share(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    """Fewer records than a batch: the batch shrinks."""
    part = share(class_split, 0.13, Fit(trained.task, seed=4))
    assert len(part.retain) == 10 < trained.task.fit.batch_size
    after = forget(trained, class_split, Frugal(FineTune(epochs=2), 0.13))
    assert after.digest == forget(trained, part, FineTune(epochs=2)).digest
    step = after.lineage[-1]
    assert step.detail["frugal"] == {"records": 10, "of": 80}
    assert step.cost["images"] == 20


def test_retraining_on_a_share(trained: efface.TrainedModel, class_split: efface.Split) -> None:
    scratch = forget(trained, class_split, Frugal(build("retrain"), 0.5))
    assert scratch.lineage[-1].cost["images"] == 40 * trained.task.fit.epochs


def test_shares_of_shares(trained: efface.TrainedModel, class_split: efface.Split) -> None:
    after = forget(trained, class_split, Frugal(Frugal(FineTune(epochs=1), 0.5), 0.5))
    assert after.lineage[-1].detail["frugal"] == {"records": 20, "of": 40}


def test_it_is_made_from_options() -> None:
    made = build("frugal", {"fraction": "0.02", "inner": {"method": "l1-sparse", "epochs": "3"}})
    assert made == Frugal(build("l1-sparse", {"epochs": 3}), 0.02)
    assert needs_of(Frugal(build("ssd"))) == {"forget", "retain"}
    assert isinstance(made, Unlearner)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_fractions_out_of_range_are_refused(
    fraction: float, task: efface.Task, class_split: efface.Split
) -> None:
    with pytest.raises(MethodError, match=r"frugal: fraction must be in \(0, 1\], not"):
        Frugal(FineTune(), fraction)
    with pytest.raises(MethodError, match=r"a share of D_r: fraction must be in \(0, 1\], not"):
        share(class_split, fraction, Fit(task))


@pytest.mark.parametrize("inner", [Replay(), Chain(FineTune(), Replay())])
def test_a_replay_is_refused(
    inner: Any, trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    with pytest.raises(MethodError, match="frugal cannot go around replay"):
        Frugal(inner).check(trained, class_split)
