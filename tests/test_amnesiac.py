"""Amnesiac unlearning, its controls and exact replay, against slow twins and hand-made runs."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import efface
from efface.data import Stream
from efface.errors import LogError, MethodError, MismatchError, NeedsError
from efface.fitting import Fit
from efface.keys import load_key, tags
from efface.replay import replay
from efface.sparsify import OneShot
from efface.task import Settings, Split
from efface.trained import weights_digest
from efface.unlearn import (
    Amnesiac,
    AmnesiacControl,
    Chain,
    FineTune,
    FromDense,
    LayerwisePartial,
    Masked,
    Replay,
)
from efface.unlearn.amnesiac import outlook
from efface.unlearn.base import forced
from efface.unlearn.ledger import removed_steps, seal, unseal
from efface.unlearn.subtraction import admission
from efface.updates.codec import decode
from efface.updates.layout import Layout
from efface.updates.log import UpdateLog
from efface.updates.recorder import Recorder

CLASSES = 3


def bn_net() -> nn.Module:
    """Two layers that are stored sparsely, batch norm between, and a small dense one."""
    return nn.Sequential(
        nn.Linear(6, 200),
        nn.BatchNorm1d(200),
        nn.ReLU(),
        nn.Linear(200, 12),
        nn.ReLU(),
        nn.Linear(12, CLASSES),
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A recorded training."""

    model: efface.TrainedModel
    log: Path

    @property
    def task(self) -> efface.Task:
        return self.model.task

    def split(self, *positions: int) -> Split:
        return Split.by_ids(self.task, [self.task.ids_[i] for i in positions])

    def forget(self, method: Any, *positions: int, **options: Any) -> efface.TrainedModel:
        options = {"log": self.log, "seed": 3} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return efface.forget(self.model, self.split(*positions), method, **options)

    def steps(self, *positions: int) -> list[int]:
        with UpdateLog.open(self.log) as log:
            return [int(t) for t in log.steps_of(self.numbers(log, *positions))]

    def numbers(self, log: UpdateLog, *positions: int) -> np.ndarray:
        return log.numbers(tags([self.task.ids_[i] for i in positions], load_key()))


Record = Callable[..., Run]


@pytest.fixture(scope="session")
def record(
    new_task: Callable[..., efface.Task], tmp_path_factory: pytest.TempPathFactory
) -> Record:
    """Trains and records: options of the recorder, of the training, and of the task."""

    def make(
        training: dict[str, Any] | None = None, task: efface.Task | None = None, **options: Any
    ) -> Run:
        task = task or new_task(
            network=bn_net, fit=Settings(epochs=6, batch_size=8, lr=0.05, weight_decay=1e-3)
        )
        folder = tmp_path_factory.mktemp("run") / "log"
        options = {"keep": 1.0, "values": "fp32"} | options
        recorder = Recorder(folder, **options)
        return Run(efface.train(task, seed=0, recorder=recorder, **training or {}), folder)

    return make


@pytest.fixture(scope="session")
def run(record: Record) -> Run:
    """120 records, 15 batches of 8, 6 epochs: 90 steps, everything logged."""
    return record(checkpoints=1)


@pytest.fixture(scope="session")
def cohort(record: Record) -> Run:
    """Five records that share one batch, in the last two of six epochs."""
    return record({"cohorts": [f"r{i:03d}" for i in (3, 9, 27, 60, 99)], "cohort_epochs": 2})


COHORT = (3, 9, 27, 60, 99)


# -- slow twins -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Watcher:
    """Notes θ before and after every step, and who was in the batch."""

    seen: list[tuple[list[int], dict[str, Tensor], dict[str, Tensor]]]

    def resume(self, network: nn.Module, step: int, steps: int, recorded: Any) -> None:
        self.network = network

    def epoch(self, epoch: int, state: Any) -> None: ...

    def before(self, batches: Any, step: int, optimizer: Any) -> None:
        self.batch = batches["retain"].positions.tolist()
        self.old = copy_of(self.network)

    def after(self, epoch: int, step: int, optimizer: Any) -> None:
        self.seen.append((self.batch, self.old, copy_of(self.network)))

    def commit(self) -> None: ...


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in network.named_parameters()}


def watched(run: Run) -> Watcher:
    """The same training once more, watched step by step."""
    watcher = Watcher([])
    fit = dataclasses.replace(Fit(run.task, seed=0, path="train"), recorder=watcher)
    network = fit.fresh()
    fit(network, fit.descend, {"retain": Stream(torch.arange(len(run.task.records)))}, run.task.fit)
    assert weights_digest(network.state_dict()) == run.model.digest
    return watcher


def top(change: Tensor, keep: float) -> Tensor:
    """The largest entries of a change, counted one by one."""
    flat = change.reshape(-1)
    k = max(1, round(keep * len(flat)))
    order = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))[:k]
    kept = torch.zeros_like(flat)
    for i in order:
        kept[i] = flat[i]
    return kept.reshape(change.shape)


def taken_back(
    run: Run, watcher: Watcher, gone: set[int], *, gamma: float = 1.0, keep: float = 1.0
) -> dict[str, Tensor]:
    """θ − γ Σ Δ_t by the definition, in float64."""
    result = copy_of(run.model.network)
    for members, old, new in watcher.seen:
        if not gone & set(members):
            continue
        for name, value in result.items():
            change = new[name] - old[name]
            small = change.ndim < 2 or change.numel() < 1024
            value -= gamma * (change if small else top(change, keep))
    return result


def assert_close(network: nn.Module, wanted: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    for name, value in copy_of(network).items():
        assert torch.allclose(value, wanted[name], atol=tolerance, rtol=0), name


# -- subtraction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "keep"), [(1.0, None), (0.5, None), (1.0, 0.1), (2.0, 0.03)])
def test_amnesiac_is_its_definition(run: Run, gamma: float, keep: float | None) -> None:
    method = Amnesiac(gamma=gamma, keep=keep, bn="keep", force=True)
    after = run.forget(method, 7, 40)
    wanted = taken_back(run, watched(run), {7, 40}, gamma=gamma, keep=keep or 1.0)
    assert_close(after.network, wanted)
    moved = [n for n, p in copy_of(run.model.network).items() if not torch.equal(p, wanted[n])]
    assert len(moved) == len(wanted)
    before = dict(run.model.network.named_buffers())
    assert all(torch.equal(b, before[n]) for n, b in after.network.named_buffers())


def test_statistics_can_be_taken_back_or_anew(run: Run) -> None:
    kept = run.forget(Amnesiac(bn="keep", force=True), 7)
    back = run.forget(Amnesiac(bn="subtract", force=True), 7)
    anew = run.forget(Amnesiac(force=True), 7)
    with UpdateLog.open(run.log) as log:
        layout = Layout.from_json(log.manifest["layout"])
        changes = [decode(payload) for _, _, payload in log.frames(log.steps_of([7]))]
    total = sum(layout.parts(full(c, layout))["1.running_mean"].astype(float) for c in changes)
    mean = [m.network[1].running_mean for m in (kept, back, anew)]
    assert torch.equal(mean[0], run.model.network[1].running_mean)
    assert np.allclose((mean[0] - mean[1]).numpy(), total, atol=1e-5)
    assert (back.network[1].running_var >= 0).all()
    retained = torch.tensor([i for i in range(120) if i != 7])
    hidden = anew.network[0](run.task.train[0][retained])
    assert torch.allclose(mean[2], hidden.mean(0), atol=0.1)
    assert not torch.equal(mean[0], mean[2])
    assert anew.lineage[-1].detail["images"]["statistics"] == 119
    assert_close(anew.network, copy_of(kept.network), 0)


def full(update: Any, layout: Layout) -> np.ndarray:
    flat = np.zeros(layout.total, np.float32)
    flat[update.indices] = update.values
    flat[update.size :] = update.dense
    return flat


def test_repair_is_a_fine_tune_on_the_rest(run: Run) -> None:
    after = run.forget(Amnesiac(repair=2, force=True), 7)
    (fit,) = after.lineage[-1].detail["fits"]
    assert (fit["label"], fit["epochs"]) == ("finetune", 2)
    assert after.lineage[-1].detail["images"]["retain"] == 2 * 119


def test_deterministic_and_the_input_stays(run: Run) -> None:
    before = run.model.digest
    for method in (Amnesiac(force=True), AmnesiacControl("unaffected", force=True)):
        digests = {run.forget(method, 7, 8).digest for _ in range(2)}
        assert len(digests) == 1
        assert before not in digests
    assert run.model.digest == before


def test_the_shares_of_records_alone(record: Record) -> None:
    ids = ["r007", "r040", "r041"]
    run = record(attribution="record", sensitive=ids)
    after = run.forget(Amnesiac(bn="keep", force=True), 7, 40)
    wanted = copy_of(run.model.network)
    with UpdateLog.open(run.log) as log:
        layout = Layout.from_json(log.manifest["layout"])
        frames = list(log.frames(log.steps_of([7, 40])))
    assert {record for _, record, _ in frames} >= {7, 40}
    for _, number, payload in frames:
        for name, part in layout.parts(full(decode(payload), layout)).items():
            if number in (7, 40) and name in wanted:
                wanted[name] -= torch.from_numpy(part)
    assert_close(after.network, wanted)
    # a neighbour's share of the same steps is still there to be taken
    again = dataclasses.replace(run, model=after).forget(Amnesiac(bn="keep", force=True), 41)
    both = run.forget(Amnesiac(bn="keep", force=True), 7, 40, 41)
    assert_close(again.network, copy_of(both.network), 1e-6)
    with pytest.raises(MethodError, match="needs whole steps"):
        run.forget(AmnesiacControl("unaffected", force=True), 7)


# -- the ledger -----------------------------------------------------------------------------------


def test_no_step_is_taken_back_twice(run: Run) -> None:
    others = neighbours(run, 7)[:3]
    shared = set(run.steps(7)) & set(run.steps(*others))
    assert shared  # or the test says nothing
    first = run.forget(Amnesiac(bn="keep", force=True), 7)
    run_2 = dataclasses.replace(run, model=first)
    second = run_2.forget(Amnesiac(bn="keep", force=True), *others)
    assert_close(second.network, taken_back(run, watched(run), {7, *others}))
    with UpdateLog.open(run.log) as log:
        removed = [removed_steps(m, None, log.id).tolist() for m in (run.model, first, second)]
    assert removed == [[], run.steps(7), run.steps(7, *others)]
    notes = [step.detail["removed"][0]["n"] for step in second.lineage[1:]]
    assert notes == [6, len(set(run.steps(*others)) - shared)]


def neighbours(run: Run, position: int) -> list[int]:
    """Records that share a step with one."""
    own = set(run.steps(position))
    return [i for i in range(120) if i != position and own & set(run.steps(i))]


def test_nor_within_one_request(run: Run) -> None:
    method = Amnesiac(bn="keep", force=True)
    once, twice = run.forget(method, 7), run.forget(Chain(method, method), 7)
    assert once.digest == twice.digest
    assert [made["n"] for made in twice.lineage[-1].detail["removed"]] == [6, 0]


def test_a_member_of_a_cohort_that_is_gone_already(cohort: Run) -> None:
    after = cohort.forget(Amnesiac(bn="keep"), 3)
    again = dataclasses.replace(cohort, model=after).forget(Amnesiac(bn="keep"), 9)
    assert again.digest == after.digest
    assert again.lineage[-1].detail["removed"][0]["n"] == 0
    assert len(again.forgotten.tags) == 2


def said_by(run: Run, model: efface.TrainedModel, method: Any, *positions: int) -> list[str]:
    """Warnings of a request about earlier ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        efface.forget(model, run.split(*positions), method, log=run.log)
    return [str(one.message) for one in caught if "taken back by" in str(one.message)]


def test_says_that_nothing_is_left_to_subtract(cohort: Run) -> None:
    after = cohort.forget(Amnesiac(), 3)
    sentence = (
        "all 2 steps with D_f were taken back by an earlier request (gamma 1, keep 1): nothing is "
        "subtracted again."
    )
    assert said_by(cohort, after, Amnesiac(), 9) == [sentence]
    assert said_by(cohort, after, AmnesiacControl(), 9) == [sentence]
    assert said_by(cohort, after, AmnesiacControl("bn-only"), 9) == []
    assert said_by(cohort, cohort.model, Amnesiac(), 9) == []
    assert said_by(cohort, cohort.model, Chain(Amnesiac(), Amnesiac()), 9) == [sentence]


@pytest.mark.parametrize(
    ("weak", "named"),
    [
        (Amnesiac(gamma=0.01), "gamma 0.01, keep 1"),
        (Amnesiac(keep=0.01), "gamma 1, keep 0.01"),
        (AmnesiacControl("random", keep=0.1), "gamma 1, keep 0.1"),
    ],
    ids=["gamma", "keep", "control"],
)
def test_says_that_an_earlier_request_was_weaker(
    cohort: Run, run: Run, weak: Any, named: str
) -> None:
    (said,) = said_by(cohort, cohort.forget(weak, 3), Amnesiac(), 9)
    assert f"({named}), weaker than this one (gamma 1, keep 1): nothing is subtracted" in said
    assert said_by(cohort, cohort.forget(Amnesiac(), 3), weak, 9)[0].endswith(
        "1): nothing is subtracted again."
    )
    neighbour = neighbours(run, 7)[0]
    shared = len(set(run.steps(7)) & set(run.steps(neighbour)))
    strong = Amnesiac(force=True)
    (said,) = said_by(run, run.forget(forced(weak), 7), strong, neighbour)
    assert said.startswith(f"{shared} of 6 steps with D_f were taken back by an earlier request (")
    assert said.endswith("(gamma 1, keep 1): they are not subtracted again.")
    assert said_by(run, run.forget(strong, 7), strong, neighbour) == []


@pytest.mark.parametrize(
    "inner",
    [Amnesiac(), AmnesiacControl(), Replay(), Chain(FineTune(epochs=1), Amnesiac())],
    ids=lambda m: m.name,
)
def test_no_part_of_an_update_is_noted_as_all_of_it(run: Run, inner: Any) -> None:
    done: list[int] = []
    for method in (LayerwisePartial(inner), Chain(FineTune(epochs=1), LayerwisePartial(inner))):
        with pytest.raises(MethodError, match=f"cannot go around {inner.name}, which reads the"):
            run.forget(method, 7, progress=lambda *_: done.append(1))
    assert done == []


def test_the_ledger_tells_nothing_without_the_key(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = run.forget(Amnesiac(force=True), 7)
    (made,) = json.loads(json.dumps(after.lineage[-1].detail["removed"]))
    steps = np.array(run.steps(7))
    assert made["steps"] == seal(steps, made["log"])
    assert unseal(made["steps"], made["log"]).tolist() == steps.tolist()
    assert seal(steps[1:], made["log"]) != made["steps"]
    assert unseal(seal(steps[:0], "x"), "x").tolist() == []
    for wrong in (made["steps"][:-8] + "AAAAAAA=", "no text of ours", ""):
        with pytest.raises(MismatchError, match="is damaged"):
            unseal(wrong, made["log"])
    with pytest.raises(MismatchError, match="does not open"):
        unseal(made["steps"], "another log")
    monkeypatch.setenv("EFFACE_KEY", "another")
    with pytest.raises(MismatchError, match="does not open with this key"):
        removed_steps(after, None, made["log"])


def test_the_ledger_survives_the_file(run: Run, tmp_path: Path) -> None:
    after = run.forget(Amnesiac(bn="keep", force=True), 7)
    loaded = efface.load(after.save(tmp_path / "m.safetensors"), run.task)
    ways = [dataclasses.replace(run, model=m) for m in (after, loaded)]
    assert len({way.forget(Amnesiac(force=True), 40).digest for way in ways}) == 1


# -- admission -------------------------------------------------------------------------------------


def test_the_limits() -> None:
    assert [admission(x) for x in (0, 0.01, 0.0101, 0.1, 0.101, 1)] == [
        "go", "go", "warn", "warn", "refuse", "refuse"
    ]  # fmt: skip


def test_a_large_share_is_refused(run: Run) -> None:
    with pytest.raises(MethodError, match=r"take back 18 of 90 steps, and 20 % of the") as caught:
        run.forget(Amnesiac(), *firsts(run, 3))
    for word in ("l1-sparse", "finetune", "replay", "cohort", "--force"):
        assert word in str(caught.value)
    with pytest.warns(UserWarning, match=r"20 % of the training is gone; expect damage"):
        efface.forget(run.model, run.split(*firsts(run, 3)), forced(Amnesiac()), log=run.log)


def firsts(run: Run, many: int) -> list[int]:
    """Records that share no step."""
    chosen: list[int] = []
    for i in range(120):
        if not any(set(run.steps(i)) & set(run.steps(j)) for j in chosen):
            chosen.append(i)
        if len(chosen) == many:
            return chosen
    raise AssertionError


def test_a_smaller_one_goes_with_a_warning_or_without(record: Record, run: Run) -> None:
    with pytest.warns(UserWarning, match=r"6 of 90 steps: 6.7 % of the training is gone; expect"):
        efface.forget(run.model, run.split(7), "amnesiac", log=run.log)
    few = record({"cohorts": ["r001", "r002"], "cohort_epochs": 1}, task=None)
    long = dataclasses.replace(few.task, fit=dataclasses.replace(few.task.fit, epochs=12))
    few = record({"cohorts": ["r001", "r002"], "cohort_epochs": 1}, task=long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = efface.forget(few.model, few.split(1, 2), "amnesiac", log=few.log)
    assert after.lineage[-1].detail["removed"][0]["n"] == 1


def test_what_earlier_requests_took_counts(run: Run) -> None:
    one, two = firsts(run, 2)
    after = dataclasses.replace(run, model=run.forget(Amnesiac(), one))
    sentence = r"6 of 90 steps, and 13 % of the training would be gone, 6 of them by earlier"
    with pytest.raises(MethodError, match=sentence):
        after.forget(Amnesiac(), two)


def test_forced_reaches_everything() -> None:
    method = Chain(FromDense(Replay()), Amnesiac())
    told = forced(method)
    assert told.first.inner.force
    assert told.second.force
    assert not method.second.force
    assert forced(FineTune()) == FineTune()


# -- what does not belong together -----------------------------------------------------------------


def test_without_a_log(run: Run) -> None:
    assert run.model.log == run.log  # the one that trained knows it, the file does not
    model = run.model.copy()
    model.log = None
    with pytest.raises(NeedsError, match="needs the update log of the model's training"):
        efface.forget(model, run.split(7), "amnesiac")
    with pytest.raises(LogError):
        efface.forget(run.model, run.split(7), "amnesiac", log=run.log / "nowhere")


METHODS = [Amnesiac(force=True), AmnesiacControl(force=True), Replay(force=True)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_log_of_something_else(
    run: Run, record: Record, new_task: Any, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = efface.train(run.task, seed=1)
    with pytest.raises(MismatchError, match="this model's training was not recorded"):
        efface.forget(other, run.split(7), method, log=run.log)
    sgd = record(task=dataclasses.replace(run.task, fit=Settings(epochs=1, batch_size=40)))
    with pytest.raises(MismatchError, match="this model's training was recorded as log"):
        sgd.forget(method, 7, log=run.log)
    if isinstance(method, Amnesiac):
        small = record(task=new_task(fit=Settings(epochs=1)))
        with pytest.raises(MismatchError, match="is of another network than the model"):
            small.forget(method, 7, log=run.log)
    monkeypatch.setenv("EFFACE_KEY", "another")
    with pytest.raises(MismatchError, match="hashed with another key"):
        run.forget(method, 7)


def test_a_model_that_is_older_or_newer_than_its_log(run: Run) -> None:
    older = run.model.copy()
    with torch.no_grad():
        next(older.network.parameters()).mul_(1.01)
    with pytest.raises(MismatchError, match="did not end its training with the weights"):
        dataclasses.replace(run, model=older).forget(Amnesiac(force=True), 7)
    step = run.model.lineage[0]
    detail = {**step.detail, "log": {**step.detail["log"], "steps": 80}}
    older = run.model.copy()
    older.lineage = (dataclasses.replace(step, detail=detail),)
    with pytest.raises(MismatchError, match="trained for 80 steps and the log"):
        dataclasses.replace(run, model=older).forget(Amnesiac(force=True), 7)


def test_records_that_the_log_knows_nothing_of(record: Record) -> None:
    run = record(sensitive=["r007", "r008"])
    with pytest.raises(LogError, match="knows of no step with 'r009': never seen"):
        run.forget(Amnesiac(force=True), 7, 9)
    assert run.forget(Amnesiac(force=True), 7).digest != run.model.digest


def test_a_model_that_was_made_anew_since(run: Run) -> None:
    for method in ("retrain", Replay()):
        anew = dataclasses.replace(run, model=run.forget(method, 7))
        with pytest.raises(MismatchError, match=r"was replayed since|was not recorded"):
            anew.forget(Amnesiac(force=True), 40)
    with pytest.raises(MismatchError, match="was replayed since"):
        run.forget(Chain(Replay(), Amnesiac(force=True)), 7)


EXPECTED = pytest.mark.filterwarnings("ignore:amnesiac takes back")


@EXPECTED
def test_a_model_that_was_trained_further_since(run: Run) -> None:
    after = run.forget(FineTune(epochs=1), 7)
    with pytest.warns(UserWarning, match=r"trained further after its log ended \(finetune\)"):
        efface.forget(after, run.split(40), Amnesiac(force=True), log=run.log)
    chain = Chain(FineTune(epochs=1), Amnesiac(force=True))
    with pytest.warns(UserWarning, match=r"its log ended \(this request\)"):
        efface.forget(run.model, run.split(40), chain, log=run.log)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"gamma": float("nan")}, "gamma must be positive"),
        ({"keep": 0.0}, "keep must lie in"),
        ({"keep": 1.5}, "keep must lie in"),
        ({"repair": -1}, "repair must be 0 or more"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        Amnesiac(**options)


def test_more_than_the_log_holds(record: Record, run: Run) -> None:
    sparse = record(keep=0.2)
    assert sparse.forget(Amnesiac(keep=0.1, force=True), 7).lineage[-1].detail["removed"]
    with pytest.raises(MethodError, match=r"keep=0.5 cannot be had .* which holds 0.2 of each"):
        sparse.forget(Amnesiac(keep=0.5, force=True), 7)
    for control in ("random", "same-norm"):
        with pytest.raises(MethodError, match="cannot be had"):
            sparse.forget(AmnesiacControl(control, keep=0.2, force=True), 7)
    lowered = record(keep=0.2)
    with UpdateLog.open(lowered.log, write=True) as log:
        log.event("keep", step=80, old=0.2, new=0.05)
    with pytest.raises(MethodError, match=r"keep=0.1 cannot be had .* which holds 0.05 of each"):
        lowered.forget(Amnesiac(keep=0.1, force=True), 7)
    drawn = record(keep=0.2, pick="random")
    with pytest.raises(MethodError, match="of each layer, by random"):
        drawn.forget(Amnesiac(keep=0.1, force=True), 7)
    assert (
        drawn.forget(Amnesiac(force=True), 7).digest != run.forget(Amnesiac(force=True), 7).digest
    )


# -- a log with holes ------------------------------------------------------------------------------


def copied(run: Run, tmp_path: Path) -> Run:
    import shutil

    shutil.copytree(run.log, tmp_path / "log")
    return dataclasses.replace(run, log=tmp_path / "log")


def test_steps_that_were_erased(run: Run, tmp_path: Path) -> None:
    holed = copied(run, tmp_path)
    with UpdateLog.open(holed.log, write=True) as log:
        log.erase(run.steps(7)[1:3], why="expired")
    with pytest.raises(LogError, match=r"lacks updates of 2 of the 6 steps .* 2 have expired"):
        holed.forget(Amnesiac(force=True), 7)
    other = next(i for i in range(120) if not set(run.steps(i)) & set(run.steps(7)))
    assert holed.forget(Amnesiac(force=True), other).digest
    same = [r.forget(Amnesiac(force=True), other).digest for r in (holed, run)]
    assert same[0] == same[1]


def test_records_that_were_purged(run: Run, tmp_path: Path) -> None:
    holed = copied(run, tmp_path)
    first = holed.forget(Amnesiac(force=True), 7)
    with UpdateLog.open(holed.log, write=True) as log:
        log.purge(holed.numbers(log, 7))
    with pytest.raises(LogError):
        holed.forget(Amnesiac(force=True), 7)
    neighbour = neighbours(run, 7)[0]
    with pytest.raises(LogError, match="were purged for an earlier request"):
        holed.forget(Amnesiac(force=True), neighbour)
    # of the model that has forgotten 7, those steps are gone already: the ledger outlives the log's
    later = dataclasses.replace(holed, model=first).forget(Amnesiac(force=True), neighbour)
    whole = dataclasses.replace(run, model=first).forget(Amnesiac(force=True), neighbour)
    assert later.digest == whole.digest


def test_a_log_that_ended_early(run: Run, tmp_path: Path) -> None:
    holed = copied(run, tmp_path)
    with UpdateLog.open(holed.log, write=True) as log:
        log.fail(85, "no space")
    with pytest.raises(LogError, match="ended early, at step 85"):
        holed.forget(Amnesiac(force=True), 7)


# -- controls --------------------------------------------------------------------------------------


def test_as_many_steps_without_the_records(run: Run) -> None:
    after = run.forget(AmnesiacControl("unaffected", bn="keep"), 7)
    (made,) = after.lineage[-1].detail["removed"]
    steps = unseal(made["steps"], made["log"]).tolist()
    assert (made["n"], made["wanted"], made["control"]) == (6, 6, "unaffected")
    assert not set(steps) & set(run.steps(7))
    watcher = watched(run)
    wanted = copy_of(run.model.network)
    for step in steps:
        _, old, new = watcher.seen[step]
        for name in wanted:
            wanted[name] -= new[name] - old[name]
    assert_close(after.network, wanted)
    seeds = {run.forget(AmnesiacControl(), 7, seed=s).digest for s in range(3)}
    assert len(seeds) == 3


def test_fewer_where_there_are_not_as_many(run: Run) -> None:
    gone = range(12)
    touched = len(run.steps(*gone))
    after = run.forget(AmnesiacControl("unaffected", force=True), *gone)
    (made,) = after.lineage[-1].detail["removed"]
    assert (made["wanted"], made["n"]) == (touched, 90 - touched)
    assert touched > 45


def test_random_masks_and_the_same_norm(run: Run) -> None:
    def moved(method: Any) -> dict[str, Tensor]:
        before, after = copy_of(run.model.network), copy_of(run.forget(method, 7).network)
        return {n: before[n] - after[n] for n in before}

    def size(change: dict[str, Tensor]) -> float:
        return float(sum(t.square().sum() for t in change.values())) ** 0.5

    whole, pruned = moved(Amnesiac(bn="keep")), moved(Amnesiac(keep=0.1, bn="keep"))
    scaled = moved(AmnesiacControl("same-norm", bn="keep"))
    drawn = moved(AmnesiacControl("random", bn="keep"))
    assert size(scaled) == pytest.approx(size(pruned), rel=1e-3)
    ratio = size(pruned) / size(whole)
    assert all(torch.allclose(scaled[n], ratio * whole[n], atol=1e-5) for n in whole)
    assert size(drawn) < size(pruned) < size(whole)
    counts = [int((change["3.weight"] != 0).sum()) for change in (drawn, pruned, whole)]
    assert counts[0] <= 6 * 240
    assert counts[1] <= 6 * 240
    assert not torch.equal(drawn["3.weight"] != 0, pruned["3.weight"] != 0)
    assert torch.allclose(drawn["0.bias"], whole["0.bias"], atol=1e-6)  # small tensors are whole


def test_batch_norm_alone(run: Run) -> None:
    after = run.forget(AmnesiacControl("bn-only", bn="keep"), 7)
    before = copy_of(run.model.network)
    assert_close(after.network, before, 0)
    assert not torch.equal(after.network[1].running_mean, run.model.network[1].running_mean)
    everyone = run.forget(AmnesiacControl("bn-only"), *range(60))  # never too many
    assert everyone.lineage[-1].detail["removed"][0]["n"] == 0


# -- composition -----------------------------------------------------------------------------------


def test_a_mask_stays_exact(run: Run) -> None:
    sparse = efface.prune(run.model, OneShot(sparsity=0.5, recovery=0), keep_dense=True)
    masked = dataclasses.replace(run, model=sparse)
    for method in (
        Amnesiac(force=True),
        efface.unlearn.Unprune(Amnesiac(force=True)),
        FromDense(Amnesiac(force=True)),
        Chain(Amnesiac(force=True), FineTune(epochs=1)),
        AmnesiacControl("random", force=True),
    ):
        after = masked.forget(method, 7)
        assert after.mask is not None
        assert after.mask.kept == sparse.mask.kept
        assert_masked(after)
        assert after.digest != sparse.digest
    for method in (
        efface.unlearn.PruneFirst(OneShot(sparsity=0.5, recovery=1), Amnesiac(force=True)),
        Masked(Amnesiac(force=True), sparse.mask),
    ):
        assert_masked(run.forget(method, 7))


def assert_masked(model: efface.TrainedModel) -> None:
    assert model.mask is not None
    weights = dict(model.network.named_parameters())
    for name, keep in model.mask.items():
        gone = weights[name][~keep]
        assert (gone == 0).all()
        assert not torch.signbit(gone).any()


@EXPECTED
def test_inside_from_dense_it_takes_from_the_dense_weights(run: Run) -> None:
    sparse = efface.prune(run.model, OneShot(sparsity=0.5, recovery=1), keep_dense=True)
    split = run.split(7)
    with warnings.catch_warnings():  # the recovery is not in the dense weights: no word of it
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "amnesiac takes back")
        after = efface.forget(sparse, split, FromDense(Amnesiac(bn="keep")), log=run.log)
    wanted = run.forget(Amnesiac(bn="keep"), 7).network.state_dict()
    assert weights_digest(after.dense) == weights_digest(wanted)
    with pytest.warns(UserWarning, match=r"after its log ended \(one-shot\)"):
        efface.forget(sparse, split, Amnesiac(), log=run.log)


def test_everything_is_checked_before_anything_runs(run: Run) -> None:
    method = Chain(FineTune(epochs=1), Chain(FineTune(epochs=1), Amnesiac()))
    done: list[int] = []
    with pytest.raises(MethodError, match="would take back"):
        run.forget(method, *range(20), progress=lambda *_: done.append(1))
    assert done == []


# -- exact replay ----------------------------------------------------------------------------------


def without(run: Run, out: list[int], cohorts: Any = None) -> str:
    """A run that never saw some records, from the initial weights on."""
    everyone = torch.arange(120)
    left = everyone[~torch.isin(everyone, torch.tensor(out))]
    fit = Fit(run.task)
    network = replay(run.model, left, everyone, fit, run.task.fit.epochs, cohorts=cohorts)
    return weights_digest(network.state_dict())


def test_a_replay_equals_a_run_that_never_saw_the_records(run: Run, cohort: Run) -> None:
    after = run.forget(Replay(), 7, 40)
    assert after.digest == without(run, [7, 40]) != run.model.digest
    fact = after.lineage[-1].detail["replayed"]
    assert (fact["first"], fact["start"], fact["epochs"], fact["of"]) == (0, 0, 6, 6)


def test_a_cohort_of_the_last_epochs_is_cheap(cohort: Run) -> None:
    from efface.updates.cohorts import cohorts_of

    cohorts = cohorts_of(cohort.task, [f"r{i:03d}" for i in COHORT], 2)
    sentence = r"D_f appears from epoch 5 on: 2 of 6 epochs are trained again, about 33 % of a tr"
    with pytest.warns(UserWarning, match=sentence) as said:
        after = efface.forget(cohort.model, cohort.split(3, 9), Replay(), log=cohort.log)
    assert "to make this cheap" not in str(said[0].message)
    assert after.digest == without(cohort, [3, 9], cohorts)
    images = after.lineage[-1].detail["images"]["retain"]
    assert images == 2 * 118
    # the next request leaves out what was forgotten before, too
    later = dataclasses.replace(cohort, model=after)
    assert later.forget(Replay(), 60).digest == without(cohort, [3, 9, 60], cohorts)
    # after which an outsider costs everything
    outsider = later.forget(Replay(), 11)
    assert outsider.digest == without(cohort, [3, 9, 11], cohorts)
    assert outsider.lineage[-1].detail["replayed"]["start"] == 0


def test_a_replay_takes_over_from_amnesiac(cohort: Run) -> None:
    quick = dataclasses.replace(cohort, model=cohort.forget(Amnesiac(), *COHORT))
    straight = cohort.forget(Replay(), *COHORT, 11)
    assert quick.forget(Replay(), 11).digest == straight.digest


def test_says_how_to_make_it_cheap(run: Run) -> None:
    with pytest.warns(UserWarning, match=r"about 100 % of a training; train deletable records as"):
        efface.forget(run.model, run.split(7), "replay", log=run.log)


def test_from_a_damaged_state_it_goes_further_back(cohort: Run, run: Run, tmp_path: Path) -> None:
    holed = copied(cohort, tmp_path)
    state = holed.log / "checkpoints" / "epoch-0004.safetensors"
    data = bytearray(state.read_bytes())
    data[-9] ^= 1
    state.write_bytes(data)
    sentence = r"start of epoch 5 in .* is damaged: the replay goes on from an earlier one\."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        after = efface.forget(holed.model, holed.split(3), Replay(), log=holed.log, seed=3)
    assert re.search(sentence, str(said[0].message))
    assert "to make this cheap" not in "".join(str(one.message) for one in said)  # it was one
    assert after.lineage[-1].detail["replayed"]["start"] == 0
    assert after.digest == cohort.forget(Replay(), 3).digest


def test_a_replay_of_a_pruned_model(cohort: Run) -> None:
    sparse = efface.prune(cohort.model, OneShot(sparsity=0.5, recovery=1), keep_dense=True)
    pruned = dataclasses.replace(cohort, model=sparse)
    with pytest.raises(MethodError, match="put from-dense around it"):
        pruned.forget(Replay(), 3)
    after = pruned.forget(FromDense(Replay()), 3)
    assert weights_digest(after.dense) == cohort.forget(Replay(), 3).digest
    assert_masked(after)
    assert after.mask.kept == sparse.mask.kept
    # and once more
    again = dataclasses.replace(pruned, model=after).forget(FromDense(Replay()), 9)
    assert weights_digest(again.dense) == cohort.forget(Replay(), 3, 9).digest


def test_other_data_or_versions_cannot_be_replayed(
    cohort: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, targets = cohort.task.train
    task = dataclasses.replace(cohort.task, train=(inputs + 1, targets))
    model = cohort.model.copy()
    model.task = task
    split = Split.by_ids(task, ["r003"])
    with pytest.raises(MismatchError, match="is not what was trained on"):
        efface.forget(model, split, Replay(force=True), log=cohort.log)
    step = cohort.model.lineage[0]
    detail = {**step.detail, "cohorts": {**step.detail["cohorts"], "records": 6}}
    model = cohort.model.copy()
    model.lineage = (dataclasses.replace(step, detail=detail),)
    with pytest.raises(MismatchError, match="no longer knows who was in the cohorts"):
        dataclasses.replace(cohort, model=model).forget(Replay(force=True), 3)
    import efface.unlearn.replaying as module

    real = module.versions()
    monkeypatch.setattr(module, "versions", lambda: real | {"torch": "1.0"})
    with pytest.raises(MismatchError, match="the training ran with torch"):
        cohort.forget(Replay(), 3)
    assert cohort.forget(forced(Replay()), 3).forgotten.tags


# -- what it would cost ----------------------------------------------------------------------------


def test_outlook(run: Run, cohort: Run) -> None:
    with UpdateLog.open(run.log) as log:
        few, many = outlook(log, np.array([7])), outlook(log, np.arange(20))
        frames = sum(len(payload) for _, _, payload in log.frames(run.steps(7)))
        later = outlook(log, np.array([7]), np.array(run.steps(7)[:2]))
    assert (few["records"], few["total"], few["steps"], few["due"]) == (1, 90, 6, 6)
    assert (few["share"], few["verdict"], few["missing"]) == (6 / 90, "warn", 0)
    assert few["bytes"] == pytest.approx(frames, rel=0.1)
    assert many["verdict"] == "refuse"
    assert few["replay"] == {"first": 0, "start": 0, "epochs": 6, "of": 6, "share": 1.0}
    assert (later["due"], later["removed"], later["share"]) == (4, 2, 6 / 90)
    with UpdateLog.open(cohort.log) as log:
        found = outlook(log, np.array(COHORT))
    assert (found["steps"], found["verdict"]) == (2, "warn")
    assert found["replay"] == {"first": 4, "start": 4, "epochs": 2, "of": 6, "share": 1 / 3}


def test_outlook_says_what_forget_would_refuse(record: Record, run: Run, tmp_path: Path) -> None:
    def agree(run: Run, position: int, sentence: str) -> str:
        with pytest.raises(LogError, match=sentence):
            run.forget(Amnesiac(force=True), position)
        with UpdateLog.open(run.log) as log:
            found = outlook(log, np.array([position]))
        assert found["verdict"] == "impossible"
        return str(found["reason"])

    few = record(sensitive=["r007", "r008"])
    assert agree(few, 9, "knows of no step") == "1 of the records is in no step of the log"
    holed = copied(run, tmp_path)
    with UpdateLog.open(holed.log, write=True) as log:
        log.erase(run.steps(7)[1:3], why="expired")
        asked = outlook(log, np.array([neighbours(run, 7)[0]]), np.array(run.steps(7)))
    assert (asked["total"], asked["reason"]) == (90, None)  # holes are steps of the training, too
    assert agree(holed, 7, "lacks updates of 2") == "2 updates of these are not in the log"
    with UpdateLog.open(holed.log, write=True) as log:
        log.fail(85, "no space")
    assert agree(holed, 7, "ended early") == "recording ended early, at step 85"


def test_outlook_where_nothing_is_due(run: Run) -> None:
    everything = np.arange(90)
    with UpdateLog.open(run.log) as log:
        found = outlook(log, np.array([7]), everything)
    assert (found["due"], found["share"], found["verdict"]) == (0, 1.0, "go")


# -- memory ----------------------------------------------------------------------------------------

MEASURE = """
import json, sys, tracemalloc, warnings, torch
from pathlib import Path
import efface
from efface.fitting import Fit
from efface.unlearn import Amnesiac
from big import task
warnings.simplefilter("ignore")
torch.set_num_threads(1)
peaks = []
for keep, records in [(None, 1), (None, 1), (None, 120), (0.1, 120)]:
    model = efface.load("model.safetensors", task)
    model.log = Path("log")
    split = efface.Split.by_ids(task, range(records))
    tracemalloc.start()
    Amnesiac(keep=keep, bn="keep", force=True)(model, split, Fit(task))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
print(json.dumps(peaks[1:]))
"""

BIG = """
import torch, efface
x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] > 0).long()
def network():
    return torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(),
        torch.nn.Linear(1024, 512), torch.nn.ReLU(), torch.nn.Linear(512, 2))
task = efface.Task(network, (x, y), (x, y), fit=efface.Settings(epochs=2, batch_size=16))
"""


def test_memory_does_not_grow_with_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big.py").write_text(BIG)
    (tmp_path / "measure.py").write_text(MEASURE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from big import task  # type: ignore[import-not-found]

    log = tmp_path / "log"
    model = efface.train(task, recorder=Recorder(log, keep=1.0, values="fp32"))
    model.save(tmp_path / "model.safetensors")
    network = sum(p.numel() for p in model.network.parameters()) * 4
    stored = sum(path.stat().st_size for path in log.rglob("*") if path.is_file())
    assert stored > 20 * network  # all of it together would not fit

    done = subprocess.run(
        [sys.executable, "measure.py"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    few, many, pruned = json.loads(done.stdout)
    assert many < network + 64 * 2**20
    assert many < few + 24 * 2**20  # 2 steps or 32; up to 16 MiB of updates are added side by side
    assert pruned < 7 * network + 64 * 2**20  # one update in memory beside the sum


# -- what the papers' claim rests on ---------------------------------------------------------------


def few_threes(seed: int, folder: Path, few: int = 12) -> Run:
    """Digits with a dozen threes, a network with batch norm: those touch 0.28 of the steps."""
    from efface.datasets.digits import digits
    from efface.networks import ThreeConv

    data, test = digits()
    draw = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    gone = {i for i in draw.tolist() if data.labels[i] == 3} - set(
        [i for i in draw.tolist() if data.labels[i] == 3][:few]
    )
    left = torch.tensor([i for i in range(len(data.labels)) if i not in gone])
    task = efface.Task(
        lambda: ThreeConv(channels=1),
        (data.images[left], data.labels[left]),
        (test.images, test.labels),
        fit=Settings(
            epochs=5, batch_size=32, optimizer="adam", lr=1e-2, weight_decay=0.0,
            schedule="constant",
        ),
    )  # fmt: skip
    return Run(efface.train(task, seed=seed, recorder=Recorder(folder, keep=1.0)), folder)


def recall(model: efface.TrainedModel, threes: bool) -> float:
    inputs, targets = model.task.train
    with torch.no_grad():
        answers = model.network.eval()(inputs).argmax(1)
    where = (targets == 3) == threes
    return float((answers == targets)[where].float().mean())


def test_only_with_batch_norm_recalibrated_does_it_say_anything(tmp_path: Path) -> None:
    """Two claims: taking back other steps "forgets", too, unless the statistics are taken anew;
    with them taken anew, amnesiac unlearning forgets and the control remembers."""
    blind = []
    for seed in range(3):
        run = few_threes(seed, tmp_path / f"log-{seed}")
        threes = (run.task.train[1] == 3).nonzero().flatten().tolist()
        assert recall(run.model, threes=True) == 1.0

        def done(method: Any, run: Run = run, threes: list[int] = threes) -> tuple[float, float]:
            after = run.forget(forced(method), *threes)
            return recall(after, threes=True), recall(after, threes=False)

        assert done(Amnesiac(bn="subtract"))[0] <= 0.1
        blind.append(done(AmnesiacControl("unaffected", bn="subtract")))
        for method in (Amnesiac(), Amnesiac(keep=0.1)):
            forgotten, kept = done(method)
            assert forgotten <= 0.25
            assert kept >= 0.95
        assert done(AmnesiacControl("unaffected"))[0] >= 0.9
        assert done(AmnesiacControl("random"))[0] >= 0.75
        assert done(AmnesiacControl("bn-only")) >= (0.99, 0.99)
    assert np.mean([forgotten for forgotten, _ in blind]) <= 0.3  # as if it had forgotten
    assert np.mean([kept for _, kept in blind]) <= 0.6  # and it has been destroyed
