"""Blocks' scores as criteria for whole filters, and as the choice of a partial update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efface
from efface.errors import MethodError
from efface.fitting import Fit
from efface.networks import MLP, DigitsCNN
from efface.networks.residual import ResNet
from efface.sparsify import BLOCK_CRITERIA, IMP, OMP, SFP, AtInit, OneShot, build_pruner
from efface.sparsify.block_criteria import block_scores
from efface.sparsify.blocks import find_blocks
from efface.sparsify.filters import FILTER_CRITERIA, filter_scores
from efface.sparsify.groups import Group, filter_groups, kept_filters
from efface.sparsify.parts import score_records, shown
from efface.unlearn import DFMU, FineTune, GradientAscent, LayerwisePartial, PruneFirst, build
from efface.unlearn.base import needs_of
from efface.unlearn.places import ratios

from .conftest import CLASSES, blobs

KINDS = pytest.mark.parametrize("name", BLOCK_CRITERIA)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP([64, 10, 6, CLASSES]),
    "digits": lambda: DigitsCNN(CLASSES),
    "residual": lambda: ResNet((1, 1), (4, 6), CLASSES, channels=1),
}


def made(name: str, n: int = 48) -> efface.TrainedModel:
    data = blobs(n, 0, (1, 8, 8))
    fit = efface.Settings(epochs=2, batch_size=12, lr=0.05)
    task = efface.Task(NETWORKS[name], data, blobs(12, 1, (1, 8, 8)), fit=fit)
    return efface.train(task, seed=0)


@pytest.fixture(scope="module")
def models() -> dict[str, efface.TrainedModel]:
    return {name: made(name) for name in NETWORKS}


# --- the scores -----------------------------------------------------------------------------------


def ends(network: nn.Module, group: Group) -> list[nn.Module]:
    """Where the channels of a group come out: its batch norms, or its layers where it has none."""
    modules = [network.get_submodule(name.rpartition(".")[0]) for name, _ in group.members]
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    return list(dict.fromkeys(norms or modules))


def margin(network: nn.Module, x: Tensor, label: int) -> float:
    logits = network(x[None])[0].tolist()
    rest = [math.exp(z) for c, z in enumerate(logits) if c != label]
    return float(logits[label]) - math.log(sum(rest))


def twin(name: str, model: efface.TrainedModel, group: Group, c: int, where: Tensor) -> list[float]:
    """What a filter carries of each record, by turning its channel a little up and down."""
    network = copy.deepcopy(model.network).double().eval()
    factor, sizes = [1.0], [0.0, 0]

    def turned(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        out = out.clone()
        sizes[0] += float((out[:, c] ** 2).sum())
        sizes[1] += out[:, c].numel()
        out[:, c] *= factor[0]
        return out

    for module in ends(network, group):
        module.register_forward_hook(turned)
    records, found, step = model.task.records, [], 1e-4
    with torch.no_grad():
        for i in where.tolist():
            x, label = records.inputs[i].double(), int(records.targets[i])
            sides = []
            for factor[0] in (1 + step, 1 - step):
                sides.append(margin(network, x, label))
            slope = (sides[0] - sides[1]) / (2 * step)
            factor[0], sizes[:] = 1.0, [0.0, 0]
            margin(network, x, label)
            mean = sizes[0] / sizes[1]
            found.append(
                {
                    "block-fisher": slope**2 / 2,
                    "block-taylor": abs(slope),
                    "block-activation": mean,
                }[name]
            )
    return found


@KINDS
@pytest.mark.parametrize("network", NETWORKS)
def test_scores_are_their_definitions(
    models: dict[str, efface.TrainedModel], network: str, name: str
) -> None:
    model, where = models[network], torch.arange(0, 48, 4)
    fit = Fit(model.task, seed=2)
    found = block_scores(name, model, where, fit)
    groups = filter_groups(model.task, model.network).prunable
    assert list(found) == [group.name for group in groups]
    for group in groups:
        assert found[group.name].shape == (group.size,)
        assert found[group.name].dtype == torch.float64
        scale = float(found[group.name].max())
        for c in range(0, group.size, 3):
            mean = sum(twin(name, model, group, c, where)) / len(where)
            assert float(found[group.name][c]) == pytest.approx(mean, rel=2e-3, abs=1e-5 * scale)
    assert fit.meter.images == {"score": len(where)}


@KINDS
def test_the_model_is_left_as_found_and_scores_are_repeatable(
    models: dict[str, efface.TrainedModel], name: str
) -> None:
    model = models["residual"]
    model.network.train()
    frozen = next(model.network.parameters()).requires_grad_(False)
    before, state = model.digest, torch.get_rng_state()
    try:
        one = block_scores(name, model, torch.arange(20), Fit(model.task, seed=4))
        two = block_scores(name, model, torch.arange(20), Fit(model.task, seed=4))
        assert model.network.training
        assert [p.requires_grad for p in model.network.parameters()].count(False) == 1
    finally:
        frozen.requires_grad_(True)
        model.network.eval()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert model.digest == before
    assert torch.equal(torch.get_rng_state(), state)
    other = block_scores(name, model, torch.arange(20), Fit(model.task, seed=5))
    assert all(torch.allclose(one[n], other[n], rtol=1e-5) for n in one)  # the order alone


# --- as criteria ----------------------------------------------------------------------------------


@KINDS
def test_filters_are_scored_on_what_a_criterion_is_shown(
    models: dict[str, efface.TrainedModel], name: str
) -> None:
    model = models["digits"]
    fit = Fit(model.task, seed=3)
    positions = torch.arange(40)
    batches = shown(name, positions, fit)
    where = torch.cat([batch.positions for batch in batches])
    assert torch.equal(where, score_records(positions, fit))
    assert torch.bincount(model.task.records.targets[where]).tolist() == [10] * CLASSES
    groups = filter_groups(model.task, model.network).prunable[1:]
    found = filter_scores(name, model, groups, batches, fit)
    wanted = block_scores(name, model, where, fit)
    assert list(found) == [group.name for group in groups]  # of the scope, no more
    assert all(torch.equal(found[n], wanted[n]) for n in found)


@KINDS
def test_the_filters_that_carry_least_are_pruned(
    models: dict[str, efface.TrainedModel], name: str
) -> None:
    model = models["digits"]
    pruner = OneShot(0.5, name, "filter", recovery=0)
    after = efface.prune(model, pruner, seed=1)
    assert after.mask is not None
    assert efface.prune(model, pruner, seed=1).digest == after.digest
    fit = Fit(model.task, seed=1, path="prune")
    groups = filter_groups(model.task, model.network).prunable
    batches = shown(name, torch.arange(48), fit)
    scores = filter_scores(name, model, groups, batches, fit)
    for group, kept in zip(groups, kept_filters(after.mask, groups).values(), strict=True):
        order = sorted(range(group.size), key=lambda c: (-float(scores[group.name][c]), c))
        assert set(kept.nonzero().flatten().tolist()) == set(order[: group.size - group.size // 2])


@KINDS
def test_pruners_that_take_a_criterion_take_it(
    models: dict[str, efface.TrainedModel], name: str
) -> None:
    model = models["residual"]
    rewound = OMP(0.5, name, "filter", to="none", epochs=1)
    after = efface.prune(model, rewound)
    split = efface.Split.by_class(model.task, 1)
    assert after.mask is not None
    reference = efface.retrain(model.task, split, model=after, like="repruned", seed=3)
    assert reference.lineage[-1].method == after.lineage[-1].method
    pruned = efface.forget(model, split, PruneFirst(OneShot(0.5, name, "filter"), FineTune()))
    assert pruned.mask is not None
    options = {"criterion": name, "granularity": "filter"}
    assert build_pruner("one-shot", options).criterion == name  # type: ignore[attr-defined]
    assert name in FILTER_CRITERIA


def test_dropped_filters_carry_nothing_and_go_first(
    models: dict[str, efface.TrainedModel],
) -> None:
    half = efface.prune(models["digits"], OneShot(0.25, "random", "filter", recovery=0))
    more = efface.prune(half, OneShot(0.5, "block-taylor", "filter", recovery=0))
    assert half.mask is not None
    assert more.mask is not None
    assert all(bool((half.mask[n] | ~more.mask[n]).all()) for n in more.mask)


def test_what_does_not_fit_is_refused(models: dict[str, efface.TrainedModel]) -> None:
    for pruner in (OneShot, OMP, AtInit):
        with pytest.raises(MethodError, match="'block-fisher' scores whole filters; take gran"):
            pruner(0.5, criterion="block-fisher")
    with pytest.raises(MethodError, match="at-init prunes single weights only"):
        AtInit(0.5, "block-fisher", "filter")
    with pytest.raises(MethodError, match="sfp: criterion must be one of l1, l2, geometric-median"):
        SFP(0.5, "block-taylor")
    with pytest.raises(MethodError, match="did you mean 'block-fisher'"):
        OneShot(0.5, "block-fischer", "filter")
    with pytest.raises(MethodError, match="imp has no option 'criterion'"):
        build_pruner("imp", {"criterion": "block-fisher"})
    assert IMP(0.5, granularity="filter").name == "imp"
    model = models["mlp"]
    groups = filter_groups(model.task, model.network).prunable
    with pytest.raises(MethodError, match="'block-taylor' needs data: two records at least"):
        filter_scores("block-taylor", model, groups, [], Fit(model.task))


@KINDS
@pytest.mark.parametrize("broken", ["dead", "nan"])
def test_scores_that_say_nothing_are_refused(
    models: dict[str, efface.TrainedModel], name: str, broken: str
) -> None:
    model = models["mlp"].copy()
    with torch.no_grad():
        for p in model.network.parameters():
            p.fill_(0.0 if broken == "dead" else math.nan)
    with pytest.raises(MethodError, match=rf"criterion '{name}': .*; take criterion=l2") as caught:
        block_scores(name, model, torch.arange(12), Fit(model.task))
    said = str(caught.value)
    assert said.count(". ") == 0
    assert "D_f" not in said
    assert ("not finite" if broken == "nan" else "zero on the records shown") in said


def test_a_network_without_filters_is_refused(new_task: Callable[..., efface.Task]) -> None:
    task = new_task(network=lambda: nn.Linear(6, CLASSES))
    model = efface.TrainedModel(task, task.network())
    with pytest.raises(MethodError, match="no filters can be pruned"):
        efface.prune(model, OneShot(0.5, "block-fisher", "filter"))


# --- the choice of a partial update ---------------------------------------------------------------


def by_class(model: efface.TrainedModel) -> efface.Split:
    return efface.Split.by_class(model.task, 1)


def slow_ratios(model: efface.TrainedModel, split: efface.Split) -> dict[str, list[float]]:
    """I_f / (I_r + ε) of every filter, ε a thousandth of the layer's mean of I_r."""
    found = {}
    for group in filter_groups(model.task, model.network).prunable:
        sides = []
        for where in (split.forget, split.retain):
            each = [twin("block-fisher", model, group, c, where) for c in range(group.size)]
            sides.append([sum(values) / len(values) for values in each])
        mine, rest = sides
        level = sum(rest) / len(rest)
        found[group.name] = [a / (b + 1e-3 * level) for a, b in zip(mine, rest, strict=True)]
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_entries_score_as_their_filter(
    models: dict[str, efface.TrainedModel], network: str
) -> None:
    model = models[network]
    split, before = by_class(model), model.digest
    found = ratios(model, split, Fit(model.task, seed=1))
    wanted = slow_ratios(model, split)
    params = dict(model.network.named_parameters())
    assert {n: t.shape for n, t in found.items()} == {n: p.shape for n, p in params.items()}
    inside = set()
    for group in filter_groups(model.task, model.network).prunable:
        for name, rows in group.members:
            inside.add(name)
            for c in range(group.size):
                entries = found[name][rows[c]].flatten()
                assert (entries == entries[0]).all()
                assert float(entries[0]) == pytest.approx(wanted[group.name][c], rel=5e-3, abs=1e-5)
    assert inside
    assert inside < set(found)
    assert all(not bool(t.any()) for n, t in found.items() if n not in inside)
    assert model.digest == before


@pytest.mark.parametrize("network", NETWORKS)
def test_as_many_entries_move_as_the_fraction_says_and_no_others(
    models: dict[str, efface.TrainedModel], network: str
) -> None:
    model = models[network]
    split = by_class(model)
    method = LayerwisePartial(FineTune(epochs=1, lr=0.01), 0.2, "dfmu", "fixed")
    after = efface.forget(model, split, method, seed=1)
    assert efface.forget(model, split, method, seed=1).digest == after.digest
    assert after.lineage[-1].detail["partial"]["selected"] > 0
    old = dict(model.network.named_parameters())
    scores = ratios(model, split, Fit(model.task, seed=1, path="forget"))
    moved = {n: p != old[n] for n, p in after.network.named_parameters()}
    assert any(bool(m.any()) for m in moved.values())
    for name, where in moved.items():
        row, count = scores[name].flatten().tolist(), max(1, round(0.2 * where.numel()))
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
        assert set(where.flatten().nonzero().flatten().tolist()) <= set(best), name


def test_under_a_mask_it_chooses_among_what_is_kept(
    models: dict[str, efface.TrainedModel],
) -> None:
    sparse = efface.prune(models["digits"], OneShot(0.6, recovery=0))
    assert sparse.mask is not None
    after = efface.forget(
        sparse, by_class(sparse), LayerwisePartial(GradientAscent(), 0.3, "dfmu", "fixed", "global")
    )
    assert after.mask == sparse.mask
    old, new = dict(sparse.network.named_parameters()), dict(after.network.named_parameters())
    moved = sum(int((new[n] != p).sum()) for n, p in old.items())
    alive = sum(
        int(sparse.mask[n].sum()) if n in sparse.mask else p.numel() for n, p in old.items()
    )
    assert 0 < moved <= round(0.3 * alive)


def test_it_reads_both_sets_and_is_drawn_once() -> None:
    method = build("layerwise-partial", {"pick": "dfmu", "redraw": "fixed", "inner": "finetune"})
    assert method.needs == {"forget", "retain"}  # type: ignore[attr-defined]
    assert needs_of(LayerwisePartial(FineTune(), pick="dfmu", redraw="fixed")) == {
        "forget",
        "retain",
    }
    with pytest.raises(MethodError, match=r"pick=dfmu scores the filters .* take redraw=fixed"):
        LayerwisePartial(pick="dfmu")
    with pytest.raises(MethodError, match="take redraw=fixed"):
        build("layerwise-partial", {"pick": "dfmu"})


def test_without_a_filter_the_choice_is_refused(new_task: Callable[..., efface.Task]) -> None:
    task = new_task(network=lambda: nn.Linear(6, CLASSES))
    model = efface.train(task)
    with pytest.raises(MethodError, match="no filter to score"):
        efface.forget(
            model, by_class(model), LayerwisePartial(FineTune(), pick="dfmu", redraw="fixed")
        )


def test_it_goes_around_dfmu_itself(models: dict[str, efface.TrainedModel]) -> None:
    model = models["digits"]
    method = LayerwisePartial(DFMU(fraction=1.0), 0.5, "dfmu", "fixed")
    after = efface.forget(model, by_class(model), method)
    assert after.digest != model.digest
    assert len(find_blocks(model.task, after.network)) == 64


def test_it_looks_at_a_sample_once(models: dict[str, efface.TrainedModel]) -> None:
    model = models["mlp"]
    fit = Fit(model.task, seed=1)
    ratios(model, by_class(model), fit)
    assert fit.meter.images == {"score": 48}
    large = made("mlp", 600)  # 200 of the class, and 256 of the 400 others
    fit = Fit(large.task, seed=1)
    ratios(large, by_class(large), fit)
    assert fit.meter.images == {"score": 456}
