"""Cohorts share batches, may be held back, and are replayed; micro-batches add up to a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import efface
from efface.data import Batch, Cohorts, Stream
from efface.errors import MethodError, NeedsError, SelectionError
from efface.feeds import Feed, portions, together
from efface.fitting import Fit
from efface.replay import replay
from efface.task import Settings
from efface.updates.cohorts import cohorts_of


def task_of(n: int = 60, epochs: int = 4, *, norm: bool = True, **fit: Any) -> efface.Task:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=draw)
    y = (x[:, 0] + 0.3 * x[:, 1] > 0).long()

    def network() -> nn.Module:
        middle = [nn.BatchNorm1d(12)] if norm else []
        return nn.Sequential(nn.Linear(6, 12), *middle, nn.ReLU(), nn.Linear(12, 2))

    settings = Settings(epochs=epochs, batch_size=8, lr=0.05, **fit)
    return efface.Task(network, (x, y), (x[:20], y[:20]), fit=settings)


def plans(task: efface.Task, stream: Stream, epochs: int) -> list[list[Tensor]]:
    feed = Feed(task, 0, "train/retain", stream, task.fit.batch_size, torch.device("cpu"))
    return [feed.plan(turn) for turn in range(epochs)]


# -- the plan ---------------------------------------------------------------------------------


@given(
    n=st.integers(2, 60),
    size=st.integers(1, 17),
    cohorts=st.integers(0, 4),
    seed=st.integers(0, 5),
)
def test_batches_hold_everybody_once_and_cohorts_share(
    n: int, size: int, cohorts: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(-1, cohorts, n)) if cohorts else torch.full((n,), -1)
    queue = torch.from_numpy(rng.permutation(n))
    batches = together(queue, labels, size, torch.Generator().manual_seed(seed))
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert all(len(b) > 0 for b in batches)
    assert size == 1 or n == 1 or all(len(b) > 1 for b in batches)  # batch norm needs two
    if (labels < 0).sum() < size * cohorts:  # too few others to fill up with
        return
    assert all(len(b) <= size + 1 for b in batches)  # a last one may have taken a single one
    for c in range(cohorts):
        members = set((labels == c).nonzero().flatten().tolist())
        touched = sum(bool(members & set(b.tolist())) for b in batches)
        assert touched == -(-len(members) // size)
    for batch in batches:  # records of two cohorts never meet
        assert len({int(c) for c in labels[batch] if c >= 0}) <= 1


def test_the_others_keep_the_order_of_the_epoch() -> None:
    queue = torch.tensor([5, 2, 0, 4, 1, 3])
    labels = torch.tensor([-1, 0, -1, -1, -1, 0])
    batches = together(queue, labels, 3, torch.Generator().manual_seed(1))
    assert sorted(b.tolist() for b in batches) == [[0, 4, 3], [5, 1, 2]]


def test_held_back_until_their_epoch() -> None:
    task = task_of()
    cohorts = cohorts_of(task, [1, 2, 3, 40], last=1)
    everyone = torch.arange(60)
    made = plans(task, Stream(everyone, cohorts=cohorts), 4)
    for epoch, batches in enumerate(made):
        there = set(torch.cat(batches).tolist())
        assert there == set(range(60)) - (set() if epoch == 3 else {1, 2, 3, 40})
    assert len({len(batches) for batches in made}) == 1


def test_leaving_a_cohort_out_moves_nobody() -> None:
    task = task_of()
    cohorts = cohorts_of(task, {7: "a", 9: "a", 11: "b", 12: "b"})
    everyone = torch.arange(60)
    left = everyone[~torch.isin(everyone, torch.tensor([7, 9]))]
    whole = plans(task, Stream(everyone, cohorts=cohorts), 3)
    holes = plans(task, Stream(left, within=everyone, cohorts=cohorts), 3)
    for before, after in zip(whole, holes, strict=True):
        assert [[p for p in b.tolist() if p not in (7, 9)] for b in before] == [
            b.tolist() for b in after
        ]


def test_a_cohort_touches_few_steps() -> None:
    task = task_of(60)
    members = list(range(0, 48, 6))  # 8 records, one batch
    whole = plans(task, Stream(torch.arange(60), cohorts=cohorts_of(task, members)), 4)
    assert [sum(bool(set(b.tolist()) & set(members)) for b in batches) for batches in whole] == [
        1
    ] * 4
    loose = plans(task, Stream(torch.arange(60)), 4)
    assert all(sum(bool(set(b.tolist()) & set(members)) for b in batches) > 2 for batches in loose)


@pytest.mark.parametrize(
    ("members", "last", "error", "words"),
    [
        ([3, 999], None, SelectionError, "999"),
        (range(60), None, SelectionError, "60 of 60"),
        ([3], 0, MethodError, "1 to 4"),
        ([3], 5, MethodError, "not 5"),
        ([], None, SelectionError, "0 of 60"),
        ("p017", None, SelectionError, "a list of IDs"),
        ({3: None}, None, SelectionError, "not None"),
    ],
)
def test_wrong_cohorts(members: Any, last: int | None, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        cohorts_of(task_of(), members, last)


# -- trained and replayed ---------------------------------------------------------------------


def test_training_with_cohorts_is_kept_in_the_lineage_without_ids() -> None:
    task = task_of()
    model = efface.train(task, cohorts=[4, 5, 6], cohort_epochs=2)
    assert model.lineage[0].detail["cohorts"] == {"records": 3, "cohorts": 1, "since": 2}
    assert model.digest != efface.train(task).digest
    assert model.digest == efface.train(task, cohorts=[4, 5, 6], cohort_epochs=2).digest


def test_replay_of_everything_is_the_training_and_needs_the_cohorts() -> None:
    task = task_of()
    members = [4, 5, 6]
    model = efface.train(task, cohorts=members, cohort_epochs=2)
    everyone, fit = torch.arange(60), Fit(task, 9)
    again = replay(model, everyone, everyone, fit, 4, cohorts=cohorts_of(task, members, 2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            again.state_dict().values(), model.network.state_dict().values(), strict=True
        )
    )
    with pytest.raises(NeedsError, match="cohorts"):
        replay(model, everyone, everyone, fit, 4)


def test_the_checkpoint_difference_asks_the_log_for_the_cohorts(tmp_path: Path) -> None:
    task = task_of()
    recorder = efface.updates.Recorder(tmp_path / "log")
    model = efface.train(task, rewind=2, recorder=recorder, cohorts=[4, 5, 6])
    split = efface.Split.by_ids(task, [4, 5])
    after = efface.forget(model, split, "checkpoint-difference")
    left = torch.tensor([i for i in range(60) if i not in (4, 5)])
    made = cohorts_of(task, [4, 5, 6])
    again = replay(model, left, torch.arange(60), Fit(task), 2, matched=True, cohorts=made)
    assert after.rewind is not None
    assert all(torch.equal(after.rewind[n], t) for n, t in again.state_dict().items())
    model.log = None
    with pytest.raises(NeedsError, match="--log"):
        efface.forget(model, split, "checkpoint-difference")


# -- micro-batches ----------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(2, 40), min_size=1, max_size=3), most=st.integers(0, 12))
def test_portions_cut_without_loss(sizes: list[int], most: int) -> None:
    batches = {
        str(i): Batch(
            {"a": torch.arange(n * 2.0).view(n, 2)}, torch.arange(n), torch.arange(n), 0.5
        )
        for i, n in enumerate(sizes)
    }
    parts = portions(batches, most)
    assert sum(share for _, share in parts) == pytest.approx(1)
    for name, batch in batches.items():
        rows = [part[name] for part, _ in parts]
        assert torch.equal(torch.cat([r.inputs["a"] for r in rows]), batch.inputs["a"])
        assert torch.equal(torch.cat([r.positions for r in rows]), batch.positions)
        assert {r.weight for r in rows} == {0.5}
        assert min(len(r.positions) for r in rows) >= 2
    if len(sizes) == 1 and most >= 2:
        assert max(len(p["0"].positions) for p, _ in parts) <= most + 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_steps_equal_whole_ones_without_batch_norm(optimizer: Any) -> None:
    whole = task_of(norm=False, optimizer=optimizer)
    cut = replace(whole, fit=replace(whole.fit, micro_batch=3))
    a, b = efface.train(whole), efface.train(cut)
    assert a.digest != b.digest  # sums in another order
    for x, y in zip(a.network.parameters(), b.network.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert a.lineage[0].detail["images"] == b.lineage[0].detail["images"]
    assert "micro_batch" not in whole.fit.to_dict()
    assert cut.fit.to_dict()["micro_batch"] == 3


def test_a_stream_of_cohorts_without_any_is_the_plain_one_shuffled() -> None:
    task = task_of()
    none = Cohorts(torch.full((60,), -1))
    made = plans(task, Stream(torch.arange(60), cohorts=none), 1)[0]
    plain = plans(task, Stream(torch.arange(60)), 1)[0]
    assert sorted(b.tolist() for b in made) == sorted(b.tolist() for b in plain)
