"""Un-pruning, forgetting from dense weights, the difference of early checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import efface
from efface.data import Stream
from efface.errors import MethodError, MismatchError, NeedsError
from efface.fitting import Fit
from efface.journal import Journal
from efface.mask import Mask
from efface.replay import recorded_settings, replay, training_seed
from efface.sparsify import IMP, OMP, AtInit, Gradual, OneShot, build_pruner, made_by
from efface.steps import rate
from efface.task import Settings
from efface.unlearn import (
    Chain,
    CheckpointDifference,
    FineTune,
    FromDense,
    L1Sparse,
    Masked,
    PruneFirst,
    Unprune,
)

FT = FineTune(epochs=1)


@pytest.fixture(scope="module")
def dense(task: efface.Task) -> efface.TrainedModel:
    return efface.train(task, seed=0, rewind=2)


@pytest.fixture(scope="module")
def sparse(dense: efface.TrainedModel) -> efface.TrainedModel:
    return efface.prune(dense, OMP(sparsity=0.6), keep_dense=True)


def kept(model: efface.TrainedModel) -> list[int]:
    assert model.mask is not None
    return [layer["kept"] for layer in model.mask.layers()]


# -- the replay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_a_replay_of_everything_is_the_training(
    dense: efface.TrainedModel, conv_task: efface.Task, images: bool
) -> None:
    """With nobody left out, the weights of epoch K come again, byte for byte."""
    model = efface.train(conv_task, seed=3, rewind=1) if images else dense
    everyone, epochs = torch.arange(len(model.task.records)), 1 if images else 2
    again = replay(model, everyone, everyone, Fit(model.task, seed=99), epochs).state_dict()
    assert model.rewind is not None
    assert again.keys() == model.rewind.keys()
    assert all(torch.equal(again[name], t) for name, t in model.rewind.items())


def test_a_replay_of_a_retrained_model_has_its_order(task: efface.Task) -> None:
    split = efface.Split.by_ids(task, [task.ids_[i] for i in range(9)])
    model = efface.retrain(task, split, seed=4)
    epochs = task.fit.epochs
    fit = Fit(task, seed=1)
    again = replay(model, split.retain, split.retain, fit, epochs)
    assert all(
        torch.equal(p, q)
        for p, q in zip(again.parameters(), model.network.parameters(), strict=True)
    )
    assert fit.meter.images == {"retain": epochs * len(split.retain)}


def test_the_rates_of_a_first_part_are_those_of_the_whole() -> None:
    whole = Settings(epochs=5, lr=0.1, schedule="linear", warmup=0.3)
    part = replace(whole, epochs=2, ahead=3)
    assert [rate(part, s / 14, 14) for s in range(14)] == [
        rate(whole, s / 35, 35) for s in range(14)
    ]
    middle = replace(whole, epochs=2, begun=1, ahead=2)
    assert [rate(middle, s / 14, 14) for s in range(14)] == [
        rate(whole, (7 + s) / 35, 35) for s in range(14)
    ]


def test_holes_keep_every_batch_in_its_place(dense: efface.TrainedModel) -> None:
    """A record that is left out leaves a hole; the others stay in their batches."""
    task = dense.task
    everyone = torch.arange(len(task.records))
    gone = torch.arange(0, len(everyone), 3)
    left = everyone[~torch.isin(everyone, gone)]
    seen: dict[str, list[set[int]]] = {}

    def plan(name: str, stream: Stream) -> None:
        def objective(network: nn.Module, batches: dict[str, Any], clock: Any) -> torch.Tensor:
            seen.setdefault(name, []).append(set(batches["retain"].positions.tolist()))
            return fit.descend(network, batches, clock)

        fit = Fit(task, seed=0, path="train")
        fit(
            copy.deepcopy(dense.network), objective, {"retain": stream}, replace(task.fit, epochs=2)
        )

    plan("whole", Stream(everyone))
    plan("holes", Stream(left, within=everyone))
    there = set(left.tolist())
    assert [batch & there for batch in seen["whole"]] == seen["holes"]


def test_the_training_must_be_known(task: efface.Task, dense: efface.TrainedModel) -> None:
    adopted = efface.adopt(task, dense.network.state_dict())
    with pytest.raises(NeedsError, match="order of this model's training is not known"):
        training_seed(adopted)
    assert recorded_settings(dense) == task.fit


# -- the difference of checkpoints -----------------------------------------------------------------


def test_nothing_to_forget_in_the_first_epochs_moves_nothing(task: efface.Task) -> None:
    """The difference is that of two runs which differ in D_f alone: the recorded order is used."""
    model = efface.train(task, seed=0, rewind=2)
    split = efface.Split.random(task, 0.1, seed=1)
    other = efface.train(task, seed=1, rewind=2)
    near = efface.forget(model, split, CheckpointDifference(rate="recorded"), seed=5)
    assert model.rewind is not None
    assert near.rewind is not None
    assert other.rewind is not None
    moved = [float((near.rewind[n] - t).norm()) for n, t in model.rewind.items()]
    apart = [float((other.rewind[n] - t).norm()) for n, t in model.rewind.items()]
    assert sum(moved) < 0.5 * sum(apart)


def test_weights_move_by_the_difference(dense: efface.TrainedModel, split: efface.Split) -> None:
    after = efface.forget(dense, split, CheckpointDifference(scale=1.5))
    assert dense.rewind is not None
    assert after.rewind is not None
    was = dict(dense.network.named_parameters())
    for name, weight in after.network.named_parameters():
        expected = was[name] + 1.5 * (after.rewind[name] - dense.rewind[name])
        assert torch.allclose(weight, expected, atol=1e-6)
    images = after.lineage[-1].cost["images"]
    assert images == 2 * len(split.retain)


def test_a_second_request_goes_on_from_the_replay(task: efface.Task) -> None:
    """What the first request left is what a training without its records would have kept."""
    model = efface.train(task, seed=0, rewind=2)
    first, second = torch.arange(0, 20), torch.arange(20, 40)
    one = efface.Split.by_ids(task, [task.ids_[i] for i in first.tolist()])
    two = efface.Split.by_ids(task, [task.ids_[i] for i in second.tolist()])
    both = efface.Split.by_ids(task, [task.ids_[i] for i in range(40)])
    method = CheckpointDifference(rate="recorded")
    after = efface.forget(efface.forget(model, one, method), two, method)
    at_once = efface.forget(model, both, method)
    assert after.rewind is not None
    assert at_once.rewind is not None
    assert all(torch.equal(after.rewind[n], t) for n, t in at_once.rewind.items())
    for p, q in zip(after.network.parameters(), at_once.network.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
    again = efface.prune(after, OMP(sparsity=0.5))  # rewinding stays possible
    assert again.sparsity == pytest.approx(0.5, abs=1e-3)


def test_rewind_and_dense_weights_are_dropped_by_other_methods(
    sparse: efface.TrainedModel, split: efface.Split
) -> None:
    after = efface.forget(sparse, split, FT)
    assert after.rewind is None
    assert after.dense is None
    with pytest.raises(NeedsError, match="keep-dense"):
        efface.forget(after, efface.Split.by_class(sparse.task, 1), FromDense(FT))


def test_a_killed_replay_goes_on(
    task: efface.Task, dense: efface.TrainedModel, split: efface.Split, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def progress(label: str, step: int, steps: int) -> None:
        if label == "replay" and step == steps - 1:
            raise StopError

    whole = efface.forget(dense, split, CheckpointDifference())
    journal = Journal(tmp_path / "j", {"a": 1}, seconds=0)
    with pytest.raises(StopError):
        efface.forget(dense, split, CheckpointDifference(), journal=journal, progress=progress)
    steps: list[int] = []
    again = efface.forget(
        dense,
        split,
        CheckpointDifference(),
        journal=Journal(tmp_path / "j", {"a": 1}, seconds=0),
        progress=lambda label, step, all_: steps.append(step),
    )
    assert again.digest == whole.digest
    assert len(steps) < 3


# -- from the dense weights ------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "global"])
def test_from_dense_prunes_what_the_inner_method_made(
    sparse: efface.TrainedModel, split: efface.Split, granularity: Any
) -> None:
    method = FromDense(FT, weights="new", granularity=granularity)
    after = efface.forget(sparse, split, method, seed=2)
    assert after.mask is not None
    assert sparse.mask is not None
    assert after.mask.kept == sparse.mask.kept
    if granularity == "layer":
        assert kept(after) == kept(sparse)
    assert after.dense is not None
    for name, keep in after.mask.items():
        sizes = after.dense[name].abs()
        assert torch.equal(after.network.state_dict()[name][keep], after.dense[name][keep])
        if granularity == "layer":
            assert float(sizes[keep].min()) >= float(sizes[~keep].max())


def test_what_the_new_mask_is_laid_on(sparse: efface.TrainedModel, split: efface.Split) -> None:
    made = {
        kind: efface.forget(sparse, split, FromDense(FineTune(epochs=3), weights=kind), seed=2)
        for kind in ("new", "dense", "sparse", "moved")
    }
    mask, was = made["new"].mask, sparse.mask
    assert mask is not None
    assert was is not None
    assert sparse.dense is not None
    assert made["new"].dense is not None
    assert all(model.mask == mask for model in made.values())
    assert mask != was
    for name, keep in mask.items():
        weights = {kind: model.network.state_dict()[name] for kind, model in made.items()}
        assert torch.equal(weights["dense"][keep], sparse.dense[name][keep])
        stayed, came = keep & was[name], keep & ~was[name]
        assert torch.equal(weights["sparse"][stayed], sparse.network.state_dict()[name][stayed])
        assert torch.equal(weights["sparse"][came], made["new"].dense[name][came])
        shift = made["new"].dense[name] - sparse.dense[name]
        expected = sparse.network.state_dict()[name] + shift
        assert torch.allclose(weights["moved"][stayed], expected[stayed])
        assert torch.equal(weights["moved"][came], made["new"].dense[name][came])


def test_the_difference_moves_the_mask_towards_retraining(task: efface.Task) -> None:
    """The finding of the method, on a network with little noise; more in docs/results."""
    fit = replace(task.fit, epochs=12, lr=0.05, batch_size=32)
    network = partial(efface.networks.MLP, (6, 48, 32, 3))
    quiet = replace(task, network=network, fit=fit)
    gains = []
    for seed in range(3):
        dense = efface.train(quiet, seed=seed, rewind=3)
        sparse = efface.prune(dense, OMP(sparsity=0.8), keep_dense=True)
        split = efface.Split.by_class(quiet, seed % 3)
        references = [
            efface.retrain(quiet, split, model=sparse, like="repruned", initial="model", seed=s)
            for s in (seed, seed + 50)
        ]
        after = efface.forget(sparse, split, FromDense(CheckpointDifference()))
        for reference in references:
            assert after.mask is not None
            assert sparse.mask is not None
            assert reference.mask is not None
            gains.append(after.mask.iou(reference.mask) - sparse.mask.iou(reference.mask))
    assert sum(gains) / len(gains) > 0


# -- un-pruning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["once", "every", "drop"])
@pytest.mark.parametrize("values", ["initial", "rewind", "random", "zero"])
def test_density_is_restored_in_every_layer(
    sparse: efface.TrainedModel, split: efface.Split, order: Any, values: Any
) -> None:
    pick: Any = "gradient" if values == "zero" else "magnitude"
    method = Unprune(FT, p=0.3, values=values, pick=pick, rounds=2, order=order)
    after = efface.forget(sparse, split, method, seed=1)
    assert kept(after) == kept(sparse)
    facts = after.lineage[-1].detail["topology"]
    assert facts["kept"] == sum(kept(sparse))
    assert facts["filters"] == 0
    for name, keep in (after.mask or {}).items():
        assert (after.network.state_dict()[name][~keep] == 0).all()


def test_what_is_open_in_the_mask_of_the_inner_method(
    sparse: efface.TrainedModel, split: efface.Split
) -> None:
    """The inner method sees a denser mask, whose new entries hold their initial values."""
    seen: list[tuple[Mask, dict[str, torch.Tensor]]] = []

    class Look:
        name, title, paper, needs = "look", "", "", frozenset[str]()

        def __call__(self, trained: efface.TrainedModel, split: efface.Split, fit: Fit) -> None:
            assert trained.mask is not None
            seen.append((trained.mask, copy.deepcopy(trained.network.state_dict())))

    model, fit = sparse.copy(), Fit(sparse.task, subject=None)
    Unprune(Look(), p=0.25)(model, split, replace(fit, subject=model))
    (mask, weights), first = seen[0], replay_start(sparse)
    was = sparse.mask
    assert was is not None
    for name, keep in mask.items():
        new = keep & ~was[name]
        assert (was[name] <= keep).all()
        assert int(new.sum()) == round(0.25 * int((~was[name]).sum()))
        assert torch.equal(weights[name][new], first[name][new])
        others = first[name].abs()[~keep]
        assert len(others) == 0 or float(first[name].abs()[new].min()) >= float(others.max())


def replay_start(model: efface.TrainedModel) -> dict[str, torch.Tensor]:
    return replace(Fit(model.task), seed=0).fresh().state_dict()


@pytest.mark.parametrize(
    "pruner",
    [
        IMP(sparsity=0.5),
        Gradual(sparsity=0.5, epochs=2),
        OneShot(sparsity=0.5, criterion="taylor", recovery=1),
        OneShot(sparsity=0.5, granularity="2:4", recovery=1),
        OneShot(sparsity=0.5, granularity="layer", scope="all", recovery=0),
    ],
    ids=lambda p: f"{p.name}-{p.granularity}",
)
@pytest.mark.parametrize("wrapper", [Unprune, FromDense])
def test_whatever_made_the_mask(
    dense: efface.TrainedModel, split: efface.Split, pruner: Any, wrapper: Any
) -> None:
    model = efface.prune(dense, pruner, keep_dense=True)
    after = efface.forget(model, split, wrapper(FT), seed=3)
    assert made_by(after) == pruner
    assert kept(after) == kept(model)
    if ":" in pruner.granularity:
        for keep in (after.mask or {}).values():
            groups = keep[:, : keep.shape[1] // 4 * 4].reshape(len(keep), -1, 4)
            assert (groups.sum(-1) == 2).all()


def test_around_pruning_within_the_same_request(
    dense: efface.TrainedModel, split: efface.Split
) -> None:
    method = PruneFirst(OneShot(sparsity=0.5, recovery=1), Unprune(FT))
    after = efface.forget(dense, split, method)
    assert after.sparsity == pytest.approx(0.5, abs=1e-3)
    chain = Chain(PruneFirst(OneShot(sparsity=0.5, recovery=1), FT), Unprune(L1Sparse(epochs=1)))
    assert efface.forget(dense, split, chain).sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_journal_takes_it_up_inside_the_inner_method(
    sparse: efface.TrainedModel, split: efface.Split, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    count = 0

    def progress(label: str, step: int, steps: int) -> None:
        nonlocal count
        count += 1
        if count == steps + steps // 2:  # in the second round
            raise StopError

    method = Unprune(FT, rounds=2, order="every")
    whole = efface.forget(sparse, split, method)
    journal = Journal(tmp_path / "j", {"a": 1}, seconds=0)
    with pytest.raises(StopError):
        efface.forget(sparse, split, method, journal=journal, progress=progress)
    again = efface.forget(sparse, split, method, journal=Journal(tmp_path / "j", {"a": 1}, 0))
    assert (again.digest, again.mask) == (whole.digest, whole.mask)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"p": 0.0}, "p must lie in"),
        ({"p": 1.1}, "p must lie in"),
        ({"p": float("nan")}, "p must lie in"),
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"values": "zero"}, "pick=gradient or pick=random"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        Unprune(FT, **options)


def test_scale_must_be_positive() -> None:
    with pytest.raises(MethodError, match="scale must be positive"):
        CheckpointDifference(scale=0.0)


def test_nothing_pruned(dense: efface.TrainedModel, split: efface.Split) -> None:
    with pytest.raises(NeedsError, match="a pruned model"):
        efface.forget(dense, split, Unprune(FT))
    names = [n for n, p in dense.network.named_parameters() if p.ndim > 1][:1]
    full = dense.copy()
    full.set_mask(Mask({n: torch.ones_like(full.network.get_parameter(n)).bool() for n in names}))
    with pytest.raises(MethodError, match="nothing is pruned"):
        efface.forget(full, split, Unprune(FT, criterion="magnitude"))


def test_no_initial_weights(sparse: efface.TrainedModel, split: efface.Split) -> None:
    adopted = efface.adopt(sparse.task, sparse.network.state_dict())
    adopted.set_mask(sparse.mask)
    with pytest.raises(NeedsError, match=r"--initial FILE.*values=random or values=zero"):
        efface.forget(adopted, split, Unprune(FT, criterion="magnitude"))
    options: Any = {"criterion": "magnitude", "pick": "random"}
    after = efface.forget(adopted, split, Unprune(FT, values="random", **options))
    assert kept(after) == kept(sparse)
    first = replay_start(sparse)
    known = efface.adopt(sparse.task, sparse.network.state_dict(), initial=first)
    known.set_mask(sparse.mask)
    grown = efface.forget(known, split, Unprune(FT, criterion="magnitude"), seed=1)
    assert grown.mask == efface.forget(sparse, split, Unprune(FT), seed=1).mask


def test_initial_weights_can_be_kept(task: efface.Task, tmp_path: Path) -> None:
    model = efface.train(task, seed=2, keep_initial=True)
    assert model.initial_weights is not None
    again = efface.load(model.save(tmp_path / "m.safetensors"), task)
    assert again.initial_weights is not None
    assert all(torch.equal(t, again.initial_weights[n]) for n, t in model.initial_weights.items())
    seed_only = efface.train(task, seed=2)
    assert seed_only.initial_weights is None
    assert seed_only.initial == model.initial


def test_initial_weights_of_another_network_are_noticed(
    sparse: efface.TrainedModel, split: efface.Split, new_task: Callable[..., efface.Task]
) -> None:
    changed = sparse.copy()
    changed.initial = {"seed": 77, "digest": (sparse.initial or {})["digest"]}
    with pytest.raises(MismatchError, match="no longer begins with"):
        efface.forget(changed, split, Unprune(FT))


def test_criterion_and_mask_must_belong_together(
    dense: efface.TrainedModel, sparse: efface.TrainedModel, split: efface.Split
) -> None:
    with pytest.raises(MethodError, match="magnitude, not taylor"):
        efface.forget(sparse, split, Unprune(FT, criterion="taylor"))
    with pytest.raises(MethodError, match="is unknown"):
        efface.forget(sparse, split, Unprune(FT, criterion="magnitud"))
    with pytest.raises(NeedsError, match="say criterion=magnitude"):
        efface.forget(dense, split, Masked(Unprune(FT), sparse.mask or Mask({})))
    early = efface.prune(dense, AtInit(sparsity=0.5, criterion="snip", epochs=1))
    with pytest.raises(MethodError, match="before training"):
        efface.forget(early, split, Unprune(FT))
    chance = efface.prune(dense, build_pruner("random", {"sparsity": 0.5, "recovery": 0}))
    with pytest.raises(MethodError, match="at random"):
        efface.forget(chance, split, Unprune(FT))
