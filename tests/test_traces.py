"""The trace in a mask from both sides: originals in several orders beside references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from efface.mask import Mask
from efface.recipes import recipe
from efface.recipes.models import Bench, Job, original, original_key, reference_key
from efface.recipes.traces import _leans, masks_beside, trace_removed_between

RECIPE = """
title = "t"
source = "s"
about = "a"
[size.digits]
seeds = 2
rewind = 1
initial = "model"
orders = 2
originals = 2
[size.digits.task]
name = "digits"
network = "MLP"
network_args = [[64, 16, 12, 10]]
fit = {epochs = 2, batch_size = 256, lr = 0.1}
[size.digits.scenarios.class]
forget = {class = 3}
[[size.digits.models]]
name = "omp"
like = "repruned"
keep_dense = true
pruner = {method = "omp", sparsity = 0.5}
[size.digits.methods.ft]
method = "finetune"
options = {epochs = 1}
"""


def mask(seed: int) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    return Mask({"a": torch.rand(40, 5, generator=draw) > 0.6})


def overlap(one: Mask, other: Mask) -> float:
    a, b = one["a"], other["a"]
    both = sum(bool(x) and bool(y) for x, y in zip(a.flatten(), b.flatten(), strict=True))
    either = sum(bool(x) or bool(y) for x, y in zip(a.flatten(), b.flatten(), strict=True))
    return both / either


def test_leans_equal_their_definition() -> None:
    before, again, first, second, after = (mask(i) for i in range(5))
    found = _leans(after, before, [first, second], [first, second], [again])
    with_, without = overlap(before, again), overlap(first, second)
    across = np.mean([overlap(first, again), overlap(second, again)])
    start = (overlap(before, first) + overlap(before, second)) / 2 - with_
    assert found["mask_lean_before"] == pytest.approx(start)
    assert found["mask_lean_goal"] == pytest.approx(without - across)
    noise = (with_**0.5 - without**0.5) ** 2
    assert found["mask_trace_between"] == pytest.approx((without - across - start) / 2 - noise)
    mine = (overlap(after, first) + overlap(after, second)) / 2 - overlap(after, again)
    assert found["mask_lean"] == pytest.approx(mine)


def test_a_mask_that_overlaps_less_with_everybody_does_not_count() -> None:
    """Noise in a mask lowers its overlap with all others, and leaves its lean where it was."""
    draw = np.random.default_rng(0)
    signal = draw.normal(size=40_000)

    def noisy(size: float) -> Mask:
        values = np.abs(signal + size * draw.normal(size=len(signal)))
        return Mask({"a": torch.from_numpy(values > np.quantile(values, 0.9))})

    masks = [noisy(size) for size in (0.5, 0.5, 0.7, 0.7)]
    found = _leans(masks[0], masks[0], masks[2:], masks[2:], masks[1:2])
    one_sided = masks[2].iou(masks[3]) - np.mean([masks[0].iou(m) for m in masks[2:]])
    assert one_sided < -0.04  # two noisy masks agree less than each agrees with the quiet one
    assert abs(found["mask_trace_between"]) < 0.15 * abs(one_sided)


def test_the_share_is_that_of_the_way() -> None:
    rows = [
        {
            "mask_lean_before": {"value": -0.1 - 0.01 * k},
            "mask_lean_goal": {"value": 0.1 + 0.01 * k},
            "mask_lean": {"value": 0.0},
            "mask_trace_between": {"value": 0.1 + 0.01 * k},
        }
        for k in range(4)
    ]
    found = trace_removed_between(rows)
    assert found is not None
    assert found["value"] == pytest.approx(0.5)
    assert found["low"] <= 0.5 <= found["high"]
    none = [
        {n: {"value": v["value"] * 0 + 0.01 * (-1) ** i} for n, v in row.items()}
        for i, row in enumerate(rows)
    ]
    gone = trace_removed_between(none)
    assert gone is not None
    assert gone["value"] is None
    assert gone["reason"].startswith("no trace")
    assert trace_removed_between([{}]) is None


def test_originals_of_other_orders_begin_alike(tmp_path: Path) -> None:
    assert recipe.parse(RECIPE, "t").size["digits"].originals == 2
    bench = Bench(RECIPE, "t", "digits", tmp_path, tmp_path / "models", "cpu")
    job = Job("original", "omp", 0, scenario="class")
    first, again = (original(bench, replace(job, order=k), print) for k in (0, 1))
    assert first.initial == again.initial
    assert first.digest != again.digest
    assert first.lineage[0].seed != again.lineage[0].seed
    other = original(bench, replace(job, seed=1), print)
    assert other.initial != first.initial
    keys = [original_key(bench, replace(job, order=k)) for k in (0, 1)]
    assert keys[0] != keys[1]
    references = [
        reference_key(bench, replace(job, kind="reference", order=k))["of"] for k in (0, 1)
    ]
    assert references[0] == references[1] == keys[0]
    row = Job("row", "omp", 0, method="ft", scenario="class")
    kinds = [(other.kind, other.order) for other in masks_beside(bench, row)]
    assert kinds == [("reference", 0), ("reference", 1), ("reference", 0), ("original", 1)]
