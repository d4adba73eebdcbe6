"""Selection against a sorted list, and the one-shot pruner."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import efface
from efface.errors import InputError, MethodError, MismatchError
from efface.mask import Mask
from efface.sparsify import Magnitude, OneShot, dead_layers, narrow, select

NewTask = Callable[..., efface.Task]

# Few different values, so that ties are the rule.
SCORES = st.lists(
    st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 1.0000001, -2.0, float("inf")]), min_size=1, max_size=12
    ),
    min_size=1,
    max_size=4,
)


def kept_by_hand(scores: list[list[float]], sparsity: float) -> list[list[bool]]:
    """Keep the best, one after the other; of equals, the one that comes first."""
    places = [(i, j) for i, layer in enumerate(scores) for j in range(len(layer))]
    ranked = sorted(places, key=lambda place: -scores[place[0]][place[1]])  # a stable sort
    best = set(ranked[: len(places) - round(sparsity * len(places))])
    return [[(i, j) in best for j in range(len(layer))] for i, layer in enumerate(scores)]


@given(SCORES, st.floats(0, 1, exclude_max=True), st.sampled_from(["global", "layer"]))
def test_selection_equals_a_sorted_list(
    scores: list[list[float]], sparsity: float, granularity: Literal["global", "layer"]
) -> None:
    tensors = {f"w{i}": torch.tensor(layer, dtype=torch.float64) for i, layer in enumerate(scores)}
    mask = select(tensors, sparsity, list(tensors), granularity)
    if granularity == "global":
        wanted = kept_by_hand(scores, sparsity)
    else:
        wanted = [kept_by_hand([layer], sparsity)[0] for layer in scores]
    assert [mask[name].tolist() for name in tensors] == wanted


@given(SCORES, st.integers(0, 19))
def test_masks_of_rising_sparsity_are_nested(scores: list[list[float]], step: int) -> None:
    tensors = {f"w{i}": torch.tensor(layer) for i, layer in enumerate(scores)}
    dense, sparse = (select(tensors, s / 20, list(tensors)) for s in (step, min(step + 1, 19)))
    assert all((dense[name] | ~sparse[name]).all() for name in tensors)


def test_only_the_scope_counts() -> None:
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0, 9.0], [8.0, 7.0]])}
    mask = select(scores, 0.5, ["b"])
    assert set(mask) == {"b"}
    assert mask["b"].tolist() == [[False, True], [True, False]]
    assert mask.sparsity == 0.5


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_sparsities_are_refused(sparsity: float) -> None:
    with pytest.raises(MethodError, match="sparsity"):
        select({"a": torch.ones(4)}, sparsity, ["a"])
    with pytest.raises(MethodError, match="sparsity"):
        OneShot(sparsity=sparsity)


def test_scopes_without_scores_are_refused() -> None:
    with pytest.raises(MismatchError, match="no weights to prune"):
        select({"a": torch.ones(4)}, 0.5, [])
    with pytest.raises(MismatchError, match="b"):
        select({"a": torch.ones(4)}, 0.5, ["a", "b"])


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError):
        select({"a": torch.tensor([1.0, float("nan"), 2.0])}, 0.5, ["a"])


def test_magnitude() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    scores = Magnitude()(network, ())
    assert set(scores) == {"0.weight"}
    found = scores["0.weight"].flatten().tolist()
    wanted = [abs(v) for v in network[0].weight.detach().flatten().tolist()]
    assert found == wanted
    assert not scores["0.weight"].requires_grad


# --- patterns -----------------------------------------------------------------------------------


def groups_of(shape: tuple[int, ...], m: int) -> list[list[tuple[int, ...]]]:
    """The places of every group, from the definition: per unit, kernel by row, column, channel."""
    found = []
    for unit in range(shape[0]):
        kernel = itertools.product(*(range(k) for k in shape[2:]))
        places = [(unit, c, *k) for k in kernel for c in range(shape[1])]
        found += [places[i : i + m] for i in range(0, len(places), m)]
    return found


@pytest.mark.parametrize("granularity", ["2:4", "1:4", "1:2", "3:8"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 10), (2, 4, 3, 3), (3, 3, 2, 2), (2, 1, 3)])
def test_patterns_hold_in_every_group(shape: tuple[int, ...], granularity: str) -> None:
    n, m = map(int, granularity.split(":"))
    scores = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1)).double()
    keep = select({"w": scores}, 1 - n / m, ["w"], granularity)["w"]
    assert keep.shape == shape
    for group in groups_of(shape, m):
        share = -(-len(group) * n // m)
        best = sorted(group, key=lambda place: -float(scores[place]))[:share]  # a stable sort
        assert {place for place in group if keep[place]} == set(best)


def test_a_pattern_of_divisible_sizes_is_exact() -> None:
    assert select({"w": torch.rand(6, 8, 3, 3)}, 0.5, ["w"], "2:4").sparsity == 0.5
    assert select({"w": torch.rand(6, 8)}, 0.75, ["w"], "1:4").sparsity == 0.75


@pytest.mark.parametrize(
    ("granularity", "sparsity", "said"),
    [
        ("2:4", 0.9, "sparsity=0.5"),
        ("1:4", 0.5, "sparsity=0.75"),
        ("4:4", 0.0, "granularity"),
        ("0:4", 0.5, "granularity"),
        ("rows", 0.5, "granularity"),
    ],
)
def test_impossible_patterns_are_refused(granularity: str, sparsity: float, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        select({"w": torch.rand(4, 4)}, sparsity, ["w"], granularity)
    with pytest.raises(MethodError, match=said):
        OneShot(sparsity, granularity=granularity)


@pytest.mark.parametrize("granularity", ["global", "layer", "2:4"])
def test_stages_are_nested_and_end_in_the_selection(granularity: str) -> None:
    make = torch.Generator().manual_seed(2)
    scores = {"a": torch.randn(6, 8, generator=make), "b": torch.randn(5, 7, generator=make)}
    mask = None
    for sparsity in (0.1, 0.25, 0.4, 0.5):
        last, mask = mask, narrow(scores, sparsity, ["a", "b"], granularity, mask)
        assert last is None or all((last[name] | ~mask[name]).all() for name in mask)
        if granularity != "layer":
            total = 48 + 35
            most = round(sparsity * total)
            assert total - mask.kept == min(
                most, total - select(scores, 0.5, ["a", "b"], granularity).kept
            )
    assert mask == select(scores, 0.5, ["a", "b"], granularity)


def test_what_was_dropped_stays_dropped_whatever_its_score() -> None:
    scores = {"w": torch.tensor([[-5.0, -1.0, 0.0, -3.0]])}  # a pruned weight's product is 0
    within = Mask({"w": torch.tensor([[True, True, False, True]])})
    assert narrow(scores, 0.5, ["w"], "global", within)["w"].tolist() == [
        [False, True, False, True]
    ]


# --- one shot -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "layer"])
@pytest.mark.parametrize("scope", ["weights", "all"])
def test_one_shot_keeps_the_largest_weights(
    trained: efface.TrainedModel, granularity: Any, scope: Any
) -> None:
    pruner = OneShot(0.75, granularity=granularity, scope=scope, recovery=0)
    after = efface.prune(trained, pruner)
    names = ["0.weight", "2.weight", "4.weight"][: 3 if scope == "all" else 2]
    weights = dict(trained.network.named_parameters())
    rows = [weights[n].detach().abs().flatten().tolist() for n in names]
    if granularity == "global":
        wanted = kept_by_hand(rows, 0.75)
    else:
        wanted = [kept_by_hand([row], 0.75)[0] for row in rows]
    assert after.mask is not None
    assert [after.mask[n].flatten().tolist() for n in names] == wanted
    # without recovery the kept weights are the old ones
    for name, p in after.network.named_parameters():
        keep = after.mask.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p[keep], weights[name][keep])
        assert (p[~keep] == 0).all()
    assert trained.mask is None


def test_recovery_trains_under_the_mask(trained: efface.TrainedModel) -> None:
    pruner = OneShot(0.75, recovery=2, lr=0.03)
    still = efface.prune(trained, OneShot(0.75, recovery=0))
    after = efface.prune(trained, pruner)
    assert after.mask == still.mask
    assert after.digest != still.digest
    (fit,) = after.lineage[-1].detail["fits"]
    assert (fit["epochs"], fit["lr"]) == (2, 0.03)
    half = efface.prune(trained, OneShot(0.75))
    assert half.lineage[-1].detail["fits"][0]["epochs"] == 3  # half of the task's six
    assert after.lineage[-1].method == {
        "method": "one-shot",
        "sparsity": 0.75,
        "criterion": "magnitude",
        "granularity": "global",
        "scope": "weights",
        "recovery": 2,
        "lr": 0.03,
        "allow_dead_layers": False,
    }


def test_recovery_leaves_out_what_was_forgotten(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    once = efface.forget(trained, split, "finetune")
    after = efface.prune(once, OneShot(0.5, recovery=1))
    assert after.lineage[-1].detail["images"] == {"retain": len(split.retain)}
    assert after.forgotten == once.forgotten


def test_pruning_again_prunes_more(pruned: efface.TrainedModel) -> None:
    more = efface.prune(pruned, OneShot(0.8, recovery=0))
    assert more.mask is not None
    assert pruned.mask is not None
    assert more.mask.kept < pruned.mask.kept
    assert all((pruned.mask[n] | ~more.mask[n]).all() for n in more.mask)


def test_a_dead_layer_is_refused_unless_it_is_allowed(new_task: NewTask) -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.second.weight.data *= 1e-6

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.second(self.first(x)))
            return out

    task = new_task(network=Faint)
    model = efface.TrainedModel(task, task.network())
    with pytest.raises(MethodError, match=r"second\.weight' lost all .*--allow-dead-layers"):
        efface.prune(model, OneShot(0.6, recovery=0))
    with pytest.warns(UserWarning, match=r"second\.weight' lost all"):
        after = efface.prune(model, OneShot(0.6, recovery=0, allow_dead_layers=True))
    assert after.mask is not None
    assert dead_layers(after.mask) == ["second.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        efface.prune(model, OneShot(0.6, recovery=0, granularity="layer"))


@pytest.mark.parametrize(
    "options", [{"recovery": -1}, {"criterion": "magic"}, {"lr": 0.0}, {"lr": -1.0}], ids=str
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        OneShot(**options)


def test_a_network_without_a_hidden_layer_has_nothing_to_prune(new_task: NewTask) -> None:
    task = new_task(network=lambda: nn.Linear(6, 3))
    model = efface.TrainedModel(task, task.network())
    with pytest.raises(MismatchError, match="no weights to prune"):
        efface.prune(model, OneShot(0.5, recovery=0))
    found = efface.prune(model, OneShot(0.5, recovery=0, scope="all")).sparsity
    assert found == pytest.approx(0.5)
