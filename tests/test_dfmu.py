"""DFMU: what it edits, what it refuses, what it says; its patch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efface
from efface.errors import InputError, MethodError, MismatchError, NeedsError, SelectionError
from efface.fitting import Fit
from efface.networks import MLP, DigitsCNN, ResNet20, ViT
from efface.sparsify.blocks import (
    BlockChoice,
    BlockScore,
    Patch,
    carried,
    choose,
    contrast,
    draw,
    factors,
    find_blocks,
    weigh,
)
from efface.sparsify.blocks.choosing import Weighed
from efface.sparsify.blocks.scoring import Carried
from efface.task import Settings
from efface.unlearn import DFMU, Chain, FineTune, build, catalogue, to_json

NONE = FineTune(epochs=0)


@pytest.fixture(scope="module")
def digits() -> efface.Task:
    from efface.datasets import digits

    return replace(digits(), fit=Settings(epochs=3, batch_size=64, lr=0.2, momentum=0.9))


@pytest.fixture(scope="module")
def trained(digits: efface.Task) -> efface.TrainedModel:
    return efface.train(digits, seed=0)


@pytest.fixture(scope="module")
def three(digits: efface.Task) -> efface.Split:
    return efface.Split.by_class(digits, 3)


def accuracy(model: efface.TrainedModel, split: efface.Split, part: str) -> float:
    from efface.predict import logits

    where = getattr(split, part)
    answers = logits(model.network, model.task, model.task.records, where).argmax(1)
    return float((answers == model.task.records.targets[where].numpy()).mean())


def images(n: int, classes: int, size: int = 16, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Records whose class is a bright place."""
    draw_ = torch.Generator().manual_seed(n)
    y = torch.arange(n) % classes
    x = torch.rand(n, channels, size, size, generator=draw_) * 0.5
    x[torch.arange(n), :, y * 3, y * 3] += 2.0
    return x, y


def small(network: Any, classes: int = 4, **more: Any) -> efface.Task:
    x, y = images(160, classes, **more)
    fit = Settings(epochs=2, batch_size=32, lr=0.05)
    return efface.Task(network, (x, y), images(64, classes, **more), fit=fit)


# -- what it does -----------------------------------------------------------------------------


def test_turning_blocks_down_takes_the_class_and_spares_the_rest(
    trained: efface.TrainedModel, three: efface.Split
) -> None:
    after = efface.forget(trained, three, DFMU(strength=0.1, inner=NONE))
    assert accuracy(after, three, "forget") < 0.6 < 0.9 < accuracy(after, three, "retain")
    facts = after.lineage[-1].detail["blocks"]
    assert 0 < facts["selected"] < facts["blocks"] == 64
    assert facts["p"] < 0.01
    assert sum(facts["ratios"]["counts"]) == 64
    assert sum(layer["selected"] for layer in facts["layers"]) == facts["selected"]


def test_a_class_loses_more_than_the_others(
    trained: efface.TrainedModel, digits: efface.Task
) -> None:
    lost = {"forget": 0.0, "retain": 0.0}
    for label in (0, 4, 7):
        split = efface.Split.by_class(digits, label)
        after = efface.forget(trained, split, DFMU(strength=0.0, inner=NONE))
        for part in lost:
            lost[part] += 1 - accuracy(after, split, part)
    assert lost["forget"] > 2 * lost["retain"]


@pytest.mark.parametrize("granularity", ["filter", "branch", "layer"])
@pytest.mark.parametrize("network", [ResNet20, lambda c: ViT(c, image=16, width=16, depth=2)])
@pytest.mark.filterwarnings("ignore:the blocks tell:UserWarning", "ignore:every block:UserWarning")
def test_every_granularity_and_action(network: Any, granularity: str) -> None:
    task = small(lambda: network(4))
    model = efface.train(task)
    split = efface.Split.by_class(task, 2)
    digests = set()
    for action in ("dampen", "prune", "reinit"):
        options = {"score": {"granularity": granularity}, "action": action, "inner": NONE}
        method = build("dfmu", {**options, "strength": 0.5})
        after = efface.forget(model, split, method)
        digests.add(after.digest)
        if action == "prune":
            assert after.mask is not None
            assert after.mask.kept < after.mask.total
    assert len({*digests, model.digest}) == 4


def test_layers_without_convolutions(digits: efface.Task) -> None:
    task = replace(digits, network=lambda: MLP([64, 32, 16, 10]))
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    after = efface.forget(model, split, DFMU(strength=0.0, inner=NONE))
    assert accuracy(after, split, "forget") < accuracy(after, split, "retain")


def test_one_forward_and_one_backward_pass(
    trained: efface.TrainedModel, three: efface.Split
) -> None:
    """Every scored record goes through every layer once each way, whatever the batch size."""
    seen = {"forward": 0, "backward": 0}
    layer: Any = trained.network.conv2

    def back(module: Any, given: Any, grads: Any) -> None:
        seen["backward"] += len(grads[0])

    def ahead(module: Any, given: Any, out: Tensor) -> None:
        seen["forward"] += len(out)

    handles = [layer.register_forward_hook(ahead), layer.register_full_backward_hook(back)]
    fit = Fit(trained.task, subject=trained)
    blocks = find_blocks(trained.task, trained.network)  # on a copy
    seen.update(forward=0, backward=0)
    forget, retain = draw(fit, three.forget, 100, "f"), draw(fit, three.retain, 100, "r")
    carried(trained.network, blocks, BlockScore(), forget, retain, fit)
    for handle in handles:
        handle.remove()
    assert seen == {"forward": 200, "backward": 200}
    assert fit.meter.images == {"score": 200}


def test_nothing_of_d_r_is_read_beyond_the_fraction(
    digits: efface.Task, three: efface.Split
) -> None:
    from efface.unlearn.frugal import share

    task = replace(digits)
    model = efface.train(task)
    split = efface.Split.by_class(task, 3)
    allowed = set(share(split, 0.05, Fit(task, seed=3)).retain.tolist()) | set(
        split.forget.tolist()
    )
    records, seen = task.records, set()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(records, name)

        def __len__(self) -> int:
            return len(records)

        def batches(self, plan: Any, device: Any) -> Any:
            plan = list(plan)
            for part in plan:
                seen.update(part.tolist())
            return records.batches(plan, device)

    task.__dict__["records"] = Spy()
    efface.forget(model, split, DFMU(fraction=0.05), seed=3)
    assert len(seen) > 100
    assert seen <= allowed


def test_pruned_filters_can_be_cut_out(trained: efface.TrainedModel, three: efface.Split) -> None:
    method = DFMU(action="prune", select=BlockChoice(by="budget", amount=0.2))
    after = efface.forget(trained, three, method)
    compacted = efface.compact(after)
    sizes = [sum(p.numel() for p in m.network.parameters()) for m in (after, compacted)]
    assert sizes[1] < 0.9 * sizes[0]


def test_an_earlier_mask_holds(trained: efface.TrainedModel, three: efface.Split) -> None:
    sparse = efface.prune(trained, efface.sparsify.OneShot(sparsity=0.5, recovery=1))
    for action in ("dampen", "prune", "reinit"):
        after = efface.forget(sparse, three, build("dfmu", {"action": action}))
        assert after.mask is not None
        for name, keep in sparse.mask.items():  # type: ignore[union-attr]
            weight = after.network.get_parameter(name)
            assert not weight[~keep].any()
            assert not (after.mask[name] & ~keep).any()


# -- its options ------------------------------------------------------------------------------


def test_groups_of_options_are_set_by_text_and_told() -> None:
    method = build("dfmu", {"score": {"kind": "taylor", "sample": "64"}, "select": {"cap": "0.5"}})
    assert method == DFMU(score=BlockScore("taylor", sample=64), select=BlockChoice(cap=0.5))
    said = to_json(method)
    assert build(said.pop("method"), said) == method
    names = [option["name"] for option in catalogue("dfmu")[0]["options"]]
    assert {"score.kind", "score.signal", "select.by", "inner", "action"} <= set(names)
    assert build("dfmu", {"score": BlockScore(sample=9)}).score.sample == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": {"kin": "fisher"}}, "no option 'kin'.*kind"),
        ({"score": {"kind": "fischer"}}, "kind must be one of"),
        ({"score": "fisher"}, "group of options"),
        ({"score": {"sample": 1}}, "sample must be 2"),
        ({"score": {"preserve": 1.5}}, "preserve must lie"),
        ({"select": {"cap": 0}}, "cap must lie"),
        ({"select": {"amount": -1}}, "amount must be 0 or more"),
        ({"select": {"by": "budget", "amount": 2}}, r"amount must be in \(0, 1\]"),
        ({"strength": -1}, "strength must be 0 or more"),
        ({"fraction": 0}, r"fraction must lie in \(0, 1\]"),
        ({"action": "cut"}, "action must be one of"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        build("dfmu", options)


# -- what it refuses, and what it says --------------------------------------------------------


def test_random_records_are_refused_unless_forced(
    trained: efface.TrainedModel, digits: efface.Task
) -> None:
    split = efface.Split.random(digits, 0.1)
    with pytest.raises(MethodError, match=r"random records.*replay.*--force"):
        efface.forget(trained, split, DFMU())
    with pytest.raises(MethodError, match="random records"):
        efface.forget(trained, split, Chain(FineTune(epochs=0), DFMU()))
    with pytest.warns(UserWarning, match="the wrong tool here"):
        after = efface.forget(trained, split, DFMU(force=True))
    assert after.lineage[-1].detail["blocks"]["strength"] == 1.0
    assert after.lineage[-1].detail["blocks"]["p"] > 0.02


def test_nothing_selected_is_told(trained: efface.TrainedModel, three: efface.Split) -> None:
    with pytest.warns(UserWarning, match="no block was selected"):
        efface.forget(trained, three, DFMU(select=BlockChoice(amount=1e6)))


def test_too_little_is_told(trained: efface.TrainedModel, three: efface.Split) -> None:
    with pytest.warns(UserWarning, match=r"blocks that were turned down carry .* times the margin"):
        efface.forget(trained, three, DFMU(select=BlockChoice("budget", 0.05)))


def test_options_of_the_recovery_leave_the_others_as_they_are() -> None:
    assert build("dfmu", {"inner": {"lr": 0.1}}).inner == FineTune(epochs=1, lr=0.1)


def test_listed_records_without_a_common_trait_are_warned_of(
    trained: efface.TrainedModel, digits: efface.Task
) -> None:
    split = efface.Split.by_ids(digits, digits.ids_[5:400:4])
    with pytest.warns(UserWarning, match="no better than they tell random records apart"):
        efface.forget(trained, split, DFMU())


def test_the_only_class_and_no_class(digits: efface.Task) -> None:
    x, y = images(32, 1)
    task = efface.Task(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), (x, y), (x, y))
    with pytest.raises((SelectionError, NeedsError)):
        efface.forget(efface.train(task), efface.Split.by_class(task, 0), DFMU())
    with pytest.raises(SelectionError, match="class 12 does not exist"):
        efface.Split.by_class(digits, 12)


@pytest.mark.filterwarnings("ignore:the blocks tell:UserWarning")
def test_a_fraction_without_some_class_names_it(
    trained: efface.TrainedModel, three: efface.Split
) -> None:
    with pytest.warns(UserWarning, match="none of classes"):
        efface.forget(trained, three, DFMU(fraction=0.004))
    with pytest.warns(UserWarning, match=r"hold none of class .*larger score.sample"):
        efface.forget(trained, three, DFMU(score=BlockScore(sample=4)))


def test_a_fraction_smaller_than_a_batch_shrinks_the_batch(
    trained: efface.TrainedModel, three: efface.Split
) -> None:
    after = efface.forget(trained, three, DFMU(fraction=0.02))
    assert after.lineage[-1].cost["images"] < 3 * len(three.forget)
    assert after.lineage[-1].detail["fits"][-1]["epochs"] == 1


def test_a_network_without_blocks_is_told(digits: efface.Task) -> None:
    task = replace(digits, network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(MethodError, match=r"no filter to score.*granularity=layer"):
        efface.forget(efface.train(task), efface.Split.by_class(task, 3), DFMU())


def test_a_saturated_network_is_told_of_the_other_score(
    trained: efface.TrainedModel, three: efface.Split
) -> None:
    sure = trained.copy()
    with torch.no_grad():
        sure.network.classifier.weight.mul_(1e4)  # type: ignore[union-attr]
    with pytest.raises(MethodError, match=r"saturated.*score.signal=margin"):
        efface.forget(sure, three, DFMU(score=BlockScore(signal="loss")))
    efface.forget(sure, three, DFMU(inner=NONE))


def test_scores_that_are_not_finite_are_told(
    trained: efface.TrainedModel, three: efface.Split
) -> None:
    broken = trained.copy()
    with torch.no_grad():
        broken.network.conv2.weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(MethodError, match="not finite"):
        efface.forget(broken, three, DFMU())


def test_dead_blocks_everywhere_are_told(trained: efface.TrainedModel, three: efface.Split) -> None:
    dead = trained.copy()
    with torch.no_grad():
        for p in dead.network.parameters():
            p.zero_()
    for kind in ("fisher", "activation"):
        with pytest.raises(MethodError, match="zero on D_f"):
            efface.forget(dead, three, build("dfmu", {"score": {"kind": kind}}))


def test_every_block_of_a_layer(trained: efface.TrainedModel, three: efface.Split) -> None:
    method = DFMU(select=BlockChoice(amount=0.0), inner=NONE)
    with pytest.warns(UserWarning, match="every block of .conv1.weight., .conv2.weight."):
        after = efface.forget(trained, three, method)
    facts = after.lineage[-1].detail["blocks"]
    assert facts["kept"] == ["conv1.weight", "conv2.weight", "conv3.weight"]
    assert [layer["selected"] for layer in facts["layers"][:2]] == [15, 23]


# -- choosing ---------------------------------------------------------------------------------


def made(ratio: list[float], difference: list[float] | None = None) -> Weighed:
    given = torch.tensor(ratio, dtype=torch.float64)
    return Weighed(given, given if difference is None else torch.tensor(difference))


def test_choices_are_exact(digits: efface.Task) -> None:
    blocks = find_blocks(digits, DigitsCNN())
    ratio = torch.linspace(0, 2, len(blocks)).double()
    weighed = Weighed(ratio, -ratio)
    by_ratio = choose(weighed, blocks, BlockChoice(amount=1.5))
    assert by_ratio.blocks.tolist() == (ratio > 1.5).tolist()
    top = choose(weighed, blocks, BlockChoice("budget", 0.25))
    assert int(top.blocks.sum()) == 16
    assert bool(top.blocks[-16:].all())
    capped = choose(weighed, blocks, BlockChoice("budget", 0.25, cap=0.5))
    assert capped.capped == ("conv3.weight",)
    assert int(capped.blocks.sum()) == 12
    none = choose(weighed, blocks, BlockChoice("difference", 0.0))
    assert int(none.blocks.sum()) == 0


def test_factors_and_dead_blocks(digits: efface.Task) -> None:
    blocks = find_blocks(digits, DigitsCNN())
    values = torch.zeros(4, len(blocks), dtype=torch.float64)
    values[:2, 0] = 1.0  # D_f alone; everything else but the next one is dead
    values[:, 1] = 0.1
    found = Carried(values, torch.tensor([True, True, False, False]))
    ratio = weigh(found, blocks).ratio
    assert float(ratio[0]) > 100
    assert not ratio[2:].any()
    chosen = choose(weigh(found, blocks), blocks, BlockChoice()).blocks
    assert chosen.nonzero().flatten().tolist() == [0]
    assert factors(weigh(found, blocks), chosen, 1.0).tolist() == [1 / ratio[0]] + [1.0] * 63
    assert factors(weigh(found, blocks), ~chosen, 0.0).tolist() == [1.0] + [0.0] * 63


def test_contrast_tells_a_trait_from_chance(digits: efface.Task) -> None:
    blocks = find_blocks(digits, DigitsCNN())
    noise = torch.rand(80, len(blocks), generator=torch.Generator().manual_seed(0)).double()
    of = torch.arange(80) < 30
    plain = contrast(Carried(noise, of), blocks, torch.Generator().manual_seed(1))
    noise[of, :8] *= 3
    planted = contrast(Carried(noise, of), blocks, torch.Generator().manual_seed(1))
    assert plain["p"] > 0.05
    assert planted["p"] == pytest.approx(1 / 201)
    assert planted["contrast"] > planted["chance"][1] > planted["chance"][0]


def test_draws_are_even_over_classes(digits: efface.Task) -> None:
    fit = Fit(digits)
    found = draw(fit, torch.arange(len(digits.records)), 200, "x")
    every = torch.bincount(digits.records.targets).double()
    taken = torch.bincount(digits.records.targets[found])
    assert bool((taken - 200 * every / every.sum()).abs().max() <= 1)
    assert len(draw(fit, torch.arange(5), 200, "x")) == 5


# -- the patch --------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["dampen", "prune"])
def test_patch_is_small_exact_and_reversible(
    trained: efface.TrainedModel, three: efface.Split, tmp_path: Path, action: str
) -> None:
    after = efface.forget(trained, three, build("dfmu", {"action": action, "inner": NONE}))
    path = after.patch.save(tmp_path / "p.safetensors")
    assert path.stat().st_size < 8000
    patch = Patch.load(path)
    on = patch.apply(trained)
    assert on.digest != trained.digest
    assert patch.undo(on).digest == trained.digest
    # it answers as the model that was made, up to batch norm's statistics
    buffers = {n: t for n, t in after.network.state_dict().items() if "running" in n}
    same = on.copy()
    same.network.load_state_dict({**same.network.state_dict(), **buffers})
    x = trained.task.test_records.raw(0)[0][None]
    same.network.eval()
    after.network.eval()
    torch.testing.assert_close(same.network(x), after.network(x), atol=1e-5, rtol=1e-5)


def test_patch_without_batch_norm(digits: efface.Task) -> None:
    task = replace(digits, network=lambda: MLP([64, 32, 16, 10]))
    model = efface.train(task)
    after = efface.forget(model, efface.Split.by_class(task, 1), DFMU(inner=NONE))
    back = after.patch.undo(after.patch.apply(model))
    for name, p in back.network.named_parameters():
        torch.testing.assert_close(p, model.network.get_parameter(name), rtol=1e-6, atol=0)


def test_patches_are_refused_elsewhere_and_when_damaged(
    trained: efface.TrainedModel, three: efface.Split, tmp_path: Path
) -> None:
    after = efface.forget(trained, three, DFMU(inner=NONE))
    path = after.patch.save(tmp_path / "p.safetensors")
    with pytest.raises(MismatchError, match="the patch is for weights"):
        after.patch.apply(after)
    with pytest.raises(MismatchError, match="does not carry this patch"):
        after.patch.undo(trained)
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 97):
        broken = bytearray(data)
        broken[place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(InputError, match="no patch of efface, or damaged"):
            Patch.load(path)
    path.write_bytes(data[:-5])
    with pytest.raises(InputError, match="no patch"):
        Patch.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Patch.load(tmp_path / "none")
