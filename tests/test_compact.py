"""Compaction: the small network answers as the masked one, rebuilds from its file, and goes on."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.auditing.base import _retrained
from efface.cli import main
from efface.errors import (
    CheckpointError,
    EffaceError,
    InputError,
    MethodError,
    NeedsError,
    OutputError,
)
from efface.fitting import Fit
from efface.mask import Mask
from efface.networks import MLP, VGG16BN, AirNet, DigitsCNN, ResNet18, ResNet20, ThreeConv, ViT
from efface.onnx_export import PACKAGES, onnx_bytes, save_onnx
from efface.predict import logits
from efface.shapes import Compacted, Cut, ShapePlan, compare, number, plan_of, sizes_of, with_plan
from efface.sparsify.compaction import dead_filters
from efface.sparsify.groups import filter_groups, mask_of
from efface.unlearn import methods
from efface.unlearn.base import needs_of

CLASSES = 3

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: MLP((64, 24, 12, CLASSES)), (1, 8, 8)),
    "DigitsCNN": (lambda: DigitsCNN(CLASSES), (1, 8, 8)),
    "ThreeConv": (lambda: ThreeConv(CLASSES), (3, 16, 16)),
    "AirNet": (lambda: AirNet(CLASSES, (16, 24, 32)), (3, 16, 16)),
    "ResNet20": (lambda: ResNet20(CLASSES), (3, 16, 16)),
    "ResNet18": (lambda: ResNet18(CLASSES), (3, 8, 8)),
    "VGG16BN": (lambda: VGG16BN(CLASSES, width=8), (3, 32, 32)),
    "ViT": (lambda: ViT(CLASSES, image=16, depth=2), (3, 16, 16)),
}


def images(n: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of three classes that differ in brightness."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    shade = labels.view(-1, *[1] * len(shape)) / CLASSES
    return 0.5 * torch.rand(n, *shape, generator=draw) + 0.5 * shade, labels


def task_of(network: Callable[[], nn.Module], shape: tuple[int, ...], n: int = 30) -> efface.Task:
    return efface.Task(
        network,
        images(n, shape),
        images(20, shape, seed=1),
        ids=[f"i{k}" for k in range(n)],
        fit=efface.Settings(epochs=1, batch_size=10, lr=0.02),
        name="shades",
    )


def disturb(network: nn.Module, seed: int = 0) -> None:
    """Batch-norm statistics, scales and shifts, and biases, as of a trained network."""
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=draw))  # type: ignore[union-attr]
            module.running_var.copy_(0.5 + torch.rand(len(module.weight), generator=draw))  # type: ignore[union-attr, operator]


def some_filters(model: efface.TrainedModel, share: float = 0.4, seed: int = 1) -> Mask:
    """A mask that keeps about so many filters of every group, and at least one."""
    draw = torch.Generator().manual_seed(seed)
    groups = filter_groups(model.task, model.network).prunable
    keep = {g.name: torch.rand(g.size, generator=draw) < share for g in groups}
    for kept in keep.values():
        kept[0] = True
    return mask_of(groups, keep, model.network)


def masked(name: str = "DigitsCNN", share: float = 0.4, n: int = 30) -> efface.TrainedModel:
    """An untrained model of one of the networks, many of its filters dropped."""
    task = task_of(*NETWORKS[name], n)
    model = efface.TrainedModel(task, Fit(task, seed=0).fresh())
    disturb(model.network)
    model.set_mask(some_filters(model, share))
    return model


@pytest.fixture(scope="module")
def large() -> efface.TrainedModel:
    """A trained DigitsCNN, 60 % of its filters dropped and trained again under the mask."""
    task = task_of(*NETWORKS["DigitsCNN"], 60)
    model = efface.train(task, seed=0, rewind=1)
    model.set_mask(some_filters(model))
    return efface.forget(
        model, efface.Split.by_ids(task, ["i1"]), efface.unlearn.FineTune(epochs=1)
    )


@pytest.fixture(scope="module")
def small(large: efface.TrainedModel) -> efface.TrainedModel:
    return efface.compact(large)


def answers(model: efface.TrainedModel, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.task.forward(copy.deepcopy(model.network).eval(), inputs)


# -- the same answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_as_the_masked_network_does(name: str) -> None:
    model = masked(name)
    result = efface.compact(model)
    inputs = torch.randn(16, *NETWORKS[name][1], generator=torch.Generator().manual_seed(7))
    expected, found = answers(model, inputs), answers(result, inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    before, after = result.lineage[-1].detail["parameters"]
    assert after == sum(p.numel() for p in result.network.parameters()) < 0.7 * before
    adds = result.lineage[-1].detail["multiply_adds"]
    assert adds[1] < 0.8 * adds[0]
    assert result.mask is None


@pytest.mark.parametrize("name", ["DigitsCNN", "ResNet20"])
def test_batch_statistics_and_gradients_are_the_same_too(name: str) -> None:
    model = masked(name)
    result = efface.compact(model)
    inputs, targets = images(12, NETWORKS[name][1], seed=3)
    found = []
    for one in (model, result):
        network = copy.deepcopy(one.network).train()
        loss = F.cross_entropy(network(inputs), targets)
        grads = torch.autograd.grad(loss, list(network.parameters()))
        tensors = dict(zip(dict(network.named_parameters()), grads, strict=True))
        found.append(tensors | dict(network.named_buffers()))
    plan = plan_of(result.task)
    assert plan is not None
    for tensor, value in found[0].items():
        kept = plan.cuts[tensor].of(value) if tensor in plan.cuts else value
        torch.testing.assert_close(found[1][tensor], kept, rtol=1e-3, atol=1e-5)


def by_hand(model: efface.TrainedModel) -> dict[str, Tensor]:
    """What is left of a DigitsCNN, from the definition."""
    state = model.network.state_dict()
    left: dict[str, list[int]] = {"0": [0]}
    for i in (1, 2, 3):
        rows = state[f"conv{i}.weight"]
        left[str(i)] = [
            r
            for r in range(len(rows))
            if any(
                bool((t[r] != 0).any())
                for t in (rows, state[f"norm{i}.weight"], state[f"norm{i}.bias"])
            )
        ]
    found = {}
    for i in (1, 2, 3):
        own, read = left[str(i)], left[str(i - 1)]
        found[f"conv{i}.weight"] = state[f"conv{i}.weight"][own][:, read]
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            found[f"norm{i}.{leaf}"] = state[f"norm{i}.{leaf}"][own]
        found[f"norm{i}.num_batches_tracked"] = state[f"norm{i}.num_batches_tracked"]
    columns = [16 * channel + place for channel in left["3"] for place in range(16)]
    found["classifier.weight"] = state["classifier.weight"][:, columns]
    found["classifier.bias"] = state["classifier.bias"]
    return found


def test_equals_what_is_cut_by_hand(large: efface.TrainedModel, small: efface.TrainedModel) -> None:
    expected = by_hand(large)
    state = small.network.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    network: Any = small.network
    assert network.conv2.in_channels == network.norm1.num_features == network.conv1.out_channels
    assert network.classifier.in_features == 16 * network.conv3.out_channels


def test_channels_that_are_zero_without_a_mask() -> None:
    model = masked()
    dense = efface.TrainedModel(model.task, copy.deepcopy(model.network))
    assert efface.compact(dense).digest == efface.compact(model).digest


def test_the_remainder_of_a_mask_goes_on_holding() -> None:
    model = masked()
    filters = model.mask
    assert filters is not None
    draw = torch.Generator().manual_seed(5)
    scattered = torch.rand(model.network.get_parameter("conv2.weight").shape, generator=draw) < 0.5
    kept = dict(filters) | {"conv2.weight": filters["conv2.weight"] & scattered}
    model.set_mask(Mask(kept))
    result = efface.compact(model)
    assert result.mask is not None
    plan = plan_of(result.task)
    assert plan is not None
    left = plan.cuts["conv2.weight"].of(scattered)
    assert torch.equal(result.mask["conv2.weight"], left)
    assert all(bool(k.all()) for n, k in result.mask.items() if n != "conv2.weight")
    after = efface.forget(result, split_of(result.task), efface.unlearn.FineTune(epochs=1))
    assert bool((after.network.get_parameter("conv2.weight")[~left] == 0).all())
    assert after.mask == result.mask


def test_of_a_group_that_is_dead_one_filter_is_kept() -> None:
    model = masked()
    groups = filter_groups(model.task, model.network).prunable
    gone = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in groups if "conv2" in g.name}
    model.set_mask(mask_of(groups, gone, model.network))
    dead = dead_filters(groups, model.network)["conv2.weight"]
    assert dead.tolist() == [False] + [True] * 23
    result = efface.compact(model)
    assert result.mask is not None
    assert not bool(result.mask["conv2.weight"].any())
    assert result.lineage[-1].detail["filters"]["conv2.weight"] == [24, 1]


class Branches(nn.Module):
    """Concatenation and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 5, 3, padding=1)
        self.deep = nn.Conv2d(11, 11, 3, padding=1, groups=11)
        self.norm = nn.BatchNorm2d(11)
        self.last = nn.Conv2d(11, 7, 1)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.last(self.norm(self.deep(x)).relu()).relu().mean((2, 3)))


def test_concatenation_and_depthwise_convolutions() -> None:
    task = task_of(Branches, (1, 8, 8))
    model = efface.TrainedModel(task, Fit(task, seed=0).fresh())
    disturb(model.network)
    model.set_mask(some_filters(model))
    result = efface.compact(model)  # checks by itself that the answers are the same
    assert result.lineage[-1].detail["difference"] <= 1e-5


# -- what a compacted model is ---------------------------------------------------------------------


def split_of(task: efface.Task) -> efface.Split:
    return efface.Split.by_ids(task, ["i3", "i5", "i8"])


def test_the_model_is_left_as_it_is(large: efface.TrainedModel) -> None:
    large.network.train()
    before = (large.to_bytes(), torch.get_rng_state().clone(), id(large.task.network))
    flags = {name: (p.requires_grad, p.grad) for name, p in large.network.named_parameters()}
    efface.compact(large)
    assert large.to_bytes() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert id(large.task.network) == before[2]
    assert all(module.training for module in large.network.modules())
    now = {name: (p.requires_grad, p.grad) for name, p in large.network.named_parameters()}
    assert now == flags


def test_lineage_and_what_goes_along(
    large: efface.TrainedModel, small: efface.TrainedModel
) -> None:
    step = small.lineage[-1]
    assert step.verb == "compact"
    assert step.parent == large.digest
    assert small.lineage[:-1] == large.lineage
    assert small.forgotten == large.forgotten
    assert large.initial is not None
    assert (small.initial, small.rewind, small.dense) == (None, None, None)
    detail = step.detail
    assert detail["records"] == 20
    filters = detail["filters"]
    assert set(filters) == {"conv1.weight", "conv2.weight", "conv3.weight"}
    assert all(after < before for before, after in filters.values())
    assert json.loads(json.dumps(dict(detail))) == dict(detail)
    assert efface.compact(large).digest == small.digest


def test_multiply_adds_are_those_of_the_definition(small: efface.TrainedModel) -> None:
    c1, c2, c3 = (small.network.get_submodule(f"conv{i}").out_channels for i in (1, 2, 3))

    def adds(a: Any, b: Any, c: Any) -> int:
        return int(9 * 64 * (a + a * b) + 9 * 16 * b * c + 16 * c * CLASSES)

    assert small.lineage[-1].detail["multiply_adds"] == [adds(16, 24, 24), adds(c1, c2, c3)]


def test_file_rebuilds_the_network(
    large: efface.TrainedModel, small: efface.TrainedModel, tmp_path: Path
) -> None:
    path = small.save(tmp_path / "small.safetensors")
    assert path.stat().st_size < 0.5 * large.save(tmp_path / "large.safetensors").stat().st_size
    for task in (large.task, small.task):
        again = efface.load(path, task)
        assert again.to_bytes() == small.to_bytes()
        assert str(again.network) == str(small.network)
    back = efface.load(tmp_path / "large.safetensors", small.task)  # a plan is the file's own
    assert back.to_bytes() == large.to_bytes()


def test_file_without_a_plan_says_nothing_of_it(large: efface.TrainedModel) -> None:
    assert b"shape_plan" not in large.to_bytes()


def test_file_and_another_network(small: efface.TrainedModel, tmp_path: Path) -> None:
    path = small.save(tmp_path / "small.safetensors")
    task = dataclasses.replace(small.task, network=lambda: DigitsCNN(4))
    with pytest.raises(CheckpointError, match=r"small\.safetensors: the shape plan .* classifier"):
        efface.load(path, task)
    task = dataclasses.replace(small.task, network=lambda: MLP((64, 8, CLASSES)))
    with pytest.raises(CheckpointError, match=r"no \w+\.weight and \d+ more"):
        efface.load(path, task)


def test_fresh_networks_are_cut_from_fresh_large_ones(
    large: efface.TrainedModel, small: efface.TrainedModel
) -> None:
    plan = plan_of(small.task)
    assert plan is not None
    fresh, whole = Fit(small.task, seed=4).fresh(), Fit(large.task, seed=4).fresh()
    for name, tensor in whole.state_dict().items():
        kept = plan.cuts[name].of(tensor) if name in plan.cuts else tensor
        assert torch.equal(fresh.state_dict()[name], kept)


def test_retraining_the_small_network_is_retraining_under_the_mask(
    large: efface.TrainedModel, small: efface.TrainedModel
) -> None:
    split = split_of(large.task)
    masked_one = efface.retrain(large.task, split, model=large, like="same-mask", seed=3)
    compacted = efface.retrain(small.task, split, model=small, seed=3)
    assert type(compacted.task.network) is Compacted
    inputs = images(20, (1, 8, 8), seed=9)[0]
    torch.testing.assert_close(
        answers(compacted, inputs), answers(masked_one, inputs), rtol=1e-3, atol=1e-4
    )


def test_records_are_not_read_again(large: efface.TrainedModel) -> None:
    records = large.task.records
    assert efface.compact(large).task.records is records


def test_compacting_again_after_pruning_again(
    large: efface.TrainedModel, small: efface.TrainedModel, tmp_path: Path
) -> None:
    model = small.copy()
    model.set_mask(some_filters(model, 0.5, seed=2))
    result = efface.compact(model)
    inputs = images(20, (1, 8, 8), seed=9)[0]
    torch.testing.assert_close(answers(result, inputs), answers(model, inputs))
    task = result.task.network
    assert isinstance(task, Compacted)
    assert task.factory is large.task.network  # one plan for the user's own network
    path = result.save(tmp_path / "smaller.safetensors")
    assert efface.load(path, large.task).to_bytes() == result.to_bytes()
    assert [s.verb for s in result.lineage[-2:]] == ["compact", "compact"]


def simple_methods() -> list[str]:
    """Unlearners that need no more than D_r, D_f or a class, and nothing inside them."""
    plain = {"retain", "forget", "class"}
    return [n for n, cls in sorted(methods().items()) if bare(cls) and needs_of(cls()) <= plain]


def bare(cls: type[Any]) -> bool:
    """Whether a method can be made without arguments."""
    missing = dataclasses.MISSING
    return all(
        f.default is not missing or f.default_factory is not missing
        for f in dataclasses.fields(cls)
    )


@pytest.mark.parametrize("name", simple_methods())
def test_unlearners_run_on_it(name: str, small: efface.TrainedModel) -> None:
    cls: Any = methods()[name]
    one = {"epochs": 1} if "epochs" in {f.name for f in dataclasses.fields(cls)} else {}
    method = cls(**one)
    split = efface.Split.by_class(small.task, 1)
    after = efface.forget(small, split, method)
    assert plan_of(after.task) == plan_of(small.task)
    assert len(after.forgotten.tags) == 20  # all of class 1; i1 had been forgotten before
    assert after.network.state_dict().keys() == small.network.state_dict().keys()


def test_needs_of_what_is_gone(small: efface.TrainedModel) -> None:
    with pytest.raises(NeedsError):
        efface.retrain(small.task, split_of(small.task), model=small, like="rewound")
    with pytest.raises(NeedsError):
        efface.prune(small, "imp")


# -- audits ----------------------------------------------------------------------------------------


def test_audit_with_references_of_every_kind(large: efface.TrainedModel) -> None:
    task = large.task
    split = split_of(task)
    after = efface.compact(efface.forget(large, split, efface.unlearn.FineTune(epochs=1)))
    dense = efface.retrain(task, split, model=large, seed=1)
    same = efface.retrain(task, split, model=large, like="same-mask", seed=2)
    references = [dense, same, efface.compact(same)]
    result = efface.audit(large, after, split, references)
    ra = result["ra"]
    assert ra["status"] == "ok"
    assert 0 <= ra["value"] <= 1
    assert all(_retrained(reference) for reference in references)
    assert not _retrained(after)
    with pytest.raises(InputError, match="a reference was not trained from fresh weights"):
        efface.audit(large, after, split, [after])


# -- what cannot be compacted ----------------------------------------------------------------------


def test_nothing_is_dead() -> None:
    task = task_of(*NETWORKS["DigitsCNN"])
    model = efface.TrainedModel(task, Fit(task, seed=0).fresh())
    with pytest.raises(MethodError, match=r"no filter is dead.*granularity=filter"):
        efface.compact(model)


def test_rows_whose_batch_norm_is_alive_are_not_dead() -> None:
    model = masked()
    assert model.mask is not None
    rows = {"conv1.weight": model.mask["conv1.weight"]}  # unstructured: batch norm left alone
    task = model.task
    other = efface.TrainedModel(task, Fit(task, seed=0).fresh())
    disturb(other.network)
    other.set_mask(Mask(rows))
    with pytest.raises(MethodError, match="no filter is dead"):
        efface.compact(other)


def test_nothing_can_be_taken_out() -> None:
    task = task_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), (1, 8, 8))
    model = efface.TrainedModel(task, task.network())
    with pytest.raises(MethodError, match="no filter of the network can be taken out"):
        efface.compact(model)


class Undecided(nn.Module):
    """A forward pass that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP((64, 8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("only on Tuesdays")


class Fixed(nn.Module):
    """A forward pass with a size written down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        if x.shape[1] != 6:
            raise RuntimeError("six channels, please")
        return self.head(x)


class Squashed(nn.Sequential):
    """An activation that makes 0.5 of a zero."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, CLASSES))


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (Undecided, r"Undecided cannot be traced \(NotImplementedError: only on Tuesdays\)"),
        (Fixed, "does not work with fewer channels .six channels, please"),
        (Squashed, "answers differently .by .* of the largest logit"),
    ],
)
def test_sentences_on_networks_that_cannot_be(network: type[nn.Module], sentence: str) -> None:
    task = task_of(network, (1, 8, 8))
    model = efface.TrainedModel(task, task.network())
    with torch.no_grad():
        for name, p in model.network.named_parameters():
            if name.split(".")[0] in ("conv", "1"):
                p[1:4] = 0.0
    before = model.to_bytes()
    with pytest.raises(MethodError, match=sentence):
        efface.compact(model)
    assert model.to_bytes() == before


# -- plans -----------------------------------------------------------------------------------------


def test_plan_through_json(small: efface.TrainedModel) -> None:
    plan = plan_of(small.task)
    assert plan is not None
    again = ShapePlan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert again == plan
    network = again.apply(DigitsCNN(CLASSES))
    assert str(network) == str(small.network)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cuts": {}}',
        '{"cuts": {"w": {"shape": [9], "keep": {"0": "ff"}}}, "sizes": {}}',
        '{"cuts": {"w": {"shape": [8], "keep": {"1": "ff"}}}, "sizes": {}}',
        '{"cuts": {"w": {"shape": [8], "keep": {"0": "xy"}}}, "sizes": {}}',
        '{"cuts": {}, "sizes": {"conv": {"out_channels": [3]}}}',
        '{"cuts": {}, "sizes": {"conv": 3}}',
    ],
)
def test_damaged_plans(text: str) -> None:
    with pytest.raises(CheckpointError, match="shape plan of the compacted model is damaged"):
        ShapePlan.from_json(text)


def test_plans_that_do_not_fit() -> None:
    rows = torch.tensor([True, False, True])
    plan = ShapePlan({"weight": Cut((3, 2), {0: rows})}, {"": {"out_features": (3, 2)}})
    with pytest.raises(CheckpointError, match=r"weight of shape \(3, 4\) instead of \(3, 2\)"):
        plan.apply(nn.Linear(4, 3))
    plan = ShapePlan({}, {"": {"out_features": (3, 2)}, "inner": {"groups": (1, 2)}})
    with pytest.raises(CheckpointError, match=r"out_features of 4 instead of 3 and 1 more"):
        plan.apply(nn.Linear(2, 4))


def test_shared_parameters_stay_shared() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    cut = Cut((3, 3), {0: torch.tensor([True, True, False])})
    ShapePlan({"0.weight": cut, "1.weight": cut}, {}).apply(network)
    assert network[0].weight is network[1].weight
    assert network[0].weight.shape == (2, 3)


def test_plan_keeps_flags_and_kinds() -> None:
    network = nn.BatchNorm1d(3)
    network.weight.requires_grad_(False)
    cut = Cut((3,), {0: torch.tensor([True, False, True])})
    names = ("weight", "bias", "running_mean", "running_var")
    ShapePlan(dict.fromkeys(names, cut), {"": {"num_features": (3, 2)}}).apply(network)
    assert not network.weight.requires_grad
    assert network.bias.requires_grad
    assert set(dict(network.named_buffers())) == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert network(torch.randn(4, 2)).shape == (4, 2)


def test_what_is_read_off_a_numbered_copy() -> None:
    before = nn.Conv2d(3, 5, 2)
    twin = copy.deepcopy(before)
    sizes = sizes_of(twin)
    number(twin)
    twin.weight = nn.Parameter(twin.weight[[0, 3]][:, [1, 2]])
    twin.bias = nn.Parameter(twin.bias[[0, 3]])
    twin.out_channels, twin.in_channels = 2, 2
    plan = compare(before.state_dict(), sizes, twin)
    assert plan.sizes == {"": {"out_channels": (5, 2), "in_channels": (3, 2)}}
    expected = before.weight[[0, 3]][:, [1, 2]]
    assert torch.equal(plan.apply(copy.deepcopy(before)).get_parameter("weight"), expected)
    for wrong in (twin.weight.flip(0), twin.weight[:, 0]):
        other = copy.deepcopy(twin)
        other.weight = nn.Parameter(wrong.detach())
        with pytest.raises(ValueError, match="weight"):
            compare(before.state_dict(), sizes, other)


def test_two_plans_in_one() -> None:
    def half(size: int, *kept: int) -> Tensor:
        return torch.isin(torch.arange(size), torch.tensor(kept))

    first = ShapePlan({"weight": Cut((5, 4), {0: half(5, 0, 2, 3, 4)})}, {"": {"a": (5, 4)}})
    then = ShapePlan(
        {
            "weight": Cut((4, 4), {0: half(4, 1, 3), 1: half(4, 0)}),
            "bias": Cut((4,), {0: half(4, 2)}),
        },
        {"": {"a": (4, 2), "b": (7, 6)}},
    )
    both = then.after(first)
    weight = torch.randn(5, 4)
    two_steps = then.cuts["weight"].of(first.cuts["weight"].of(weight))
    assert torch.equal(both.cuts["weight"].of(weight), two_steps)
    assert both.cuts["weight"].after == (2, 1)
    assert both.sizes == {"": {"a": (5, 2), "b": (7, 6)}}
    assert both.cuts["bias"] is then.cuts["bias"]


def test_task_without_its_plan(small: efface.TrainedModel, large: efface.TrainedModel) -> None:
    assert with_plan(small.task, None).network is large.task.network
    assert with_plan(large.task, None) is large.task


# -- ONNX ------------------------------------------------------------------------------------------

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="efface[onnx] is not installed"
)


def run_onnx(data: bytes, inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(data)
    return torch.from_numpy(session.run(["logits"], {"input": inputs.numpy()})[0])


@needs_onnx
def test_onnx_answers_as_torch_does(small: efface.TrainedModel, tmp_path: Path) -> None:
    facts = save_onnx(small, tmp_path / "small.onnx")
    data = (tmp_path / "small.onnx").read_bytes()
    assert facts["batch"] == "dynamic"
    assert facts["bytes"] == len(data)
    assert facts["difference"] <= 1e-4
    inputs = images(13, (1, 8, 8), seed=11)[0]
    torch.testing.assert_close(run_onnx(data, inputs), answers(small, inputs), rtol=0, atol=1e-4)
    assert small.digest.encode() in data
    for trace in (__file__, str(Path(torch.__file__).parent), "File ", "DigitsCNN"):
        assert trace.encode() not in data
    assert onnx_bytes(small)[0] == data


@needs_onnx
def test_onnx_of_a_forward_pass_for_one_size_only() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP((64, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + torch.zeros(len(x), 1)  # the length becomes a constant

    task = task_of(Counted, (1, 8, 8))
    data, facts = onnx_bytes(efface.TrainedModel(task, task.network()))
    assert facts["batch"] == 1
    assert run_onnx(data, images(1, (1, 8, 8))[0]).shape == (1, CLASSES)


@needs_onnx
def test_onnx_of_inputs_of_several_parts() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, CLASSES), nn.Linear(3, CLASSES)

        def forward(self, parts: dict[str, Tensor]) -> Tensor:
            return self.a(parts["wide"]) + self.b(parts["slim"])

    inputs = {"wide": torch.randn(20, 4), "slim": torch.randn(20, 3)}
    data = (inputs, torch.arange(20) % CLASSES)
    task = efface.Task(Pair, data, data)
    facts = onnx_bytes(efface.TrainedModel(task, task.network()))[1]
    assert facts["inputs"] == ["input_0", "input_1"]


@needs_onnx
def test_onnx_of_a_forward_pass_that_cannot_be(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP((64, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x if bool(x.sum() > 0) else -x)

    task = task_of(Moody, (1, 8, 8))
    path = tmp_path / "moody.onnx"
    with pytest.raises(MethodError, match="the forward pass of Moody cannot be exported to ONNX"):
        save_onnx(efface.TrainedModel(task, task.network()), path)
    assert not path.exists()
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


@needs_onnx
def test_onnx_that_answers_otherwise_is_not_written(
    small: efface.TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given: Any, **options: Any) -> Any:
        return logits(*given, **options) + np.float32(2e-4)

    monkeypatch.setattr("efface.onnx_export.logits", wrong)
    with pytest.raises(EffaceError, match=r"otherwise than torch does.*nothing was written"):
        save_onnx(small, tmp_path / "wrong.onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages(
    small: efface.TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def absent(name: str) -> Any:
        return None if name in PACKAGES[1:] else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(NeedsError, match=r"onnxscript, onnxruntime.*pip install 'efface\[onnx\]'"):
        save_onnx(small, tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_onnx_file_that_exists(small: efface.TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(OutputError):
        save_onnx(small, tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_text() == "mine"


# -- the command -----------------------------------------------------------------------------------

MODULE = """
import torch

import efface
from efface.networks import DigitsCNN

draw = torch.Generator().manual_seed(0)
labels = torch.arange(80) % 3
inputs = 0.5 * torch.rand(80, 1, 8, 8, generator=draw) + 0.3 * labels.view(-1, 1, 1, 1)
train, test = (inputs[:60], labels[:60]), (inputs[60:], labels[60:])
task = efface.Task(
    lambda: DigitsCNN(3), train, test, ids=[f"i{k}" for k in range(60)], name=NAME,
    fit=efface.Settings(epochs=2, batch_size=20, lr=0.05),
)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a user's task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shades.py").write_text(MODULE.replace("NAME", "'shades:task'"))
    monkeypatch.delitem(sys.modules, "shades", raising=False)
    return tmp_path


def run(words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["efface", *words.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@needs_onnx
def test_command_line_end_to_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = "--method one-shot --sparsity 0.6 --set granularity=filter --set recovery=1"
    for words in (
        "train shades:task --out dense.st",
        f"prune shades:task --model dense.st {prune} --out sparse.st",
        "forget shades:task --model sparse.st --class 1 --method finetune --set epochs=1 "
        "--out forgot.st",
        "compact forgot.st --task shades:task --out small.st --onnx small.onnx",
        "retrain shades:task --model sparse.st --like same-mask --class 1 --out fresh.st",
        "audit shades:task --before sparse.st --after small.st --reference fresh.st --out audit",
        "forget shades:task --model small.st --class 2 --method finetune --set epochs=1 "
        "--out both.st",
        "audit shades:task --before small.st --after both.st --out audit2",
    ):
        assert run(words, monkeypatch) == 0, capsys.readouterr().err
    assert Path("small.st").stat().st_size < 0.6 * Path("forgot.st").stat().st_size
    assert json.loads(Path("audit/audit.json").read_text())["verdict"]
    capsys.readouterr()

    assert run("compact forgot.st --task shades:task --out again.st --json", monkeypatch) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "again.st"
    assert facts["onnx"] is None
    assert facts["parameters"][1] < facts["parameters"][0] == 12762 - 7 * 384 - 7

    assert run("show small.st", monkeypatch) == 0
    text = capsys.readouterr().out
    assert "compact" in text
    assert "conv2.weight" in text
    assert "24 × 16 × 3 × 3" in text
    assert run("show small.st --json", monkeypatch) == 0
    shown = json.loads(capsys.readouterr().out)["compacted"]
    assert shown["after"] < 0.5 * shown["before"]

    # a model that has nothing to compact, or was compacted already, as ONNX
    for name in ("dense", "both"):
        assert run(f"compact {name}.st --task shades:task --onnx {name}.onnx", monkeypatch) == 0
        assert Path(f"{name}.onnx").is_file()
    assert run("compact dense.st --task shades:task --out no.st --onnx no.onnx", monkeypatch) == 2
    assert "no filter is dead" in capsys.readouterr().err
    assert not Path("no.st").exists()
    assert not Path("no.onnx").exists()


def test_command_line_and_bad_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = masked()
    model.save("m.st")  # of a task called "shades"
    for words, sentence in (
        ("compact m.st", "say what to write"),
        ("compact m.st --out o.st", "a task called 'shades', which is no built-in one"),
        ("compact m.st --out m.st --task shades:task", "m.st exists"),
        ("compact absent.st --out o.st", "absent.st cannot be read"),
        ("compact shades.py --out o.st", "truncated, damaged or no safetensors"),
    ):
        assert run(words, monkeypatch) == 2
        assert sentence in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["m.st", "shades.py"]
    assert run("compact m.st --out o.st --task shades:task", monkeypatch) == 0


@needs_onnx
def test_command_line_writes_neither_when_onnx_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    masked().save("m.st")
    monkeypatch.setattr("efface.onnx_export.TOLERANCE", 0.0)
    words = "compact m.st --out o.st --onnx o.onnx --task shades:task"
    assert run(words, monkeypatch) == 1
    assert "answers otherwise than torch does" in capsys.readouterr().err
    assert not Path("o.st").exists()
    assert not Path("o.onnx").exists()
