"""What is left of a class: probe and re-learning against loops; the contrast of blocks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.auditing import Cache, Finding, Subject
from efface.auditing.blocks import BlockContrast, scored
from efface.auditing.probing import LinearProbe, balanced, drawn
from efface.auditing.relearning import Curve, Relearn
from efface.data import order
from efface.errors import MethodError, NeedsError
from efface.fitting import Fit
from efface.report.after import ratios
from efface.report.html import audit_page
from efface.seeds import rng
from efface.task import Settings
from efface.trained import TrainedModel
from efface.unlearn import FineTune, LogitOff, methods

from . import oracles

NewTask = Callable[..., efface.Task]
LABEL = 1
PROBE = LinearProbe(records=15)
ALONE, MIXED = Relearn(records=30), Relearn(added=6, records=30, epochs=4, lr=0.02)
AUDITS = [PROBE, ALONE, MIXED, BlockContrast()]


@pytest.fixture(scope="module")
def references(task: efface.Task, class_split: efface.Split) -> list[TrainedModel]:
    return [efface.retrain(task, class_split, seed=s) for s in (1, 2)]


@pytest.fixture(scope="module")
def after(trained: TrainedModel, class_split: efface.Split) -> TrainedModel:
    return efface.forget(trained, class_split, FineTune(epochs=2, lr=0.02))


@pytest.fixture
def subject(
    trained: TrainedModel,
    after: TrainedModel,
    class_split: efface.Split,
    references: list[TrainedModel],
) -> Subject:
    return Subject(trained, after, class_split, tuple(references))


def found(audit: Any, subject: Subject, seed: int = 0) -> Finding:
    finding: Finding = audit(subject, rng(seed, "test"))
    return finding


def compares(finding: Finding, subject: Subject, measure: Callable[[TrainedModel], float]) -> None:
    """That a finding holds one measure of every model."""
    others = [measure(model) for model in subject.references]
    mean = sum(others) / len(others)
    assert finding.status == "ok"
    assert finding.value == pytest.approx(measure(subject.after))
    assert finding.original == pytest.approx(measure(subject.before))
    assert finding.reference == pytest.approx(mean)
    assert finding.value is not None
    assert finding.gap == pytest.approx(abs(finding.value - mean))
    assert finding.floor == pytest.approx(max(others) - min(others))
    assert finding.low is not None
    assert finding.high is not None
    assert 0 <= finding.low <= finding.value <= finding.high <= 1


# --- a linear probe -------------------------------------------------------------------------------


def slow_probe(subject: Subject, model: TrainedModel) -> float:
    """Logistic regression by Newton's method in float64 on features that are read one by one."""
    task, split = subject.split.task, subject.split
    body = copy.deepcopy(model.network)[:-1].double().eval()  # type: ignore[index]
    known, labels = task.train
    fresh, there = task.test

    def read(x: Tensor) -> Tensor:
        with torch.no_grad():
            return body(x[None].double())[0]  # type: ignore[no-any-return]

    targets = task.records.targets
    forget = drawn(targets, split.forget, 15, "probe forget").tolist()
    retain = drawn(targets, split.retain, 15, "probe retain").tolist()
    assert all(labels[i] == LABEL for i in forget)
    assert all(labels[i] != LABEL for i in retain)
    x = torch.stack([read(known[i]) for i in forget + retain])
    y = torch.tensor([1.0] * 15 + [-1.0] * 15, dtype=torch.float64)
    middle, scale = x.mean(0), x.std(0, unbiased=False)
    scale[scale == 0] = 1.0
    z = torch.cat([(x - middle) / scale, torch.ones(30, 1)], dim=1)
    w = torch.zeros(z.shape[1], dtype=torch.float64)
    ridge = torch.ones_like(w)
    ridge[-1] = 0.0  # the intercept is not shrunk
    for _ in range(50):
        p = torch.sigmoid(-y * (z @ w))
        slope = ridge * w - 0.1 * z.T @ (y * p)
        bend = torch.diag(ridge) + 0.1 * z.T @ torch.diag(p * (1 - p)) @ z
        w = w - torch.linalg.solve(bend, slope)
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row, label in zip(fresh, there.tolist(), strict=True):
        said = float(((read(row) - middle) / scale) @ w[:-1] + w[-1]) > 0
        hits[label == LABEL].append(said == (label == LABEL))
    return sum(sum(h) / len(h) for h in hits.values()) / 2


def test_the_probe_by_its_definition(subject: Subject) -> None:
    finding = found(PROBE, subject)
    compares(finding, subject, lambda model: slow_probe(subject, model))
    assert finding.n == 60
    assert "15 forgotten and as many retained" in finding.sentence
    measured = PROBE.measure(subject, subject.after)
    assert (measured.value, measured.low) == (finding.value, finding.low)


def test_features_that_hold_nothing_are_guessed(subject: Subject) -> None:
    blind = subject.after.copy()
    with torch.no_grad():
        blind.network[2].weight.zero_()  # type: ignore[index, union-attr, operator]
    again = replace(subject, after=blind)
    assert found(PROBE, again).value == pytest.approx(0.5)


def test_a_switched_off_output_hides_nothing_from_the_probe(subject: Subject) -> None:
    off = efface.forget(subject.before, subject.split, LogitOff())
    finding = found(PROBE, replace(subject, after=off))
    assert finding.value == finding.original
    assert found(Relearn(records=30), replace(subject, after=off)).value == 0


def test_interval_of_two_rates() -> None:
    for wins, n, losses, m in ((7, 10, 40, 45), (0, 5, 9, 9), (20, 20, 31, 31)):
        one = oracles.clopper_pearson(wins, n, 0.95)
        two = oracles.clopper_pearson(losses, m, 0.95)
        p, q = wins / n, losses / m
        low = (p + q - math.sqrt((p - one[0]) ** 2 + (q - two[0]) ** 2)) / 2
        high = (p + q + math.sqrt((one[1] - p) ** 2 + (two[1] - q) ** 2)) / 2
        interval = balanced([i < wins for i in range(n)], [i < losses for i in range(m)])
        assert (interval.low, interval.high) == pytest.approx((low, high))
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        assert interval.n == n + m


def test_the_interval_covers() -> None:
    draw = np.random.default_rng(0)
    for p, q in ((0.9, 0.97), (0.5, 0.8)):
        inside = 0
        for _ in range(400):
            interval = balanced(draw.random(40) < p, draw.random(120) < q)
            inside += interval.low <= (p + q) / 2 <= interval.high
        assert inside >= 0.94 * 400


def test_records_are_drawn_in_proportion_and_shift_nobody() -> None:
    targets = torch.arange(100) % 5
    everyone = drawn(targets, torch.arange(100), 50, "x")
    assert torch.bincount(targets[everyone]).tolist() == [10] * 5
    assert drawn(targets, torch.arange(100), 1000, "x").tolist() == list(range(100))
    gone = int(everyone[3])
    rest = drawn(targets, torch.tensor([i for i in range(100) if i != gone]), 50, "x")
    assert len({*everyone.tolist()} - {*rest.tolist()} - {gone}) == 0


def test_too_few_records_for_a_probe(new_task: NewTask, subject: Subject) -> None:
    x, y = subject.split.task.test
    few = torch.cat([(y != LABEL).nonzero().flatten(), (y == LABEL).nonzero().flatten()[:9]])
    task = new_task(test=(x[few], y[few]))
    split = efface.Split.by_class(task, LABEL)
    finding = found(PROBE, replace(subject, split=split))
    assert finding.status == "not_estimable"
    assert "9 test records of the class" in finding.sentence
    none = new_task(test=(x[y != LABEL], y[y != LABEL]))
    bare = replace(subject, split=efface.Split.by_class(none, LABEL))
    for audit in (PROBE, ALONE, MIXED):
        told = found(audit, bare)
        assert told.status == "undefined"
        assert "class 1 has none" in told.sentence


class Bare(nn.Module):
    """Its output layers are not called: one is no module, one is used by its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.body(x)) @ self.own, self.head.weight)


def test_an_output_layer_that_cannot_be_read(new_task: NewTask) -> None:
    task = new_task(network=Bare, fit=Settings(epochs=1, batch_size=32))
    model = efface.train(task)
    for name in (None, "own"):
        named = replace(task, classifier=name)
        finding = found(PROBE, Subject(model, model, efface.Split.by_class(named, LABEL)))
        assert finding.status == "not_estimable"
        assert "Task(classifier=" in finding.sentence
        assert (name or "head.weight") in finding.sentence
    other = replace(task, classifier="body.weight")  # what this layer is given: the inputs
    inside = Subject(model, model, efface.Split.by_class(other, LABEL))
    assert found(PROBE, inside).status == "ok"


def test_features_that_are_not_finite(subject: Subject) -> None:
    broken = subject.after.copy()
    with torch.no_grad():
        broken.network[0].weight.fill_(float("inf"))  # type: ignore[index, union-attr, operator]
    for audit in (PROBE, ALONE):
        finding = found(audit, replace(subject, after=broken))
        assert finding.status == "not_estimable"
        assert finding.value is finding.low is finding.gap is None


# --- re-learning ----------------------------------------------------------------------------------


def slow_curve(subject: Subject, audit: Relearn, model: TrainedModel) -> list[float]:
    """SGD with Nesterov momentum written out, batch after batch; then every test record."""
    task, split = subject.split.task, subject.split
    targets = task.records.targets
    chosen = drawn(targets, split.retain, audit.records, "relearn retain").tolist()
    chosen += drawn(targets, split.forget, audit.added, "relearn forget").tolist()
    network = copy.deepcopy(model.network)
    weights, speed = list(network.parameters()), [torch.zeros_like(p) for p in network.parameters()]
    x, y = task.train
    lr = task.fit.lr / 2 if audit.lr is None else audit.lr
    mask = dict(model.mask or {})
    names = [name for name, _ in network.named_parameters()]

    def accuracy() -> float:
        with torch.no_grad():
            mine = [(r, c) for r, c in zip(*task.test, strict=True) if int(c) == LABEL]
            return sum(int(network(r[None])[0].argmax()) == LABEL for r, _ in mine) / len(mine)

    curve = [accuracy()]
    for epoch in range(audit.epochs):
        queue = order(0, "relearn/records", epoch, torch.tensor(sorted(chosen)), len(targets))
        for start in range(0, len(queue), 16):
            batch = queue[start : start + 16]
            loss = F.cross_entropy(network(x[batch]), y[batch])
            slopes = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for name, w, v, slope in zip(names, weights, speed, slopes, strict=True):
                    slope = slope + task.fit.weight_decay * w
                    v.mul_(0.9).add_(slope)
                    w.sub_(lr * (slope + 0.9 * v))
                    if name in mask:
                        w.masked_fill_(~mask[name], 0.0)
        curve.append(accuracy())
    return curve


@pytest.mark.parametrize("audit", [ALONE, MIXED], ids=["alone", "mixed"])
def test_relearning_by_its_definition(subject: Subject, audit: Relearn) -> None:
    def value(model: TrainedModel) -> float:
        curve = slow_curve(subject, audit, model)[1:]
        return sum(curve) / len(curve) if audit.added else max(curve)

    finding = found(audit, subject)
    compares(finding, subject, value)
    assert finding.n == 20
    assert finding.series is not None
    groups = {g["label"]: g for g in finding.series["groups"]}
    assert groups["after"]["y"] == pytest.approx(slow_curve(subject, audit, subject.after))
    curves = [slow_curve(subject, audit, m) for m in subject.references]
    assert groups["retrained"]["y"] == pytest.approx(np.mean(curves, 0).tolist())
    per_epoch = 3 if audit.added else 2  # 36 or 30 records in batches of 16
    assert groups["before"]["x"] == [per_epoch * e for e in range(audit.epochs + 1)]
    measured = audit.measure(subject, subject.after)
    assert (measured.value, measured.high) == (finding.value, finding.high)
    json.dumps(finding.to_dict(), allow_nan=False)


def test_who_never_forgot_is_back_sooner(subject: Subject) -> None:
    finding = found(MIXED, replace(subject, after=subject.before))
    assert finding.value == finding.original
    assert "sooner than in any retrained model" in finding.sentence
    further = efface.retrain(subject.split.task, subject.split, seed=7)
    finding = found(ALONE, replace(subject, after=further))
    assert finding.value == 0
    assert "no more than in retrained models" in finding.sentence


def test_steps_until_half() -> None:
    rows = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    curve = Curve((0, 5, 10), rows)
    assert curve.accuracy.tolist() == [0, 0.5, 0.75]
    assert [curve.passes(level) for level in (-0.1, 0.4, 0.5, 0.9)] == [0, 5, 10, None]


def test_without_references(subject: Subject) -> None:
    alone = replace(subject, references=())
    for audit in (PROBE, ALONE, MIXED):
        finding = found(audit, alone)
        assert finding.value == found(audit, subject).value
        assert finding.reference is finding.gap is finding.floor is None
        assert "no retrained model was given" in finding.sentence


def test_the_mask_holds_while_a_copy_learns(
    pruned: TrainedModel, class_split: efface.Split
) -> None:
    subject = Subject(pruned, pruned, class_split)
    curve = ALONE.curve(subject, pruned)
    assert curve.accuracy.tolist() == pytest.approx(slow_curve(subject, ALONE, pruned))
    assert pruned.mask is not None
    # equal weights, no mask: another model, also for what was computed once
    loose = pruned.copy()
    loose.set_mask(None)
    assert loose.digest == pruned.digest
    both = Subject(loose, loose, class_split, cache=subject.cache)
    finer = Relearn(added=20, records=80, epochs=6)
    finer.curve(subject, pruned)
    assert finer.curve(both, loose) is not finer.curve(subject, pruned)


def test_a_training_that_goes_astray_is_told(subject: Subject) -> None:
    loud = subject.after.copy()
    with torch.no_grad():
        for p in loud.network.parameters():
            p.mul_(1e6)
    finding = found(ALONE, replace(subject, after=loud))
    if finding.status == "ok":  # it may survive; then its number is a number
        assert finding.value is not None
        assert 0 <= finding.value <= 1
    steep = found(replace(ALONE, lr=1e30), subject)
    assert steep.status == "not_estimable"
    assert "went astray" in steep.sentence


def test_options_out_of_range() -> None:
    for wrong in ({"epochs": 0}, {"records": 0}, {"added": -1}, {"lr": 0.0}):
        with pytest.raises(MethodError, match=next(iter(wrong))):
            Relearn(**wrong)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="tested"):
        LinearProbe(tested=3)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "ids"])
def test_other_splits_have_no_class_and_cost_nothing(
    subject: Subject, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = subject.split.task
    other = (
        efface.Split.random(task, 0.2)
        if kind == "random"
        else efface.Split.by_ids(task, [task.ids_[i] for i in subject.split.forget.tolist()])
    )
    monkeypatch.setattr(Fit, "__call__", lambda *a, **k: pytest.fail("it trained"))
    cache = Cache()
    here = replace(subject, split=other, cache=cache)
    for audit in (PROBE, ALONE, MIXED):
        finding = found(audit, here)
        assert finding.status == "undefined"
        assert "one class" in finding.sentence
        with pytest.raises(NeedsError, match="--class"):
            audit.measure(here, here.after)
    assert not cache._kept


def state(model: TrainedModel) -> Sequence[Any]:
    modules = list(model.network.modules())
    return (
        model.digest,
        [m.training for m in modules],
        [p.requires_grad for p in model.network.parameters()],
        [p.grad is None for p in model.network.parameters()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules],
        model.lineage,
        model.mask,
    )


def test_models_and_randomness_are_left_as_found(subject: Subject) -> None:
    subject.after.network[0].train()  # type: ignore[index, operator]
    subject.references[0].network[4].requires_grad_(False)  # type: ignore[index, union-attr, operator]
    models = (subject.before, subject.after, *subject.references)
    torch.manual_seed(11)
    before, luck, numbers = [state(m) for m in models], torch.get_rng_state(), np.random.get_state()
    try:
        for audit in AUDITS:
            found(audit, subject)
        assert [state(m) for m in models] == before
        assert torch.equal(torch.get_rng_state(), luck)
        assert all(
            np.array_equal(a, b) for a, b in zip(np.random.get_state(), numbers, strict=True)
        )
    finally:
        subject.references[0].network.requires_grad_(True)
        subject.after.network.eval()


def test_same_again_whatever_the_seed(subject: Subject) -> None:
    once = [found(audit, subject, seed=0).to_dict() for audit in AUDITS]
    torch.manual_seed(123)
    fresh = replace(subject, cache=Cache())
    assert [found(audit, fresh, seed=9).to_dict() for audit in AUDITS] == once


def test_each_model_is_trained_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = Fit.__call__
    monkeypatch.setattr(Fit, "__call__", lambda fit, *a, **k: calls.append(1) or run(fit, *a, **k))
    for _ in range(2):
        found(ALONE, subject)
    assert len(calls) == 4
    found(replace(ALONE, epochs=2), subject)  # other options: another measure
    assert len(calls) == 8


# --- blocks ---------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "granularity": "filter",
    "kind": "fisher",
    "signal": "loss",
    "blocks": 64,
    "selected": 12,
    "records": {"forget": 40, "retain": 80},
    "contrast": 0.83,
    "chance": [0.21, 0.25],
    "p": 0.005,
    "draws": 200,
    "ratios": {"edges": [-1.0, -0.5, 0.0, 0.5, 1.0], "counts": [4, 20, 30, 10]},
    "layers": [{"layer": "conv1.weight", "blocks": 64, "selected": 12}],
    "capped": [],
    "kept": [],
}


def with_blocks(model: TrainedModel, **changes: Any) -> TrainedModel:
    """The model as if its last step had scored blocks."""
    made, last = model.copy(), model.lineage[-1]
    detail = {**last.detail, "blocks": FACTS | changes}
    made.lineage = (*model.lineage[:-1], replace(last, detail=detail))
    return made


def test_blocks_that_stand_for_the_records(subject: Subject) -> None:
    finding = found(BlockContrast(), replace(subject, after=with_blocks(subject.after)))
    assert (finding.value, finding.n, finding.direction) == (0.83, 120, "info")
    assert finding.sentence.startswith("The 64 blocks (filter by filter) tell the forgotten")
    assert "factor of 2.29" in finding.sentence
    assert "1.23" in finding.sentence
    assert "wrong tool" not in finding.sentence
    assert finding.series is not None
    assert finding.series["counts"] == [4, 20, 30, 10]
    json.dumps(finding.to_dict(), allow_nan=False)


def test_blocks_that_tell_nothing_name_other_tools(subject: Subject) -> None:
    plain = with_blocks(subject.after, contrast=0.2, p=0.31)
    sentence = found(BlockContrast(), replace(subject, after=plain)).sentence
    assert "no better than random records" in sentence
    for name in ("replay", "amnesiac", "l1-sparse", "unprune"):
        assert name in sentence
        assert name in methods()


def test_no_blocks_and_no_ratio(subject: Subject) -> None:
    finding = found(BlockContrast(), subject)
    assert (finding.status, finding.sentence) == ("undefined", "the method scored no blocks.")
    broken = with_blocks(subject.after, contrast=math.inf)
    assert found(BlockContrast(), replace(subject, after=broken)).status == "not_estimable"


def test_blocks_of_an_earlier_request_do_not_count(subject: Subject) -> None:
    first = with_blocks(subject.after)
    untouched = replace(subject, before=first, after=first)
    assert scored(untouched) is None
    other = efface.Split.by_class(subject.split.task, 2)
    second = efface.forget(first, other, FineTune(epochs=1))
    assert scored(Subject(first, second, other)) is None
    assert scored(replace(subject, after=second)) is None  # the last request is what is asked about


# --- the report -----------------------------------------------------------------------------------


def test_the_page_shows_them(subject: Subject) -> None:
    after = with_blocks(subject.after)
    result = efface.audit(subject.before, after, subject.split, subject.references)
    page = audit_page(result)
    assert "Does the class come back?" in page
    assert "Do parts of the network stand for the forgotten records?" in page
    assert "kept records only" in page
    assert "with a few forgotten records" in page
    assert "conv1.weight" in page
    assert result["relearn_forget"]["sentence"].split(";")[0][:40] in page
    assert any("beyond the few epochs" in line for line in result.not_shown)
    assert audit_page(result) == page


def test_the_page_of_other_requests_is_as_it_was(
    trained: TrainedModel, split: efface.Split
) -> None:
    result = efface.audit(trained, efface.forget(trained, split, FineTune(epochs=1)), split)
    page = audit_page(result)
    assert "Does the class come back?" not in page
    assert "Do parts of the network" not in page
    assert any(line.endswith("a model that never saw them.") for line in result.not_shown)


@pytest.mark.parametrize("edges", [[-0.01, 0.0, 0.01], [-9.0, 0.0, 12.0], [0.4, 0.5, 0.6]])
def test_histograms_of_any_range(edges: list[float]) -> None:
    series = {"x_label": "ratio", "edges": edges, "counts": [3, 1], "contrast": 0.1}
    svg = ratios(series | {"chance": [0.0, 0.1]}, "salt")
    assert svg.startswith("<svg")
    assert "log scale" in svg
