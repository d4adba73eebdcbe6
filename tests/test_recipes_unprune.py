"""Recipes with several scenarios, several references, and the topology of pruned models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import efface
from efface.auditing.membership import svc_at_balance
from efface.console import Run
from efface.errors import InputError
from efface.recipes.bench import run_bench
from efface.recipes.models import Bench, Job, original, original_key, reference, reference_key
from efface.recipes.recipe import Claim, parse
from efface.recipes.stability import stability
from efface.recipes.summary import judge, summarise
from efface.recipes.traces import masks_beside, ratio_interval, trace_removed
from efface.report.bench_stability import sentences

TWO = """
title = "Two scenarios"
source = "a test"
about = "Small."
[[claims]]
text = "FT overlaps less than retraining"
metric = "mask_iou"
less = ["omp", "ft"]
than = ["omp", "retrain"]
[[claims]]
text = "in one only"
metric = "ua"
less = ["omp", "ft"]
than = ["omp", "ascent"]
scenario = "class"
[[curves]]
metric = "ta"
methods = ["ft"]
[size.digits]
seeds = 2
rewind = 1
initial = "model"
orders = 2
[[size.digits.models]]
name = "dense"
[[size.digits.models]]
name = "omp"
like = "repruned"
references = ["same-mask", "dense"]
keep_dense = true
pruner = {method = "omp", sparsity = 0.8, to = "initial"}
[size.digits.task]
name = "digits"
network = "MLP"
network_args = [[64, 32, 10]]
fit = {epochs = 3, batch_size = 64, lr = 0.1}
[size.digits.scenarios.class]
forget = {class = 3}
[size.digits.scenarios.random]
forget = {random = 0.1, wrong_labels = 0.2}
proxy = {random = 0.1, wrong_labels = 0.2, seed = 1}
[size.digits.methods.ft]
method = "finetune"
options = {epochs = 1, lr = 0.1}
within = {random = {lr = 0.05}}
[size.digits.methods.searched]
method = "finetune"
scenarios = ["random"]
on = ["omp"]
options = {epochs = 1}
search = {lr = [0.01, 0.1]}
[size.digits.methods.ascent]
method = "gradient-ascent"
scenarios = ["class"]
on = ["omp"]
options = {epochs = 1, lr = 1e-3}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bench of two scenarios."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.toml").write_text(TWO)
    run_bench(Run(), str(folder / "two.toml"), folder / "out", jobs=1)
    return folder / "out"


def results(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "results.json").read_text())
    return value


def bench_of(out: Path) -> Bench:
    return Bench(TWO, "two", "digits", out, out / "models")


def found(document: dict[str, Any], *named: Any) -> dict[str, Any]:
    keys = ("scenario", "model", "method", "seed")[: len(named)]
    part = document["rows"] if len(named) == 4 else document["summary"]
    (one,) = [entry for entry in part if tuple(entry[k] for k in keys) == named]
    return dict(one)


def test_there_is_a_row_for_everything_that_takes_part(done: Path) -> None:
    rows = {(r["scenario"], r["model"], r["method"]) for r in results(done)["rows"]}
    common = ("original", "retrain", "retrain-again", "ft")
    kinds = ("retrain-same-mask", "retrain-dense")
    wanted = {(s, m, n) for s in ("class", "random") for m in ("dense", "omp") for n in common}
    wanted |= {(s, "omp", n) for s in ("class", "random") for n in kinds}
    wanted |= {("random", "omp", "searched"), ("class", "omp", "ascent")}
    assert rows == wanted
    assert len(results(done)["rows"]) == 2 * len(wanted)
    assert all(row["status"] == "ok" for row in results(done)["rows"])


def test_a_scenario_without_change_of_the_data_shares_the_originals(done: Path) -> None:
    text = TWO.replace(", wrong_labels = 0.2", "")
    bench = Bench(text, "two", "digits", done, done / "models")
    jobs = [Job("original", "omp", 0, scenario=name) for name in ("class", "random")]
    assert original_key(bench, jobs[0]) == original_key(bench, jobs[1])
    assert reference_key(bench, jobs[0]) != reference_key(bench, jobs[1])
    noisy = bench_of(done)
    assert original_key(noisy, jobs[0]) != original_key(noisy, jobs[1])


def test_values_are_searched_in_their_scenario_alone(done: Path) -> None:
    (search,) = results(done)["search"]
    assert (search["scenario"], search["model"], search["method"]) == ("random", "omp", "searched")
    assert found(results(done), "random", "omp", "searched", 0)["options"] == search["chosen"]


def test_a_scenario_has_options_of_its_own(done: Path) -> None:
    for scenario, lr in (("class", 0.1), ("random", 0.05)):
        assert found(results(done), scenario, "omp", "ft", 0)["settings"]["lr"] == lr


def test_the_references_are_what_the_recipe_says(done: Path) -> None:
    """Same initial weights, another order; every kind has its own row, and the first is primary."""
    bench = bench_of(done)
    job = Job("reference", "omp", 1, scenario="class")
    before = original(bench, job, print)
    first = reference(bench, job, print)
    again = reference(bench, Job("reference", "omp", 1, scenario="class", order=1), print)
    assert before.initial is not None
    for model in (first, again):
        assert model.initial is not None
        assert model.initial["digest"] == before.initial["digest"]
        assert model.lineage[-1].detail["like"] == "repruned"
    assert first.trained_by().seed == 1  # type: ignore[union-attr]
    assert again.trained_by().seed == 1001  # type: ignore[union-attr]
    assert first.digest != again.digest
    kept = reference(bench, Job("reference", "omp", 1, scenario="class", like="same-mask"), print)
    assert kept.mask is not None
    assert before.mask is not None
    assert kept.mask.digest == before.mask.digest
    dense = reference(bench, Job("reference", "omp", 1, scenario="class", like="dense"), print)
    assert dense.mask is None
    rows = results(done)
    values = {
        name: found(rows, "class", "omp", name, 1)["metrics"]["ta"]["value"]
        for name in ("retrain", "retrain-again", "retrain-same-mask", "retrain-dense")
    }
    task, split = bench.data("forget", "class")
    for name, model in zip(values, (first, again, kept, dense), strict=True):
        audited = efface.audit(before, model, split)
        assert values[name] == audited["ta"]["value"], name
    assert task is before.task


def test_overlaps_of_masks_follow_from_the_models(done: Path) -> None:
    """The slow twin: intersection over union, entry by entry, of every pair."""
    bench, rows = bench_of(done), results(done)

    def kept(job: Job, make: Any = reference) -> set[tuple[str, int]]:
        mask = make(bench, job, print).mask
        return {(n, i) for n, t in mask.items() for i in t.flatten().nonzero().flatten().tolist()}

    def iou(a: set[Any], b: set[Any]) -> float:
        return len(a & b) / len(a | b)

    for scenario in ("class", "random"):
        base = Job("reference", "omp", 0, scenario=scenario)
        orders = [kept(Job("reference", "omp", 0, scenario=scenario, order=k)) for k in (0, 1)]
        before = kept(base, original)
        other = kept(Job("reference", "omp", 1, scenario=scenario))
        metrics = found(rows, scenario, "omp", "ft", 0)["metrics"]
        says = {k: metrics[k]["value"] for k in metrics if k.startswith("mask")}
        assert says["mask_iou"] == pytest.approx(np.mean([iou(before, o) for o in orders]))
        assert says["mask_iou_before"] == says["mask_iou"]  # fine-tuning leaves the mask alone
        assert says["mask_iou_ceiling"] == pytest.approx(iou(*orders))
        assert says["mask_iou_other_init"] == pytest.approx(iou(before, other))
        trace = says["mask_iou_ceiling"] - says["mask_iou_before"]
        assert says["mask_trace"] == pytest.approx(trace)
        assert 0 < says["mask_iou_chance"] < says["mask_iou_before"]
        assert metrics["mask_iou"]["low"] is None
        again = found(rows, scenario, "omp", "retrain-again", 0)["metrics"]
        assert again["mask_iou"]["value"] == pytest.approx(iou(*orders))  # the other one only
        assert "mask_iou" not in found(rows, scenario, "dense", "ft", 0)["metrics"]
        assert "mask_iou" not in found(rows, scenario, "omp", "retrain-dense", 0)["metrics"]


def test_what_a_row_is_measured_against(done: Path) -> None:
    bench = bench_of(done)
    beside = masks_beside(bench, Job("row", "omp", 0, method="ft", scenario="class"))
    assert [(j.seed, j.order, j.scenario) for j in beside] == [
        (0, 0, "class"),
        (0, 1, "class"),
        (1, 0, "class"),
    ]
    assert masks_beside(bench, Job("row", "dense", 0, method="ft", scenario="class")) == []
    assert masks_beside(bench, Job("trial", "omp", 0, "proxy", "ft", scenario="random")) == []
    one = Bench(TWO, "two", "digits", done, done / "models", seeds=1)
    assert len(masks_beside(one, Job("row", "omp", 0, method="ft", scenario="class"))) == 2


def test_the_cost_of_a_retrained_model_is_that_of_all_its_steps(done: Path) -> None:
    document = results(done)
    for scenario in ("class", "random"):
        whole = found(document, scenario, "omp", "retrain", 0)["cost"]["images"]
        row = found(document, scenario, "omp", "ft", 0)["cost"]["images"]
        task, split = bench_of(done).data("forget", scenario)
        assert row == len(split.retain)
        assert whole == 2 * task.fit.epochs * len(split.retain)  # dense, then under the mask
        assert found(document, scenario, "omp", "ft")["cost"]["mean"] == pytest.approx(1 / 6)
        assert found(document, scenario, "omp", "retrain")["cost"]["mean"] == 1.0
        assert found(document, scenario, "omp", "original")["cost"] is None


def test_a_second_run_makes_nothing_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import efface.recipes.models as models

    before = results(done)
    (sorted((done / "rows").iterdir())[0]).unlink()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was trained again")

    for verb in ("train", "retrain", "prune"):
        monkeypatch.setattr(models.verbs, verb, refuse)
    run_bench(Run(force=True), str(done.parent / "two.toml"), done, jobs=1)

    def plain(document: dict[str, Any]) -> list[Any]:
        return [{k: v for k, v in row.items() if k != "cost"} for row in document["rows"]]

    assert plain(results(done)) == plain(before)


# -- concluding -------------------------------------------------------------------------------


def mask_row(
    method: str, seed: int, after: float, before: float, ceiling: float, **more: Any
) -> dict[str, Any]:
    values = {"mask_iou": after, "mask_iou_before": before, "mask_iou_ceiling": ceiling, **more}
    metrics = {k: {"value": v, "low": None, "high": None, "n": None} for k, v in values.items()}
    return {
        "scenario": "class",
        "model": "omp",
        "method": method,
        "seed": seed,
        "status": "ok",
        "sparsity": 0.9,
        "metrics": metrics,
        "cost": {"wall": 1.0, "images": 10},
    }


def slow_fieller(above: Any, below: Any) -> tuple[float, float]:
    """The definition: all ratios r for which Student's test of above − r·below keeps zero."""
    above, below = np.asarray(above), np.asarray(below)
    most = stats.t.ppf(0.975, len(above) - 1)
    held = []
    for r in np.linspace(0, 1.5, 3001):
        d = above - r * below
        if abs(d.mean()) <= most * d.std(ddof=1) / np.sqrt(len(d)):
            held.append(r)
    return min(held), max(held)


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_of_a_ratio_is_fiellers(seed: int) -> None:
    draw = np.random.default_rng(seed)
    below = 0.2 + 0.05 * draw.standard_normal(8)
    above = 0.6 * below + 0.03 * draw.standard_normal(8)
    value, low, high = ratio_interval(list(above), list(below))
    assert value == pytest.approx(above.mean() / below.mean())
    slow = slow_fieller(above, below)
    assert (low, high) == pytest.approx(slow, abs=1e-3)


def test_a_ratio_to_nothing_has_no_bounds() -> None:
    value, low, high = ratio_interval([0.1, 0.2, 0.3], [0.1, -0.1, 0.05])
    assert np.isfinite(value)
    assert (low, high) == (-np.inf, np.inf)


@pytest.mark.slow
def test_fiellers_interval_covers() -> None:
    draw, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        below = 0.1 + 0.05 * draw.standard_normal(6)
        above = 0.4 * below + 0.03 * draw.standard_normal(6)
        _, low, high = ratio_interval(list(above), list(below))
        hits += low <= 0.4 <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_the_share_of_the_trace_that_is_gone() -> None:
    rows = [mask_row("x", s, 0.5 + 0.01 * s, 0.4, 0.6 + 0.01 * s) for s in range(4)]
    share = trace_removed([row["metrics"] for row in rows])
    assert share is not None
    assert share["value"] == pytest.approx(0.115 / 0.215)
    assert share["low"] < share["value"] < share["high"]
    assert (share["n"], share["reason"]) == (4, None)
    assert trace_removed([{"ua": {"value": 1.0}}]) is None


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([mask_row("x", 0, 0.5, 0.4, 0.6)], "one training seed"),
        ([mask_row("x", s, 0.5, 0.4, 0.4 + (-1) ** s * 0.1) for s in range(4)], "the original"),
        (
            [mask_row("x", s, 0.5, 0.4, 0.6 + s / 100, mask_iou_initial=0.7) for s in range(4)],
            "initial weights",
        ),
    ],
)
def test_where_there_is_no_trace_nothing_is_removed(rows: Any, word: str) -> None:
    share = trace_removed([row["metrics"] for row in rows])
    assert share is not None
    assert share["value"] is None
    assert word in share["reason"]


def test_a_claim_is_tested_in_every_scenario_or_in_one(done: Path) -> None:
    told = [(c["text"], c["scenario"]) for c in results(done)["claims"]]
    assert told == [
        ("FT overlaps less than retraining", "class"),
        ("FT overlaps less than retraining", "random"),
        ("in one only", "class"),
    ]
    rows = [
        {**mask_row(name, s, value, 0.4, 0.6), "scenario": scenario}
        for scenario, gain in (("a", 0.1), ("b", -0.1))
        for name, shift in (("x", 0.0), ("y", gain))
        for s in range(4)
        for value in [0.5 + s / 1000 + shift + s * shift / 100]
    ]
    claim = Claim(text="", metric="mask_iou", less=("omp", "x"), than=("omp", "y"))
    assert [c["verdict"] for c in judge([claim], rows)] == ["holds", "reversed"]


def test_the_summary_of_scenarios_is_apart() -> None:
    rows = [
        {**mask_row(name, s, 0.5 + s / 100, 0.4, 0.6 + s / 100), "scenario": scenario}
        for scenario in ("class", "random")
        for name in ("retrain", "x")
        for s in range(2 if scenario == "class" else 3)
    ]
    entries = summarise(parse(TWO, "two"), rows)
    assert [(e["scenario"], e["method"], e["n"]) for e in entries] == [
        ("class", "retrain", 2),
        ("class", "x", 2),
        ("random", "retrain", 3),
        ("random", "x", 3),
    ]
    assert "gap" not in entries[1]["metrics"]["mask_iou"]


WRONG = {
    "both forms": (TWO.replace("orders = 2", "orders = 2\nforget = {class = 1}"), "scenarios"),
    "unknown scenario": (TWO.replace('scenarios = ["random"]', 'scenarios = ["rndm"]'), "rndm"),
    "unknown within": (TWO.replace("within = {random", "within = {rand"), "rand"),
    "unknown model": (TWO.replace('on = ["omp"]', 'on = ["opm"]', 1), "opm"),
    "claim's scenario": (TWO.replace('scenario = "class"', 'scenario = "random"'), "random"),
    "reserved": (TWO.replace("methods.ascent]", "methods.retrain-dense]"), "retrain-dense"),
    "primary twice": (TWO.replace('["same-mask", "dense"]', '["repruned"]'), "twice"),
    "references of a dense model": (
        TWO.replace('name = "dense"', 'name = "dense"\nreferences = ["same-mask"]', 1),
        "no pruner",
    ),
    "no proxy there": (TWO.replace("proxy = {", "proxi = {"), "proxi"),
    "orders": (TWO.replace("orders = 2", "orders = 0"), "orders"),
    "empty name": (TWO.replace("scenarios.class]", 'scenarios.""]'), "name"),
    "option of an inner method": (
        TWO.replace("search = {lr = [0.01, 0.1]}", 'search = {"inner.lr" = [0.1]}'),
        "inner",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_slip_is_noticed(case: str) -> None:
    text, word = WRONG[case]
    with pytest.raises(InputError, match=word) as caught:
        parse(text, "two")
    assert "\n" not in str(caught.value)


def test_inner_options_can_be_searched() -> None:
    text = TWO.replace('method = "finetune"\nscenarios', 'method = "unprune"\nscenarios')
    text = text.replace(
        "options = {epochs = 1}\nsearch = {lr = [0.01, 0.1]}",
        'options = {inner = {method = "finetune", epochs = 1}}\nsearch = {"inner.lr" = [0.1, 0.2]}',
    )
    method = parse(text, "two").size["digits"].methods["searched"]
    assert method.grid() == [{"inner.lr": 0.1}, {"inner.lr": 0.2}]
    made = method.made("omp", {"inner.lr": 0.2})
    assert (made.inner.lr, made.inner.epochs) == (0.2, 1)


def test_a_network_takes_arguments() -> None:
    task = parse(TWO, "two").size["digits"].task.build()
    assert sum(p.numel() for p in task.network().parameters()) == 64 * 32 + 32 + 320 + 10
    wrong = TWO.replace("[[64, 32, 10]]", '["x", "y", 3]')
    with pytest.raises(InputError, match="network_args"):
        parse(wrong, "two").size["digits"].task.build()


# -- how stable membership inference is -------------------------------------------------------

EVEN = """
title = "Balances"
source = "a test"
about = "Small."
[size.digits]
seeds = 2
balances = [0.2, 0.5, 0.8]
[size.digits.task]
name = "digits"
network = "MLP"
network_args = [[64, 16, 10]]
fit = {epochs = 2, batch_size = 64, lr = 0.1}
[size.digits.scenarios."5 %"]
forget = {random = 0.05}
[size.digits.scenarios."20 %"]
forget = {random = 0.2}
[[size.digits.models]]
name = "dense"
[size.digits.methods.ft]
method = "finetune"
options = {epochs = 1, lr = 0.1}
"""


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bench of three balances."""
    folder = tmp_path_factory.mktemp("even")
    (folder / "even.toml").write_text(EVEN)
    run_bench(Run(), str(folder / "even.toml"), folder / "out", jobs=1)
    return folder / "out"


def test_the_attack_is_fitted_at_every_balance_on_as_many_records(even: Path) -> None:
    document = results(even)
    for row in document["rows"]:
        assert [point["balance"] for point in row["balances"]] == [0.2, 0.5, 0.8]
        assert len({point["records"] for point in row["balances"]}) == 1
        for point in row["balances"]:
            assert max(point["balance"], 1 - point["balance"]) - 0.02 <= point["accuracy"] <= 1
    found = document["stability"]
    assert found["shares"] == {"5 %": 0.05, "20 %": 0.2}
    assert len(found["lines"]) == 3 * 3 * 2  # rows × measures × scenarios
    line = next(x for x in found["lines"] if x["method"] == "ft" and x["measure"] == "accuracy")
    values = [
        point["accuracy"]
        for row in document["rows"]
        if (row["method"], row["scenario"]) == ("ft", line["scenario"])
        for point in row["balances"][:1]
    ]
    assert line["points"][0]["mean"] == pytest.approx(np.mean(values))
    page = (even / "report.html").read_text()
    assert "What moves, and why" in page
    assert "Against the share that is deleted" in page


def test_a_bench_without_balances_says_nothing_of_them(done: Path) -> None:
    assert results(done)["stability"] is None
    assert "What moves, and why" not in (done / "report.html").read_text()


def balanced_row(seed: int, scenario: str, values: list[float]) -> dict[str, Any]:
    points = [
        {"balance": b, "accuracy": v, "mia_efficacy": 1 - b, "auc": 0.5}
        for b, v in zip((0.2, 0.5, 0.8), values, strict=True)
    ]
    named = {"scenario": scenario, "model": "dense", "method": "ft", "seed": seed}
    return {**named, "metrics": {"mia_auc": {"value": seed / 10}}, "balances": points}


def test_ranges_are_of_each_seed() -> None:
    plan = parse(EVEN, "even").size["digits"]
    rows = [
        balanced_row(0, "5 %", [0.8, 0.5, 0.9]),
        balanced_row(0, "20 %", [0.7, 0.5, 0.5]),
        balanced_row(1, "5 %", [0.6, 0.6, 0.6]),
        balanced_row(1, "20 %", [0.6, 0.6, 0.8]),
    ]
    found = stability(plan, rows)
    assert found is not None
    spreads = {entry["measure"]: entry for entry in found["spreads"]}
    # over balances: seed 0 has 0.4 and 0.2, seed 1 has 0 and 0.2
    assert spreads["accuracy"]["balance"]["mean"] == pytest.approx((0.3 + 0.1) / 2)
    # over shares: seed 0 has 0.1, 0, 0.4; seed 1 has 0, 0, 0.2
    assert spreads["accuracy"]["share"]["mean"] == pytest.approx((0.5 / 3 + 0.2 / 3) / 2)
    assert spreads["auc"]["balance"]["mean"] == 0.0
    assert spreads["mia_auc"]["balance"] is None
    assert spreads["mia_auc"]["share"]["mean"] == 0.0
    assert found["facts"]["order"] == pytest.approx(-1.0)
    assert found["facts"]["auc_order"] is None
    assert found["facts"]["efficacy"] == pytest.approx([0.8, 0.2])
    missing = stability(plan, [row for row in rows if row["seed"] == 0 or row["scenario"] == "5 %"])
    assert missing is not None  # seed 1 has one scenario only: its range over shares is unknown
    assert stability(plan.model_copy(update={"balances": ()}), rows) is None


def test_the_words_follow_the_data() -> None:
    plan = parse(EVEN, "even").size["digits"]

    def said(values: list[float], auc: tuple[float, ...]) -> str:
        rows = [balanced_row(s, name, values) for s in (0, 1) for name in plan.cases]
        for row in rows:
            for point, value in zip(row["balances"], auc, strict=True):
                point["auc"] = value
        found = stability(plan, rows)
        assert found is not None
        return " ".join(sentences(found))

    baseline = said([0.8, 0.5, 0.8], (0.50, 0.51, 0.50))
    assert "explains 100.0% of the accuracy's variance" in baseline
    assert "MIA-efficacy follows the balance: 80%" in baseline
    assert "the ranking does not" in baseline
    other = said([0.8, 0.5, 0.8], (0.2, 0.5, 0.9))
    assert "goes with the balance (rank correlation 1.00)" in other
    assert "the ranking moves nearly as much" in other


def test_the_attack_without_a_signal_names_the_larger_side() -> None:
    draw = np.random.default_rng(0)
    inside, outside, forget = draw.random((3, 600))
    for balance in (0.1, 0.5, 0.9):
        found = svc_at_balance(inside, outside, forget, balance, 500, np.random.default_rng(1))
        assert found["accuracy"] == pytest.approx(max(balance, 1 - balance), abs=0.06)
        assert found["auc"] == pytest.approx(0.5, abs=0.12)
    assert svc_at_balance(inside, outside, forget, 0.9, 500, draw)["mia_efficacy"] == 0.0
    assert svc_at_balance(inside, outside, forget, 0.1, 500, draw)["mia_efficacy"] == 1.0
    again = [
        svc_at_balance(inside, outside, forget, 0.5, 500, np.random.default_rng(2)) for _ in "ab"
    ]
    assert again[0] == again[1]
    with pytest.raises(ValueError, match="do not give"):
        svc_at_balance(inside[:10], outside, forget, 0.5, 500, draw)
