"""The recorder beside the loop: what it stores is what the steps did, whatever happens."""

from __future__ import annotations

import itertools
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import efface
from efface.data import Stream
from efface.errors import LogError, MethodError, NeedsError, SelectionError, WriteError
from efface.feeds import Feed
from efface.fitting import Fit
from efface.journal import Journal
from efface.mask import Mask
from efface.steps import make_optimizer
from efface.task import Settings
from efface.trained import TrainedModel
from efface.updates import Recorder, UpdateLog
from efface.updates.codec import decode
from efface.updates.layout import Layout
from efface.updates.recorder import in_bytes
from efface.updates.shares import step_of

N = 48


def task_of(*, norm: bool = True, epochs: int = 3, wide: int = 40, **fit: Any) -> efface.Task:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(N, 30, generator=draw)
    y = (x[:, 0] + 0.3 * x[:, 1] > 0).long()

    def network() -> nn.Module:
        middle: list[nn.Module] = [nn.BatchNorm1d(wide)] if norm else []
        return nn.Sequential(nn.Linear(30, wide), *middle, nn.ReLU(), nn.Linear(wide, 2))

    settings = Settings(**({"epochs": epochs, "batch_size": 8, "lr": 0.05} | fit))
    return efface.Task(network, (x, y), (x[:20], y[:20]), fit=settings)


def deltas(log: UpdateLog, layout: Layout) -> dict[int, np.ndarray[Any, Any]]:
    """Step → the stored change, laid flat."""
    steps = np.arange(int(log.info()["steps"]))
    found = {}
    for step, _, payload in log.frames(steps):
        update = decode(payload)
        flat = np.zeros(layout.total, dtype=np.float32)
        flat[update.indices] = update.values
        flat[layout.size :] = update.dense
        found[step] = flat
    return found


def flat_of(layout: Layout, state: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    flat = np.zeros(layout.total, dtype=np.float32)
    for name, view in layout.parts(flat).items():
        view[...] = state[name].numpy()
    return flat


def watched(
    task: efface.Task, folder: Path, *, sparsity: float = 0.0, **options: Any
) -> tuple[dict[int, np.ndarray[Any, Any]], list[dict[str, Tensor]], Layout]:
    """Stored changes by step, and the weights after every step, the initial ones first."""
    fit = Fit(task, 5, path="train")
    model = TrainedModel(task, fit.fresh())
    if sparsity:
        keep = torch.rand(model.network[0].weight.shape, generator=fit.generator("m")) > sparsity  # type: ignore[index,union-attr]
        model.set_mask(Mask({"0.weight": keep}))
    layout = Layout.of(model.network)
    seen = [{n: t.clone() for n, t in model.network.state_dict().items()}]

    def look(label: str, step: int, steps: int) -> None:
        seen.append({n: t.clone() for n, t in model.network.state_dict().items()})

    fit = replace(fit, subject=model, progress=look)
    recording = Recorder(folder, **options).begin(fit, model.network)
    fit = replace(fit, recorder=recording)
    stream = {"retain": Stream(torch.arange(N))}
    fit(model.network, fit.descend, stream, task.fit)
    recording.finish(model.digest)
    return deltas(UpdateLog.open(folder), layout), seen, layout


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "fit",
    [
        {"momentum": 0.0, "schedule": "constant"},
        {"momentum": 0.9, "schedule": "cosine", "warmup": 0.2},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adamw", "lr": 0.01, "micro_batch": 3},
    ],
)
def test_all_kept_is_the_very_difference_of_every_step(
    tmp_path: Path, fit: dict[str, Any], norm: bool
) -> None:
    stored, seen, layout = watched(
        task_of(norm=norm, **fit), tmp_path / "log", keep=1.0, values="fp32"
    )
    assert sorted(stored) == list(range(18))
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        there = flat_of(layout, after) - flat_of(layout, before)
        assert np.array_equal(stored[step], there)


@pytest.mark.parametrize("keep", [0.3, 0.05])
def test_the_largest_of_each_layer_are_kept_and_small_tensors_whole(
    tmp_path: Path, keep: float
) -> None:
    stored, seen, layout = watched(task_of(), tmp_path / "log", keep=keep, values="fp32")
    for step, flat in stored.items():
        there = flat_of(layout, seen[step + 1]) - flat_of(layout, seen[step])
        parts, whole = layout.parts(flat), layout.parts(there)
        for name in parts:
            if name != "0.weight":  # 1,200 entries; every other tensor has less than 1,024
                assert np.array_equal(parts[name], whole[name])
        k = round(keep * 1200)
        least = np.sort(np.abs(whole["0.weight"]).ravel())[-k]
        kept = np.abs(whole["0.weight"]) >= least
        assert np.array_equal(parts["0.weight"], np.where(kept, whole["0.weight"], 0))


def test_a_mask_is_not_in_the_way(tmp_path: Path) -> None:
    stored, seen, layout = watched(
        task_of(), tmp_path / "log", sparsity=0.7, keep=0.1, values="fp32"
    )
    alive = int((seen[-1]["0.weight"] != 0).sum())
    for step, flat in stored.items():
        moved = layout.parts(flat)["0.weight"] != 0
        assert not (moved & (seen[-1]["0.weight"] == 0).numpy()).any()
        assert moved.sum() == round(0.1 * alive), step


def test_mixed_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efface.placement._bf16_is_fast", lambda device: True)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 1, 6, 6, generator=draw), torch.arange(N) % 2

    def network() -> nn.Module:
        body = [nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(512, 2))

    settings = Settings(epochs=1, batch_size=8, lr=0.05)
    task = efface.Task(network, (x, y), (x, y), fit=settings)
    stored, seen, layout = watched(task, tmp_path / "log", keep=1.0, values="fp32")
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        assert np.array_equal(stored[step], flat_of(layout, after) - flat_of(layout, before))


def test_recording_changes_nothing(tmp_path: Path) -> None:
    task = task_of()
    plain = efface.train(task, seed=4)
    for attribution in ("batch", "record"):
        recorder = Recorder(
            tmp_path / attribution,
            attribution=attribution,  # type: ignore[arg-type]
            sensitive=[3, 4] if attribution == "record" else None,
        )
        model = efface.train(task, seed=4, recorder=recorder)
        assert model.digest == plain.digest
        assert model.log == tmp_path / attribution
        assert model.lineage[0].detail["log"]["steps"] == 18


def test_the_index_knows_whose_steps_they_are(tmp_path: Path) -> None:
    task = task_of()
    efface.train(task, seed=4, recorder=Recorder(tmp_path / "log"))
    feed = Feed(task, 4, "train/retain", Stream(torch.arange(N)), 8, torch.device("cpu"))
    steps = [batch.tolist() for epoch in range(3) for batch in feed.plan(epoch)]
    log = UpdateLog.open(tmp_path / "log")
    for record in (0, 7, 33):
        assert log.steps_of([record]).tolist() == [s for s, b in enumerate(steps) if record in b]
    both = [s for s, b in enumerate(steps) if {1, 2} & set(b)]
    assert log.steps_of([1, 2]).tolist() == both


def test_only_sensitive_steps_are_stored(tmp_path: Path) -> None:
    efface.train(task_of(), seed=4, recorder=Recorder(tmp_path / "all"))
    efface.train(task_of(), seed=4, recorder=Recorder(tmp_path / "some", sensitive=[5]))
    everything, some = UpdateLog.open(tmp_path / "all"), UpdateLog.open(tmp_path / "some")
    mine = everything.steps_of([5])
    assert some.steps_of([5]).tolist() == mine.tolist()
    whole = {s: p for s, _, p in everything.frames(mine)}
    assert {s: p for s, _, p in some.frames(mine)} == whole
    assert some.seen([4, 5, 6]).tolist() == [False, True, False]
    assert everything.seen([6, 5]).tolist() == [True, True]
    assert some.info()["bytes"] < everything.info()["bytes"] / 3


# -- shares of single records -----------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_shares_add_up_to_the_step_for_plain_sgd(tmp_path: Path, norm: bool) -> None:
    task = task_of(norm=norm, momentum=0.0, weight_decay=0.0, epochs=1)
    stored, seen, layout = watched(
        task,
        tmp_path / "log",
        keep=1.0,
        values="fp32",
        attribution="record",
        sensitive=list(range(N)),
    )
    del stored
    total: dict[int, np.ndarray[Any, Any]] = {}
    records: dict[int, int] = {}
    for step, record, payload in UpdateLog.open(tmp_path / "log").frames(np.arange(6)):
        update = decode(payload)
        flat = total.setdefault(step, np.zeros(layout.total, dtype=np.float64))
        flat[update.indices] += update.values
        flat[layout.size :] += update.dense
        assert record is not None
        records[record] = step
    assert sorted(records) == list(range(N))
    params = {n for n, _ in layout.sparse + layout.dense}
    for step, flat in total.items():
        there = flat_of(layout, seen[step + 1]) - flat_of(layout, seen[step])
        for name, view in layout.parts(flat).items():
            if name in params:
                np.testing.assert_allclose(view, layout.parts(there)[name], atol=2e-6)


@pytest.mark.parametrize(
    "fit",
    [
        {"momentum": 0.0},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    ],
)
def test_step_of_is_what_the_optimizer_does(fit: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(5, 3, generator=draw, dtype=torch.float64))
    optimizer = make_optimizer({"w": param}, Settings(**fit))
    for _ in range(4):
        param.grad = torch.randn(5, 3, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            told = step_of(optimizer, param, param.grad)
        before = param.detach().clone()
        optimizer.step()
        torch.testing.assert_close(told, param.detach() - before, rtol=1e-9, atol=1e-12)


def test_step_of_another_optimizer_is_refused() -> None:
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(NeedsError, match="Adagrad"):
        step_of(torch.optim.Adagrad([param]), param, torch.ones(2))


# -- cut short --------------------------------------------------------------------------------


class CutError(Exception):
    pass


def cut_at(step: int) -> Any:
    def progress(label: str, done: int, steps: int) -> None:
        if done == step:
            raise CutError

    return progress


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_training_cut_short_goes_on_without_gap_or_double(tmp_path: Path, seconds: float) -> None:
    task = task_of()
    whole = efface.train(task, seed=4, recorder=Recorder(tmp_path / "whole"))
    first = {s: p for s, _, p in UpdateLog.open(tmp_path / "whole").frames(np.arange(18))}
    recorder = Recorder(tmp_path / "log")
    for step in (1, 5, 6, 13, 18):
        journal = Journal(tmp_path / "journal", {"a": 1}, seconds)
        with pytest.raises(CutError):
            efface.train(task, seed=4, recorder=recorder, journal=journal, progress=cut_at(step))
        UpdateLog.open(tmp_path / "log").close()
    journal = Journal(tmp_path / "journal", {"a": 1}, seconds)
    model = efface.train(task, seed=4, recorder=recorder, journal=journal)
    assert model.digest == whole.digest
    log = UpdateLog.open(tmp_path / "log")
    assert {s: p for s, _, p in log.frames(np.arange(18))} == first
    assert log.info()["steps"] == 18
    assert log.steps_of([7]).tolist() == UpdateLog.open(tmp_path / "whole").steps_of([7]).tolist()


def test_a_log_older_than_the_state_is_noticed(tmp_path: Path) -> None:
    task, recorder = task_of(), Recorder(tmp_path / "log")
    for step in (6, 12):
        journal = Journal(tmp_path / "journal", {"a": 1}, 0.0)
        with pytest.raises(CutError):
            efface.train(task, recorder=recorder, journal=journal, progress=cut_at(step))
        if step == 6:
            shutil.copytree(tmp_path / "log", tmp_path / "older")
    shutil.rmtree(tmp_path / "log")
    shutil.copytree(tmp_path / "older", tmp_path / "log")
    journal = Journal(tmp_path / "journal", {"a": 1}, 0.0)
    with pytest.raises(LogError, match="the log is older"):
        efface.train(task, recorder=recorder, journal=journal)


def test_another_training_and_a_finished_one_are_refused(tmp_path: Path) -> None:
    task = task_of()
    efface.train(task, seed=4, recorder=Recorder(tmp_path / "log"))
    with pytest.raises(LogError, match=r"finished.*--force"):
        efface.train(task, seed=4, recorder=Recorder(tmp_path / "log"))
    with pytest.raises(LogError, match=r"another.*--force"):
        efface.train(task, seed=5, recorder=Recorder(tmp_path / "log"))
    efface.train(task, seed=5, recorder=Recorder(tmp_path / "log", force=True))
    assert UpdateLog.open(tmp_path / "log").manifest["seed"] == 5


def broken(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UpdateLog, "append", broken)
    with pytest.raises(WriteError, match=r"recording failed at step 0.*No space"):
        efface.train(task_of(), recorder=Recorder(tmp_path / "log"))


def test_or_the_training_goes_on_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = UpdateLog.append, []

    def third(self: UpdateLog, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            broken()
        right(self, *args, **kwargs)

    monkeypatch.setattr(UpdateLog, "append", third)
    with pytest.warns(UserWarning, match="recording ended at step"):
        model = efface.train(task_of(), recorder=Recorder(tmp_path / "log", on_failure="go-on"))
    assert model.digest == efface.train(task_of()).digest
    assert "No space" in model.lineage[0].detail["log"]["failed"]
    info = UpdateLog.open(tmp_path / "log").info()
    assert not info["finished"]
    assert info["failed_at"] is not None


# -- options ----------------------------------------------------------------------------------


def test_a_budget_lowers_the_keep_fraction_and_says_so(tmp_path: Path) -> None:
    task = task_of(wide=400, epochs=6)
    efface.train(task, recorder=Recorder(tmp_path / "free", keep=0.5, values="fp32"))
    free = UpdateLog.open(tmp_path / "free").info()["bytes"]
    journal = Journal(tmp_path / "journal", {"a": 1}, 0.0)  # commits at every step
    budget = int(free * 0.6)
    with pytest.warns(UserWarning, match="outgrow its budget"):
        efface.train(
            task,
            journal=journal,
            recorder=Recorder(tmp_path / "log", keep=0.5, values="fp32", budget=budget),
        )
    info = UpdateLog.open(tmp_path / "log").info()
    assert info["bytes"] <= budget
    assert [e for e in info["events"] if e["kind"] == "keep"]


def test_below_the_least_keep_fraction_the_oldest_epochs_go(tmp_path: Path) -> None:
    task = task_of(wide=400, epochs=20)
    journal = Journal(tmp_path / "journal", {"a": 1}, 0.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = efface.train(
            task, journal=journal, recorder=Recorder(tmp_path / "log", budget=160_000)
        )
    assert [w for w in said if "epochs 0 to" in str(w.message)]
    log = UpdateLog.open(tmp_path / "log")
    assert log.info()["bytes"] <= 160_000
    thinned = [e for e in log.info()["events"] if e["kind"] == "thinned"]
    assert thinned[0]["first"] == 0
    states = log.states(np.arange(120))
    assert states[0] == "thinned"
    assert states[-1] == "live"
    assert model.lineage[0].detail["log"]["steps"] == 120


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.0}, "keep must be in"),
        ({"keep": 1.5}, "keep must be in"),
        ({"keep": float("nan")}, "keep must be in"),
        ({"values": "fp8"}, "values must be one of"),
        ({"budget": "much"}, "budget must be a size"),
        ({"budget": "-3GB"}, "budget must be a size"),
        ({"retention": 0}, "retention"),
        ({"attribution": "record"}, "needs sensitive"),
        ({"checkpoints": -1}, "checkpoints"),
        ({"checkpoints": 0.5}, "checkpoints"),
        ({"keep": "x"}, "keep must be in"),
        ({"retention": "x"}, "retention"),
        ({"sensitive": []}, "sensitive must be a list"),
        ({"sensitive": "p017"}, "sensitive must be a list"),
        ({"budget": "9" * 400}, "budget must be a size"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        Recorder(tmp_path, **options)


def test_unknown_sensitive_records(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="'999'"):
        efface.train(task_of(), recorder=Recorder(tmp_path / "log", sensitive=[1, 999]))


def test_a_routine_of_ones_own_cannot_be_recorded(tmp_path: Path) -> None:
    task = replace(task_of(), train_fn=lambda network, data, seed: None)
    with pytest.raises(NeedsError, match="train_fn"):
        efface.train(task, recorder=Recorder(tmp_path / "log"))


def test_sizes() -> None:
    assert in_bytes("1.5 KiB") == 1536
    assert in_bytes(None) is None


def test_states_are_kept_where_cohorts_begin(tmp_path: Path) -> None:
    task = task_of(epochs=4)
    recorder = Recorder(tmp_path / "log", checkpoints=2)
    efface.train(task, recorder=recorder, cohorts=[1, 2], cohort_epochs=1)
    there = sorted(p.stem for p in (tmp_path / "log" / "checkpoints").glob("epoch-*"))
    assert there == ["epoch-0002", "epoch-0003"]
    log = UpdateLog.open(tmp_path / "log")
    journal = Journal(tmp_path / "log" / "checkpoints", {"log": log.id})
    state = journal.read("epoch-0003")
    assert state is not None
    assert state.values["step"] == 18
