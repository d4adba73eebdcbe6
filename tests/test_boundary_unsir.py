"""Boundary shrink, boundary expand and UNSIR: from their definitions, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.data import Batch
from efface.errors import MethodError, NeedsError
from efface.fitting import Fit, History
from efface.journal import Journal
from efface.networks.layers import Normalize
from efface.task import Settings
from efface.unlearn import BoundaryExpand, BoundaryShrink, Frugal, LayerwisePartial, Unsir
from efface.unlearn.boundary import Widened, nearest_labels, pixel_scale
from efface.unlearn.unsir import Noise, Pool, classes_of, error_maximising, sample

NewTask = Callable[..., efface.Task]
ALL = [BoundaryShrink, BoundaryExpand, Unsir]


class Steps:
    """A constraint that keeps gradients and weights as every step finds them."""

    def __init__(self) -> None:
        self.slopes: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def begin(self, params: Any) -> None:
        self.slopes.append({n: p.grad.clone() for n, p in params.items()})
        self.weights.append({n: p.detach().clone() for n, p in params.items()})

    def end(self, params: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class StillFit(Fit):
    """A fit that notes what it is asked for and trains nothing."""

    asked: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self, *args: Any, label: str | None = None) -> History:  # type: ignore[override]
        self.asked.append((label, *args))
        return []


def plain(**more: Any) -> Settings:
    """One batch an epoch, plain gradient steps."""
    values: dict[str, Any] = {"batch_size": 500, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    return Settings(**values | {"schedule": "constant"} | more)


def pixels(n: int = 60) -> tuple[Tensor, Tensor]:
    """Images of bytes: two classes of another brightness, and a third between them."""
    draw, targets = torch.Generator().manual_seed(8), torch.arange(n) % 3
    bright = torch.tensor([60, 190, 120])[targets].view(-1, 1, 1, 1)
    noise = torch.randint(-45, 46, (n, 1, 4, 4), generator=draw)
    return (bright + noise).to(torch.uint8), targets


def pixel_net() -> nn.Module:
    return nn.Sequential(
        Normalize([0.5], [0.25]), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def pixel_task(data: tuple[Tensor, Tensor] | None = None, **more: Any) -> efface.Task:
    data = data or pixels()
    fit = Settings(epochs=5, batch_size=12, lr=0.05)
    return efface.Task(**{"network": pixel_net, "train": data, "test": data, "fit": fit} | more)


# -- nearest incorrect class -----------------------------------------------------------------------


def nearest_by_hand(network: nn.Module, x: Tensor, y: Tensor, bound: float) -> list[int]:
    """One record at a time, in float64: a step up the slope of the loss, the best other class."""
    twin, found = copy.deepcopy(network).double().eval(), []
    low, high = float(x.min()), float(x.max())
    for record, own in zip(x.double(), y.tolist(), strict=True):
        inputs = record[None].clone().requires_grad_()
        z = twin(inputs)[0]
        (z.exp().sum().log() - z[own]).backward()
        assert inputs.grad is not None
        there = record + bound * (high - low) * torch.sign(inputs.grad[0])
        answers = twin(there.clamp(low, high)[None])[0].tolist()
        others = [k for k in range(len(answers)) if k != own]
        found.append(max(others, key=lambda k: answers[k]))
    return found


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("by_class", [False, True])
def test_nearest_incorrect_class(
    trained: efface.TrainedModel,
    split: efface.Split,
    class_split: efface.Split,
    bound: float,
    by_class: bool,
) -> None:
    task, chosen = trained.task, class_split if by_class else split
    fit = Fit(task)
    labels = nearest_labels(trained, chosen.forget, fit, bound)
    x, y = task.train
    wanted = nearest_by_hand(trained.network, x[chosen.forget], y[chosen.forget], bound)
    assert labels[chosen.forget].tolist() == wanted
    assert torch.equal(labels[chosen.retain], y[chosen.retain])
    assert (labels[chosen.forget] != y[chosen.forget]).all()
    assert len(set(wanted)) > 1
    assert 0 <= fit.meter.facts["crossed"] <= len(wanted)


def test_a_longer_step_leaves_the_class_more_often(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    crossed = []
    for bound in (0.0, 0.05, 0.5):
        fit = Fit(trained.task)
        nearest_labels(trained, class_split.forget, fit, bound)
        crossed.append(fit.meter.facts["crossed"])
    assert crossed[0] < crossed[1] < crossed[2]


def test_bytes_are_taken_as_the_pixels_that_they_are() -> None:
    x, y = pixels()
    task, real = pixel_task(), pixel_task((x.float() / 255, y))
    model = efface.train(task)
    twin = efface.TrainedModel(real, copy.deepcopy(model.network))
    forget = efface.Split.by_class(task, 1).forget
    found = nearest_labels(model, forget, Fit(task), 0.1)
    assert torch.equal(found, nearest_labels(twin, forget, Fit(real), 0.1))
    assert pixel_scale("x", model.network, task, forget[:1]) == 255.0
    assert pixel_scale("x", model.network, real, forget[:1]) == 1.0
    # a network that reads bytes as 0…255 is asked so
    raw = pixel_task(forward=lambda network, inputs: network(inputs.float() / 255))
    assert pixel_scale("x", model.network, raw, forget[:1]) == 1.0
    split = efface.Split.by_class(task, 1)
    for cls in ALL:
        assert efface.forget(model, split, cls()).digest != model.digest


def test_shrink_trains_on_those_labels_and_on_nothing_else(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    fit = StillFit(trained.task, 3)
    BoundaryShrink(bound=0.2)(trained.copy(), class_split, fit)
    ((label, _, _, streams, settings),) = fit.asked
    ((name, stream),) = streams.items()
    assert (label, name) == ("boundary-shrink", "forget")
    assert torch.equal(stream.positions, class_split.forget)
    assert torch.equal(
        stream.targets, nearest_labels(trained, class_split.forget, Fit(trained.task), 0.2)
    )
    assert (settings.epochs, settings.lr, settings.bn) == (10, trained.task.fit.lr / 100, "train")
    assert fit.meter.images == {"forget": len(class_split.forget)}


# -- the shadow class ------------------------------------------------------------------------------


def test_expand_descends_on_the_widened_loss(
    new_task: NewTask, trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    task = new_task(fit=plain())
    model = efface.TrainedModel(task, copy.deepcopy(trained.network))
    split = efface.Split(task, class_split.forget, class_split.retain, class_split.selector)
    steps = Steps()
    fit = Fit(task, 3, subject=model).with_(steps)
    BoundaryExpand(epochs=3, lr=0.05)(model, split, fit)
    assert len(steps.weights) == 3
    for now, slopes in zip(steps.weights, steps.slopes, strict=True):
        twin = copy.deepcopy(trained.network).double()
        twin.load_state_dict({n: w.double() for n, w in now.items() if not n.startswith(".")})
        wide = nn.Linear(12, 4).double()
        with torch.no_grad():
            wide.weight.copy_(torch.cat([now["4.weight"], now[".shadow.weight"]]))
            wide.bias.copy_(torch.cat([now["4.bias"], now[".shadow.bias"]]))
        twin[4] = wide  # type: ignore[operator]
        losses = []
        for p in split.forget.tolist():
            z = twin(task.train[0][p : p + 1].double())[0]
            losses.append(z.exp().sum().log() - z[3])
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        wanted = {n: p.grad for n, p in twin.named_parameters()}
        for end in ("weight", "bias"):
            both = torch.cat([slopes[f"4.{end}"], slopes[f".shadow.{end}"]])
            assert torch.allclose(both.double(), wanted[f"4.{end}"], atol=1e-6)
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert torch.allclose(slopes[name].double(), wanted[name], atol=1e-6), name
    # what is left is the network, one plain step further, and no shadow
    assert set(model.network.state_dict()) == set(trained.network.state_dict())
    for name, param in model.network.named_parameters():
        last = steps.weights[-1][name] - 0.05 * steps.slopes[-1][name]
        assert torch.allclose(param, last, atol=1e-7), name
    assert model.network(task.train[0][:2]).shape == (2, 3)
    assert not any(m._forward_hooks for m in model.network.modules())


def test_the_shadow_is_drawn_by_the_seed(trained: efface.TrainedModel) -> None:
    def shadow(seed: int) -> Tensor:
        state = torch.get_rng_state()
        wide = Widened(trained.network, None, Fit(trained.task, seed).generator("shadow"))
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for p in wide.shadow.parameters()])

    assert torch.equal(shadow(1), shadow(1))
    assert not torch.equal(shadow(1), shadow(2))
    assert shadow(1).abs().max() <= 1 / math.sqrt(12)


def test_the_shadow_is_there_only_while_joined(
    trained: efface.TrainedModel,
) -> None:
    network = copy.deepcopy(trained.network)
    wide = Widened(network, None, torch.Generator().manual_seed(0))
    with wide.joined():
        assert network(torch.zeros(1, 6)).shape == (1, 4)
    with pytest.raises(ZeroDivisionError), wide.joined():
        _ = 1 / 0
    assert network(torch.zeros(1, 6)).shape == (1, 3)


def test_the_mask_holds_at_every_step_of_expand(
    pruned: efface.TrainedModel, class_split: efface.Split
) -> None:
    model, steps = pruned.copy(), Steps()
    assert model.mask is not None
    fit = Fit(pruned.task, 3, subject=model).with_(steps)
    BoundaryExpand(epochs=2, lr=0.05)(model, class_split, fit)
    for weights in [*steps.weights, dict(model.network.named_parameters())]:
        for name, keep in model.mask.items():
            assert (weights[name][~keep] == 0).all()
            assert (weights[name][keep] != 0).any()
    assert any((slopes["0.weight"][~model.mask["0.weight"]] != 0).any() for slopes in steps.slopes)


def test_a_part_of_each_layer_around_expand(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    method = LayerwisePartial(BoundaryExpand(epochs=2, lr=0.05), 0.2, redraw="fixed")
    after = efface.forget(trained, class_split, method, seed=1)
    for (name, old), new in zip(
        trained.network.named_parameters(), after.network.parameters(), strict=True
    ):
        assert 0 < int((old != new).sum()) <= max(1, round(0.2 * old.numel())), name


class Aside(nn.Module):
    """Uses its output layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight, self.head.bias)


def test_output_layers_that_cannot_be_widened_are_refused(new_task: NewTask) -> None:
    def made(network: Callable[[], nn.Module], **more: Any) -> tuple[Any, efface.Split]:
        task = new_task(network=network, **more)
        return efface.TrainedModel(task, task.network()), efface.Split.by_class(task, 1)

    aside, split = made(Aside)
    before = aside.digest
    with pytest.raises(MethodError, match="gave \\(3,\\); name the right layer"):
        efface.forget(aside, split, BoundaryExpand())
    assert aside.digest == before
    images, targets = torch.rand(30, 1, 4, 4), torch.arange(30) % 3
    net = lambda: nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())  # noqa: E731
    task = pixel_task((images, targets), network=net)
    conv = efface.TrainedModel(task, task.network())
    with pytest.raises(MethodError, match=r"'0\.weight' belongs to Conv2d"):
        efface.forget(conv, efface.Split.by_class(task, 1), BoundaryExpand())


# -- noise -----------------------------------------------------------------------------------------


def noise_by_hand(
    network: nn.Module, start: Tensor, like: Tensor, label: int, steps: int
) -> Tensor:
    """Adam by hand in float64, one input at a time: no input's slope depends on another's."""
    twin, found = copy.deepcopy(network).double().eval(), []
    flat = like.double().flatten()
    centre = sum(flat.tolist()) / len(flat)
    spread = math.sqrt(sum((v - centre) ** 2 for v in flat.tolist()) / (len(flat) - 1))
    for first in start.double():
        value, mean, square = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
        for t in range(1, steps + 1):
            v = value.clone().requires_grad_()
            z = twin((centre + spread * v)[None])[0]
            loss = 0.1 * (v * v).sum() - (z.exp().sum().log() - z[label])
            (slope,) = torch.autograd.grad(loss / len(start), v)
            mean = 0.9 * mean + 0.1 * slope
            square = 0.999 * square + 0.001 * slope**2
            value -= 0.1 * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        found.append(centre + spread * value)
    return torch.stack(found)


def learnt(trained: efface.TrainedModel, label: int, steps: int, count: int = 8) -> Tensor:
    fit, positions = Fit(trained.task, 3), torch.arange(40)
    noise = Noise(sample(positions, 16, 1.0, fit), count, fit.generator("start"))
    return error_maximising(trained, noise, label, steps, fit, positions[:1])


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_noise_is_that_of_the_definition(trained: efface.TrainedModel, steps: int) -> None:
    fit = Fit(trained.task, 3)
    like = sample(torch.arange(40), 16, 1.0, fit)
    assert torch.equal(like, trained.task.train[0][[int(i * 39 / 15) for i in range(16)]])
    start = torch.randn(8, 6, generator=fit.generator("start"))
    wanted = noise_by_hand(trained.network, start, like, 2, steps)
    assert torch.allclose(learnt(trained, 2, steps).double(), wanted, atol=1e-4)


def test_noise_is_worst_at_its_own_class(trained: efface.TrainedModel) -> None:
    before = trained.digest
    noises = [learnt(trained, label, 40) for label in range(3)]
    assert trained.digest == before
    network = copy.deepcopy(trained.network).eval()
    with torch.no_grad():
        loss = torch.tensor(
            [
                [float(F.cross_entropy(network(x), torch.full((8,), k))) for k in range(3)]
                for x in noises
            ]
        )
        first = F.cross_entropy(network(learnt(trained, 1, 0)), torch.full((8,), 1))
    assert loss.argmax(1).tolist() == [0, 1, 2]
    assert loss.argmax(0).tolist() == [0, 1, 2]
    assert loss[1, 1] > float(first) + 1


def test_noise_is_learnt_in_eval_mode_and_moves_no_statistics(
    conv_trained: efface.TrainedModel,
) -> None:
    before = conv_trained.digest
    fit, positions = Fit(conv_trained.task, 1), torch.arange(12)
    like = sample(positions, 12, 1.0, fit)
    made = [
        error_maximising(
            conv_trained, Noise(like, 4, fit.generator("start")), 0, 5, fit, positions[:1]
        )
        for _ in range(2)
    ]
    assert torch.equal(*made)
    assert made[0].shape == (4, 1, 8, 8)
    assert conv_trained.digest == before


class Losses:
    """A loss that keeps the labels it is given, in training and elsewhere."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.seen.append(targets.clone())
        return F.cross_entropy(logits, targets)


@pytest.mark.parametrize("gone", ["target == 2", "target >= 1"])
def test_impairing_mixes_noise_of_the_right_class_and_repairing_none(
    new_task: NewTask, trained: efface.TrainedModel, gone: str
) -> None:
    loss = Losses()
    task = new_task(loss=loss)
    model = efface.TrainedModel(task, copy.deepcopy(trained.network))
    split = efface.Split.where(task, gone)
    labels = classes_of(split)
    assert labels == ([2] if "2" in gone else [1, 2])
    after = efface.forget(model, split, Unsir(noise=0.6, steps=3, epochs=2), seed=4)
    learning, rest = loss.seen[: 3 * len(labels)], loss.seen[3 * len(labels) :]
    wanted = [torch.full((16,), c).tolist() for c in labels for _ in range(3)]
    assert [t.tolist() for t in learning] == wanted
    kept = round(16 / (1 + 0.6 * len(labels)))
    steps = 2 * -(-len(split.retain) // kept)
    impair, repair = rest[:steps], rest[steps:]
    for targets in impair:
        n = next(
            n for n in range(1, 17) if n + max(1, round(0.6 * len(labels) * n)) == len(targets)
        )
        assert not set(targets[:n].tolist()) & set(labels)
        assert set(targets[n:].tolist()) <= set(labels)
        counts = torch.bincount(targets[n:], minlength=3)[labels]
        assert counts.max() - counts.min() <= 1
    assert sum(len(t) for t in repair) == 2 * len(split.retain)
    assert not {int(v) for t in repair for v in t} & set(labels)
    images = after.lineage[-1].detail["images"]
    mixed = round(0.6 * len(labels) * len(split.retain)) * 2
    assert images == {"retain": 4 * len(split.retain), "noise": 3 * 16 * len(labels) + mixed}


def test_every_row_of_noise_has_its_turn() -> None:
    pool = Pool.of({4: torch.zeros(3, 2), 7: torch.ones(3, 2)})
    batch = Batch(torch.full((2, 2), 5.0), torch.tensor([0, 1]), torch.tensor([8, 9]))
    got = [pool.mixed(batch, 1.0, 4, step * 4) for step in range(3)]
    assert all(b.targets.tolist() == [0, 1, 4, 7, 4, 7] for b in got)
    assert all(torch.equal(b.inputs[2:, 0], (b.targets[2:] == 7).float()) for b in got)
    one = Pool(torch.arange(5.0)[:, None], torch.zeros(5, dtype=torch.long))
    thin = batch._replace(inputs=batch.inputs[:, :1])
    rows = [one.mixed(thin, 1.0, 2, step * 2).inputs[2:, 0].tolist() for step in range(3)]
    assert rows == [[0, 1], [2, 3], [4, 0]]
    with pytest.raises(MethodError, match="one shape"):
        pool.mixed(thin, 1.0, 2, 0)


def test_settings_of_the_two_phases(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    def asked(**options: Any) -> list[Any]:
        fit = StillFit(trained.task)
        Unsir(**options)(trained.copy(), class_split, fit)
        return [(row[0], row[4]) for row in fit.asked if row[0] != "unsir noise"]

    lr = trained.task.fit.lr
    (one, impair), (two, repair) = asked(bn="recalibrate")
    assert (one, two) == ("unsir impair", "unsir repair")
    assert (impair.lr, impair.epochs, impair.bn) == (lr, 1, "train")
    assert (repair.lr, repair.epochs, repair.bn) == (lr / 2, 1, "recalibrate")
    (_, impair), (_, repair) = asked(lr=0.02, bn="frozen", epochs=3)
    assert (impair.lr, repair.lr, impair.epochs, impair.bn) == (0.04, 0.02, 3, "frozen")
    assert asked(impair_lr=0.3)[0][1].lr == 0.3
    assert asked(epochs=0) == []


def test_a_class_is_needed_but_no_record_of_it(task: efface.Task) -> None:
    nobody, few = torch.tensor([], dtype=torch.long), torch.arange(20)
    named = efface.Split(task, nobody, few, {"kind": "class", "class": 1})
    assert classes_of(named) == [1]
    model = efface.TrainedModel(task, task.network())
    nameless = efface.Split(task, nobody, few, {"kind": "ids", "n": 0})
    with pytest.raises(NeedsError, match="needs a class to forget"):
        Unsir().check(model, nameless)


@pytest.mark.filterwarnings("ignore:the part of D_r")
@pytest.mark.parametrize("fraction", [0.02, 0.1])
def test_unsir_on_a_few_records(
    trained: efface.TrainedModel, class_split: efface.Split, fraction: float
) -> None:
    after = efface.forget(trained, class_split, Frugal(Unsir(steps=5), fraction))
    assert after.lineage[-1].detail["images"]["retain"] == 2 * round(fraction * 80)
    assert after.digest != trained.digest


# -- all of them -----------------------------------------------------------------------------------


def cut(network: nn.Module, inputs: Tensor) -> Tensor:
    logits: Tensor = network(inputs.detach())
    return logits


@pytest.mark.parametrize("cls", [BoundaryShrink, Unsir])
def test_inputs_without_a_slope_are_refused(new_task: NewTask, cls: type[Any]) -> None:
    numbers = torch.randint(0, 5, (30, 4), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(30) % 3
    words = lambda: nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(24, 3))  # noqa: E731
    pair = lambda network, inputs: network(inputs["x"])  # noqa: E731
    tasks = {
        "words": pixel_task((numbers, targets), network=words),
        "bytes": pixel_task((numbers.to(torch.uint8), targets), network=words, forward=tokens),
        "pytree": efface.Task(
            lambda: nn.Linear(4, 3),
            ({"x": numbers.float()}, targets),
            ({"x": numbers.float()}, targets),
            forward=pair,
        ),
    }
    for name, task in tasks.items():
        model = efface.TrainedModel(task, task.network())
        with pytest.raises(
            MethodError, match=f"{cls.name} takes slopes with respect to the inputs"
        ):
            efface.forget(model, efface.Split.by_class(task, 1), cls())
        assert efface.forget(model, efface.Split.by_class(task, 1), BoundaryExpand()), name
    if cls is BoundaryShrink:
        task = new_task(forward=cut)
        model = efface.TrainedModel(task, task.network())
        with pytest.raises(MethodError, match="finds no slope"):
            efface.forget(model, efface.Split.by_class(task, 1), cls())


def tokens(network: nn.Module, inputs: Tensor) -> Tensor:
    if inputs.is_floating_point():
        raise TypeError("tokens are whole numbers")
    logits: Tensor = network(inputs.long())
    return logits


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (BoundaryShrink, {"bound": -0.1}),
        (BoundaryShrink, {"bound": math.inf}),
        (BoundaryShrink, {"lr": 0.0}),
        (BoundaryExpand, {"epochs": -1}),
        (Unsir, {"noise": 0.0}),
        (Unsir, {"steps": -1}),
        (Unsir, {"impair_lr": 0.0}),
        (Unsir, {"epochs": -1}),
    ],
)
def test_options_out_of_range(cls: type[Any], options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"{cls.name}: {next(iter(options))} must be"):
        cls(**options)


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("after", [3, 9, 19])
def test_interrupted_it_goes_on(
    conv_trained: efface.TrainedModel, cls: type[Any], after: int, tmp_path: Path
) -> None:
    split = efface.Split.by_class(conv_trained.task, 1)
    method = cls(epochs=6) if cls is not Unsir else cls(epochs=2, steps=4)
    whole = efface.forget(conv_trained, split, method, seed=2)
    taken = 0

    def stop(label: str, step: int, steps: int) -> None:
        nonlocal taken
        taken += 1
        if taken == after:
            raise EnoughError

    journal = Journal(tmp_path / "journal", {"test": 1}, seconds=0.0)
    if after < 19 or cls is Unsir:
        with pytest.raises(EnoughError):
            efface.forget(conv_trained, split, method, seed=2, journal=journal, progress=stop)
        assert journal.start()
    again = efface.forget(conv_trained, split, method, seed=2, journal=journal)
    assert again.digest == whole.digest
    assert again.lineage[-1].detail["images"] == whole.lineage[-1].detail["images"]


@pytest.fixture(scope="module")
def digits_model() -> efface.TrainedModel:
    task = efface.datasets.digits()
    return efface.train(dataclasses.replace(task, fit=dataclasses.replace(task.fit, epochs=6)))


@pytest.mark.parametrize("cls", ALL)
def test_a_class_of_digits_goes_and_the_rest_stays(
    digits_model: efface.TrainedModel, cls: type[Any]
) -> None:
    task = digits_model.task
    split = efface.Split.by_class(task, 3)

    def accuracy(model: efface.TrainedModel, positions: Tensor) -> float:
        inputs, targets = task.train
        with torch.no_grad():
            answers = copy.deepcopy(model.network).eval()(inputs[positions]).argmax(1)
        return float((answers == targets[positions]).float().mean())

    after = efface.forget(digits_model, split, cls())
    assert accuracy(digits_model, split.forget) > 0.95
    assert accuracy(after, split.forget) < 0.2
    assert accuracy(after, split.retain) > 0.93


def test_the_loss_of_the_shadow(trained: efface.TrainedModel) -> None:
    wide = Widened(copy.deepcopy(trained.network), None, torch.Generator())
    with pytest.raises(MethodError, match="widens the output layer to 4 outputs"):
        wide.loss(torch.zeros(2, 3))
    assert float(wide.loss(torch.zeros(2, 4))) == pytest.approx(math.log(4))
    assert float(wide.loss(torch.tensor([[0.0, 0.0, 0.0, 50.0]]))) < 1e-9
