"""train, adopt, prune, forget, retrain: what they take, leave alone and write down."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import efface
from efface.errors import (
    CheckpointError,
    DivergedError,
    InputError,
    MethodError,
    MismatchError,
    NeedsError,
)
from efface.mask import Mask
from efface.sparsify import OneShot
from efface.task import Settings
from efface.trained import TrainedModel, weights_digest
from efface.unlearn import FineTune, LogitOff, Masked, PruneFirst, RandomLabel
from efface.unlearn.retrain import own_seed
from efface.verbs import per_record, split_of

NewTask = Callable[..., efface.Task]


# --- train ----------------------------------------------------------------------------------------


def test_lineage_of_a_training(trained: TrainedModel, task: efface.Task) -> None:
    (step,) = trained.lineage
    assert (step.verb, step.method, step.seed, step.parent) == ("train", None, 0, None)
    assert step.settings == task.fit.to_dict()
    assert step.data == {"n": 120, "fingerprint": task.data_fingerprint, "positional": False}
    assert step.detail["images"] == {"retain": 6 * 120}
    assert step.cost["images"] == 6 * 120
    assert step.cost["wall"] > 0
    assert step.cost["threads"] == 1
    (fit,) = step.detail["fits"]
    assert [row["epoch"] for row in fit["history"]] == list(range(6))
    assert fit["history"][-1]["loss"] < fit["history"][0]["loss"]
    assert trained.initial == {
        "seed": 0,
        "digest": weights_digest(efface.Fit(task, 0).fresh().state_dict()),
    }
    assert trained.trained_by() is step


def test_the_same_seed_gives_the_same_bytes(task: efface.Task, trained: TrainedModel) -> None:
    torch.manual_seed(3)
    assert efface.train(task, seed=0).digest == trained.digest
    assert efface.train(task, seed=1).digest != trained.digest


def test_forgetting_leaves_no_early_weights_behind(task: efface.Task, split: efface.Split) -> None:
    """They were trained on what is to be forgotten."""
    before = efface.train(task, seed=0, rewind=1)
    after = efface.forget(before, split, efface.unlearn.FineTune(epochs=1))
    assert before.rewind is not None
    assert after.rewind is None
    again = efface.forget(before, split, efface.unlearn.Retrain(), seed=5)
    assert again.rewind is None
    assert again.initial is not None
    assert before.initial is not None
    assert again.initial["seed"] != before.initial["seed"]


@pytest.mark.parametrize("epoch", [1, 3, 6])
def test_rewind_weights_are_those_after_an_epoch(
    task: efface.Task, trained: TrainedModel, epoch: int
) -> None:
    model = efface.train(task, seed=0, rewind=epoch)
    assert model.digest == trained.digest
    assert model.rewind is not None

    kept: dict[str, Tensor] = {}

    def hook(network: nn.Module, clock: Any, history: Any) -> None:
        if len(history) == epoch:
            kept.update({n: t.clone() for n, t in network.state_dict().items()})

    fit = efface.Fit(task, 0, path="train").with_(hook=hook)
    streams = {"retain": efface.Stream(torch.arange(120))}
    fit(fit.fresh(), fit.descend, streams, task.fit)
    assert weights_digest(model.rewind) == weights_digest(kept)
    assert (weights_digest(model.rewind) == model.digest) == (epoch == 6)


@pytest.mark.parametrize("epoch", [-1, 0, 7])
def test_impossible_rewinds_are_refused(task: efface.Task, epoch: int) -> None:
    with pytest.raises(MethodError, match="rewind"):
        efface.train(task, rewind=epoch)


def test_divergence_is_said(new_task: NewTask) -> None:
    task = new_task(fit=Settings(epochs=3, lr=1e30, batch_size=16))
    with pytest.raises(DivergedError, match=r"epoch \d+, step \d+ \(train\)"):
        efface.train(task)


# --- adopt ----------------------------------------------------------------------------------------


def test_adopted_weights_are_copied(task: efface.Task, trained: TrainedModel) -> None:
    source = copy.deepcopy(trained.network)
    model = efface.adopt(task, source.state_dict())
    assert model.digest == trained.digest
    with torch.no_grad():
        source[0].weight.zero_()
    assert model.digest == trained.digest
    (step,) = model.lineage
    assert (step.verb, step.parent, model.mask, model.initial) == ("adopt", None, None, None)
    assert model.trained_by() is None


def test_live_pruned_networks_are_adopted_with_their_mask(
    task: efface.Task, trained: TrainedModel, split: efface.Split
) -> None:
    live = copy.deepcopy(trained.network)
    prune.global_unstructured(
        [(live[0], "weight"), (live[2], "weight")], prune.L1Unstructured, amount=0.5
    )
    wanted = Mask.from_pruned(live)
    before = {n: t.clone() for n, t in live.state_dict().items()}
    model = efface.adopt(task, live.state_dict())
    assert model.mask == wanted
    assert model.network.state_dict().keys() == trained.network.state_dict().keys()
    x = task.train[0]
    with torch.no_grad():
        assert torch.equal(model.network(x), live(x))
    assert all(torch.equal(t, before[n]) for n, t in live.state_dict().items())
    after = efface.forget(model, split, FineTune(epochs=1))
    weights = dict(after.network.named_parameters())
    assert all((weights[n][~keep] == 0).all() for n, keep in model.mask.items())
    # and back: exported, it is the same live network again
    assert model.mask is not None
    exported = model.mask.to_pruned(copy.deepcopy(model.network))
    with torch.no_grad():
        assert torch.equal(exported(x), live(x))


def test_weights_of_another_network_are_refused(task: efface.Task, trained: TrainedModel) -> None:
    weights = dict(trained.network.state_dict())
    weights["head.weight"] = weights.pop("4.weight")
    weights["0.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        efface.adopt(task, weights, name="theirs.safetensors")
    for part in ("theirs.safetensors", "'4.weight'", "'head.weight'", "(7,) instead of (16,)"):
        assert part in str(caught.value)
    mask = {"0.weight_orig": weights["0.weight"], "0.weight_mask": torch.ones(2, 2)}
    odd = {n: t for n, t in trained.network.state_dict().items() if n != "0.weight"} | mask
    with pytest.raises((CheckpointError, MismatchError)):
        efface.adopt(task, odd)


# --- forget ---------------------------------------------------------------------------------------


def test_lineage_of_a_request(trained: TrainedModel, split: efface.Split) -> None:
    method = Masked(FineTune(epochs=1, lr=0.02), Mask({"0.weight": torch.ones(16, 6).bool()}))
    after = efface.forget(trained, split, method, seed=4)
    first, step = after.lineage
    assert first == trained.lineage[0]
    assert (step.verb, step.seed, step.parent) == ("forget", 4, trained.digest)
    assert step.method == {
        "method": "masked",
        "inner": {"method": "finetune", "epochs": 1, "lr": 0.02, "bn": "train"},
        "mask": {"digest": method.mask.digest},
    }
    assert step.detail["split"] == {"forget": 24, "retain": 96, "test": 60}
    assert step.detail["images"] == {"retain": 96}
    assert step.cost["images"] == 96
    assert step.detail["fits"][0]["epochs"] == 1
    (request,) = after.forgotten.requests
    assert request == {"selector": {"kind": "random", "fraction": 0.2, "seed": 3}, "n": 24}
    assert sorted(after.forgotten.positions(trained.task).tolist()) == split.forget.tolist()


def test_methods_by_name_take_the_task_defaults(
    new_task: NewTask, trained: TrainedModel, split: efface.Split
) -> None:
    task = new_task(defaults={"finetune": {"epochs": 2, "lr": 0.004}})
    model = TrainedModel(task, copy.deepcopy(trained.network))
    chosen = efface.Split(task, split.forget, split.retain, split.selector)
    after = efface.forget(model, chosen, "ft", seed=1)
    assert after.lineage[-1].method == {
        "method": "finetune",
        "epochs": 2,
        "lr": 0.004,
        "bn": "train",
    }
    wanted = efface.forget(trained, split, FineTune(epochs=2, lr=0.004), seed=1)
    assert after.digest == wanted.digest


def test_two_requests_in_a_row(trained: TrainedModel, task: efface.Task) -> None:
    first = efface.Split.where(task, "subject == 'person-03'")
    second = efface.Split.where(task, "subject in ('person-03', 'person-07')")
    once = efface.forget(trained, first, FineTune(epochs=1))
    twice = efface.forget(once, second, RandomLabel(epochs=1))
    positions = twice.forgotten.positions(task).tolist()
    assert positions == [*range(12, 16), *range(28, 32)]
    assert [r["n"] for r in twice.forgotten.requests] == [4, 4]
    assert twice.lineage[-1].detail["split"] == {"forget": 4, "retain": 112, "test": 60}
    assert twice.lineage[-1].parent == once.digest
    assert once.forgotten.positions(task).tolist() == list(range(12, 16))
    # the requests between two models, from their lineage
    found = split_of(once, twice)
    assert found.forget.tolist() == list(range(28, 32))
    assert len(found.retain) == 112
    both = split_of(trained, twice)
    assert both.forget.tolist() == positions
    assert both.selector == {"kind": "ids", "n": 8}


def test_records_that_the_owner_has_deleted(new_task: NewTask, trained: TrainedModel) -> None:
    """After the deletion the data is without them; the next request finds its way."""
    task = trained.task
    once = efface.forget(trained, efface.Split.by_ids(task, ["r003", "r050"]), FineTune(epochs=1))
    left = [i for i in range(120) if i not in (3, 50)]
    x, y = task.train
    smaller = new_task(
        train=(x[left], y[left]), ids=[task.ids_[i] for i in left], subjects=None, columns={}
    )
    model = TrainedModel(
        smaller, copy.deepcopy(once.network), lineage=once.lineage, forgotten=once.forgotten
    )
    assert model.forgotten.positions(smaller).tolist() == []
    twice = efface.forget(model, efface.Split.by_ids(smaller, ["r004"]), FineTune(epochs=1))
    assert len(twice.forgotten.tags) == 3
    assert twice.lineage[-1].detail["split"]["retain"] == 117


# --- retrain --------------------------------------------------------------------------------------


def test_a_reference_shares_no_randomness_with_a_model_of_its_seed(
    task: efface.Task, split: efface.Split
) -> None:
    assert own_seed(0) != 0
    model, reference = efface.train(task, seed=1), efface.retrain(task, split, seed=1)
    assert model.initial is not None
    assert reference.initial is not None
    assert reference.initial["digest"] != model.initial["digest"]
    (step,) = reference.lineage
    assert (step.verb, step.seed, step.parent) == ("retrain", 1, None)
    assert step.detail["like"] == "dense"
    assert step.detail["images"] == {"retain": 6 * 96}
    assert len(reference.forgotten.tags) == 24


def test_a_reference_never_sees_what_is_forgotten(new_task: NewTask) -> None:
    """Whatever the forgotten records hold, the reference is the same."""
    task = new_task()
    split = efface.Split.random(task, 0.3, seed=1)
    x, y = task.train[0].clone(), task.train[1].clone()
    x[split.forget] = 1e6
    y[split.forget] = 0
    poisoned = new_task(train=(x, y))
    other = efface.Split(poisoned, split.forget, split.retain, split.selector)
    assert efface.retrain(poisoned, other).digest == efface.retrain(task, split).digest


@pytest.fixture(scope="module")
def rewound(task: efface.Task) -> TrainedModel:
    return efface.prune(efface.train(task, rewind=2), OneShot(0.6, recovery=2))


def test_references_like_a_pruned_model(rewound: TrainedModel, split: efface.Split) -> None:
    task = rewound.task
    kinds: tuple[Any, ...] = ("dense", "same-mask", "rewound", "repruned")
    found = {like: efface.retrain(task, split, model=rewound, like=like, seed=2) for like in kinds}
    assert len({m.digest for m in found.values()}) == 4
    assert {m.lineage[-1].detail["like"] for m in found.values()} == set(kinds)
    assert found["dense"].mask is None
    assert found["dense"].digest == efface.retrain(task, split, seed=2).digest
    assert found["same-mask"].mask == found["rewound"].mask == rewound.mask
    assert found["repruned"].mask is not None
    assert rewound.mask is not None
    assert found["repruned"].mask != rewound.mask
    assert found["repruned"].mask.kept == rewound.mask.kept
    assert [s.verb for s in found["repruned"].lineage] == ["retrain", "prune"]
    assert found["repruned"].lineage[-1].method == rewound.lineage[-1].method
    assert found["repruned"].lineage[-1].detail["images"] == {"retain": 2 * 96}
    assert found["rewound"].initial is None
    for model in found.values():
        weights = dict(model.network.named_parameters())
        for name, keep in (model.mask or {}).items():
            assert (weights[name][~keep] == 0).all()
            assert not torch.signbit(weights[name][~keep]).any()


def test_a_rewound_reference_starts_from_the_rewind_weights(
    rewound: TrainedModel, split: efface.Split
) -> None:
    task = dataclasses.replace(rewound.task, fit=Settings(epochs=1, batch_size=500, lr=1e-30))
    model = rewound.copy()
    model.task = task
    chosen = efface.Split(task, split.forget, split.retain, split.selector)
    start = dict(
        efface.retrain(task, chosen, model=model, like="rewound").network.named_parameters()
    )
    assert rewound.rewind is not None
    assert rewound.mask is not None
    for name, tensor in rewound.rewind.items():
        wanted = tensor.clone()
        if name in rewound.mask:
            wanted[~rewound.mask[name]] = 0
        assert torch.equal(start[name], wanted), name


def test_what_a_reference_cannot_be_like_is_refused(
    trained: TrainedModel, pruned: TrainedModel, task: efface.Task, split: efface.Split
) -> None:
    likes: tuple[Any, ...] = ("same-mask", "rewound", "repruned")
    for like in likes:
        with pytest.raises(NeedsError, match="pruned model"):
            efface.retrain(task, split, like=like)
        with pytest.raises(NeedsError, match="pruned model"):
            efface.retrain(task, split, model=trained, like=like)
    with pytest.raises(NeedsError, match="rewind"):
        efface.retrain(task, split, model=pruned, like="rewound")
    masked = trained.copy()
    masked.set_mask(pruned.mask)
    with pytest.raises(NeedsError, match="lineage"):
        efface.retrain(task, split, model=masked, like="repruned")


def test_an_unknown_likeness_is_refused(rewound: TrainedModel, split: efface.Split) -> None:
    with pytest.raises(InputError, match="same_mask"):
        efface.retrain(
            rewound.task,
            split,
            model=rewound,
            like="same_mask",  # type: ignore[arg-type]
        )


# --- the owner's own routine ----------------------------------------------------------------------


class Routine:
    """A training routine as an owner may have one; notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, network: nn.Module, dataset: Any, seed: int) -> None:
        self.calls.append((len(dataset), seed))
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        draw = torch.Generator().manual_seed(seed % 2**31)
        for inputs, targets in DataLoader(dataset, batch_size=20, shuffle=True, generator=draw):
            optimizer.zero_grad()
            noise = torch.randn_like(inputs) * 0.1  # from the global generator
            nn.functional.cross_entropy(network(inputs + noise), targets).backward()
            optimizer.step()


def test_a_routine_of_their_own_trains_model_and_references(
    new_task: NewTask, split: efface.Split
) -> None:
    routine = Routine()

    def train_fn(network: nn.Module, dataset: Any, seed: int) -> None:
        routine(network, dataset, seed)

    task = new_task(train_fn=train_fn)
    chosen = efface.Split(task, split.forget, split.retain, split.selector)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = efface.train(task, seed=5)
    reference = efface.retrain(task, chosen, model=model, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert routine.calls == [(120, 5), (96, own_seed(5))]
    torch.manual_seed(2)
    assert efface.train(task, seed=5).digest == model.digest
    assert model.digest != reference.digest
    named = f"{train_fn.__module__}.{train_fn.__qualname__}"
    assert model.lineage[0].settings["train_fn"] == named
    assert model.lineage[0].cost["images"] == 120
    after = efface.forget(model, chosen, FineTune(epochs=1))
    result = efface.audit(model, after, chosen, [reference])
    assert result["ra"]["gap"] is not None
    with pytest.raises(MethodError, match="rewind"):
        efface.train(task, rewind=1)


def test_a_routine_of_their_own_keeps_no_mask(new_task: NewTask, split: efface.Split) -> None:
    task = new_task(train_fn=lambda *args: Routine()(*args))
    model = efface.prune(efface.train(task), OneShot(0.5, recovery=1))
    chosen = efface.Split(task, split.forget, split.retain, split.selector)
    with pytest.raises(NeedsError, match="train_fn"):
        efface.retrain(task, chosen, model=model, like="same-mask")
    efface.retrain(task, chosen, model=model, like="repruned")


@pytest.mark.parametrize("routine", [Routine(), functools.partial(Routine.__call__, Routine())])
def test_a_routine_may_be_any_callable(new_task: NewTask, routine: Any) -> None:
    model = efface.train(new_task(train_fn=routine))
    assert "0x" not in model.lineage[0].settings["train_fn"]  # no address: names compare


# --- the rest -------------------------------------------------------------------------------------


def test_a_long_story_keeps_its_lineage(
    trained: TrainedModel, class_split: efface.Split, tmp_path: Path
) -> None:
    model = efface.prune(trained, OneShot(0.5, recovery=1))
    model = efface.forget(model, efface.Split.where(model.task, "age > 60"), FineTune(epochs=1))
    model = efface.forget(model, class_split, LogitOff())
    steps = model.lineage
    assert [s.verb for s in steps] == ["train", "prune", "forget", "forget"]
    assert [s.parent is None for s in steps] == [True, False, False, False]
    assert steps[1].parent == trained.digest
    assert len({s.parent for s in steps}) == 4
    back = efface.load(model.save(tmp_path / "m.safetensors"), model.task)
    assert [s.verb for s in back.lineage] == [s.verb for s in steps]
    assert back.forgotten == model.forgotten
    prune_first = efface.forget(
        trained, class_split, PruneFirst(OneShot(0.5, recovery=0), LogitOff())
    )
    assert prune_first.sparsity == pytest.approx(0.5)


VERBS: dict[str, Callable[[TrainedModel, efface.Split, Path], object]] = {
    "train": lambda model, split, path: efface.train(model.task),
    "adopt": lambda model, split, path: efface.adopt(model.task, model.network.state_dict()),
    "load": lambda model, split, path: efface.load(path, model.task),
    "prune": lambda model, split, path: efface.prune(model),
    "forget": lambda model, split, path: efface.forget(model, split, "ft"),
    "retrain": lambda model, split, path: efface.retrain(model.task, split),
    "audit": lambda model, split, path: efface.audit(model, model, split),
    "split": lambda model, split, path: efface.Split.random(model.task, 0.1),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_global_random_state_is_left_as_found(
    trained: TrainedModel, split: efface.Split, tmp_path: Path, verb: str
) -> None:
    path = trained.save(tmp_path / "m.safetensors")
    VERBS[verb](trained, split, path)  # libraries draw when they are first imported
    torch.manual_seed(31)
    random.seed(31)
    np.random.seed(31)
    state, theirs, arrays = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    VERBS[verb](trained, split, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == theirs
    assert (np.random.get_state()[1] == arrays).all()


def test_rows_per_record(trained: TrainedModel, split: efface.Split) -> None:
    rows = per_record(trained, split)
    task = trained.task
    network = copy.deepcopy(trained.network).eval()
    for i, p in enumerate(split.forget.tolist()):
        assert rows["id"][i] == task.ids_[p]
        assert rows["label"][i] == int(task.train[1][p])
        with torch.no_grad():
            z = network(task.train[0][p : p + 1])[0].double()
        others = torch.cat([z[: rows["label"][i]], z[rows["label"][i] + 1 :]])
        assert rows["answer"][i] == int(z.argmax())
        wanted = float(z[rows["label"][i]] - others.logsumexp(0))
        assert rows["margin"][i] == pytest.approx(wanted, abs=2e-4)
