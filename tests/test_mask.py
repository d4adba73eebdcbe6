"""Mask: a value, its bits, and live ``torch.nn.utils.prune`` modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import efface
from efface.errors import MismatchError
from efface.mask import Mask, classifier_name, pack, scope_names, unpack

NewTask = Callable[..., efface.Task]

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def bools(draw: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    shape = draw(SHAPES) if shape is None else shape
    n = math.prod(shape)
    flat = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return torch.tensor(flat, dtype=torch.bool).reshape(shape)


def two_masks() -> Any:
    shapes = st.lists(SHAPES, min_size=1, max_size=3)
    return shapes.flatmap(
        lambda found: st.tuples(
            *(st.tuples(*(bools(shape) for shape in found)) for _ in range(2))
        ).map(lambda pair: tuple(Mask({f"w{i}": t for i, t in enumerate(side)}) for side in pair))
    )


def entries(mask: Mask) -> set[tuple[str, int]]:
    return {
        (name, i) for name in mask for i, kept in enumerate(mask[name].flatten().tolist()) if kept
    }


@given(bools())
def test_bits_are_packed_little_endian(keep: Tensor) -> None:
    packed = pack(keep)
    flat = keep.flatten().tolist()
    wanted = [0] * math.ceil(len(flat) / 8)
    for i, bit in enumerate(flat):
        wanted[i // 8] += 2 ** (i % 8) if bit else 0
    assert packed.tolist() == wanted
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, tuple(keep.shape)), keep)


@given(bools(shape=(3, 4)))
def test_layout_in_memory_does_not_matter(keep: Tensor) -> None:
    assert torch.equal(pack(keep.t().contiguous().t()), pack(keep))
    assert Mask({"w": keep.t().contiguous().t()}) == Mask({"w": keep})


@given(two_masks())
def test_counts_overlap_and_equality_against_sets(pair: tuple[Mask, Mask]) -> None:
    a, b = pair
    kept, other = entries(a), entries(b)
    assert a.kept == len(kept)
    assert a.total == sum(t.numel() for t in a.values())
    assert a.sparsity == pytest.approx(1 - len(kept) / a.total)
    union = kept | other
    assert a.iou(b) == b.iou(a) == pytest.approx(len(kept & other) / len(union) if union else 1.0)
    assert (a == b) == (kept == other)
    assert (hash(a) == hash(b)) == (a == b)
    assert a.iou(a) == 1.0
    for layer in a.layers():
        mine = [e for e in kept if e[0] == layer["name"]]
        assert (layer["kept"], layer["total"]) == (len(mine), a[layer["name"]].numel())
        assert layer["sparsity"] == pytest.approx(1 - len(mine) / layer["total"])


def test_a_mask_is_an_immutable_value() -> None:
    source = torch.tensor([True, False])
    mask = Mask({"w": source})
    source[1] = True
    assert mask["w"].tolist() == [True, False]
    with pytest.raises(TypeError):
        mask["w"] = source  # type: ignore[index]
    assert list(mask) == ["w"]
    assert len(mask) == 1
    assert mask != "w"
    assert Mask(mask) == mask


def test_the_digest_sees_names_shapes_and_bits() -> None:
    keep = torch.tensor([True, False, True, True])
    masks = [
        Mask({"a": keep}),
        Mask({"b": keep}),
        Mask({"a": keep.reshape(2, 2)}),
        Mask({"a": ~keep}),
        Mask({"a": torch.cat([keep, torch.tensor([False])])}),
        Mask({"a": keep, "b": keep}),
    ]
    assert len({m.digest for m in masks}) == len(masks)
    assert Mask({"a": keep, "b": ~keep}).digest == Mask({"b": ~keep, "a": keep}).digest


def test_masks_of_other_scopes_do_not_compare() -> None:
    keep = torch.ones(2, dtype=torch.bool)
    with pytest.raises(MismatchError, match="different weights"):
        Mask({"a": keep}).iou(Mask({"b": keep}))


def test_masks_of_other_shapes_do_not_compare() -> None:
    with pytest.raises(MismatchError):
        Mask({"a": torch.ones(2, dtype=torch.bool)}).iou(
            Mask({"a": torch.ones(3, dtype=torch.bool)})
        )


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("-inf"), float("nan")])
def test_pruned_entries_become_plus_zero_whatever_they_were(value: float) -> None:
    weights = {"w": nn.Parameter(torch.full((2, 2), value))}
    Mask({"w": torch.tensor([[True, False], [False, True]])}).apply_(weights)
    gone = weights["w"].detach()[torch.tensor([[False, True], [True, False]])]
    assert gone.tolist() == [0.0, 0.0]
    assert not torch.signbit(gone).any()
    kept = weights["w"].detach()[0, 0].item()
    assert kept == value or (math.isnan(value) and math.isnan(kept))


# --- live modules ---------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 4), nn.Linear(4, 2))


def test_export_to_and_import_from_live_modules() -> None:
    network = net()
    draw = torch.Generator().manual_seed(0)
    keep = {
        n: torch.rand(network.get_parameter(n).shape, generator=draw) > 0.5
        for n in ("0.weight", "2.weight")
    }
    mask = Mask(keep)
    live = mask.to_pruned(copy.deepcopy(network))
    assert prune.is_pruned(live)
    for name, kept in keep.items():
        owner = live.get_submodule(name.split(".")[0])
        assert torch.equal(owner.weight, network.get_parameter(name) * kept)
        assert torch.equal(owner.weight_mask.bool(), kept)
    assert Mask.from_pruned(live) == mask
    assert Mask.from_pruned(network) is None


def test_masks_that_torch_made_are_read() -> None:
    network = net()
    prune.l1_unstructured(network[0], "weight", amount=0.5)
    prune.global_unstructured(
        [(network[2], "weight"), (network[2], "bias")], prune.L1Unstructured, amount=0.25
    )
    found = Mask.from_pruned(network)
    assert found is not None
    assert set(found) == {"0.weight", "2.weight", "2.bias"}
    for name, keep in found.items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(keep, getattr(network.get_submodule(owner), f"{leaf}_mask").bool())


def test_a_buffer_that_ends_in_mask_is_no_mask() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(2, 2)
            self.register_buffer("causal_mask", torch.ones(2, 2))

    assert Mask.from_pruned(Attention()) is None


def test_a_mask_of_another_network_is_refused() -> None:
    for keep in ({"9.weight": torch.ones(2, 2)}, {"0.weight": torch.ones(3, 1, 3, 2)}):
        mask = Mask({n: t.bool() for n, t in keep.items()})
        with pytest.raises(MismatchError, match="another network"):
            mask.check(net())
        with pytest.raises(MismatchError, match="another network"):
            mask.to_pruned(net())


# --- scopes ---------------------------------------------------------------------------------------


class Headed(nn.Module):
    """A classifier that is not the last weight, an embedding, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 3)
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4, bias=False)


def test_scopes() -> None:
    network = Headed()
    assert set(scope_names(network, "all")) == {
        "classifier.weight",
        "table.weight",
        "conv.weight",
        "last.weight",
    }
    assert scope_names(network, "conv") == ["conv.weight"]
    # by default the last weight is taken for the classifier; the task can say better
    assert set(scope_names(network)) == {"classifier.weight", "table.weight", "conv.weight"}
    found = scope_names(network, classifier="classifier.weight")
    assert set(found) == {"table.weight", "conv.weight", "last.weight"}
    assert scope_names(nn.Conv2d(1, 1, 1), "conv") == ["weight"]


def test_the_classifier() -> None:
    assert classifier_name(net()) == "3.weight"
    assert classifier_name(net(), "2.weight") == "2.weight"
    with pytest.raises(MismatchError, match="not a weight"):
        classifier_name(net(), "head.weight")
    with pytest.raises(MismatchError, match="no weight"):
        classifier_name(nn.ReLU())
    assert scope_names(nn.Linear(2, 2)) == []
