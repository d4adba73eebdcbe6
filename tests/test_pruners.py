"""Pruners: exact sparsity, the way back to early weights, schedules, kills, and every wrapper."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efface
from efface.errors import MethodError, MismatchError, NeedsError, TaskError
from efface.fitting import Fit
from efface.journal import Journal
from efface.mask import Mask, scope_names
from efface.sparsify import (
    IMP,
    OMP,
    PRUNERS,
    AtInit,
    Gradual,
    OneShot,
    Pruner,
    Snip,
    build_pruner,
    dead_layers,
    rewind_epoch,
    select,
)
from efface.sparsify.parts import score_records, shown
from efface.steps import batch_norms, rate
from efface.trained import weights_digest
from efface.unlearn import FineTune, GradientAscent, Masked, PruneFirst, build, to_json

from .test_cli import done, workplace, write_task
from .test_cli import efface as run

NewTask = Callable[..., efface.Task]
SCHEDULES: dict[str, Any] = {
    "one-shot": OneShot(0.5, recovery=1),
    "omp": OMP(0.5),
    "imp": IMP(0.5, rate=0.3),
    "gradual": Gradual(0.5, epochs=3),
    "at-init": AtInit(0.5, rounds=3, epochs=2),
}
"""One of every schedule, small."""


class KilledError(Exception):
    """Stands for a kill."""


class Counter:
    """A progress callback that keeps what it is told, and raises at the n-th step."""

    def __init__(self, kill: int | None = None) -> None:
        self.kill, self.said = kill, list[tuple[str, int, int]]()

    def __call__(self, label: str, step: int, steps: int) -> None:
        self.said.append((label, step, steps))
        if len(self.said) == self.kill:
            raise KilledError


@pytest.fixture(scope="module")
def early(task: efface.Task) -> efface.TrainedModel:
    """Six epochs, the weights after the second kept."""
    return efface.train(task, seed=0, rewind=2)


@pytest.fixture(scope="module")
def early_conv(new_conv_task: NewTask) -> efface.TrainedModel:
    """Convolutions of divisible sizes, four epochs, the weights after the first kept."""

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        )

    settings = efface.Settings(epochs=4, batch_size=12, lr=0.05)
    return efface.train(new_conv_task(network=network, fit=settings), seed=0, rewind=1)


def params(model: efface.TrainedModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.network.named_parameters()}


def check_mask_holds(model: efface.TrainedModel) -> None:
    assert model.mask is not None
    for name, keep in model.mask.items():
        assert (params(model)[name][~keep] == 0).all()


# --- every pruner ---------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "layer", "2:4"])
@pytest.mark.parametrize("scope", ["conv", "all"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_sparsity_is_exact(
    early_conv: efface.TrainedModel, name: str, scope: Any, granularity: str
) -> None:
    pruner = dataclasses.replace(SCHEDULES[name], granularity=granularity, scope=scope)
    after = efface.prune(early_conv, pruner)
    assert after.mask is not None
    names = scope_names(after.network, scope)
    assert list(after.mask) == names
    for keep in after.mask.values():
        n, kept = keep.numel(), int(keep.sum())
        if granularity == "layer":
            assert kept == n - round(0.5 * n)
        if granularity == "2:4":
            groups = keep.movedim(1, -1).reshape(len(keep), -1)
            for unit in groups.tolist():
                for i in range(0, len(unit), 4):
                    part = unit[i : i + 4]
                    assert sum(part) == -(-len(part) // 2)
    if granularity == "global":
        assert after.mask.kept == after.mask.total - round(0.5 * after.mask.total)
    check_mask_holds(after)
    assert early_conv.mask is None


@pytest.mark.parametrize("name", SCHEDULES)
def test_same_seed_same_bytes(early_conv: efface.TrainedModel, name: str) -> None:
    one, two = (efface.prune(early_conv, SCHEDULES[name], seed=4) for _ in range(2))
    other = efface.prune(early_conv, SCHEDULES[name], seed=5)
    assert (one.digest, one.mask) == (two.digest, two.mask)
    assert one.digest != other.digest


def short(name: str) -> Pruner:
    """A small pruner of any name."""
    options: dict[str, Any] = {"sparsity": 0.4}
    pruner = build_pruner(name, options)
    fields = {f.name for f in dataclasses.fields(pruner)}  # type: ignore[arg-type]
    options |= {option: 1 for option in ("epochs", "recovery") if option in fields}
    return build_pruner(name, options | ({"rounds": 2} if "rounds" in fields else {}))


@pytest.mark.parametrize(
    "inner", [FineTune(epochs=1), GradientAscent(epochs=1)], ids=lambda m: m.name
)
@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_before_every_kind_of_unlearner(
    early: efface.TrainedModel, split: efface.Split, name: str, inner: Any
) -> None:
    pruner = short(name)
    after = efface.forget(early, split, PruneFirst(pruner, inner))
    assert after.sparsity == pytest.approx(0.4, abs=0.01)
    check_mask_holds(after)
    step = after.lineage[-1]
    assert step.method is not None
    assert step.method["pruner"]["method"] == pruner.name
    # it saw D_r alone: what ran before the unlearner took the records of whole epochs over D_r
    fits = step.detail["fits"][:-1]
    shown = sum(fit["epochs"] for fit in fits) * len(split.retain)
    kind = "forget" if inner.name == "gradient-ascent" else "retain"
    images = dict(step.detail["images"])
    images[kind] -= len(getattr(split, kind))
    assert images == {"retain": shown} | ({"forget": 0} if kind == "forget" else {})


@pytest.mark.parametrize("name", PRUNERS)
def test_round_trip_through_json_and_toml(name: str) -> None:
    pruner = short(name)
    value = to_json(pruner)
    assert build_pruner(value.pop("method"), value) == pruner
    file = tomllib.loads(
        f'method = "prune-first"\npruner = {{method = "{name}", sparsity = 0.95}}\ninner = "ga"\n'
    )
    made = build(file.pop("method"), file)
    assert made == PruneFirst(build_pruner(name, {"sparsity": 0.95}), GradientAscent())
    assert build("prune-first", {"pruner": name}).pruner == build_pruner(name)


def test_names_of_criteria_stand_for_schedules() -> None:
    assert build_pruner("synflow") == AtInit(criterion="synflow")
    assert build_pruner("grasp", {"sparsity": "0.5"}) == AtInit(0.5, criterion="grasp")
    assert build_pruner("taylor") == OneShot(criterion="taylor")
    with pytest.raises(MethodError, match=r"snip fixes .* at-init"):
        build_pruner("snip", {"criterion": "grasp"})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("opm", {}, "did you mean 'omp'"),
        ("omp", {"sparcity": 0.5}, "did you mean 'sparsity'"),
        ("omp", {"sparsity": "much"}, "sparsity must be a number"),
        ("omp", {"sparsity": 1.0}, r"sparsity must lie in \[0, 1\)"),
        ("omp", {"to": "start"}, "to must be one of rewind, initial, none"),
        ("omp", {"epochs": -1}, "epochs must be 0 epochs or more"),
        ("omp", {"granularity": "2:4"}, "sparsity=0.5"),
        ("imp", {"rate": 1.0}, "rate must lie between 0 and 1"),
        ("imp", {"rate": 0.0}, "rate must lie between 0 and 1"),
        ("gradual", {"hold": 1.0}, r"hold must lie in \[0, 1\)"),
        ("gradual", {"lr": 0.0}, "lr must be positive"),
        ("at-init", {"rounds": 0}, "rounds must be 1 or more"),
        ("at-init", {"criterion": "snap"}, "did you mean 'snip'"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        build_pruner(name, options)
    with pytest.raises(MethodError):
        build("prune-first", {"pruner": {"method": name, **options}})


def test_options_of_python_are_checked_too() -> None:
    with pytest.raises(MethodError, match="scope must be one of"):
        OMP(scope="convs")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="pruner must be a pruner"):
        build("prune-first", {"pruner": "finetune"})
    with pytest.raises(MethodError, match="inner must be a method"):
        build("prune-first", {"inner": "omp"})


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_dead_layer_stops_every_pruner(new_task: NewTask, name: str) -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 3)
            self.second.weight.data *= 1e-6

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.second(self.first(x)))
            return out

    settings = efface.Settings(epochs=1, batch_size=120, lr=1e-6)
    model = efface.train(new_task(network=Faint, fit=settings), rewind=1)
    pruner = dataclasses.replace(SCHEDULES[name], sparsity=0.6)
    if name == "at-init":
        pruner = dataclasses.replace(pruner, criterion="magnitude")
    with pytest.raises(MethodError, match=r"'second\.weight' lost all .*--allow-dead-layers"):
        efface.prune(model, pruner)
    with pytest.warns(UserWarning, match=r"second\.weight"):
        after = efface.prune(model, dataclasses.replace(pruner, allow_dead_layers=True))
    assert after.mask is not None
    assert dead_layers(after.mask) == ["second.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        efface.prune(model, dataclasses.replace(pruner, granularity="layer"))


def test_a_mask_of_another_network_is_refused(
    early: efface.TrainedModel, early_conv: efface.TrainedModel, split: efface.Split
) -> None:
    mask = efface.prune(early_conv, OneShot(0.5, recovery=0)).mask
    assert mask is not None
    with pytest.raises(MismatchError, match="another network"):
        efface.forget(early, split, Masked(FineTune(), mask))
    wrong = Mask({name: keep[1:] for name, keep in mask.items()})
    with pytest.raises(MismatchError, match="another network"):
        efface.prune(early_conv, OneShot(0.5, recovery=0)).set_mask(wrong)


# --- the records that criteria see ----------------------------------------------------------------


def test_criteria_see_ten_records_of_each_class(task: efface.Task) -> None:
    chosen = score_records(torch.arange(120), Fit(task, seed=2))
    assert torch.bincount(task.records.targets[chosen]).tolist() == [10, 10, 10]
    assert len(set(chosen.tolist())) == 30
    assert torch.equal(chosen, score_records(torch.arange(120), Fit(task, seed=2)))
    assert not torch.equal(chosen, score_records(torch.arange(120), Fit(task, seed=3)))
    few = torch.arange(5, 20)
    assert set(score_records(few, Fit(task, seed=2)).tolist()) == set(few.tolist())


def test_forgetting_a_record_shows_nobody_else_less(task: efface.Task) -> None:
    """A record that is left out is replaced by another of its class; the others stay."""
    fit = Fit(task, seed=2)
    before = score_records(torch.arange(120), fit).tolist()
    gone = before[4]
    after = score_records(torch.tensor([i for i in range(120) if i != gone]), fit).tolist()
    assert set(before) - set(after) == {gone}


def test_one_shot_with_a_criterion_that_needs_data(early: efface.TrainedModel) -> None:
    after = efface.prune(early, OneShot(0.5, criterion="snip", recovery=0), seed=3)
    fit = Fit(early.task, 3, subject=early, path="prune")
    batches = shown("snip", torch.arange(120), fit)
    assert sum(len(b.positions) for b in batches) == 30
    scores = Snip()(early.network, batches, fit.loss)
    assert after.mask == select(scores, 0.5, scope_names(early.network))
    again = efface.prune(after, OneShot(0.7, criterion="grasp", recovery=0))
    assert again.mask is not None
    assert all((after.mask[n] | ~again.mask[n]).all() for n in again.mask)


# --- back to early weights ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["omp", "imp"])
def test_rewinding_is_exact(early_conv: efface.TrainedModel, name: str) -> None:
    pruner = build_pruner(name, {"sparsity": 0.5, "epochs": 0, "scope": "conv"})
    after = efface.prune(early_conv, pruner)
    assert after.mask is not None
    assert early_conv.rewind is not None
    for key, tensor in after.network.state_dict().items():
        wanted = early_conv.rewind[key].clone()
        if key in after.mask:
            wanted[~after.mask[key]] = 0
        assert torch.equal(tensor, wanted), key
    there = batch_norms(early_conv.network)[0].running_mean
    here = batch_norms(after.network)[0].running_mean
    assert there is not None
    assert here is not None
    assert not torch.equal(there, here)
    if name == "omp":
        scores = {n: p.abs() for n, p in params(early_conv).items() if p.ndim > 1}
        assert after.mask == select(scores, 0.5, scope_names(early_conv.network, "conv"))


def test_back_to_the_initial_weights(early_conv: efface.TrainedModel) -> None:
    after = efface.prune(early_conv, OMP(0.5, to="initial", epochs=0))
    assert early_conv.initial is not None
    fresh = Fit(early_conv.task, int(early_conv.initial["seed"])).fresh().state_dict()
    assert weights_digest(fresh) == early_conv.initial["digest"]
    model = efface.TrainedModel(early_conv.task, early_conv.task.network(), mask=after.mask)
    model.network.load_state_dict(fresh)
    model.set_mask(after.mask)
    assert after.digest == model.digest
    stays = efface.prune(early_conv, OMP(0.5, to="none", epochs=0))
    assert stays.digest == efface.prune(early_conv, OneShot(0.5, recovery=0)).digest


def test_the_schedule_goes_on_where_it_stood(early_conv: efface.TrainedModel) -> None:
    (fit,) = efface.prune(early_conv, OMP(0.5)).lineage[-1].detail["fits"]
    assert (fit["epochs"], fit["begun"]) == (3, 1)
    (fit,) = efface.prune(early_conv, OMP(0.5, epochs=4)).lineage[-1].detail["fits"]
    assert (fit["epochs"], fit["begun"]) == (4, 1)
    (fit,) = efface.prune(early_conv, OMP(0.5, to="initial")).lineage[-1].detail["fits"]
    assert fit["epochs"] == 4
    assert "begun" not in fit


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3])
def test_rates_are_the_tail_of_the_whole_schedule(schedule: Any, warmup: float) -> None:
    each = 7
    whole = efface.Settings(epochs=182, schedule=schedule, warmup=warmup)
    wanted = [rate(whole, s / (182 * each), 182 * each) for s in range(182 * each)]
    for begun in (1, 8, 91, 181):
        rest = dataclasses.replace(whole, epochs=182 - begun, begun=begun)
        steps = rest.epochs * each
        found = [rate(rest, s / steps, steps) for s in range(steps)]
        assert found == wanted[begun * each :]  # to the last bit


def test_a_begun_schedule_is_checked_and_silent_when_there_is_none() -> None:
    assert "begun" not in efface.Settings().to_dict()
    assert efface.Settings(begun=2).to_dict()["begun"] == 2
    with pytest.raises(TaskError, match="begun"):
        efface.Settings(begun=-1)


def test_what_is_missing_is_said_before_anything_runs(
    task: efface.Task, trained: efface.TrainedModel, split: efface.Split
) -> None:
    counter = Counter()
    adopted = efface.adopt(task, trained.network.state_dict())
    cases: list[tuple[efface.TrainedModel, Any, str]] = [
        (trained, OMP(0.5), "--rewind EPOCH"),
        (trained, IMP(0.5), "--rewind EPOCH"),
        (adopted, AtInit(0.5), "efface train"),
        (adopted, IMP(0.5, to="initial"), "efface train"),
    ]
    for model, pruner, said in cases:
        with pytest.raises(NeedsError, match=said):
            efface.prune(model, pruner, progress=counter)
        chain = efface.unlearn.Chain(FineTune(), PruneFirst(pruner))
        with pytest.raises(NeedsError, match=said):
            efface.forget(model, split, chain, progress=counter)
    assert counter.said == []
    efface.prune(adopted, OMP(0.5, to="none", epochs=1))


def test_nothing_goes_back_to_before_a_request(
    early: efface.TrainedModel, split: efface.Split
) -> None:
    """Rewind weights have seen what the model was made to forget; the next request would, too."""
    after = efface.forget(early, split, PruneFirst(OMP(0.5), FineTune(epochs=1)))
    other = efface.Split.by_class(early.task, 2)
    for pruner in (OMP(0.7), IMP(0.7)):
        with pytest.raises(NeedsError, match="forgotten since"):
            efface.prune(after, pruner)
        with pytest.raises(NeedsError, match="made to forget"):
            efface.forget(after, other, PruneFirst(pruner))
        efface.prune(after, dataclasses.replace(pruner, to="initial", epochs=1))
    reference = efface.retrain(early.task, split, model=early)
    assert efface.prune(reference, OMP(0.7, to="none", epochs=1)).sparsity > 0.69


def test_an_audit_takes_a_repruned_reference(
    early: efface.TrainedModel, split: efface.Split
) -> None:
    model = efface.prune(early, OMP(0.5))
    after = efface.forget(model, split, "finetune")
    reference = efface.retrain(
        early.task, split, model=model, like="repruned", initial="model", seed=3
    )
    assert efface.audit(model, after, split, [reference])["mask_iou"]["value"] < 1


def test_other_initial_weights_are_noticed(early: efface.TrainedModel) -> None:
    model = early.copy()
    model.initial = {"seed": 1, "digest": "0" * 64}
    with pytest.raises(MismatchError, match="initial weights"):
        efface.prune(model, AtInit(0.5))


def test_the_epoch_of_rewinding_survives_the_file(
    early: efface.TrainedModel, tmp_path: Path, split: efface.Split
) -> None:
    path = early.save(tmp_path / "m.st")
    loaded = efface.load(path, early.task)
    assert rewind_epoch(loaded) == 2
    assert rewind_epoch(efface.forget(loaded, split, "finetune")) is None
    assert efface.prune(loaded, OMP(0.5)).digest == efface.prune(early, OMP(0.5)).digest


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_repruned_reference_is_made_like_the_model(
    early: efface.TrainedModel, split: efface.Split, name: str
) -> None:
    model = efface.prune(early, SCHEDULES[name])
    reference = efface.retrain(early.task, split, model=model, like="repruned", seed=3)
    assert reference.lineage[-1].method == model.lineage[-1].method
    assert reference.sparsity == model.sparsity
    assert reference.mask != model.mask
    if name in ("omp", "imp"):
        assert rewind_epoch(reference) == 2
        assert reference.rewind is not None
        assert early.rewind is not None
        assert weights_digest(reference.rewind) != weights_digest(early.rewind)
    else:
        assert reference.rewind is None
    assert set(reference.lineage[-1].detail["images"]) == {"retain"}


# --- iterative ------------------------------------------------------------------------------------


def test_rounds_of_imp(early: efface.TrainedModel) -> None:
    """Sparsity 1 − 0.8^k after k rounds; the last exactly as asked; nested by magnitude."""
    assert IMP(0.95).rounds() == [*(pytest.approx(1 - 0.8**k) for k in range(1, 14)), 0.95]
    assert IMP(0.2).rounds() == [0.2]
    assert IMP(0.0).rounds() == [0.0]
    assert IMP(1 - 0.8**7).rounds()[-1] == 1 - 0.8**7
    assert len(IMP(1 - 0.8**7).rounds()) == 7
    seen: list[efface.TrainedModel] = []
    last = early
    for k in range(1, 5):  # a round at a time, by hand
        scores = {n: p.abs() for n, p in params(last).items()}
        if last.mask is not None:
            scores = {
                n: s.masked_fill(~last.mask[n], -1.0) if n in last.mask else s
                for n, s in scores.items()
            }
        goal = min(1 - 0.8**k, 0.55)
        wanted = select(scores, goal, scope_names(early.network))
        last = efface.prune(early, IMP(goal))
        assert last.mask == wanted
        seen.append(last)
    whole = efface.prune(early, IMP(0.55))
    assert [(f["epochs"], f["begun"]) for f in whole.lineage[-1].detail["fits"]] == [(4, 2)] * 4
    assert whole.digest == last.digest


def test_pruning_on_from_a_pruned_model(early: efface.TrainedModel) -> None:
    once = efface.prune(early, IMP(0.36))
    assert once.mask is not None
    for pruner in (IMP(0.6), Gradual(0.6, epochs=2)):
        more = efface.prune(once, pruner)
        assert more.mask is not None
        assert all((once.mask[n] | ~more.mask[n]).all() for n in more.mask)
        with pytest.raises(MethodError, match=r"is pruned to .* already"):
            efface.prune(once, dataclasses.replace(pruner, sparsity=0.2))


@pytest.mark.parametrize("kill", [3, 33, 65, 75, 96])
def test_imp_goes_on_in_the_round_in_which_it_was_killed(
    early: efface.TrainedModel, tmp_path: Path, kill: int
) -> None:
    """Three rounds of 32 steps: finished ones are not run again, and the bytes are the same."""
    pruner, each = IMP(0.488), 32
    whole = efface.prune(early, pruner, seed=1)
    journal = Journal(tmp_path / "j", {}, 0.0)
    with pytest.raises(KilledError):
        efface.prune(early, pruner, seed=1, journal=journal, progress=Counter(kill))
    counter = Counter()
    after = efface.prune(
        early, pruner, seed=1, journal=Journal(tmp_path / "j", {}, 0.0), progress=counter
    )
    assert (after.digest, after.mask) == (whole.digest, whole.mask)
    assert after.lineage[-1].detail["fits"] == whole.lineage[-1].detail["fits"]
    assert after.lineage[-1].detail["images"] == whole.lineage[-1].detail["images"]
    at = (kill - 1) // each + 1
    assert counter.said[0][0] == f"round {at} of 3"
    assert len(counter.said) == 3 * each - kill + 1  # the last step's commit was not reached


def test_a_finished_round_is_kept_between_two_commits(
    early: efface.TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With commits far apart the end of a fit is one, unless the fit took no time at all."""
    import efface.fitting as fitting

    class Fast:
        """A clock on which every look takes a tenth of a second."""

        def __init__(self) -> None:
            self.now = 0.0

        def monotonic(self) -> float:
            self.now += 0.1
            return self.now

        def process_time(self) -> float:
            return 0.0

    monkeypatch.setattr(fitting, "time", Fast())
    journal = Journal(tmp_path / "j", {}, 1e9)
    with pytest.raises(KilledError):
        efface.prune(early, IMP(0.488), journal=journal, progress=Counter(70))
    kept = sorted(path.name for path in (tmp_path / "j").glob("fit-*"))
    assert kept == ["fit-0000.safetensors", "fit-0001.safetensors"]
    counter = Counter()
    efface.prune(early, IMP(0.488), journal=Journal(tmp_path / "j", {}, 1e9), progress=counter)
    assert {label for label, _, _ in counter.said} == {"round 3 of 3"}


# --- gradual --------------------------------------------------------------------------------------


def watched(
    model: efface.TrainedModel, pruner: Gradual, journal: Journal | None, kill: int | None
) -> tuple[list[Mask], str]:
    """Run a gradual pruner; the mask at every step, and the digest at the end."""
    model, masks, steps = model.copy(), [], 0

    def progress(label: str, step: int, total: int) -> None:
        nonlocal steps
        steps += 1
        masks.append(model.mask or Mask({}))
        if steps == kill:
            raise KilledError

    fit = Fit(model.task, 1, subject=model, journal=journal, progress=progress)
    pruner(model, torch.arange(120), fit)
    return [*masks, model.mask or Mask({})], model.digest


def test_gradual_follows_the_cubic_schedule(early: efface.TrainedModel) -> None:
    masks, _ = watched(early, Gradual(0.8, epochs=8), None, None)
    total = masks[-1].total
    for epoch in range(8):
        t = min(epoch / 6, 1.0)  # a quarter of the epochs is held
        wanted = 0.8 * (1 - (1 - t) ** 3)
        for mask in masks[8 * epoch : 8 * epoch + 8]:
            assert (total - mask.kept if mask else 0) == round(wanted * total)
    for one, two in itertools.pairwise(masks[8:]):
        assert all((one[n] | ~two[n]).all() for n in two)
    assert masks[48] == masks[-1]


def test_gradual_without_epochs_prunes_at_once(early: efface.TrainedModel) -> None:
    after = efface.prune(early, Gradual(0.5, epochs=0))
    assert after.digest == efface.prune(early, OneShot(0.5, recovery=0)).digest


@pytest.mark.parametrize("kill", [4, 8, 9, 17, 30])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_gradual_goes_on_after_a_kill(
    early: efface.TrainedModel, tmp_path: Path, kill: int, seconds: float
) -> None:
    pruner = Gradual(0.8, epochs=4)
    whole = watched(early, pruner, None, None)
    with pytest.raises(KilledError):
        watched(early, pruner, Journal(tmp_path / "j", {}, seconds), kill)
    masks, digest = watched(early, pruner, Journal(tmp_path / "j", {}, seconds), None)
    assert digest == whole[1]
    assert masks == whole[0][-len(masks) :]


# --- at initialisation ----------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["synflow", "snip", "grasp", "magnitude", "random", "taylor"])
def test_pruning_at_initialisation(early_conv: efface.TrainedModel, criterion: str) -> None:
    once = efface.prune(early_conv, OneShot(0.9, recovery=0, allow_dead_layers=True))
    pruner = AtInit(0.5, criterion=criterion, epochs=0)
    after = efface.prune(once, pruner)  # the old mask does not matter
    assert after.digest == efface.prune(early_conv, pruner).digest
    assert early_conv.initial is not None
    fresh = Fit(early_conv.task, int(early_conv.initial["seed"])).fresh().state_dict()
    assert after.mask is not None
    for key, tensor in after.network.state_dict().items():
        keep = after.mask.get(key, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor, torch.where(keep, fresh[key], torch.zeros_like(fresh[key])))
    trained = efface.prune(early_conv, dataclasses.replace(pruner, epochs=None))
    assert trained.mask == after.mask
    (fit,) = trained.lineage[-1].detail["fits"]
    assert fit["epochs"] == 4


def test_fresh_batch_norm_uses_the_batch(early_conv: efface.TrainedModel) -> None:
    after = efface.prune(early_conv, AtInit(0.5, criterion="snip", epochs=0), seed=3)
    assert early_conv.initial is not None
    fresh = Fit(early_conv.task, int(early_conv.initial["seed"])).fresh()
    fit = Fit(early_conv.task, 3, path="prune")
    batches = shown("snip", torch.arange(48), fit)
    for batch_stats in (True, False):
        scores = Snip(batch_stats=batch_stats)(fresh, batches, fit.loss)
        same = after.mask == select(scores, 0.5, scope_names(fresh))
        assert same is batch_stats


def test_synflow_prunes_in_a_hundred_rounds(early_conv: efface.TrainedModel) -> None:
    """Each round scores what is left, and prunes the same fraction of it."""
    pruner = AtInit(0.9, epochs=0)
    found = efface.prune(early_conv, pruner).mask
    model = efface.prune(early_conv, AtInit(0.0, epochs=0))
    names = scope_names(model.network)
    weights = {n: p.detach().double().abs() for n, p in model.network.named_parameters()}
    keep = {n: torch.ones_like(weights[n], dtype=torch.bool) for n in names}
    total = sum(k.numel() for k in keep.values())
    for k in range(1, 101):
        scores = flow_scores(model.network, {n: weights[n] * keep[n] for n in names})
        left = total - round((1 - 0.1 ** (k / 100)) * total)
        ranked = sorted(
            (
                (float(scores[n].view(-1)[i]), -place, n, i)
                for place, (n, i) in enumerate(
                    (n, i) for n in names for i in range(keep[n].numel())
                )
                if keep[n].view(-1)[i]
            ),
            reverse=True,
        )
        keep = {n: torch.zeros_like(keep[n]) for n in names}
        for _, _, n, i in ranked[:left]:
            keep[n].view(-1)[i] = True
    assert found == Mask(keep)
    with pytest.raises(MethodError, match=r"4\.weight"):  # in one round a layer collapses
        efface.prune(early_conv, AtInit(0.9, epochs=0, rounds=1))


def flow_scores(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {n: t.abs().double() for n, t in network.state_dict().items()}
    own = {n: t.clone().requires_grad_() for n, t in weights.items()}
    twin = network.eval()
    ones = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    out = torch.func.functional_call(twin, {**state, **own}, (ones,)).sum()
    grads = torch.autograd.grad(out, list(own.values()))
    return {n: t.detach() * g for (n, t), g in zip(own.items(), grads, strict=True)}


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a task and a model whose rewind weights are kept."""
    with workplace(tmp_path, monkeypatch) as folder:
        write_task(folder)
        done("train mine:task --rewind 3 --out m.st")
        yield folder


def test_pruning_by_name_and_a_reference_like_it(lab: Path) -> None:
    words = "--set scope=all --set rate=0.3"
    done(f"prune mine:task --model m.st --method imp --sparsity 0.5 {words} --out p.st")
    assert done("show p.st --json").json["sparsity"] == pytest.approx(0.5, abs=0.02)
    (step,) = [s for s in done("show p.st --json").json["lineage"] if s["verb"] == "prune"]
    assert (step["method"], step["settings"]["rate"]) == ("imp", 0.3)
    done("retrain mine:task --class 1 --model p.st --like repruned --out r.st")
    lineage = done("show r.st --json").json["lineage"]
    assert [s["method"] for s in lineage] == ["—", "imp"]


def test_a_method_file_with_a_pruner(lab: Path) -> None:
    (lab / "m.toml").write_text(
        'method = "prune-first"\ninner = "finetune"\n'
        'pruner = {method = "omp", sparsity = 0.75, scope = "all", epochs = 2}\n'
    )
    done("forget mine:task --model m.st --class 1 --method m.toml --out f.st")
    step = done("show f.st --json").json["lineage"][-1]
    assert step["settings"]["pruner"]["method"] == "omp"
    assert done("show f.st --json").json["sparsity"] == pytest.approx(0.75, abs=0.02)


def test_slips_of_the_command_line(lab: Path) -> None:
    prune = "prune mine:task --model m.st --out p.st"
    answer = run(f"{prune} --method opm")
    assert (answer.code, answer.out) == (2, "")
    assert "did you mean 'omp'?" in answer.err
    answer = run("forget mine:task --model m.st --class 1 --method snip --out p.st")
    assert answer.code == 2
    assert "snip is a pruner; use efface prune" in answer.err
    words = "--sparsity 0.9999 --set recovery=0"
    answer = run(f"{prune} {words}")
    assert answer.code == 2
    assert "--allow-dead-layers" in answer.err
    assert not (lab / "p.st").exists()
    answer = done(f"{prune} {words} --allow-dead-layers")
    assert answer.err.startswith("note: ")
    assert "lost all weights" in answer.err
    assert ".py" not in answer.err


def test_a_repruned_reference_of_prune_first(
    early: efface.TrainedModel, split: efface.Split
) -> None:
    after = efface.forget(early, split, PruneFirst(OneShot(0.6, recovery=1), FineTune(epochs=1)))
    reference = efface.retrain(early.task, split, model=after, like="repruned", seed=3)
    assert reference.sparsity == after.sparsity
    assert reference.lineage[-1].method["method"] == "one-shot"
