"""The contract of unlearners, over every one that is found, and what each is by its definition."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.data import Batch, LoadedRecords
from efface.errors import MethodError, NeedsError, SelectionError
from efface.files import canonical
from efface.fitting import Fit, History
from efface.mask import Mask
from efface.sparsify import OneShot, Pruner
from efface.task import Settings
from efface.trained import weights_digest
from efface.unlearn import (
    DFMU,
    Chain,
    ClassPruning,
    FineTune,
    FromDense,
    GradientAscent,
    L1Sparse,
    LogitOff,
    Masked,
    NegGradPlus,
    PruneFirst,
    RandomLabel,
    Retrain,
    Unlearner,
    Unprune,
    build,
    methods,
    to_json,
)
from efface.unlearn.ascent import pick_cap
from efface.unlearn.base import filled, fit_settings, needs_of
from efface.updates.recorder import Recorder

pytestmark = pytest.mark.filterwarnings(  # what amnesiac unlearning and replay say beforehand
    "ignore:.*(takes back|taken back by|was trained further|are trained again):UserWarning",
    "ignore:the part of D_r:UserWarning",
    "ignore:(the blocks tell|the .* blocks that were|every block of|no block was):UserWarning",
    "ignore:the .* scored records:UserWarning",
)
NAMES = sorted(methods())
NewTask = Callable[..., efface.Task]


def slots(cls: type[Any]) -> list[str]:
    """The fields of a wrapper that take an unlearner."""
    hints = typing.get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if hints[f.name] is Unlearner]


WRAPPERS = [(name, slot) for name in NAMES for slot in slots(methods()[name])]
REFUSED = {  # there is no mask in the dense weights; a density that is gone cannot be restored
    ("from-dense", "from-dense"): "nothing is pruned",
    ("from-dense", "unprune"): "nothing is pruned",
    ("unprune", "prune-first"): "pruned further",
    ("unprune", "dfmu"): "pruned further",
    **{(w, "replay"): "put from-dense around" for w, _ in WRAPPERS if w != "from-dense"},
    **{
        ("layerwise-partial", n): "reads the training's log"
        for n in ("amnesiac", "amnesiac-control", "replay")
    },
    ("frugal", "replay"): "trains on all that the log has recorded",
}
ITERATIVE = [n for n in NAMES if "epochs" in {f.name for f in dataclasses.fields(methods()[n])}]

RECALIBRATING = [
    n for n in ITERATIVE if "recalibrate" in str(typing.get_type_hints(methods()[n]).get("bn"))
]


def some_mask(network: nn.Module) -> Mask:
    draw = torch.Generator().manual_seed(1)
    names = [n for n, p in network.named_parameters() if p.ndim > 1][:-1]
    weights = dict(network.named_parameters())
    return Mask({n: torch.rand(weights[n].shape, generator=draw) > 0.4 for n in names})


def example(name: str, network: nn.Module, **given: Any) -> Any:
    """A small instance of any method, wrappers around small ones."""
    cls = methods()[name]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if hint is Unlearner:
            values[field.name] = FineTune(epochs=1)
        elif hint is Mask:
            values[field.name] = some_mask(network)
        elif hint is Pruner:
            values[field.name] = OneShot(sparsity=0.7, recovery=1)
        elif field.name in {"epochs", "repair"}:
            values[field.name] = 2
        elif field.name == "force":
            values["force"] = True
        elif field.name == "control":  # nearly every step of these tests holds D_f
            values["control"] = "same-norm"
        elif field.name == "criterion":
            values["criterion"] = "magnitude"
    return cls(**values | given)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and a split that have all that a method needs."""

    model: efface.TrainedModel
    split: efface.Split

    def run(self, method: Any, **options: Any) -> efface.TrainedModel:
        return efface.forget(self.model, self.split, method, **{"seed": 7} | options)


@pytest.fixture(scope="session")
def rewindable(task: efface.Task, tmp_path_factory: pytest.TempPathFactory) -> efface.TrainedModel:
    """Recorded, with rewind weights."""
    folder = tmp_path_factory.mktemp("recorded") / "log"
    return efface.train(task, seed=0, rewind=2, recorder=Recorder(folder, keep=1.0))


@pytest.fixture(scope="session")
def complete(rewindable: efface.TrainedModel) -> efface.TrainedModel:
    """A pruned model with everything that one can keep."""
    return efface.prune(rewindable, OneShot(sparsity=0.6, recovery=1), keep_dense=True)


@pytest.fixture
def setting_for(
    trained: efface.TrainedModel,
    complete: efface.TrainedModel,
    rewindable: efface.TrainedModel,
    split: efface.Split,
    class_split: efface.Split,
) -> Callable[[Any], Setting]:
    def choose(method: Any) -> Setting:
        needs = needs_of(method)
        more = needs & {"rewind", "log"}
        model = complete if "mask" in needs else rewindable if more else trained
        return Setting(model, class_split if "class" in needs else split)

    return choose


def outcome(model: efface.TrainedModel) -> tuple[str, str | None]:
    return model.digest, model.mask.digest if model.mask else None


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_everything_left_as_found(
    trained: efface.TrainedModel, setting_for: Any, name: str
) -> None:
    method = example(name, trained.network)
    setting = setting_for(method)
    original, before = setting.model, setting.model.digest
    lineage = original.lineage
    modes = [m.training for m in original.network.modules()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = setting.run(method)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4321)
    assert outcome(setting.run(method)) == outcome(first)
    assert torch.get_num_threads() == threads
    # the input is untouched, and shares nothing with the output
    assert original.digest == before
    assert (original.lineage, original.forgotten.tags) == (lineage, ())
    assert [m.training for m in original.network.modules()] == modes
    assert [m.training for m in first.network.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in first.network.parameters())
    own = {t.data_ptr() for t in original.network.state_dict().values()}
    assert not own & {t.data_ptr() for t in first.network.state_dict().values()}
    # it did something, and nothing broke
    assert first.digest != before
    assert all(torch.isfinite(t).all() for t in first.network.state_dict().values())
    assert len(first.forgotten.tags) == len(setting.split.forget)
    assert first.lineage[-1].method == to_json(filled(method, original.task))
    assert first.lineage[-1].parent == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [False, True])
def test_mask_is_exact_afterwards(
    complete: efface.TrainedModel, conv_task: efface.Task, name: str, images: bool, tmp_path: Path
) -> None:
    model = complete
    if images:
        model = efface.train(conv_task, rewind=1, recorder=Recorder(tmp_path / "log", keep=1.0))
        model = efface.prune(model, OneShot(0.5, scope="conv", recovery=0), keep_dense=True)
    method = example(name, model.network)
    split = efface.Split.by_class(model.task, 1)
    if name == "replay":
        with pytest.raises(MethodError, match="put from-dense around"):
            efface.forget(model, split, method)
        return
    after = efface.forget(model, split, method, seed=1)
    assert after.mask is not None
    own = PruneFirst | Masked | Unprune | FromDense | ClassPruning | DFMU
    brings_its_own = isinstance(method, own)
    assert brings_its_own or after.mask == model.mask
    if isinstance(method, Unprune | FromDense):
        kept = [layer["kept"] for layer in model.mask.layers()]
        assert [layer["kept"] for layer in after.mask.layers()] == kept
    weights = dict(after.network.named_parameters())
    for layer, keep in after.mask.items():
        gone = weights[layer][~keep]
        assert (gone == 0).all()
        assert not torch.signbit(gone).any()


@pytest.mark.parametrize("name", ITERATIVE)
def test_no_epochs_are_the_identity(
    trained: efface.TrainedModel, setting_for: Any, conv_trained: efface.TrainedModel, name: str
) -> None:
    method = example(name, trained.network, epochs=0)
    setting = setting_for(method)
    assert setting.run(method).digest == setting.model.digest
    split = efface.Split.by_class(conv_trained.task, 0)
    assert efface.forget(conv_trained, split, method).digest == conv_trained.digest


@pytest.mark.parametrize("name", ITERATIVE)
def test_the_seed_matters(trained: efface.TrainedModel, setting_for: Any, name: str) -> None:
    method = example(name, trained.network)
    setting = setting_for(method)
    assert setting.run(method, seed=1).digest != setting.run(method, seed=2).digest


class Spy:
    """Records that note which positions were asked for."""

    def __init__(self, records: Any) -> None:
        self.records, self.seen = records, set[int]()
        self.targets, self.in_memory = records.targets, records.in_memory

    def __len__(self) -> int:
        return len(self.records)

    def batches(self, plan: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for batch in self.records.batches(plan, device):
            self.seen.update(batch.positions.tolist())
            yield batch

    def raw(self, position: int) -> Any:
        return self.records.raw(position)


@pytest.mark.parametrize(
    ("name", "bn"),
    [*((name, None) for name in NAMES), *((name, "recalibrate") for name in RECALIBRATING)],
)
def test_reads_only_what_it_declares(
    new_task: NewTask, setting_for: Any, name: str, bn: str | None
) -> None:
    task = new_task()
    assert task.data_fingerprint  # of the records themselves
    spy = Spy(task.records)
    task.__dict__["records"] = spy
    method = example(name, task.network(), **({"bn": bn} if bn else {}))
    chosen = setting_for(method)
    model = efface.TrainedModel(
        task,
        copy.deepcopy(chosen.model.network),
        mask=chosen.model.mask,
        initial=chosen.model.initial,
        rewind=chosen.model.rewind,
        dense=chosen.model.dense,
        lineage=chosen.model.lineage,
    )
    model.log = chosen.model.log
    forget, retain = chosen.split.forget, chosen.split.retain
    split = efface.Split(task, forget, retain, chosen.split.selector)
    efface.forget(model, split, method, seed=0)
    needs = needs_of(method)
    assert ("forget" in needs) or not spy.seen & set(forget.tolist())
    assert ("retain" in needs) or not spy.seen & set(retain.tolist())
    for_batch_norm_alone = name == "amnesiac-control"  # of which there is none here
    assert not {"forget", "retain"} & needs or spy.seen or for_batch_norm_alone
    assert spy.seen <= set(forget.tolist()) | set(retain.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_what_an_earlier_request_removed_is_never_read(
    new_task: NewTask, name: str, tmp_path: Path
) -> None:
    task = new_task()
    assert task.data_fingerprint
    recorder = Recorder(tmp_path / "log", keep=1.0)
    model = efface.forget(
        efface.train(task, recorder=recorder),
        efface.Split.where(task, "age < 25"),
        FineTune(epochs=0),
    )
    gone = set(model.forgotten.positions(task).tolist())
    assert len(gone) > 5
    method = example(name, model.network)
    if needs_of(method) & {"rewind", "dense"}:
        with pytest.raises(NeedsError, match="keeps none"):
            efface.forget(model, efface.Split.by_class(task, 2), method)
        return
    if "mask" in needs_of(method):
        model = efface.prune(model, OneShot(0.5, recovery=1))
    spy = Spy(task.records)
    task.__dict__["records"] = spy
    split = efface.Split.by_class(task, 2)
    assert gone & set(split.forget.tolist())
    assert gone & set(split.retain.tolist())
    after = efface.forget(model, split, method)
    assert not spy.seen & gone
    assert set(after.forgotten.positions(task).tolist()) == gone | set(split.forget.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_settings_round_trip_through_json(trained: efface.TrainedModel, name: str) -> None:
    method = example(name, trained.network)
    options = json.loads(canonical(to_json(method)))
    assert options.pop("method") == name
    if name == "masked":  # a mask is named by its digest: it goes with the model
        assert options["mask"] == {"digest": method.mask.digest}
        return
    assert build(name, options) == method
    as_text = {k: v if isinstance(v, dict) else str(v) for k, v in options.items()}
    assert build(name, as_text) == method


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_refused_before_anything_runs(
    trained: efface.TrainedModel,
    rewindable: efface.TrainedModel,
    task: efface.Task,
    split: efface.Split,
    name: str,
) -> None:
    method = example(name, trained.network)
    nobody, few = torch.tensor([], dtype=torch.long), torch.arange(5)
    without = {
        "retain": (rewindable, efface.Split(task, few, nobody, {"kind": "class", "class": 0})),
        "forget": (trained, efface.Split(task, nobody, few, {"kind": "class", "class": 0})),
        "class": (trained, split),
        "mask": (trained, split),
        "log": (trained, split),
        "rewind": (trained, split),
        "dense": (trained, split),
        "initial": (efface.adopt(task, trained.network.state_dict()), split),
    }
    needs = needs_of(method)
    assert needs <= set(without)
    for need in needs:
        model, poor = without[need]
        with pytest.raises(NeedsError, match=method.name):
            efface.forget(model, poor, method)


@pytest.mark.parametrize(("wrapper", "slot"), WRAPPERS)
@pytest.mark.parametrize("name", NAMES)
def test_inside_a_wrapper_it_still_does_something(
    complete: efface.TrainedModel, class_split: efface.Split, wrapper: str, slot: str, name: str
) -> None:
    trained = complete
    nothing = FineTune(epochs=0)
    idle = example(wrapper, trained.network, **dict.fromkeys(slots(methods()[wrapper]), nothing))
    inner = example(name, trained.network)
    busy = dataclasses.replace(idle, **{slot: inner})
    assert needs_of(busy) >= needs_of(inner) - {"mask"}
    if (wrapper, name) in REFUSED:
        with pytest.raises(MethodError, match=REFUSED[wrapper, name]):
            efface.forget(trained, class_split, busy, seed=2)
        return
    done = efface.forget(trained, class_split, busy, seed=2)
    assert done.digest != efface.forget(trained, class_split, idle, seed=2).digest


@pytest.mark.parametrize("name", ["finetune", "gradient-ascent", "random-label", "chain"])
def test_loaded_data_leaves_the_global_state_as_found(
    new_task: NewTask, split: efface.Split, name: str
) -> None:
    fresh = new_task()
    lists = {
        part: list(zip(*getattr(fresh, part), strict=True)) for part in ("train", "validation")
    }
    task = new_task(**{part: LoadedRecords(pairs) for part, pairs in lists.items()})
    model = efface.TrainedModel(task, task.network())
    chosen = efface.Split(task, split.forget, split.retain, split.selector)
    inner = {"second": GradientAscent(epochs=1)} if name == "chain" else {}
    state = torch.get_rng_state()
    after = efface.forget(model, chosen, example(name, model.network, **inner))
    assert torch.equal(torch.get_rng_state(), state)
    assert after.digest != model.digest


def test_selections_of_nobody_and_of_everybody_are_refused(task: efface.Task) -> None:
    empty: list[Callable[[], efface.Split]] = [
        lambda: efface.Split.by_ids(task, []),
        lambda: efface.Split.where(task, "age > 1000"),
        lambda: efface.Split.random(task, 0.001),
    ]
    for make in empty:
        with pytest.raises(SelectionError, match="forget set is empty"):
            make()
    for total in (
        lambda: efface.Split.by_ids(task, task.ids_),
        lambda: efface.Split.where(task, "age > 0"),
    ):
        with pytest.raises(SelectionError, match="everything"):
            total()
    with pytest.raises(SelectionError, match="class 9 does not exist"):
        efface.Split.by_class(task, 9)


def test_a_request_that_was_met_already_is_refused(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    once = efface.forget(trained, split, FineTune(epochs=0))
    with pytest.raises(SelectionError, match="earlier request"):
        efface.forget(once, split, FineTune(epochs=0))


# --- each by its definition -----------------------------------------------------------------------


class Gradients:
    """A constraint that keeps the gradient and the weights of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def begin(self, params: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in params.items()})
        self.weights.append({n: p.detach().clone() for n, p in params.items()})

    def end(self, params: Any) -> None:
        pass


def bound(model: efface.TrainedModel, task: efface.Task, seed: int = 7) -> tuple[Fit, Gradients]:
    record = Gradients()
    return Fit(task, seed, subject=model).with_(record), record


def gradient(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def mean_loss(network: nn.Module, task: efface.Task, positions: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy by a loop over records, in the network's own type."""
    rows = []
    for p in positions.tolist():
        z = network(task.train[0][p : p + 1].to(next(network.parameters()).dtype))[0]
        rows.append(z.exp().sum().log() - z[labels[p]])
    return torch.stack(rows).mean()


def check_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, g in found.items():
        assert torch.allclose(g.double(), wanted[name], atol=1e-5), name


@pytest.fixture
def whole(new_task: NewTask) -> efface.Task:
    """The task with one batch an epoch and plain gradient steps."""
    return new_task(
        fit=Settings(
            epochs=6, batch_size=500, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant"
        )
    )


@pytest.fixture
def apart(
    whole: efface.Task, trained: efface.TrainedModel, split: efface.Split
) -> tuple[efface.TrainedModel, efface.Split, nn.Module]:
    """A model of ``whole``, a split of it, and the network in float64."""
    model = efface.TrainedModel(whole, copy.deepcopy(trained.network))
    chosen = efface.Split(whole, split.forget, split.retain, split.selector)
    return model, chosen, copy.deepcopy(trained.network).double()


@pytest.mark.parametrize("schedule", ["decay", "constant", "grow"])
def test_l1_penalty_and_its_schedule(apart: Any, whole: efface.Task, schedule: Any) -> None:
    model, split, _ = apart
    alpha, epochs = 0.5, 4
    plain = efface.TrainedModel(whole, copy.deepcopy(model.network))
    fit, with_penalty = bound(model, whole)
    L1Sparse(alpha, schedule, epochs=epochs, lr=1e-9)(model, split, fit)
    fit, without = bound(plain, whole)
    L1Sparse(0.0, schedule, epochs=epochs, lr=1e-9)(plain, split, fit)
    for epoch in range(epochs):
        gamma = {
            "decay": alpha * (1 - epoch / epochs),
            "constant": alpha,
            "grow": alpha * epoch / epochs,
        }[schedule]
        for name, g in with_penalty.steps[epoch].items():
            sign = torch.sign(with_penalty.weights[epoch][name])
            assert torch.allclose(g - without.steps[epoch][name], gamma * sign, atol=1e-5), name


def test_l1_without_penalty_is_fine_tuning(setting_for: Any) -> None:
    setting = setting_for(FineTune())
    tuned = setting.run(FineTune(epochs=2, lr=0.03))
    assert setting.run(L1Sparse(alpha=0.0, epochs=2, lr=0.03)).digest == tuned.digest
    strong = setting.run(L1Sparse(alpha=0.05, epochs=2, lr=0.03))

    def norm(model: efface.TrainedModel) -> float:
        return sum(float(p.detach().abs().sum()) for p in model.network.parameters())

    assert norm(strong) < 0.9 * norm(tuned)


def test_fine_tuning_descends_on_retained_records_only(apart: Any, whole: efface.Task) -> None:
    model, split, twin = apart
    fit, record = bound(model, whole)
    FineTune(epochs=1, lr=0.01)(model, split, fit)
    wanted = gradient(twin, mean_loss(twin, whole, split.retain, whole.train[1]))
    check_gradient(record.steps[0], wanted)


def test_ascent_climbs_until_the_cap(apart: Any, whole: efface.Task) -> None:
    model, split, twin = apart
    fit, record = bound(model, whole)
    cap = 1.5
    GradientAscent(epochs=40, lr=0.3, cap=cap)(model, split, fit)
    wanted = gradient(twin, -mean_loss(twin, whole, split.forget, whole.train[1]))
    check_gradient(record.steps[0], wanted)
    losses = []
    for weights in record.weights:
        twin.load_state_dict(weights)
        losses.append(float(mean_loss(twin, whole, split.forget, whole.train[1]).detach()))
    crossing = next(i for i, loss in enumerate(losses) if loss > cap)
    assert 0 < crossing < 39
    for loss, step in zip(losses, record.steps, strict=True):
        assert (loss > cap) == all((g == 0).all() for g in step.values())
    assert losses[crossing:] == [losses[crossing]] * (40 - crossing)
    assert losses[0] < losses[crossing]


@pytest.mark.parametrize("cap", [0.05, 5.0])
def test_neggrad_plus_weighs_both_sides(apart: Any, whole: efface.Task, cap: float) -> None:
    model, split, twin = apart
    fit, record = bound(model, whole)
    NegGradPlus(beta=0.3, cap=cap, epochs=1, lr=0.01)(model, split, fit)
    forget = mean_loss(twin, whole, split.forget, whole.train[1])
    assert (float(forget.detach()) > cap) == (cap < 1)
    climbed = torch.clamp(forget, max=cap)
    retain = mean_loss(twin, whole, split.retain, whole.train[1])
    check_gradient(record.steps[0], gradient(twin, retain - 0.3 * climbed))


def test_natural_caps(
    task: efface.Task,
    new_task: NewTask,
    trained: efface.TrainedModel,
    split: efface.Split,
    class_split: efface.Split,
) -> None:
    fit = Fit(task)
    assert pick_cap(0.7, trained, class_split, fit) == 0.7
    assert pick_cap(None, trained, class_split, fit) == 8.0
    network = copy.deepcopy(trained.network).double()
    losses = [
        float(F.cross_entropy(network(x[None].double()), y[None]).detach())
        for x, y in zip(*task.validation, strict=True)
    ]
    found = pick_cap(None, trained, split, fit)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert fit.meter.facts["cap"] == found
    poor = new_task(validation=None)
    assert pick_cap(None, trained, split, Fit(poor)) == pytest.approx(math.log(3) / 2)


@dataclasses.dataclass(frozen=True)
class StillFit(Fit):
    """A fit that notes what it is asked for and trains nothing."""

    asked: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self, *args: Any, label: str | None = None) -> History:  # type: ignore[override]
        self.asked.append(args)
        return []


def test_random_labels_are_wrong_and_drawn_once(
    task: efface.Task, trained: efface.TrainedModel, split: efface.Split
) -> None:
    def labels(forget: Tensor, seed: int = 0) -> Tensor:
        everyone = torch.arange(120)
        chosen = efface.Split(task, forget, everyone[~torch.isin(everyone, forget)], {})
        fit = StillFit(task, seed)
        RandomLabel(epochs=3)(trained.copy(), chosen, fit)
        ((_, _, streams, settings),) = fit.asked
        (stream,) = streams.values()
        assert sorted(stream.positions.tolist()) == list(range(120))
        assert settings.epochs == 3
        return typing.cast("Tensor", stream.targets)

    drawn, own = labels(split.forget), task.records.targets
    assert (drawn[split.forget] != own[split.forget]).all()
    assert torch.equal(drawn[split.retain], own[split.retain])
    assert drawn.min() >= 0
    assert drawn.max() < 3
    for label in range(3):  # both wrong labels occur
        there = drawn[split.forget][own[split.forget] == label]
        assert len(set(there.tolist())) == 2
    # what a record gets depends on nobody else
    fewer = labels(split.forget[::2])
    assert torch.equal(fewer[split.forget[::2]], drawn[split.forget[::2]])
    assert not torch.equal(labels(split.forget, seed=1), drawn)


def test_random_label_trains_on_them(apart: Any, whole: efface.Task) -> None:
    model, split, twin = apart
    still = StillFit(whole, 7)
    method = RandomLabel(epochs=1, lr=0.01)
    method(model, split, still)
    labels = still.asked[0][2]["all"].targets
    fit, record = bound(model, whole)
    method(model, split, fit)
    check_gradient(
        record.steps[0], gradient(twin, mean_loss(twin, whole, torch.arange(120), labels))
    )


@pytest.mark.parametrize("images", [False, True])
def test_retrain_equals_a_dense_reference(
    trained: efface.TrainedModel, conv_trained: efface.TrainedModel, images: bool
) -> None:
    model = conv_trained if images else trained
    split = efface.Split.random(model.task, 0.2)
    reference = efface.retrain(model.task, split, seed=3)
    assert efface.forget(model, split, Retrain(), seed=3).digest == reference.digest
    # another seed's network and one trained on everything are others
    assert efface.retrain(model.task, split, seed=4).digest != reference.digest
    assert efface.train(model.task, seed=3).digest != reference.digest


def test_retrain_starts_from_fresh_buffers(
    new_conv_task: NewTask, conv_trained: efface.TrainedModel
) -> None:
    task = new_conv_task(fit=Settings(epochs=1, batch_size=12, lr=0.05, bn="frozen"))
    model = efface.TrainedModel(task, copy.deepcopy(conv_trained.network))
    split = efface.Split.random(task, 0.2)
    after = dict(efface.forget(model, split, Retrain()).network.named_buffers())
    fresh = dict(task.network().named_buffers())
    assert int(conv_trained.network[1].num_batches_tracked) > 0
    assert all(torch.equal(after[n], fresh[n]) for n in fresh)


def test_retrain_under_a_mask_equals_the_same_mask_reference(
    pruned: efface.TrainedModel, split: efface.Split
) -> None:
    reference = efface.retrain(pruned.task, split, model=pruned, like="same-mask", seed=3)
    assert outcome(efface.forget(pruned, split, Retrain(), seed=3)) == outcome(reference)


def test_logit_off_lowers_one_bias(
    trained: efface.TrainedModel, class_split: efface.Split, task: efface.Task
) -> None:
    after = efface.forget(trained, class_split, LogitOff())
    for name, new in after.network.state_dict().items():
        old = trained.network.state_dict()[name]
        wanted = old.clone()
        if name == "4.bias":
            wanted[1] -= 100.0
        assert torch.equal(new, wanted), name
    with torch.no_grad():
        old, new = trained.network(task.train[0]), after.network(task.train[0])
    assert (new.argmax(1) != 1).all()
    others = torch.tensor([0, 2])
    assert torch.equal(old[:, others], new[:, others])


def test_logit_off_needs_a_bias(new_task: NewTask) -> None:
    task = new_task(network=lambda: nn.Linear(6, 3, bias=False))
    model = efface.TrainedModel(task, task.network())
    with pytest.raises(NeedsError, match="bias"):
        efface.forget(model, efface.Split.by_class(task, 1), LogitOff())


# --- wrappers -------------------------------------------------------------------------------------


def test_masked_installs_its_mask_and_then_unlearns_under_it(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    mask = some_mask(trained.network)
    inner = FineTune(epochs=1)
    by_hand = trained.copy()
    by_hand.set_mask(mask)
    after = efface.forget(trained, split, Masked(inner, mask), seed=2)
    assert after.mask == mask
    assert after.digest == efface.forget(by_hand, split, inner, seed=2).digest


def test_prune_first_recovers_on_retained_records_then_runs_the_inner_method(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    wrapped = PruneFirst(OneShot(0.8, recovery=1), FineTune(epochs=0))
    after = efface.forget(trained, split, wrapped, seed=2)
    assert after.sparsity == pytest.approx(0.8, abs=0.005)
    assert after.lineage[-1].detail["images"] == {"retain": len(split.retain)}


def test_a_chain_runs_first_then_second(trained: efface.TrainedModel, split: efface.Split) -> None:
    nothing = FineTune(epochs=0)
    one, two = FineTune(epochs=1, lr=0.01), GradientAscent(epochs=1, lr=0.05)
    both = efface.forget(trained, split, Chain(one, two), seed=2)
    labels = [fit["label"] for fit in both.lineage[-1].detail["fits"]]
    assert labels == ["finetune", "gradient-ascent"]
    half = efface.forget(trained, split, Chain(one, nothing), seed=2)
    assert half.digest not in (both.digest, trained.digest)
    # the same method twice draws anew the second time
    twice = efface.forget(trained, split, Chain(nothing, one), seed=2)
    assert twice.digest != half.digest


# --- options --------------------------------------------------------------------------------------


def test_open_options_take_a_tenth_of_the_epochs_and_half_of_the_rate(task: efface.Task) -> None:
    base = dataclasses.replace(task, fit=Settings(epochs=34, lr=0.2, warmup=0.3, schedule="cosine"))
    settings = fit_settings(Fit(base), FineTune(), epochs=None, lr=None)
    assert (settings.epochs, settings.lr, settings.warmup) == (3, 0.1, 0.0)
    assert settings.schedule == "cosine"
    few = fit_settings(Fit(task), FineTune(), epochs=None, lr=None)
    assert few.epochs == 1


def test_task_defaults_fill_what_is_open(new_task: NewTask) -> None:
    task = new_task(defaults={"l1-sparse": {"alpha": 0.25, "epochs": 3}})
    chained = filled(Chain(L1Sparse(epochs=1), FineTune()), task)
    assert chained == Chain(L1Sparse(alpha=0.25, epochs=1), FineTune())
    wrong = new_task(defaults={"finetune": {"alpha": 1.0}})
    with pytest.raises(MethodError, match="no option 'alpha'"):
        filled(FineTune(), wrong)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("finetune", {"epochs": -1}),
        ("finetune", {"lr": 0}),
        ("finetune", {"epochs": "many"}),
        ("finetune", {"bn": "maybe"}),
        ("gradient-ascent", {"cap": 0}),
        ("l1-sparse", {"alpha": -1e-3}),
        ("neggrad-plus", {"beta": -1}),
        ("neggrad-plus", {"beta": "nan"}),
        ("finetune", {"lr": "nan"}),
        ("finetune", {"lr": "inf"}),
        ("l1-sparse", {"alpha": "inf"}),
        ("prune-first", {"pruner": {"sparsity": 1.0}}),
        ("prune-first", {"pruner": {"recovery": -1}}),
        ("prune-first", {"inner": {"method": "finetun"}}),
        ("masked", {"inner": "finetune", "mask": "x"}),
        ("chain", {"third": "finetune"}),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        build(name, options)


def test_weights_digest_sees_buffers(conv_trained: efface.TrainedModel) -> None:
    copied = conv_trained.copy()
    copied.network[1].running_mean += 1e-3
    assert weights_digest(copied.network.state_dict()) != conv_trained.digest
