"""Class-discriminative pruning, against loops written from the paper's formula."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efface
from efface.errors import MethodError
from efface.fitting import Fit
from efface.sparsify.blocks import find_blocks
from efface.sparsify.groups import filter_groups, kept_filters
from efface.unlearn import ClassPruning, FineTune, Frugal, build
from efface.unlearn.class_pruning import activity, documents, select, tf_idf

NewTask = Callable[..., efface.Task]
IDLE = FineTune(epochs=0)
CONV_GATES = {"0.weight": 1, "4.weight": 5}
"""Layer → the module of ``conv_net`` behind which its channels are gated."""
MLP_GATES = {"0.weight": 0, "2.weight": 2}


def accuracy(model: efface.TrainedModel, positions: Tensor) -> float:
    network = copy.deepcopy(model.network).eval()
    inputs, targets = model.task.train
    with torch.no_grad():
        hits = network(inputs[positions]).argmax(1) == targets[positions]
    return float(hits.double().mean())


# -- slow twins -----------------------------------------------------------------------------------


def slow_activity(
    model: efface.TrainedModel, gates: dict[str, int], parts: list[list[int]], kind: str
) -> dict[str, list[list[float]]]:
    """Layer → [document][filter], record by record and position by position, in float64."""
    network = copy.deepcopy(model.network).double().eval()
    found: dict[str, list[list[float]]] = {}
    for layer, gate in gates.items():
        rows = []
        for part in parts:
            total: list[float] = []
            for p in part:
                x = model.task.train[0][p : p + 1].double()
                for module in list(network)[: gate + 1]:  # type: ignore[call-overload]
                    x = module(x)
                own = []
                for channel in x[0].detach():
                    values = channel.reshape(-1).tolist()
                    sizes = [max(v, 0.0) if kind == "relu" else v * v for v in values]
                    own.append(sum(sizes) / len(sizes))
                total = [a + b for a, b in zip(total or [0.0] * len(own), own, strict=True)]
            rows.append([t / len(part) for t in total])
        found[layer] = rows
    return found


def slow_tf_idf(active: list[list[float]], document: int, idf: str) -> list[float]:
    count, filters = len(active), len(active[0])
    found = []
    words = [j for j in range(filters) if any(row[j] > 0 for row in active)]
    for j in range(filters):
        if j not in words:
            found.append(0.0)
            continue
        holds = 0
        for u in range(count):
            if idf == "paper":
                level = sum(active[u]) / len(words)
            else:
                level = sum(active[v][j] for v in range(count)) / count
            holds += active[u][j] >= level
        rare = (1 + count) / (1 + holds) if idf == "paper" else count / (1 + holds)
        found.append(active[document][j] / sum(active[document]) * math.log(rare))
    return found


def slow_gone(scores: dict[str, list[float]], amount: float, scope: str) -> dict[str, set[int]]:
    """Layer → filters to prune, where no layer would lose all of them."""
    pools = [[layer] for layer in scores] if scope == "layer" else [list(scores)]
    gone: dict[str, set[int]] = {layer: set() for layer in scores}
    for pool in pools:
        ranked = sorted(
            (-score, layer, j) for layer in pool for j, score in enumerate(scores[layer])
        )
        for score, layer, j in ranked[: max(1, round(amount * len(ranked)))]:
            if -score > 0:
                gone[layer].add(j)
    assert all(len(gone[layer]) < len(scores[layer]) for layer in scores)
    return gone


def gone_in(model: efface.TrainedModel) -> dict[str, set[int]]:
    """Layer → the filters that a model's mask drops."""
    assert model.mask is not None
    groups = filter_groups(model.task, model.network).prunable
    keep = kept_filters(model.mask, groups)
    return {g.name: set((~keep[g.name]).nonzero().flatten().tolist()) for g in groups}


# -- the method by its definition ------------------------------------------------------------------


@pytest.mark.parametrize("idf", ["paper", "code"])
@pytest.mark.parametrize("seed", range(4))
def test_tf_idf_is_the_formula(idf: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    active = torch.rand(5, 9, generator=draw, dtype=torch.float64) ** 3
    for document in range(5):
        wanted = slow_tf_idf(active.tolist(), document, idf)
        assert tf_idf(active, document, idf).tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("idf", ["paper", "code"])
def test_a_layer_that_is_silent_scores_nothing(idf: Any) -> None:
    active = torch.rand(3, 4, dtype=torch.float64)
    active[1] = 0
    assert tf_idf(active, 1, idf).abs().tolist() == [0.0] * 4
    assert torch.isfinite(tf_idf(torch.zeros(3, 4, dtype=torch.float64), 0, idf)).all()


def test_a_filter_of_every_class_is_worth_nothing_and_a_rare_one_most() -> None:
    active = torch.tensor([[9.0, 9.0, 1.0, 0.1], [9.0, 1.0, 1.0, 0.1], [9.0, 1.0, 2.0, 0.1]])
    scores = tf_idf(active.double(), 0)
    assert scores[0] == 0
    assert scores.argmax() == 1


@pytest.mark.parametrize("kind", ["relu", "square"])
@pytest.mark.parametrize("idf", ["paper", "code"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("images", [False, True])
def test_what_is_pruned_is_what_loops_prune(
    trained: efface.TrainedModel,
    conv_trained: efface.TrainedModel,
    kind: Any,
    idf: Any,
    scope: Any,
    images: bool,
) -> None:
    model = conv_trained if images else trained
    gates = CONV_GATES if images else MLP_GATES
    targets = model.task.train[1].tolist()
    split = efface.Split.by_class(model.task, 1)
    parts = [[i for i, t in enumerate(targets) if t == c] for c in (1, 0, 2)]
    active = slow_activity(model, gates, parts, kind)
    scores = {layer: slow_tf_idf(rows, 0, idf) for layer, rows in active.items()}
    amount = 0.3
    method = ClassPruning(amount, scope, idf, kind, sample=10_000, inner=IDLE)
    after = efface.forget(model, split, method)
    assert gone_in(after) == slow_gone(scores, amount, scope)
    weights = dict(after.network.named_parameters())
    for layer, gone in gone_in(after).items():
        assert gone
        assert (weights[layer][sorted(gone)] == 0).all()
    facts = after.lineage[-1].detail["class_pruning"]
    assert facts["documents"] == [len(part) for part in parts]
    assert facts["pruned"] == sum(map(len, gone_in(after).values()))


def test_what_is_left_is_untouched(conv_trained: efface.TrainedModel) -> None:
    split = efface.Split.by_class(conv_trained.task, 0)
    after = efface.forget(conv_trained, split, ClassPruning(inner=IDLE))
    assert after.mask is not None
    before = dict(conv_trained.network.named_parameters())
    for name, weight in after.network.named_parameters():
        keep = after.mask.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight[keep], before[name][keep])
        assert (weight[~keep] == 0).all()


def test_one_forward_pass_and_no_backward_over_the_sample(
    new_conv_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_conv_task()
    network = task.network()
    split = efface.Split.by_class(task, 2)
    parts = [part[:5] for part in documents(split)[0]]
    blocks = find_blocks(task, network, "filter")
    seen: list[int] = []
    network.register_forward_hook(lambda m, given, out: seen.append(len(out)))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a backward pass"))
    network.train()
    fit = Fit(task, seed=0)
    activity(network, blocks, parts, "relu", fit)
    assert sum(seen) == 15 == fit.meter.images["score"]
    assert max(seen) <= task.fit.batch_size
    assert network.training
    assert all(not m._forward_hooks for m in network.children())


# -- documents -------------------------------------------------------------------------------------


def held(task: efface.Task, split: efface.Split) -> Iterator[tuple[int, set[int]]]:
    parts, _ = documents(split)
    for part in parts:
        yield len(part), set(task.train[1][part].tolist())


def test_documents_of_a_class(task: efface.Task) -> None:
    split = efface.Split.by_class(task, 1)
    assert list(held(task, split)) == [(40, {1}), (40, {0}), (40, {2})]
    assert documents(split)[1] == 1


def test_documents_of_two_classes_and_of_a_part(new_task: NewTask) -> None:
    task = new_task()
    two = efface.Split.where(task, "target < 2")
    assert list(held(task, two)) == [(40, {0}), (40, {1}), (40, {2})]
    assert documents(two)[1] == 2
    # records of three classes, none of them complete: one document, besides what is left of them
    site = efface.Split.where(task, "site == 'south'")
    assert list(held(task, site)) == [(24, {0, 1, 2}), (32, {0}), (32, {1}), (32, {2})]
    assert documents(site)[1] == 1
    both = efface.Split.where(task, "target == 0 or site == 'south'")
    assert list(held(task, both)) == [(40, {0}), (16, {1, 2}), (32, {1}), (32, {2})]
    assert documents(both)[1] == 2


def test_each_of_two_classes_loses_its_filters(conv_trained: efface.TrainedModel) -> None:
    task = conv_trained.task
    method = ClassPruning(0.3, sample=10_000, inner=IDLE)
    active = slow_activity(
        conv_trained,
        CONV_GATES,
        [[i for i in range(48) if i % 3 == c] for c in range(3)],
        "relu",
    )
    wanted: dict[str, set[int]] = {layer: set() for layer in active}
    for document in (0, 1):
        scores = {n: slow_tf_idf(rows, document, "paper") for n, rows in active.items()}
        for layer, gone in slow_gone(scores, 0.3, "layer").items():
            wanted[layer] |= gone
    split = efface.Split.where(task, "target < 2")
    assert gone_in(efface.forget(conv_trained, split, method)) == wanted


# -- which are selected ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(conv_task: efface.Task) -> Any:
    return find_blocks(conv_task, conv_task.network(), "filter")  # 4 and 6 filters


def test_one_filter_stays_in_every_layer(blocks: Any) -> None:
    scores = torch.tensor([[5.0, 6, 7, 8, 1, 1, 1, 1, 1, 2]], dtype=torch.float64)
    alive = torch.ones(10, dtype=torch.bool)
    chosen, kept = select(scores, alive, blocks, 0.4, "global")
    assert chosen.tolist() == [False, True, True, True] + [False] * 6
    assert kept == [blocks.layers[0]]
    alive[1] = False  # a filter that is dead already neither goes nor is what stays
    chosen, kept = select(scores, alive, blocks, 0.4, "global")
    assert chosen.tolist() == [False, False, True, True] + [False] * 6
    assert kept == [blocks.layers[0]]


def test_filters_that_score_nothing_stay(blocks: Any) -> None:
    alive = torch.ones(10, dtype=torch.bool)
    scores = torch.tensor([[0.0, 0, 0, 3, 0, 0, 0, 0, 0, -1]], dtype=torch.float64)
    chosen, kept = select(scores, alive, blocks, 0.9, "layer")
    assert (chosen.nonzero().flatten().tolist(), kept) == ([3], [])


def test_at_least_one_goes_and_ties_go_to_the_first(blocks: Any) -> None:
    alive = torch.ones(10, dtype=torch.bool)
    scores = torch.ones(1, 10, dtype=torch.float64)
    chosen, _ = select(scores, alive, blocks, 0.01, "layer")
    assert chosen.nonzero().flatten().tolist() == [0, 4]
    chosen, _ = select(scores, alive, blocks, 0.01, "global")
    assert chosen.nonzero().flatten().tolist() == [0]


def test_a_layer_that_would_go_is_named(
    conv_trained: efface.TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = efface.Split.by_class(conv_trained.task, 1)
    ones = lambda active, *rest: torch.ones_like(active[0])  # noqa: E731
    monkeypatch.setattr("efface.unlearn.class_pruning.tf_idf", ones)
    method = ClassPruning(0.99, inner=IDLE)
    with pytest.warns(UserWarning, match="selected every filter of"):
        after = efface.forget(conv_trained, split, method)
    assert {layer: len(gone) for layer, gone in gone_in(after).items()} == {
        "0.weight": 3,
        "4.weight": 5,
    }


# -- the sample ------------------------------------------------------------------------------------


def test_the_sample_is_drawn_by_class_and_seed(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    method = ClassPruning(0.3, sample=4, inner=IDLE)
    runs = [efface.forget(trained, class_split, method, seed=s) for s in (0, 0, 1, 2, 3)]
    assert runs[0].digest == runs[1].digest
    assert len({run.digest for run in runs}) > 1
    assert runs[0].lineage[-1].detail["class_pruning"]["documents"] == [4, 4, 4]
    assert runs[0].lineage[-1].detail["images"]["score"] == 12


def test_a_frugal_share_is_all_that_is_read(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    method = Frugal(ClassPruning(0.3, inner=FineTune(epochs=1)), fraction=0.1)
    after = efface.forget(trained, class_split, method)
    assert after.lineage[-1].detail["class_pruning"]["documents"] == [32, 4, 4]


# -- networks --------------------------------------------------------------------------------------


def test_channels_of_a_residual_sum_go_together(new_conv_task: NewTask) -> None:
    """And the size of such a filter is the mean over the channels that are summed."""
    draw = torch.Generator().manual_seed(0)
    data = (torch.randn(24, 3, 8, 8, generator=draw), torch.arange(24) % 3)
    task = new_conv_task(
        network=lambda: efface.networks.ResNet20(3), train=data, test=data, ids=range(24)
    )
    model = efface.train(task, seed=0)
    split = efface.Split.by_class(task, 1)
    blocks = find_blocks(task, model.network, "filter")
    parts = documents(split)[0]
    found = activity(model.network, blocks, parts, "relu", Fit(task, seed=0))
    sizes: dict[str, Tensor] = {}
    network = copy.deepcopy(model.network).eval()
    for gate in blocks.gates:
        network.get_submodule(gate.module).register_forward_hook(
            lambda m, given, out, name=gate.module: sizes.update({name: out.relu().mean((2, 3))})
        )
    with torch.no_grad():
        network(task.train[0])
    shared = [b for b in range(len(blocks)) if sum((g.owner == b).any() for g in blocks.gates) > 1]
    assert shared
    for b in (0, shared[0], shared[-1], len(blocks) - 1):
        channels = torch.cat([sizes[g.module][:, g.owner == b] for g in blocks.gates], 1).double()
        wanted = [float(channels[part].mean()) for part in parts]
        assert found[:, b].tolist() == pytest.approx(wanted, rel=1e-5)
    after = efface.forget(model, split, ClassPruning(0.3, inner=FineTune(epochs=1)))
    assert all(gone_in(after).values())
    small = efface.compact(after)
    with torch.no_grad():
        before, now = after.network.eval()(data[0]), small.network.eval()(data[0])
    assert torch.allclose(before, now, atol=1e-4)


def test_a_module_that_is_called_twice_counts_twice(new_task: NewTask) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(6, 5), nn.Linear(5, 5)
            self.last = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.last(self.again(self.again(x).relu()).relu())  # type: ignore[no-any-return]

    task = new_task(network=Twice)
    network = task.network()
    blocks = find_blocks(task, network, "filter")
    heard: list[Tensor] = []
    twin = copy.deepcopy(network)
    for layer in (twin.first, twin.again):  # what one puts out the other takes in
        layer.register_forward_hook(lambda m, given, out: heard.append(out.relu()))
    parts = documents(efface.Split.by_class(task, 0))[0]
    found = activity(network, blocks, parts, "relu", Fit(task, seed=0))
    with torch.no_grad():
        twin(task.train[0][parts[0]])
    assert len(heard) == 3
    wanted = torch.stack(heard).mean((0, 1))
    assert torch.allclose(found[0].float(), wanted, atol=1e-5)


@pytest.fixture(scope="module")
def digits() -> efface.TrainedModel:
    return efface.train(efface.datasets.digits(), seed=0)


def test_it_takes_more_of_the_class_than_of_the_rest(digits: efface.TrainedModel) -> None:
    split = efface.Split.by_class(digits.task, 3)
    after = efface.forget(digits, split, ClassPruning(0.5))
    assert accuracy(digits, split.forget) > 0.95
    assert accuracy(after, split.forget) < 0.9 * accuracy(after, split.retain)
    assert accuracy(after, split.retain) > 0.95


# -- what was pruned before ------------------------------------------------------------------------


def test_filters_that_are_gone_change_nothing(digits: efface.TrainedModel) -> None:
    """The same are pruned next where they were removed for good."""
    task = digits.task
    once = efface.forget(digits, efface.Split.by_class(task, 0), ClassPruning(0.3))
    split = efface.Split.by_class(task, 1)
    small = efface.compact(once)
    method = ClassPruning(0.3, inner=IDLE, scope="global")
    twice = efface.forget(once, split, method)
    detail = twice.lineage[-1].detail["class_pruning"]
    assert detail["pruned"] == 19  # 30 % of 64, of which 19 were gone
    there = gone_in(twice)
    for layer, gone in gone_in(once).items():
        assert gone <= there[layer]
    fewer = efface.forget(small, split, ClassPruning(19 / 45, inner=IDLE, scope="global"))
    assert fewer.lineage[-1].detail["class_pruning"]["layers"] == [
        entry | {"filters": entry["filters"] - len(gone_in(once)[entry["layer"]])}
        for entry in detail["layers"]
    ]


def test_the_next_request_prunes_further(digits: efface.TrainedModel) -> None:
    task, method = digits.task, ClassPruning(0.3)
    once = efface.forget(digits, efface.Split.by_class(task, 0), method)
    twice = efface.forget(once, efface.Split.by_class(task, 1), method)
    first, second = gone_in(once), gone_in(twice)
    for layer in first:
        assert first[layer] < second[layer]
    weights = dict(twice.network.named_parameters())
    assert twice.mask is not None
    assert all((weights[name][~keep] == 0).all() for name, keep in twice.mask.items())


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"amount": 0.0}, r"amount must lie in \(0, 1\), not 0.0"),
        ({"amount": 1.0}, "amount must lie in"),
        ({"amount": math.nan}, "amount must lie in"),
        ({"sample": 0}, "sample must be 1 or more, not 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        ClassPruning(**options)


def test_random_records_are_refused_unless_forced(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    with pytest.raises(MethodError, match="random records have none in common"):
        efface.forget(trained, split, ClassPruning())
    assert efface.forget(trained, split, ClassPruning(force=True)).digest != trained.digest


def test_a_network_that_says_nothing_is_refused(
    conv_trained: efface.TrainedModel,
) -> None:
    split = efface.Split.by_class(conv_trained.task, 1)
    for value, said in ((math.nan, "not finite"), (-1.0, "no filter is active")):
        model = conv_trained.copy()
        with torch.no_grad():
            for module in model.network:  # type: ignore[union-attr]
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.zero_()
                    module.bias.fill_(value)
        with pytest.raises(MethodError, match=said):
            efface.forget(model, split, ClassPruning())


def test_names_and_defaults(new_conv_task: NewTask) -> None:
    assert build("tf-idf") == ClassPruning()
    assert build("class-pruning", {"amount": "0.2"}).share == 0.2
    task = new_conv_task(defaults={"class-pruning": {"amount": 0.4}})
    after = efface.forget(
        efface.train(task, seed=0), efface.Split.by_class(task, 1), ClassPruning(inner=IDLE)
    )
    assert after.lineage[-1].detail["class_pruning"]["amount"] == 0.4
    assert sum(map(len, gone_in(after).values())) == 4  # round(1.6) of 4 and round(2.4) of 6
