"""Un-pruning of single weights against a slow twin, written from its page with loops.

The twin follows every round: what is dropped, what grows, what it begins with, what stays as it
was, and what is pruned again. What the inner method did is read from a log, so that any will do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn

import efface
from efface.fitting import Fit
from efface.mask import Mask
from efface.seeds import seed_for
from efface.sparsify import OneShot
from efface.task import Settings, Split
from efface.trained import TrainedModel
from efface.unlearn import FineTune, Unprune

from .conftest import make_conv_task, make_task

State = dict[str, Tensor]
Unit = tuple[str, int]
Parts = dict[str, tuple[list[str], list[str]]]
"""Group of filters → the weights that are scored, and what else goes with each filter."""
Scores = Callable[[State, set[Unit]], dict[Unit, float]]

ORDERS = ("once", "every", "drop")

# --- inner methods --------------------------------------------------------------------------------

LOG: list[tuple[dict[str, Tensor], State, State]] = []
"""Of every call of an inner method: its mask, the weights before it and behind it."""


def pattern(name: str, shape: torch.Size) -> Tensor:
    """Numbers that depend on the name of a weight only, of about the size of a weight."""
    draw = torch.Generator().manual_seed(crc32(name.encode()) + 2)
    return 0.25 * torch.randn(shape, generator=draw)


@dataclass(frozen=True)
class Shift:
    """Adds a pattern to every weight that is switched on; a careless one, to every weight."""

    name: ClassVar[str] = "shift"
    title: ClassVar[str] = "Shift"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    careless: bool = False

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        mask = {} if self.careless else trained.mask or {}
        with torch.no_grad():
            for name, p in trained.network.named_parameters():
                p += pattern(name, p.shape) * mask.get(name, torch.tensor(True))


@dataclass(frozen=True)
class Spy:
    """Logs what an inner method finds and what it leaves."""

    name: ClassVar[str] = "spy"
    title: ClassVar[str] = "Spy"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    inner: Any

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        mask = {name: keep.clone() for name, keep in (trained.mask or {}).items()}
        before = state_of(trained.network)
        self.inner(trained, split, fit)
        LOG.append((mask, before, state_of(trained.network)))


# --- weights --------------------------------------------------------------------------------------


def dense(weights: Any) -> State:
    """A state dict of its own."""
    return {name: t.detach().clone().contiguous() for name, t in weights.items()}


def state_of(network: nn.Module) -> State:
    return dense(network.state_dict())


def initial_of(model: TrainedModel) -> State:
    """The weights that its training began with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for((model.initial or {})["seed"], "init"))
        return state_of(model.task.network())


def values_of(model: TrainedModel, kind: str) -> State | None:
    """What grown units begin with, or None where it is drawn."""
    if kind == "random":
        return None
    if kind == "zero":
        return {n: torch.zeros_like(t) for n, t in state_of(model.network).items()}
    return initial_of(model) if kind == "initial" else dense(model.rewind or {})


def same(found: State, wanted: State, buffers: bool = True) -> None:
    """Bit for bit; on request, without batch-norm statistics."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if buffers or not ("running" in name or "num_batches" in name):
            assert torch.equal(found[name], tensor), name


def first_of(model: TrainedModel, n: int) -> Split:
    """Keeps the first n records (few enough for all of them to be looked at), forgets the rest."""
    return Split.by_ids(model.task, model.task.ids_[n:])


def gradients(task: efface.Task, positions: Tensor, state: State) -> State:
    """Of the mean cross-entropy of these records; in evaluation mode and in float64."""
    network = task.network().double().eval()
    network.load_state_dict(state)
    inputs, targets = task.train
    rows = [network(inputs[p : p + 1].double())[0] for p in positions.tolist()]
    losses = [-row.log_softmax(0)[targets[p]] for row, p in zip(rows, positions, strict=True)]
    named = dict(network.named_parameters())
    found = torch.autograd.grad(torch.stack(losses).mean(), [*named.values()])
    return dict(zip(named, found, strict=True))


# --- units ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """What is switched on and off: single weights, or filters with all that belongs to them."""

    entries: dict[Unit, list[tuple[str, int]]]  # (weight, index) of all that a unit switches
    scored: dict[Unit, list[tuple[str, int]]]  # the same of what its score looks at
    pools: list[list[Unit]]  # what is counted and compared with one another, in order


def single(model: TrainedModel, granularity: str) -> Units:
    """Every weight that the mask names."""
    layers = [[(n, i) for i in range(keep.numel())] for n, keep in (model.mask or {}).items()]
    entries = {unit: [unit] for layer in layers for unit in layer}
    pools = [[unit for layer in layers for unit in layer]] if granularity == "global" else layers
    return Units(entries, entries, pools)


def filters(model: TrainedModel, groups: Parts) -> Units:
    """Filter c of a group: row c of its weights, entry c of what else belongs to them."""
    state = state_of(model.network)

    def rows(names: list[str], c: int) -> list[tuple[str, int]]:
        widths = {name: state[name][0].numel() for name in names}
        return [(n, i) for n, width in widths.items() for i in range(c * width, (c + 1) * width)]

    pools = [[(g, c) for c in range(len(state[g]))] for g in groups]
    units = [unit for pool in pools for unit in pool]
    scored = {(g, c): rows(groups[g][0], c) for g, c in units}
    return Units({(g, c): rows([*groups[g][0], *groups[g][1]], c) for g, c in units}, scored, pools)


def kept_in(mask: Any, units: Units) -> set[Unit]:
    """The units that a mask keeps; it must keep or drop every one as a whole, and nothing else."""
    flat = {name: keep.flatten().tolist() for name, keep in mask.items()}
    kept, gone = set(), 0
    for unit, entries in units.entries.items():
        found = [flat[name][i] for name, i in entries]
        assert all(found) == any(found), unit
        kept |= {unit} if found[0] else set()
        gone += 0 if found[0] else len(entries)
    assert gone == sum(keep.count(False) for keep in flat.values())
    return kept


def zeroed(state: State, units: Units, kept: set[Unit]) -> State:
    """Zero wherever a unit is not kept."""
    made = dense(state)
    for unit, entries in units.entries.items():
        for name, i in entries if unit not in kept else ():
            made[name].view(-1)[i] = 0.0
    return made


def vectors(state: State, units: Units) -> dict[Unit, list[float]]:
    flat = {name: t.double().flatten().tolist() for name, t in state.items()}
    return {unit: [flat[n][i] for n, i in entries] for unit, entries in units.scored.items()}


def norms(state: State, units: Units) -> dict[Unit, float]:
    """L2; of a single weight, its absolute value."""
    return {unit: math.hypot(*v) for unit, v in vectors(state, units).items()}


def sums(state: State, units: Units) -> dict[Unit, float]:
    """L1."""
    return {unit: sum(abs(x) for x in v) for unit, v in vectors(state, units).items()}


def distances(state: State, units: Units) -> dict[Unit, float]:
    """Sum of the distances to all filters of the group."""
    pairs = vectors(state, units).items()
    return {u: sum(math.dist(v, w) for x, w in pairs if x[0] == u[0]) for u, v in pairs}


def best(pool: list[Unit], scores: dict[Unit, float], n: int) -> set[Unit]:
    """The n with the largest score; of equal ones, those that come first."""
    return set(sorted(pool, key=lambda unit: -scores[unit])[:n])  # sorting is stable


# --- the twin -------------------------------------------------------------------------------------


def check_best(found: set[Unit], pool: list[Unit], scores: dict[Unit, float], n: int) -> None:
    """Those that grew are the best n; float32 may exchange what is nearly, but not quite, equal."""
    exchanged = sorted(scores[unit] for unit in found ^ best(pool, scores, n))
    assert not exchanged or 0 < exchanged[-1] - exchanged[0] < 1e-5 * exchanged[-1], sorted(found)


def follow(
    model: TrainedModel,
    after: TrainedModel,
    method: Unprune,
    units: Units,
    values: State | None,
    grow: Scores | None,
    prune: Scores,
    *,
    buffers: bool = True,
) -> None:
    """Go through the rounds of an un-pruning, and compare all that the log of a spy shows of it.

    Args:
        model, after: Before and behind.
        method, units: The inner method is the spy.
        values: What grown units begin with; None: what the log says.
        grow: Scores of what may grow, from weights and kept units as they were before the drop;
            None: what the log says.
        prune: Scores of what may be kept, from weights and units.
        buffers: Whether batch-norm statistics are compared.
    """
    state, kept = state_of(model.network), kept_in(model.mask, units)
    counts = [len(kept.intersection(pool)) for pool in units.pools]
    assert len(LOG) == method.rounds
    for i, (mask, before, behind) in enumerate(LOG):
        staying, growing = set(kept), []
        least = prune(dense(state), set(kept)) if method.order == "drop" else {}
        for pool in units.pools:
            on = [unit for unit in pool if unit in kept]
            growing.append(round(method.p * (len(pool) - len(on))))
            if method.order == "drop":
                growing[-1] = round(method.p * len(on))
                staying -= set(on) - best(on, least, len(on) - growing[-1])
        scores = grow(dense(state), set(kept)) if grow else None  # as before the drop
        open_ = kept_in(mask, units)
        assert open_ >= staying
        for pool, number in zip(units.pools, growing, strict=True):
            grown = {unit for unit in pool if unit in open_ and unit not in staying}
            assert len(grown) == number
            if scores is not None:
                off = [unit for unit in pool if unit not in staying]
                check_best(grown, off, scores, number)
        begun = zeroed(state, units, staying)
        for unit in open_ - staying:
            for name, j in units.entries[unit]:
                begun[name].view(-1)[j] = (values or before)[name].view(-1)[j]
        same(before, begun, buffers)
        if not getattr(method.inner.inner, "careless", False):
            same(behind, zeroed(behind, units, open_))
        state, kept = zeroed(behind, units, open_), open_
        if method.order == "every" or i == method.rounds - 1:
            scores = prune(dense(state), set(kept))
            pools = [[unit for unit in pool if unit in open_] for pool in units.pools]
            chosen = [best(pool, scores, n) for pool, n in zip(pools, counts, strict=True)]
            kept = {unit for part in chosen for unit in part}
            state = zeroed(state, units, kept)
    assert kept_in(after.mask, units) == kept
    same(state_of(after.network), state, buffers)


def run(model: TrainedModel, split: Split, method: Any, seed: int = 0) -> TrainedModel:
    """Forget with an empty log; what was given stays as it was, and the density as well."""
    LOG.clear()
    given = model.to_bytes()
    after = efface.forget(model, split, method, seed=seed)
    assert model.to_bytes() == given
    assert (after.mask or Mask({})).kept == (model.mask or Mask({})).kept
    return after


def check(model: TrainedModel, method: Unprune, units: Units, records: int = 27) -> None:
    """Run an un-pruning of single weights that magnitude prunes again, and follow it."""
    split, values = first_of(model, records), values_of(model, method.values)

    def by_gradient(state: State, _: set[Unit]) -> dict[Unit, float]:
        return norms(gradients(model.task, split.retain, state), units)

    def by_size(_: State, __: set[Unit]) -> dict[Unit, float]:
        return norms(values or {}, units)

    grow = {"gradient": by_gradient, "magnitude": by_size if values else None}.get(method.pick)
    after = run(model, split, method)
    follow(model, after, method, units, values, grow, lambda state, _: norms(state, units))


# --- all combinations -----------------------------------------------------------------------------

WAYS = [
    (values, pick)
    for values in ("initial", "rewind", "random", "zero")
    for pick in ("magnitude", "gradient", "random")
    if (values, pick) != ("zero", "magnitude")  # is refused
]
INNER = {"shift": Shift(), "careless": Shift(careless=True), "finetune": FineTune(epochs=1)}


@pytest.fixture(scope="module")
def sparse() -> TrainedModel:
    """An MLP with rewind weights, at 60 % in every layer."""
    task = make_task(fit=Settings(epochs=4, batch_size=32, lr=0.1))
    dense_model = efface.train(task, seed=0, rewind=2)
    return efface.prune(dense_model, OneShot(sparsity=0.6, recovery=1, granularity="layer"))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("values", "pick"), WAYS)
def test_weights_equal_their_twin(sparse: TrainedModel, values: Any, pick: Any, inner: str) -> None:
    """In every order, compared in layers and over them, up to three rounds."""
    for granularity in ("layer", "global"):
        units: Any = single(sparse, granularity)
        for order, rounds in itertools.product(ORDERS, (1, 2, 3)):
            p = 1.0 if (rounds == 2) == (inner == "shift") else 0.23
            method: Any = Unprune(Spy(INNER[inner]), p, values, pick, rounds, order, granularity)
            check(sparse, method, units)


@pytest.mark.parametrize("order", ORDERS)
def test_weights_of_convolutions_equal_their_twin(order: Any) -> None:
    """Batch-norm statistics stay as the inner method left them."""
    task = make_conv_task(fit=Settings(epochs=2, batch_size=48, lr=0.05))
    dense_model = efface.train(task, seed=0, rewind=1)
    for granularity, inner in itertools.product(("layer", "global"), ("shift", "finetune")):
        pruner = OneShot(sparsity=0.6, recovery=1, granularity=granularity)
        model = efface.prune(dense_model, pruner)
        for pick in ("magnitude", "gradient"):
            method: Any = Unprune(Spy(INNER[inner]), 0.3, "rewind", pick, 2, order, granularity)
            check(model, method, single(model, granularity), 24)


def with_kept(model: TrainedModel, kept: tuple[int, int]) -> TrainedModel:
    """The same, but of its layers so many weights are kept."""
    made, masks, draw = model.copy(), {}, torch.Generator().manual_seed(7)
    for number, (name, old) in zip(kept, (model.mask or {}).items(), strict=True):
        masks[name] = (torch.randperm(old.numel(), generator=draw) < number).view(old.shape)
    made.set_mask(Mask(masks))
    return made


KEPT = [(0, 1), (1, 0), (1, 192), (96, 1), (0, 192), (96, 0), (96, 191), (0, 100)]


@pytest.mark.filterwarnings("ignore:.*lost all weights")  # some have none at all
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_layers_of_which_next_to_nothing_is_kept_or_dropped(
    sparse: TrainedModel, kept: tuple[int, int]
) -> None:
    """At any p: rounding may grow nothing, or everything."""
    model, spy = with_kept(sparse, kept), Spy(Shift())
    for granularity, order in itertools.product(("layer", "global"), ORDERS):
        units: Any = single(model, granularity)
        for p, rounds in ((1e-6, 1), (0.004, 2), (0.5, 2), (0.999, 1), (1.0, 3)):
            method: Any = Unprune(spy, p, "initial", "magnitude", rounds, order, granularity)
            check(model, method, units)


@pytest.mark.filterwarnings("ignore:.*lost all weights")
@pytest.mark.parametrize("kept", [(0, 1), (96, 1), (96, 0), (0, 100)], ids=str)
def test_layers_may_lose_to_others(sparse: TrainedModel, kept: tuple[int, int]) -> None:
    """Over all layers together, from round to round."""
    model = with_kept(sparse, kept)
    method = Unprune(Spy(Shift()), 0.004, rounds=2, order="every", granularity="global")
    check(model, method, single(model, "global"))
