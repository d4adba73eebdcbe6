"""Records, index streams, seeds and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

import efface
from efface.data import (
    LoadedRecords,
    TensorRecords,
    as_records,
    as_strings,
    check_repeatable,
    chunks,
    fingerprint,
    order,
    probes,
    uniforms,
)
from efface.errors import InputError, SelectionError, TaskError
from efface.feeds import Feed
from efface.seeds import generator, rng, seed_for

from . import oracles

CPU = torch.device("cpu")
NewTask = Callable[..., efface.Task]


class Listed(Dataset[Any]):
    """A map-style data set over a list that counts how often it is read."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.rows[index]


def listed(n: int = 20) -> Listed:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 3, generator=draw)
    return Listed([(inputs[i], i % 4) for i in range(n)])


# --- index streams --------------------------------------------------------------------------------


@st.composite
def subsets(draw: Any) -> tuple[int, list[int]]:
    total = draw(st.integers(1, 60))
    chosen = draw(st.sets(st.integers(0, total - 1), min_size=1))
    return total, sorted(chosen)


@given(subsets(), st.integers(0, 5), st.integers(0, 5))
def test_leaving_records_out_shifts_nobody(
    subset: tuple[int, list[int]], seed: int, epoch: int
) -> None:
    total, chosen = subset
    everyone = order(seed, "fit/retain", epoch, torch.arange(total), total).tolist()
    assert sorted(everyone) == list(range(total))
    found = order(seed, "fit/retain", epoch, torch.tensor(chosen), total).tolist()
    assert found == [p for p in everyone if p in set(chosen)]
    # the order in which positions are given says nothing
    backwards = torch.tensor(chosen[::-1])
    assert order(seed, "fit/retain", epoch, backwards, total).tolist() == found


def test_streams_differ_by_seed_purpose_and_epoch() -> None:
    state = torch.get_rng_state()
    everyone = torch.arange(50)
    found = {
        tuple(order(seed, purpose, epoch, everyone, 50).tolist())
        for seed in (0, 1)
        for purpose in ("a", "b", "a/b")
        for epoch in (0, 1)
    }
    assert len(found) == 12
    torch.manual_seed(5)
    again = order(0, "a", 0, everyone, 50)
    assert tuple(again.tolist()) in found
    torch.set_rng_state(state)
    order(0, "a", 0, everyone, 50)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_place_is_equally_likely() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(600):
        for place, p in enumerate(order(0, "x", epoch, torch.arange(6), 6).tolist()):
            counts[p, place] += 1
    assert np.abs(counts - 100).max() < 45  # five standard deviations


@given(st.integers(1, 200), st.integers(1, 50))
def test_batches_are_cut_as_by_hand(n: int, size: int) -> None:
    positions = torch.arange(n)
    found = [part.tolist() for part in chunks(positions, size)]
    assert found == oracles.cut(list(range(n)), size)
    if n > 1 and size > 1:
        assert min(map(len, found)) > 1  # batch norm needs two


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 3))
def test_uniform_rows_belong_to_records_and_epochs(total: int, draws: int, epoch: int) -> None:
    table = uniforms(3, epoch, total, draws)
    assert table.shape == (total, draws)
    assert table.min() >= 0
    assert table.max() < 1
    assert torch.equal(table, uniforms(3, epoch, total, draws))
    assert not torch.equal(table, uniforms(3, epoch + 1, total, draws))
    assert not torch.equal(table, uniforms(4, epoch, total, draws))


def test_seeds_are_told_apart() -> None:
    found = {
        seed_for(seed, purpose, *counters)
        for seed in (0, 1, 11)
        for purpose in ("a", "b", "1")
        for counters in ((), (1,), (1, 1), (11,), (1, 2))
    }
    assert len(found) == 3 * 3 * 5
    assert all(0 <= s < 2**63 for s in found)
    assert rng(0, "x").random() == rng(0, "x").random()
    assert torch.rand(1, generator=generator(0, "x")) == torch.rand(1, generator=generator(0, "x"))


def test_seeds_stay_what_they_are() -> None:
    """Every published result would change with them."""
    assert seed_for(0, "order", 3) == 228291028133782092
    assert order(0, "train", 1, torch.arange(6), 6).tolist() == [3, 5, 4, 1, 2, 0]


# --- records --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 19), min_size=1, max_size=12), st.integers(1, 5))
def test_both_paths_give_the_same_batches(positions: list[int], size: int) -> None:
    data = listed()
    memory, loaded = as_records(data), LoadedRecords(data)
    assert isinstance(memory, TensorRecords)
    assert torch.equal(memory.targets, loaded.targets)
    plan = chunks(torch.tensor(positions), size)
    pairs = zip(memory.batches(plan, CPU), loaded.batches(plan, CPU), plan, strict=True)
    for a, b, where in pairs:
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert a.targets.dtype == b.targets.dtype == torch.int64
        assert torch.equal(a.positions, where)
        assert torch.equal(b.positions, where)
        for row, target, p in zip(a.inputs, a.targets, where.tolist(), strict=True):
            assert torch.equal(row, data.rows[p][0])
            assert int(target) == data.rows[p][1]


def test_trees_of_tensors() -> None:
    rows = [({"a": torch.tensor([float(i)]), "b": (torch.tensor(i), i)}, i % 2) for i in range(6)]
    memory, loaded = as_records(Listed(rows)), LoadedRecords(Listed(rows))
    assert memory.in_memory
    plan = [torch.tensor([4, 1])]
    for records in (memory, loaded):
        (batch,) = records.batches(plan, CPU)
        assert batch.inputs["a"].tolist() == [[4.0], [1.0]]
        assert batch.inputs["b"][0].tolist() == batch.inputs["b"][1].tolist() == [4, 1]
        assert batch.targets.tolist() == [0, 1]
        assert float(records.raw(3)[0]["a"]) == 3.0
        assert records.raw(3)[1] == 1


@pytest.mark.parametrize("form", ["pair", "dataset", "list", "records"])
def test_every_form_of_data_is_the_same_data(form: str) -> None:
    rows = listed().rows
    inputs, targets = torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])
    data: Any = {
        "pair": (inputs, targets),
        "dataset": TensorDataset(inputs, targets),
        "list": rows,
        "records": TensorRecords(inputs, targets),
    }[form]
    records = as_records(data)
    assert records.in_memory
    assert len(records) == 20
    (batch,) = records.batches([torch.arange(20)], CPU)
    assert torch.equal(batch.inputs, inputs)
    assert torch.equal(batch.targets, targets)
    assert fingerprint(records) == fingerprint(as_records(listed()))


def test_memory_is_used_up_to_the_limit() -> None:
    # 20 records of three floats and one 64-bit label
    need = 20 * (3 * 4 + 8)
    assert as_records(listed(), limit=need).in_memory
    assert not as_records(listed(), limit=need - 1).in_memory
    assert not as_records(listed(), collate=default_collate).in_memory


def test_data_in_memory_is_read_once() -> None:
    data = listed(100)
    records = as_records(data)
    reads = data.reads
    assert reads <= 100 + 4 * 16
    for _ in records.batches([torch.arange(100)], CPU):
        pass
    assert data.reads == reads


@pytest.mark.parametrize("odd", [0, 3])
def test_ragged_data_goes_through_the_loader(odd: int) -> None:
    """Also when none of the records that are probed says so."""
    n = 40
    assert (odd in probes(n)) == (odd == 0)
    rows = [(torch.zeros(2 if i == odd else 3), i % 2) for i in range(n)]

    def collate(pairs: list[Any]) -> Any:
        padded = [torch.nn.functional.pad(x, (0, 3 - len(x))) for x, _ in pairs]
        return torch.stack(padded), torch.tensor([y for _, y in pairs])

    records = as_records(Listed(rows))
    assert not records.in_memory
    records = as_records(Listed(rows), collate=collate)
    (batch,) = records.batches([torch.tensor([odd, 0])], CPU)
    assert batch.inputs.shape == (2, 3)


def test_a_set_with_targets_is_not_read_for_them() -> None:
    data = listed()
    data.targets = [y for _, y in data.rows]  # type: ignore[attr-defined]
    assert LoadedRecords(data).targets.tolist() == data.targets  # type: ignore[attr-defined]
    assert data.reads == 0


def test_loader_processes_give_the_same_batches() -> None:
    data = listed()
    plan = chunks(torch.arange(20).flip(0), 6)
    for a, b in zip(
        LoadedRecords(data).batches(plan, CPU),
        LoadedRecords(data, workers=1).batches(plan, CPU),
        strict=True,
    ):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)


# --- what is refused ------------------------------------------------------------------------------


class Augmenting(Listed):
    """Adds noise at every read."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


class Flipping(Listed):
    """Flips labels at every other read."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x, (y + self.reads) % 4


@pytest.mark.parametrize("kind", [Augmenting, Flipping])
def test_sets_that_augment_by_themselves_are_refused(kind: Any) -> None:
    data = kind(listed().rows)
    with pytest.raises(TaskError, match=r"differs between two reads.*augment="):
        check_repeatable(data)
    with pytest.raises(TaskError, match="differs"):
        as_records(data)
    with pytest.raises(TaskError, match="differs"):
        as_records(data, collate=default_collate)
    check_repeatable(listed())


def test_unusable_data_is_refused() -> None:
    for empty in ([], (torch.zeros(0, 3), torch.zeros(0).long())):
        with pytest.raises(TaskError, match="empty"):
            as_records(empty)
    with pytest.raises(TaskError, match="not a map-style"):
        as_records(iter([1]))
    with pytest.raises(TaskError, match="pair"):
        as_records([torch.zeros(3)] * 4)
    with pytest.raises(TaskError, match="pair"):
        as_records([(torch.zeros(3), 1, 2)] * 4)


def test_inputs_and_targets_of_different_length_are_refused() -> None:
    with pytest.raises(TaskError):
        as_records((torch.zeros(5, 2), torch.zeros(4).long()))


# --- fingerprints ---------------------------------------------------------------------------------


def test_fingerprints_see_order_content_and_number() -> None:
    x, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 4
    swapped = torch.arange(40)
    swapped[[4, 5]] = swapped[[5, 4]]
    moved = x.clone()
    moved[7, 1] += 1e-3
    relabelled = y.clone()
    relabelled[9] = (y[9] + 1) % 4
    variants = [(x, y), (x[:39], y[:39]), (x[swapped], y[swapped]), (moved, y), (x, relabelled)]
    found = [fingerprint(as_records(v)) for v in variants]
    assert len(set(found)) == len(found)
    assert fingerprint(as_records((x.clone(), y.clone()))) == found[0]


@given(st.integers(1, 500))
def test_probes_are_spread(n: int) -> None:
    found = probes(n)
    assert found == sorted(set(found))
    assert len(found) == min(n, 16)
    assert found[0] == 0
    assert found[-1] == n - 1


# --- feeds ----------------------------------------------------------------------------------------


@given(
    st.integers(2, 23),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 40),
    st.booleans(),
)
def test_a_feed_finds_its_place(n: int, size: int, period: int, start: int, is_first: bool) -> None:
    """Started at any step, it supplies what one that ran from the beginning supplies."""
    data = (torch.arange(30.0)[:, None], torch.arange(30) % 2)
    task = efface.Task(lambda: torch.nn.Linear(1, 2), data, data)
    positions = torch.arange(30)[:n]
    stream = efface.Stream(positions, batch_size=size, period=period)
    feed = Feed(task, 3, "fit/x", stream, 99, CPU)
    if is_first:
        epoch, inside = divmod(start, feed.length * period)
        found = feed.batches(start, epoch)
        turns = [order(3, "fit/x", epoch, positions, 30).tolist()]
        wanted = oracles.cut(turns[0], size)[-(-inside // period) :]
    else:
        found = feed.batches(start, None)
        stream_by_hand = oracles.HandStream(
            lambda turn: order(3, "fit/x", turn, positions, 30).tolist(), size, period
        )
        supplied = [stream_by_hand.next()[1] for _ in range(-(-start // period) + 5)]
        wanted = supplied[-5:]
    for batch in wanted:
        given_ = next(found)
        assert given_.positions.tolist() == batch
        assert given_.inputs.flatten().tolist() == [float(p) for p in batch]


class Marked:
    """Replaces a record by its own uniform number."""

    draws = 1

    def __call__(self, inputs: Tensor, uniform: Tensor, /) -> Tensor:
        return uniform.clone()


def test_augmentation_is_the_records_own(new_task: NewTask) -> None:
    task = new_task(augment=Marked())
    numbers: dict[int, float] = {}
    few = torch.arange(0, 120, 7)
    for positions in (torch.arange(120), few):
        feed = Feed(task, 1, "fit/x", efface.Stream(positions, batch_size=13), 99, CPU)
        for batch, _ in zip(feed.batches(0, 4), range(feed.length), strict=False):
            for p, value in zip(
                batch.positions.tolist(), batch.inputs.flatten().tolist(), strict=True
            ):
                assert numbers.setdefault(p, value) == value
    assert len(set(numbers.values())) == 120


# --- tasks and splits -----------------------------------------------------------------------------


def test_ids_are_strings() -> None:
    given_ = ["a", 7, 7.0, 7.5, np.float64(8), np.int64(9)]
    assert as_strings(given_) == ["a", "7", "7", "7.5", "8", "9"]


def test_tasks_check_what_they_are_given(new_task: NewTask) -> None:
    with pytest.raises(TaskError, match="ids has 3 entries"):
        new_task(ids=["a", "b", "c"])
    with pytest.raises(TaskError, match="age has 1 entries"):
        new_task(columns={"age": [1]})
    with pytest.raises(TaskError, match="more than once"):
        new_task(ids=["a"] * 120)
    with pytest.raises(TaskError, match="did you mean 'name'"):
        new_task(ids="nam", columns={"name": list(range(120))})
    with pytest.raises(TaskError, match="more than once"):
        new_task(ids=[1, 1.0, *range(2, 120)])
    assert new_task(ids=None).ids_[:2] == ["0", "1"]
    assert new_task(ids="name", columns={"name": range(120)}).ids_[5] == "5"


def test_splits_by_loops(task: efface.Task) -> None:
    rows = list(zip(task.ids_, task.train[1].tolist(), task.columns["age"], strict=True))
    chosen = {
        "ids": efface.Split.by_ids(task, ["r007", "r003"]),
        "class": efface.Split.by_class(task, 2),
        "where": efface.Split.where(task, "age < 30 and target == 1 or id == 'r000'"),
        "subject": efface.Split.where(task, "subject in ('person-00', 'person-29')"),
    }
    wanted = {
        "ids": [3, 7],
        "class": [i for i, (_, y, _) in enumerate(rows) if y == 2],
        "where": [i for i, (_, y, age) in enumerate(rows) if (age < 30 and y == 1) or i == 0],
        "subject": [0, 1, 2, 3, 116, 117, 118, 119],
    }
    for name, split in chosen.items():
        assert split.forget.tolist() == wanted[name], name
        everyone = sorted(split.forget.tolist() + split.retain.tolist())
        assert everyone == list(range(120))
        assert split.sizes()["forget"] == len(wanted[name])


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_random_splits(task: efface.Task, fraction: float) -> None:
    split = efface.Split.random(task, fraction, seed=4)
    assert len(split.forget) == round(fraction * 120)
    assert torch.equal(efface.Split.random(task, fraction, seed=4).forget, split.forget)
    assert not torch.equal(efface.Split.random(task, fraction, seed=5).forget, split.forget)
    for wrong in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(SelectionError, match="fraction"):
            efface.Split.random(task, wrong)


def test_ids_that_are_unknown_or_doubled_are_refused(task: efface.Task) -> None:
    with pytest.raises(SelectionError, match=r"1 of 2 IDs.*'r999'"):
        efface.Split.by_ids(task, ["r001", "r999"])
    with pytest.raises(SelectionError, match=r"given twice.*'r001'"):
        efface.Split.by_ids(task, ["r001", "r001"])


def test_without_earlier_requests(task: efface.Task) -> None:
    split = efface.Split.by_class(task, 0)
    rest = split.without(torch.tensor([0, 1, 3]))
    assert 0 not in rest.forget
    assert 3 not in rest.forget
    assert 1 not in rest.retain
    assert len(rest.forget) + len(rest.retain) == 117
    assert rest.label == 0
    assert split.without(torch.tensor([], dtype=torch.long)) is split
    with pytest.raises(SelectionError, match="earlier request"):
        split.without(split.forget)
    with pytest.raises(SelectionError, match="left to retain"):
        split.without(split.retain)


class Texts:
    """Sentences of any length: no tensors before they are collated."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[dict[str, str], int]:
        words = ("good", "fine") if index % 2 else ("bad", "poor")
        return {"text": f"{words[index % 3 % 2]} thing {index}"}, index % 2


def letters(pairs: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A bag of letters per sentence."""
    rows = [[item["text"].count(c) for c in "abdfginor"] for item, _ in pairs]
    return torch.tensor(rows, dtype=torch.float32), torch.tensor([label for _, label in pairs])


def test_text_goes_through_the_owners_collate() -> None:
    settings = efface.Settings(epochs=3, batch_size=8)
    task = efface.Task(lambda: nn.Linear(9, 2), Texts(), Texts(), collate=letters, fit=settings)
    trained = efface.train(task)
    assert not task.records.in_memory
    split = efface.Split.by_class(task, 1)
    after = efface.forget(trained, split, "neggrad-plus")
    result = efface.audit(trained, after, split, [efface.retrain(task, split)])
    assert result["ua"]["n"] == 20
    backwards = [Texts()[i] for i in reversed(range(40))]
    other = efface.Task(lambda: nn.Linear(9, 2), backwards, Texts(), collate=letters)
    assert other.data_fingerprint != task.data_fingerprint


def test_half_precision_records_have_a_fingerprint() -> None:
    x = torch.randn(30, 4).bfloat16()
    y = torch.arange(30) % 2
    task = efface.Task(lambda: nn.Linear(4, 2), (x, y), (x, y))
    assert len(task.data_fingerprint) == 64


class Broken:
    """A set with one record that cannot be read."""

    targets = torch.arange(8) % 2

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise InputError("record 5 is no readable image; replace or leave it out.")
        return torch.ones(2), int(self.targets[index])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_a_record_is_said_in_one_sentence(workers: int) -> None:
    records = LoadedRecords(Broken(), workers)
    with pytest.raises(InputError) as caught:
        list(records.batches([torch.arange(8)], torch.device("cpu")))
    assert str(caught.value) == "record 5 is no readable image; replace or leave it out."
