"""Findings against loops over records, references that do not belong, planted verdicts."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from sklearn.svm import SVC

import efface
from efface.auditing import Cache, Subject, decide
from efface.auditing import verdict as verdict_module
from efface.auditing.membership import LowFPR
from efface.errors import MismatchError, SelectionError
from efface.lineage import Forgotten
from efface.report import AuditResult
from efface.sparsify import OneShot
from efface.task import Settings
from efface.trained import TrainedModel
from efface.unlearn import FineTune, GradientAscent, LogitOff, PruneFirst, Retrain

from . import oracles

NewTask = Callable[..., efface.Task]


@dataclasses.dataclass
class Case:
    """An audit and everything that went into it; probabilities by a loop over records."""

    before: TrainedModel
    after: TrainedModel
    split: efface.Split
    references: list[TrainedModel]
    result: AuditResult

    @property
    def models(self) -> dict[str, TrainedModel]:
        named = {f"reference {i}": r for i, r in enumerate(self.references)}
        return {"after": self.after, "before": self.before, **named}

    def records(self, part: str) -> list[tuple[torch.Tensor, int]]:
        task = self.split.task
        inputs, targets = task.test if part == "test" else task.train
        where = {"forget": self.split.forget, "retain": self.split.retain}.get(
            part, torch.arange(len(targets))
        )
        return [(inputs[i], int(targets[i])) for i in where.tolist()]

    def logits(self, model: TrainedModel, part: str) -> list[list[float]]:
        network = copy.deepcopy(model.network).eval()
        with torch.no_grad():
            return [network(x[None])[0].double().tolist() for x, _ in self.records(part)]

    def margins(self, model: TrainedModel, part: str) -> list[float]:
        labels = [y for _, y in self.records(part)]
        return [oracles.margin(z, y) for z, y in zip(self.logits(model, part), labels, strict=True)]

    def right(self, model: TrainedModel, part: str) -> list[tuple[int, bool]]:
        labels = [y for _, y in self.records(part)]
        rows = zip(self.logits(model, part), labels, strict=True)
        return [(y, max(range(3), key=z.__getitem__) == y) for z, y in rows]

    def check(self, name: str, measure: Callable[[TrainedModel], float], **tolerance: Any) -> None:
        """A finding that compares one measure of every model."""
        finding = self.result[name]
        tolerance = tolerance or {"abs": 1e-6}
        values = {who: measure(model) for who, model in self.models.items()}
        references = [v for who, v in values.items() if who.startswith("reference")]
        mean = sum(references) / len(references)
        floor = max(abs(a - b) for a, b in combinations(references, 2))
        assert finding["status"] == "ok"
        assert finding["value"] == pytest.approx(values["after"], **tolerance)
        assert finding["original"] == pytest.approx(values["before"], **tolerance)
        assert finding["reference"] == pytest.approx(mean, **tolerance)
        assert finding["gap"] == pytest.approx(abs(values["after"] - mean), **tolerance)
        assert finding["floor"] == pytest.approx(floor, **tolerance)
        assert finding["low"] <= finding["value"] <= finding["high"]


def make_case(trained: TrainedModel, split: efface.Split, method: Any, **like: Any) -> Case:
    after = efface.forget(trained, split, method, seed=1)
    options = {"model": trained, **like}
    references = [efface.retrain(trained.task, split, seed=s, **options) for s in (1, 2, 3)]
    return Case(trained, after, split, references, efface.audit(trained, after, split, references))


@pytest.fixture(scope="module")
def by_class(trained: TrainedModel, class_split: efface.Split) -> Case:
    return make_case(trained, class_split, FineTune(epochs=2, lr=0.02))


@pytest.fixture(scope="module")
def by_chance(trained: TrainedModel, split: efface.Split) -> Case:
    return make_case(trained, split, GradientAscent(epochs=2, lr=0.01))


@pytest.fixture(scope="module")
def sparse(pruned: TrainedModel, split: efface.Split) -> Case:
    return make_case(pruned, split, FineTune(epochs=1), like="repruned", initial="model")


@pytest.fixture(params=["by_class", "by_chance", "sparse"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


# --- each finding by its definition ---------------------------------------------------------------


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def test_accuracies(case: Case) -> None:
    left_out = case.split.label
    case.check("ua", lambda m: 1 - share([ok for _, ok in case.right(m, "forget")]))
    case.check("ra", lambda m: share([ok for _, ok in case.right(m, "retain")]))
    case.check("ta", lambda m: share([ok for y, ok in case.right(m, "test") if y != left_out]))
    counts = {"ua": len(case.split.forget), "ra": len(case.split.retain)}
    counts["ta"] = 60 if left_out is None else 40
    for name, n in counts.items():
        finding = case.result[name]
        assert finding["n"] == n
        limits = oracles.clopper_pearson(round(finding["value"] * n), n, 0.95)
        assert (finding["low"], finding["high"]) == pytest.approx(limits, abs=1e-9)


def test_every_class(case: Case) -> None:
    def accuracies(model: TrainedModel) -> dict[int, float]:
        rows = case.right(model, "test")
        return {c: share([ok for y, ok in rows if y == c]) for c in range(3)}

    kept = [c for c in range(3) if c != case.split.label]
    case.check("accuracy_per_class", lambda m: min(accuracies(m)[c] for c in kept))
    series = case.result["accuracy_per_class"]["series"]
    assert series["labels"] == ["0", "1", "2"]
    wanted = [case.before, case.after, case.references[0]]
    for group, model in zip(series["groups"], wanted, strict=True):
        assert group["values"] == pytest.approx(list(accuracies(model).values()))


def test_the_forgotten_class(by_class: Case, by_chance: Case) -> None:
    by_class.check(
        "forget_class_test_accuracy",
        lambda m: share([ok for y, ok in by_class.right(m, "test") if y == 1]),
    )
    finding = by_chance.result["forget_class_test_accuracy"]
    assert (finding["status"], finding["value"]) == ("undefined", None)


def test_efficacy_is_a_plain_support_vector_classifier(case: Case) -> None:
    """Jia et al.'s protocol, written down once more with scikit-learn alone."""

    def sure(model: TrainedModel, part: str) -> list[float]:
        found = []
        for z, (_, y) in zip(case.logits(model, part), case.records(part), strict=True):
            if part == "test" and y == case.split.label:
                continue
            found.append(math.exp(z[y]) / sum(math.exp(v) for v in z))
        return found

    def efficacy(model: TrainedModel) -> float:
        outsiders = sure(model, "test")
        members = sure(model, "retain")[: len(outsiders)]
        attack = SVC(C=3, gamma="auto", kernel="rbf")
        attack.fit([[v] for v in members + outsiders], [1] * len(members) + [0] * len(outsiders))
        return share(list(attack.predict([[v] for v in sure(model, "forget")]) == 0))

    case.check("mia_efficacy", efficacy)
    assert case.result["mia_efficacy"]["n"] == len(case.split.forget)


def test_matched_test_records(case: Case) -> None:
    """As many as there can be, in the class proportions of D_f, the same for every model."""
    subject = Subject(case.before, case.after, case.split, tuple(case.references))
    matched = subject.matched_test
    assert matched is not None
    assert len(set(matched.tolist())) == len(matched)
    forgotten = [y for _, y in case.records("forget")]
    there = [case.records("test")[i][1] for i in matched.tolist()]
    available = [y for _, y in case.records("test")]
    scale = min(available.count(c) / forgotten.count(c) for c in set(forgotten))
    for c in range(3):
        assert there.count(c) == math.floor(scale * forgotten.count(c) + 1e-9)
    if case.split.label is not None:  # inside the class: all of its test records
        assert matched.tolist() == [i for i, y in enumerate(available) if y == case.split.label]
    again = Subject(case.after, case.before, case.split)
    assert again.matched_test is not None
    assert again.matched_test.tolist() == matched.tolist()


def test_auc_is_the_share_of_pairs_won(case: Case) -> None:
    subject = Subject(case.before, case.after, case.split)
    assert subject.matched_test is not None
    chosen = subject.matched_test.tolist()

    def area(model: TrainedModel) -> float:
        outside = case.margins(model, "test")
        return oracles.pairwise_auc(case.margins(model, "forget"), [outside[i] for i in chosen])

    case.check("mia_auc", area, abs=2e-3)  # margins that tie in float32 may not in float64
    assert case.result["mia_auc"]["n"] == len(case.split.forget) + len(chosen)


def test_margins(case: Case) -> None:
    def mean(model: TrainedModel) -> float:
        values = case.margins(model, "forget")
        return sum(values) / len(values)

    case.check("margin_forget", mean, abs=1e-4)
    sizes = {"forgotten": len(case.split.forget), "retained": len(case.split.retain)}
    sizes["test"] = 40 if case.split.label is not None else 60
    for panel in case.result["margin_forget"]["series"]["panels"]:
        n = sizes[panel["title"].split()[0]]
        assert [sum(g["counts"]) for g in panel["groups"]] == [n] * 3


@pytest.mark.parametrize("part", ["forget", "retain", "test"])
def test_distances_of_answers(case: Case, part: str) -> None:
    def answers(model: TrainedModel) -> list[list[float]]:
        return [[math.exp(v) / sum(map(math.exp, z)) for v in z] for z in case.logits(model, part)]

    def distance(p: list[list[float]], q: list[list[float]]) -> float:
        rows = [oracles.js_distance(a, b) for a, b in zip(p, q, strict=True)]
        return sum(rows) / len(rows)

    references = [answers(r) for r in case.references]
    finding = case.result[f"js_{part}"]
    for key, model in (("value", case.after), ("original", case.before)):
        each = [distance(answers(model), q) for q in references]
        assert finding[key] == pytest.approx(sum(each) / 3, abs=1e-5)
    pairs = [distance(p, q) for p, q in combinations(references, 2)]
    assert finding["floor"] == pytest.approx(sum(pairs) / 3, abs=1e-5)
    assert finding["low"] < finding["value"] < finding["high"]


def test_distances_of_weights(case: Case) -> None:
    def distance(a: TrainedModel, b: TrainedModel) -> float:
        total, other = 0.0, dict(b.network.named_parameters())
        for name, p in a.network.named_parameters():
            for v, w in zip(p.flatten().tolist(), other[name].flatten().tolist(), strict=True):
                total += (v - w) ** 2
        return math.sqrt(total)

    moved = case.result["weight_distance_original"]
    assert moved["value"] == pytest.approx(distance(case.after, case.before), rel=1e-9)
    found = case.result["weight_distance_reference"]
    for key, model in (("value", case.after), ("original", case.before)):
        each = [distance(model, r) for r in case.references]
        assert found[key] == pytest.approx(sum(each) / 3, rel=1e-9)
    pairs = [distance(a, b) for a, b in combinations(case.references, 2)]
    assert found["floor"] == pytest.approx(sum(pairs) / 3, rel=1e-9)


def test_overlap_of_masks(sparse: Case, by_chance: Case) -> None:
    def kept(model: TrainedModel) -> set[tuple[str, int]]:
        assert model.mask is not None
        return {
            (name, i)
            for name, keep in model.mask.items()
            for i, k in enumerate(keep.flatten().tolist())
            if k
        }

    def iou(a: TrainedModel, b: TrainedModel) -> float:
        return len(kept(a) & kept(b)) / len(kept(a) | kept(b))

    found = sparse.result["mask_iou"]
    mean = sum(iou(sparse.after, r) for r in sparse.references) / 3
    assert found["value"] == pytest.approx(mean)
    assert found["original"] == pytest.approx(mean)  # fine-tuning kept the mask
    pairs = [iou(a, b) for a, b in combinations(sparse.references, 2)]
    assert sparse.result["mask_iou_ceiling"]["value"] == pytest.approx(sum(pairs) / 3)
    for name in ("mask_iou", "mask_iou_chance", "mask_iou_ceiling"):
        assert by_chance.result[name]["status"] == "undefined"


def test_run_time(case: Case) -> None:
    seconds = case.result["rte_seconds"]
    spent = case.after.lineage[-1].cost["wall"]
    retraining = [sum(s.cost["wall"] for s in r.lineage) for r in case.references]
    assert seconds["value"] == pytest.approx(spent)
    assert seconds["reference"] == pytest.approx(sum(retraining) / 3)
    ratio = case.result["rte_ratio"]
    assert ratio["value"] == pytest.approx(3 * spent / sum(retraining))


def test_gaps_are_means_of_four(case: Case) -> None:
    gap = {f["name"]: f["gap"] for f in case.result.findings}
    for value, attack in (
        (case.result.average_gap, "mia_efficacy"),
        (case.result.gap_a, "mia_auc"),
    ):
        wanted = (gap["ua"] + gap[attack] + gap["ra"] + gap["ta"]) / 4
        assert value == pytest.approx(wanted)


def test_low_false_alarms_need_many_unseen_records(case: Case) -> None:
    finding = case.result["mia_tpr_at_1fpr"]
    assert (finding["status"], finding["value"]) == ("not_estimable", None)
    assert "200 needed" in finding["sentence"]


def test_low_false_alarms_by_definition(new_task: NewTask) -> None:
    draw = torch.Generator().manual_seed(5)
    big = new_task(test=(torch.randn(900, 6, generator=draw), torch.arange(900) % 3))
    model, split = efface.train(big), efface.Split.random(big, 0.2, seed=3)
    subject = Subject(model, model, split, (efface.retrain(big, split),))
    found = LowFPR()(subject, np.random.default_rng(0))
    assert subject.matched_test is not None
    again = np.random.default_rng(int(np.random.default_rng(0).integers(2**63)))
    there = Case(model, model, split, [], AuditResult({}, {}, (), None, None, "not measurable"))
    outside = np.array(there.margins(model, "test"))[subject.matched_test]
    pos, neg = again.permutation(there.margins(model, "forget")), again.permutation(outside)
    half, middle = len(neg) // 2, len(pos) // 2
    halves = [(pos[:middle], neg[:half]), (pos[middle:], neg[half:])]
    hits, _ = oracles.cross_fitted_hits([(p.tolist(), n.tolist()) for p, n in halves], 0.01)
    assert found.status == "ok"
    assert found.n == len(split.forget) == 24
    assert found.value == pytest.approx(hits / 24)
    assert (found.low, found.high) == pytest.approx(oracles.clopper_pearson(hits, 24, 0.95))


# --- the whole ------------------------------------------------------------------------------------

DIRECTIONS = {
    "match": {
        "ua",
        "ra",
        "ta",
        "mia_efficacy",
        "mia_auc",
        "margin_forget",
        "accuracy_per_class",
        "forget_class_test_accuracy",
        "linear_probe",
        "relearn_retain",
        "relearn_forget",
    },
    "lower": {"js_forget", "js_retain", "js_test", "rte_seconds", "rte_ratio"},
    "higher": {"mask_iou", "mask_iom", "mask_trace_removed", "mask_membership"},
    "info": {
        "weight_distance_original",
        "weight_distance_reference",
        "mask_iou_chance",
        "mask_iou_ceiling",
        "mask_iou_initial",
        "mask_trace",
        "block_contrast",
    },
}
KEYS = {
    "name",
    "value",
    "low",
    "high",
    "n",
    "direction",
    "status",
    "sentence",
    "reference",
    "gap",
    "floor",
    "original",
    "series",
}


def test_the_document(case: Case) -> None:
    text = case.result.to_json()
    document = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert document["schema"] == "efface.audit/1"
    assert document["split"] == {
        "forget": len(case.split.forget),
        "retain": len(case.split.retain),
        "test": 60,
    }
    names = [f["name"] for f in document["findings"]]
    assert len(set(names)) == len(names)
    for finding in document["findings"]:
        assert set(finding) == KEYS
        assert finding["sentence"]
        assert (finding["status"] == "ok") == (finding["value"] is not None)
        if finding["status"] == "ok":
            assert finding["name"] in DIRECTIONS[finding["direction"]]
            assert finding["n"] > 0
        else:
            assert finding["low"] is finding["high"] is finding["gap"] is None
    assert len(document["not_shown"]) >= 5
    assert AuditResult.from_json(text) == AuditResult.from_json(case.result.to_json())
    assert all(record not in text for record in case.split.task.ids_)


def without_time(result: AuditResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.to_json())
    del found["subject"]["created"]
    return found


def test_an_audit_repeats_and_changes_nothing(case: Case) -> None:
    models = case.models.values()
    before = [m.digest for m in models]
    modes = [[x.training for x in m.network.modules()] for m in models]
    torch.manual_seed(9)
    state = torch.get_rng_state()
    again = efface.audit(case.before, case.after, case.split, case.references)
    assert without_time(again) == without_time(case.result)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.digest for m in models] == before
    assert [[x.training for x in m.network.modules()] for m in models] == modes


def test_the_split_can_be_read_from_the_lineage(case: Case) -> None:
    again = efface.audit(case.before, case.after, references=case.references)
    assert without_time(again) == without_time(case.result)
    with pytest.raises(SelectionError, match="no request"):
        efface.audit(case.before, case.before)


def test_a_shared_cache_changes_nothing(by_class: Case, by_chance: Case) -> None:
    cache = Cache()
    for case in (by_class, by_chance, by_class):
        found = efface.audit(case.before, case.after, case.split, case.references, cache=cache)
        assert without_time(found) == without_time(case.result)


def test_a_cache_knows_how_the_records_were_selected(by_class: Case) -> None:
    """The same records by list: the class is not left out of TA then."""
    task = by_class.before.task
    ids = [task.ids_[i] for i in by_class.split.forget.tolist()]
    by_list = efface.Split.by_ids(task, ids)
    cache = Cache()
    efface.audit(by_class.before, by_class.after, by_class.split, by_class.references, cache=cache)
    shared = efface.audit(
        by_class.before, by_class.after, by_list, by_class.references, cache=cache
    )
    alone = efface.audit(by_class.before, by_class.after, by_list, by_class.references)
    assert shared["ta"]["n"] == alone["ta"]["n"] == 60
    assert without_time(shared) == without_time(alone)


def test_huge_logits_give_no_nan(by_class: Case) -> None:
    loud = by_class.after.copy()
    with torch.no_grad():
        loud.network[4].weight *= 1e6
    result = efface.audit(by_class.before, loud, by_class.split, by_class.references)
    json.loads(result.to_json(), parse_constant=lambda word: pytest.fail(word))
    assert result["ua"]["value"] is not None


def test_a_single_record(trained: TrainedModel, task: efface.Task) -> None:
    split = efface.Split.by_ids(task, ["r007"])
    after = efface.forget(trained, split, FineTune(epochs=1))
    references = [efface.retrain(task, split, seed=s) for s in (1, 2)]
    result = efface.audit(trained, after, split, references)
    assert result["ua"]["n"] == 1
    assert result["mia_auc"]["status"] == "not_estimable"
    assert "10 each needed" in result["mia_auc"]["sentence"]
    assert result.gap_a is None
    assert "r007" not in result.to_json()


# --- references -----------------------------------------------------------------------------------


def test_without_references(trained: TrainedModel, by_class: Case) -> None:
    result = efface.audit(trained, by_class.after, by_class.split)
    assert result.verdict == "not measurable"
    assert result.average_gap is None
    assert result["ua"]["value"] == by_class.result["ua"]["value"]
    assert result["ua"]["reference"] is result["ua"]["gap"] is result["ua"]["floor"] is None
    assert result["js_forget"]["status"] == "not_estimable"
    assert "no retrained model" in result.not_shown[0]
    json.loads(result.to_json())


def test_one_reference(trained: TrainedModel, by_class: Case) -> None:
    result = efface.audit(trained, by_class.after, by_class.split, by_class.references[:1])
    assert result["ua"]["floor"] is None
    assert result["ua"]["gap"] is not None
    assert result["js_forget"]["floor"] is None
    assert any("only one was given" in line for line in result.not_shown)


def refused(case: Case, reference: TrainedModel, match: str, after: Any = None) -> None:
    with pytest.raises(MismatchError, match=match):
        efface.audit(case.before, after or case.after, case.split, [reference])


def test_references_that_do_not_belong_are_refused(
    by_class: Case, new_task: NewTask, pruned: TrainedModel
) -> None:
    task, split = by_class.before.task, by_class.split
    refused(by_class, by_class.before, "exactly the forgotten")
    refused(by_class, by_class.after, "fresh weights")
    other = efface.retrain(task, efface.Split.by_class(task, 2))
    refused(by_class, other, "exactly the forgotten")
    more = efface.retrain(task, split, model=by_class.references[0].copy())
    assert set(more.forgotten.tags) == set(by_class.references[0].forgotten.tags)
    slower = new_task(fit=Settings(epochs=6, batch_size=16, lr=0.05, weight_decay=1e-3))
    refused(by_class, efface.retrain(slower, efface.Split.by_class(slower, 1)), r"settings.*\(lr\)")
    x, y = task.train
    moved = new_task(train=(x + 0.5, y))
    refused(by_class, efface.retrain(moved, efface.Split.by_class(moved, 1)), "other data")
    masked = efface.retrain(task, split, model=pruned, like="same-mask")
    refused(by_class, masked, "60.1% of its weights pruned")
    adopted = efface.adopt(task, by_class.references[0].network.state_dict())
    adopted.forgotten = by_class.after.forgotten
    refused(by_class, adopted, "fresh weights")


def test_dense_references_of_a_pruned_model_are_refused(
    sparse: Case, trained: TrainedModel
) -> None:
    dense = efface.retrain(trained.task, sparse.split)
    refused(sparse, dense, "0.0% of its weights pruned")
    pruner = OneShot(0.6, recovery=1)
    after = efface.forget(trained, sparse.split, PruneFirst(pruner, FineTune(epochs=1)))
    with pytest.raises(MismatchError, match="pruned"):
        efface.audit(trained, after, sparse.split, [dense])
    like = efface.retrain(trained.task, sparse.split, model=after, like="same-mask")
    efface.audit(trained, after, sparse.split, [like])


def test_a_split_that_was_not_forgotten_is_refused(by_class: Case, split: efface.Split) -> None:
    with pytest.raises(MismatchError, match="not what the model forgot"):
        efface.audit(by_class.before, by_class.after, split)


def test_an_adopted_original_takes_any_settings(by_class: Case) -> None:
    task = by_class.before.task
    adopted = efface.adopt(task, by_class.before.network.state_dict())
    after = efface.forget(adopted, by_class.split, FineTune(epochs=1))
    result = efface.audit(adopted, after, by_class.split, by_class.references)
    assert any("came from elsewhere" in line for line in result.not_shown)
    wanted = by_class.result["ua"]["original"]
    assert result["ua"]["original"] == wanted


# --- a second request -----------------------------------------------------------------------------


def test_a_second_request_leaves_earlier_records_out(
    trained: TrainedModel, split: efface.Split
) -> None:
    task = trained.task
    first = efface.forget(trained, split, FineTune(epochs=1))
    gone = set(split.forget.tolist())
    asked = efface.Split.where(task, "age < 30")
    both = gone & set(asked.forget.tolist())
    assert both
    second = efface.forget(first, asked, FineTune(epochs=1))
    n = {"forget": len(asked.forget) - len(both), "test": 60}
    n["retain"] = 120 - len(gone) - n["forget"]
    assert len(second.forgotten.tags) == len(gone) + n["forget"]
    references = [efface.retrain(task, asked, model=first, seed=s) for s in (1, 2)]
    for reference in references:
        assert set(reference.forgotten.tags) == set(second.forgotten.tags)
        assert reference.lineage[0].detail["images"] == {"retain": 6 * n["retain"]}
    result = efface.audit(first, second, asked, references)
    assert result.split == n
    assert (result["ua"]["n"], result["ra"]["n"]) == (n["forget"], n["retain"])
    assert without_time(efface.audit(first, second, None, references)) == without_time(result)
    # a reference that only knows of the second request has seen the records of the first
    with pytest.raises(MismatchError, match="exactly the forgotten"):
        efface.audit(first, second, asked, [efface.retrain(task, asked)])
    # both requests at once
    union = sorted(gone | set(asked.forget.tolist()))
    everything = efface.Split.by_ids(task, [task.ids_[i] for i in union])
    total = efface.audit(trained, second, everything, [efface.retrain(task, everything)])
    assert total.split["forget"] == len(union)


# --- verdicts -------------------------------------------------------------------------------------


def test_the_original_as_after_has_forgotten_nothing(by_class: Case, by_chance: Case) -> None:
    for case in (by_class, by_chance):
        result = efface.audit(case.before, case.before, case.split, case.references)
        assert result.verdict in ("under-forgotten", "not measurable")
        assert result["ua"]["value"] == result["ua"]["original"]
        assert result["rte_seconds"]["status"] == "undefined"
    found = efface.audit(by_class.before, by_class.before, by_class.split, by_class.references)
    assert found.verdict == "under-forgotten"


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_a_further_retrain_is_indistinguishable(by_class: Case, seed: int) -> None:
    further = efface.retrain(by_class.before.task, by_class.split, seed=seed)
    result = efface.audit(by_class.before, further, by_class.split, by_class.references)
    assert result.verdict == "indistinguishable"
    unlearned = efface.forget(by_class.before, by_class.split, Retrain(), seed=seed)
    result = efface.audit(by_class.before, unlearned, by_class.split, by_class.references)
    assert result.verdict == "indistinguishable"


def test_a_switched_off_output_is_no_forgetting(by_class: Case) -> None:
    """It has the accuracies of a retrained model, and every sign of the class inside."""
    off = efface.forget(by_class.before, by_class.split, LogitOff())
    result = efface.audit(by_class.before, off, by_class.split, by_class.references)
    assert result["ua"]["gap"] == 0
    assert result["mia_auc"]["value"] == pytest.approx(result["mia_auc"]["original"], abs=0.05)
    assert result.verdict != "indistinguishable"


def test_far_below_retraining_is_over_forgotten(by_class: Case) -> None:
    low = by_class.references[0].copy()
    with torch.no_grad():
        low.network[4].bias[1] -= 100
    result = efface.audit(by_class.before, low, by_class.split, by_class.references[1:])
    assert result.verdict == "over-forgotten"


def planted(
    monkeypatch: pytest.MonkeyPatch,
    before: float,
    after: float,
    references: Sequence[float],
    n: int,
) -> Any:
    """A subject whose margins on D_f are a normal sample moved by so much; on D_t, at 0."""
    quantiles = np.array([student.ppf((i + 0.5) / n, 1000) for i in range(n)])

    def margins(subject: Any, model: float, part: str) -> Any:
        return quantiles + (model if part == "forget" else 0.0)

    monkeypatch.setattr(verdict_module, "margins", margins)
    return SimpleNamespace(
        before=before,
        after=after,
        references=tuple(references),
        matched_test=np.arange(n),
        split=SimpleNamespace(forget=range(n)),
    )


RETRAINED = (-0.05, 0.0, 0.05)


@pytest.mark.parametrize(
    ("before", "after", "references", "n", "word"),
    [
        (3.0, 3.0, RETRAINED, 40, "under-forgotten"),
        (3.0, 0.01, RETRAINED, 40, "indistinguishable"),
        (3.0, -3.0, RETRAINED, 40, "over-forgotten"),
        (0.02, 0.01, RETRAINED, 40, "not measurable"),
        (0.02, 3.0, RETRAINED, 40, "not measurable"),
        (-3.0, -3.0, RETRAINED, 40, "under-forgotten"),  # seen from the original's side
        (-3.0, 3.0, RETRAINED, 40, "over-forgotten"),
        (-3.0, 0.0, RETRAINED, 40, "indistinguishable"),
        # references that agree to a hair: a difference below a tenth of a nat is never called
        (3.0, 0.08, (0.0, 0.001), 40, "indistinguishable"),
        (3.0, 0.12, (0.0, 0.001), 40, "under-forgotten"),
        # one reference: the AUC alone decides, and needs twenty records
        (3.0, 3.0, (0.0,), 40, "under-forgotten"),
        (3.0, 0.1, (0.0,), 40, "indistinguishable"),
        (3.0, -3.0, (0.0,), 40, "over-forgotten"),
        (3.0, 3.0, (0.0,), 19, "not measurable"),
        (3.0, 3.0, RETRAINED, 19, "under-forgotten"),
        (3.0, 0.0, (), 40, "not measurable"),
    ],
)
def test_planted_verdicts(
    monkeypatch: pytest.MonkeyPatch,
    before: float,
    after: float,
    references: Sequence[float],
    n: int,
    word: str,
) -> None:
    found = decide(planted(monkeypatch, before, after, references, n))
    assert found.word == word
    assert found.sentence.endswith(".")


def test_the_edge_of_the_prediction_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean ± t(k−1) · s · sqrt(1 + 1/k), written out; too few records for the AUC to speak."""
    references = [0.0, 1.0, 0.5, -0.5]
    mean = sum(references) / 4
    deviation = math.sqrt(sum((r - mean) ** 2 for r in references) / 3)
    edge = mean + student.ppf(0.975, 3) * deviation * math.sqrt(1 + 1 / 4)
    for shift, word in ((-0.01, "indistinguishable"), (0.01, "under-forgotten")):
        subject = planted(monkeypatch, 50.0, edge + shift, references, 19)
        assert decide(subject).word == word


def test_nothing_to_forget_never_reads_as_success(new_task: NewTask, split: efface.Split) -> None:
    """Where nobody was learnt by heart, even a retrained model gets no good word."""
    task = new_task(fit=Settings(epochs=1, batch_size=60, lr=1e-4))
    chosen = efface.Split(task, split.forget, split.retain, split.selector)
    before = efface.train(task)
    references = [efface.retrain(task, chosen, seed=s) for s in (1, 2, 3, 4)]
    after = efface.retrain(task, chosen, seed=9)
    assert efface.audit(before, after, chosen, references).verdict == "not measurable"


def test_forgotten_defaults() -> None:
    assert Forgotten().positions(None).tolist() == []  # type: ignore[arg-type]
