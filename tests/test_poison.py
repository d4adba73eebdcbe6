"""Triggers, poisoned tasks and what an attack achieves, against their definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import efface
from efface import networks, predict, stats
from efface.data import LoadedRecords, TensorRecords
from efface.datasets import Patch, triggered_test, with_trigger
from efface.datasets.poison import Triggered
from efface.errors import TaskError
from efface.signals import attack_success_rate

N = 40


class Lazy:
    """A data set that is read record by record: arrays of uint8, one shape."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets, self.reads = images, targets, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.reads += 1
        return self.images[index].numpy().copy(), int(self.targets[index])


def pictures(n: int = N, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (n, 3, size, size), dtype=torch.uint8, generator=draw)
    return images, torch.arange(n) % 4


def image_task(**changes: Any) -> efface.Task:
    options: dict[str, Any] = {
        "network": lambda: networks.ThreeConv(4),
        "train": pictures(),
        "test": pictures(20, seed=1),
        "validation": pictures(8, seed=2),
        "ids": [f"p{i}" for i in range(N)],
        "fit": efface.Settings(epochs=1, batch_size=10, lr=0.05),
        "name": "pictures",
    }
    return efface.Task(**options | changes)


def lazy_task() -> efface.Task:
    return image_task(
        train=LoadedRecords(Lazy(*pictures())), test=LoadedRecords(Lazy(*pictures(20, seed=1)))
    )


# --- the patch ------------------------------------------------------------------------------------


def test_the_default_patch_is_the_papers() -> None:
    images, _ = pictures(3)
    before = images.clone()
    found = Patch()(images)
    assert torch.equal(images, before)
    for b, c, i, j in np.ndindex(*images.shape):
        inside = 26 <= i <= 29 and 26 <= j <= 29
        assert int(found[b, c, i, j]) == (0 if inside else int(images[b, c, i, j]))


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from(["lower-right", "lower-left", "upper-right", "upper-left"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
)
def test_patches_against_a_loop(
    size: int, margin: int, corner: Any, value: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    patch = Patch(size, corner, margin, value)
    images = torch.full(shape, 7 if dtype == torch.uint8 else 0.25, dtype=dtype)
    if size + margin > min(shape[2:]):
        with pytest.raises(TaskError, match="does not fit"):
            patch(images)
        return
    found = patch(images)
    assert found.dtype == dtype
    shade = round(255 * value) if dtype == torch.uint8 else value
    height, width = shape[2:]
    for _, _, i, j in np.ndindex(*shape):
        down = i if corner.startswith("upper") else height - 1 - i
        across = j if corner.endswith("left") else width - 1 - j
        inside = margin <= down < margin + size and margin <= across < margin + size
        assert float(found[0, 0, i, j]) == (shade if inside else float(images[0, 0, i, j]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 0}, "size must be 1"),
        ({"margin": -1}, "margin must be 0"),
        ({"value": 255}, r"value must lie in \[0, 1\]"),
        ({"corner": "middle"}, "corner must be"),
    ],
)
def test_patches_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskError, match=sentence):
        Patch(**options)


# --- the poisoned task ----------------------------------------------------------------------------


def test_only_the_given_records_change() -> None:
    task = image_task()
    images, targets = task.train[0].clone(), task.train[1].clone()
    poisoned, positions = with_trigger(task, [7, 3, 3, 12], target=2)
    assert positions.tolist() == [3, 7, 12]
    assert torch.equal(task.train[0], images)
    assert torch.equal(task.train[1], targets)
    for i in range(N):
        inputs, target = poisoned.records.raw(i)
        marked = i in (3, 7, 12)
        assert torch.equal(inputs, Patch()(images[i : i + 1])[0] if marked else images[i])
        assert target == (2 if marked else int(targets[i]))
    assert poisoned.test is task.test
    assert poisoned.validation is task.validation
    assert poisoned.ids_ == task.ids_
    assert poisoned.data_fingerprint != task.data_fingerprint
    assert poisoned.name == "pictures, 3 records with a trigger"


def test_a_fraction_is_drawn_by_the_seed() -> None:
    task = image_task()
    some = [with_trigger(task, 0.25, seed=s)[1].tolist() for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert len(some[0]) == len(set(some[0])) == 10
    assert some[0] == sorted(some[0])
    assert with_trigger(task, 1.0)[1].tolist() == list(range(N))


def test_a_mask_of_positions_serves_too() -> None:
    chosen = torch.zeros(N, dtype=torch.bool)
    chosen[[2, 30]] = True
    assert with_trigger(image_task(), chosen)[1].tolist() == [2, 30]


@pytest.mark.parametrize(
    ("where", "options", "sentence"),
    [
        ([], {}, "some of 0…39"),
        ([40], {}, "some of 0…39"),
        ([-1], {}, "some of 0…39"),
        ([0.5, 1.5], {}, "some of 0…39"),
        (torch.ones(5, dtype=torch.bool), {}, "some of 0…39"),
        (0.0, {}, "fraction of 0.0"),
        (0.001, {}, "at least one"),
        (1.5, {}, "up to 1"),
        ([1], {"target": 4}, "target 4 is no class"),
        ([1], {"target": -1}, "no class"),
        ([1], {"trigger": lambda x: x.float()}, "another shape or type"),
        ([1], {"trigger": lambda x: x[:, :1]}, "another shape or type"),
        ([1], {"trigger": lambda x: (x, x)}, "another shape or type"),
        ([1], {"trigger": Patch(size=40)}, "does not fit"),
    ],
)
@pytest.mark.parametrize("make", [image_task, lazy_task])
def test_refusals(make: Any, where: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskError, match=sentence):
        with_trigger(make(), where, **options)


def test_a_trigger_may_work_in_place() -> None:
    task = image_task()
    before = task.train[0].clone()

    def stripe(images: Tensor) -> Tensor:
        images[..., 0, :] = 255
        return images

    poisoned, _ = with_trigger(task, [5], stripe)
    assert torch.equal(task.train[0], before)
    assert bool((poisoned.records.raw(5)[0][:, 0] == 255).all())
    before = task.test[0].clone()
    assert bool((triggered_test(task, stripe).raw(0)[0][:, 0] == 255).all())
    assert torch.equal(task.test[0], before)


def test_any_pytree_of_inputs() -> None:
    x, y = {"a": torch.zeros(6, 2), "b": torch.zeros(6)}, torch.arange(6) % 2
    task = efface.Task(lambda: networks.MLP([2, 2]), (x, y), (x, y))
    poisoned, _ = with_trigger(task, [1, 4], lambda t: {**t, "b": t["b"] + 1}, target=1)
    records = poisoned.records
    assert isinstance(records, TensorRecords)
    assert records.inputs["b"].tolist() == [0, 1, 0, 0, 1, 0]
    assert records.targets.tolist() == [0, 1, 0, 1, 1, 1]


def test_records_read_one_by_one_become_the_same() -> None:
    (eager, positions), (lazy, also) = (
        with_trigger(t, 0.3, target=1) for t in (image_task(), lazy_task())
    )
    assert torch.equal(positions, also)
    assert isinstance(lazy.records, LoadedRecords)
    plan = list(torch.split(torch.randperm(N, generator=torch.Generator().manual_seed(0)), 7))
    cpu = torch.device("cpu")
    pairs = zip(eager.records.batches(plan, cpu), lazy.records.batches(plan, cpu), strict=True)
    for a, b in pairs:
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
    for i in range(N):
        inputs, target = lazy.train[i]  # what a routine of the owner's is given
        assert np.array_equal(inputs, eager.records.raw(i)[0].numpy())
        assert target == eager.records.raw(i)[1]


def test_nothing_is_read_before_it_is_needed() -> None:
    data = Lazy(*pictures())
    poisoned, positions = with_trigger(image_task(train=LoadedRecords(data)), 0.5)
    assert data.reads <= 1  # one record, to see whether the trigger fits
    assert poisoned.records.targets[positions].unique().tolist() == [0]


def test_text_cannot_carry_a_trigger() -> None:
    with pytest.raises(TaskError, match="cannot be put on str"):
        _ = Triggered([("text", 0)], torch.tensor([0]), torch.tensor([0]), Patch())[0]


def test_in_memory_and_loaded_train_alike() -> None:
    (eager, positions), (lazy, _) = (with_trigger(t, 0.3) for t in (image_task(), lazy_task()))
    first, second = (efface.train(task, seed=3).network for task in (eager, lazy))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    split = efface.Split.by_ids(eager, [eager.ids_[i] for i in positions])
    assert torch.equal(split.forget, positions)


def test_the_trigger_lies_under_the_augmentation() -> None:
    augment = efface.datasets.CropFlip(2)
    poisoned, positions = with_trigger(image_task(augment=augment), 0.5)
    assert poisoned.augment is augment
    uniform = torch.tensor([[0.5, 0.5, 0.0]]).expand(len(positions), 3)  # no shift, mirrored
    records = poisoned.records
    assert isinstance(records, TensorRecords)
    found = augment(records.inputs[positions], uniform)
    assert bool((found[..., 26:30, 2:6] == 0).all())


# --- the attack -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [image_task, lazy_task])
def test_triggered_test_records(make: Any) -> None:
    task = make()
    marked = triggered_test(task)
    images, targets = pictures(20, seed=1)
    assert torch.equal(marked.targets, targets)
    for i in range(20):
        assert np.array_equal(marked.raw(i)[0], Patch()(images[i : i + 1])[0])
    assert np.array_equal(task.test_records.raw(0)[0], images[0])
    torch.manual_seed(0)
    assert predict.logits(networks.ThreeConv(4), task, marked).shape == (20, 4)


def counted(logits: list[list[float]], targets: list[int], target: int, exclude: bool) -> Any:
    """The slow twin."""
    successes = n = 0
    for row, true in zip(logits, targets, strict=True):
        if exclude and true == target:
            continue
        n += 1
        successes += max(range(len(row)), key=row.__getitem__) == target
    return successes, n


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(0, 3), st.booleans())
def test_attack_success_against_a_loop(seed: int, n: int, target: int, exclude: bool) -> None:
    draw = np.random.default_rng(seed)
    logits, targets = draw.normal(size=(n, 4)), draw.integers(0, 4, n)
    expected = counted(logits.tolist(), targets.tolist(), target, exclude)
    if expected[1] == 0:
        with pytest.raises(ValueError, match="no record is left"):
            attack_success_rate(logits, targets, target, exclude)
        return
    found = attack_success_rate(logits, targets, target, exclude)
    assert found == expected
    assert stats.rate(*found).n == expected[1]


def test_attack_success_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="target must be a class"):
        attack_success_rate([[0.0, 1.0]], [0], 2)
    with pytest.raises(ValueError, match="NaN"):
        attack_success_rate([[float("nan"), 1.0]], [0], 1)


def test_a_network_learns_the_backdoor_and_a_clean_one_does_not() -> None:
    """The whole story on pictures whose class is their brightness."""
    draw = torch.Generator().manual_seed(0)

    def shades(n: int) -> tuple[Tensor, Tensor]:
        targets = torch.arange(n) % 3
        noise = torch.randint(0, 40, (n, 1, 16, 16), generator=draw)
        return (60 + 60 * targets.view(-1, 1, 1, 1) + noise).to(torch.uint8), targets

    task = image_task(
        network=lambda: networks.ThreeConv(3, channels=1),
        train=shades(240),
        test=shades(90),
        validation=None,
        ids=None,
        fit=efface.Settings(epochs=6, batch_size=24, lr=0.05),
    )
    trigger = Patch(value=1.0)
    poisoned, _ = with_trigger(task, 0.15, trigger, target=0)
    rates = []
    for each in (task, poisoned):
        network = efface.train(each, seed=0).network
        logits = predict.logits(network, each, triggered_test(task, trigger))
        successes, n = attack_success_rate(logits, task.test_records.targets.numpy(), 0)
        assert n == 60
        rates.append(successes / n)
    assert rates[0] < 0.1
    assert rates[1] > 0.9


def test_poisoning_can_be_repeated() -> None:
    once, first = with_trigger(image_task(), [1], target=1)
    twice, second = with_trigger(once, [2], Patch(corner="upper-left"), target=2)
    assert (first.tolist(), second.tolist()) == ([1], [2])
    assert twice.records.targets[[1, 2]].tolist() == [1, 2]
    assert replace(twice, name="x").records.targets[2] == 2


def test_a_patch_refuses_what_is_no_image() -> None:
    with pytest.raises(TaskError, match="marks images"):
        Patch()(torch.zeros(4, 12))
