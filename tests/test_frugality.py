"""How little of D_r is enough: families by fraction, one search for all, pooled results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import efface
from efface.auditing import Subject
from efface.console import Run
from efface.errors import InputError
from efface.recipes import recipe as recipes
from efface.recipes.bench import run_bench
from efface.recipes.frugality import frugality, shown, worst_class
from efface.recipes.models import Bench
from efface.recipes.plan import Size
from efface.recipes.probe import Spent
from efface.recipes.recipe import Claim, parse
from efface.recipes.stages import Stages
from efface.recipes.summary import Table, judge
from efface.report import bench_page
from efface.report.bench_frugality import frugality_section, over_fraction, over_time, styles
from efface.unlearn import FineTune, Frugal

MINI = """
title = "Mini"
source = "a test"
about = "Small."
[[claims]]
text = "l1 keeps 90 points more"
metric = "ra"
less = ["dense", "ft@13"]
than = ["dense", "l1@13"]
by = 0.9
pooled = true
[[claims]]
text = "l1 takes less than all of it"
metric = "seconds"
less = ["dense", "l1@13"]
than = ["dense", "ft@100"]
times = 5.0
pooled = true
[size.digits]
seeds = 2
pooled = true
subject = "l1"
shared_search = true
search_seed = 7
per_class = true
probed = ["ft@13"]
[[size.digits.models]]
name = "dense"
[size.digits.task]
name = "digits"
network = "MLP"
network_args = [[64, 32, 10]]
fit = {epochs = 4, batch_size = 32, lr = 0.1}
[size.digits.scenarios."class 4"]
forget = {class = 4}
[size.digits.scenarios."class 8"]
forget = {class = 8}
proxy = {class = 2}
[size.digits.methods.ft]
method = "finetune"
options = {epochs = 2}
search = {lr = [0.01, 0.1]}
fractions = [0.13, 0.02, 1.0]
[size.digits.methods.l1]
method = "l1-sparse"
options = {epochs = 2, lr = 0.1}
fractions = [0.13, 1.0]
[size.digits.methods.ga]
method = "gradient-ascent"
options = {epochs = 1, lr = 1e-2}
"""
PERCENT = (2, 13, 100)


def size(text: str = MINI) -> Size:
    return parse(text, "mini").size["digits"]


def stages(text: str = MINI, folder: Path = Path("out")) -> Stages:
    bench = Bench(text, "mini", "digits", folder, folder / "models", device="cpu")
    return Stages(Run(), bench, bench.plan, 1, Spent(folder / "seconds.json"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bench of the mini recipe."""
    folder = tmp_path_factory.mktemp("frugality")
    (folder / "mini.toml").write_text(MINI)
    run_bench(Run(), str(folder / "mini.toml"), folder / "out", jobs=1)
    return folder


def results(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return value


# -- families ----------------------------------------------------------------------------------


def test_a_method_with_fractions_is_a_family() -> None:
    plan = size()
    assert list(plan.methods) == ["ft@13", "ft@2", "ft@100", "l1@13", "l1@100", "ga"]
    assert [plan.family(name) for name in plan.methods] == ["ft"] * 3 + ["l1"] * 2 + ["ga"]
    assert plan.members("ft") == ["ft@13", "ft@2", "ft@100"]
    assert plan.family("retrain") == "retrain"
    made = plan.methods["ft@2"].made("dense", {"lr": 0.03}, "class 4")
    assert made == Frugal(FineTune(epochs=2, lr=0.03), 0.02)
    assert plan.methods["ga"].made("dense", {}).name == "gradient-ascent"


def test_a_single_fraction_keeps_the_name() -> None:
    plan = size(MINI.replace("fractions = [0.13, 1.0]", "fraction = 0.5").replace("l1@13", "l1"))
    assert plan.family("l1") == "l1"
    assert plan.methods["l1"].made("dense", {}).fraction == 0.5


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("fractions = [0.13, 1.0]", "fractions = [0.0]", r"fraction must be in \(0, 1\], not 0.0"),
        ("fractions = [0.13, 1.0]", "fractions = [1.5]", r"fraction must be in \(0, 1\], not 1.5"),
        ("fractions = [0.13, 1.0]", "fractions = [0.1]\nfraction = 0.1", "give one of"),
        ('subject = "l1"', 'subject = "l2"', "subject speaks of a method 'l2'"),
        ('subject = "l1"', 'subject = "l1@13"', "subject speaks of a method 'l1@13'"),
        ('probed = ["ft@13"]', 'probed = ["ft"]', "probed speaks of a method 'ft'"),
        ("proxy = {class = 2}", "", "search values, but there is no proxy"),
        ("shared_search = true", "", "search values, but there is no proxy"),
        (
            'name = "dense"',
            'name = "dense"\nscenarios = ["class 4", "class 8"]',
            "models that take part in all scenarios",
        ),
        (
            "pooled = true\n[[claims]]",
            'pooled = true\nscenario = "class 4"\n[[claims]]',
            "name none",
        ),
        ("times = 5.0", "times = 0.0", "greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(old: str, new: str, sentence: str) -> None:
    assert old in MINI
    with pytest.raises(InputError, match=sentence):
        parse(MINI.replace(old, new, 1), "mini")


# -- one search for all ------------------------------------------------------------------------


def test_values_are_looked_for_once() -> None:
    found = {(j.scenario, j.method, j.seed, j.which) for j in stages().trials()}
    assert found == {("class 8", "ft@13", 7, "proxy")}
    assert [j.options for j in stages().trials()] == [{"lr": 0.01}, {"lr": 0.1}]


def test_the_member_next_to_the_fraction_is_taken() -> None:
    plan = size(MINI.replace("shared_search", "search_fraction = 0.04\nshared_search"))
    assert plan.searched_at("ft@100", "class 4") == ("class 8", "ft@2")


def test_every_row_of_the_family_takes_what_was_chosen() -> None:
    chosen = {("class 8", "dense", "ft@13"): {"lr": 0.5}}
    rows = list(stages().rows(chosen))
    mine = [j for j in rows if j.method.startswith("ft@")]
    assert len(mine) == 3 * 2 * 2
    assert {j.seed for j in mine} == {0, 1}
    assert all(j.options == {"lr": 0.5} for j in mine)
    assert all(j.options == {} for j in rows if j not in mine)


def test_the_models_of_the_search_are_made_for_its_seed_alone() -> None:
    made = [job for stage in stages().models() for job in stage]
    assert {(j.kind, j.seed) for j in made if j.which == "proxy"} == {
        ("original", 7),
        ("reference", 7),
    }
    assert {j.seed for j in made if j.which == "forget"} == {0, 1}
    assert sum(j.kind == "original" for j in made) == 3


def test_without_sharing_each_member_searches_in_each_scenario() -> None:
    text = MINI.replace("shared_search = true\nsearch_seed = 7\n", "")
    text = text.replace("forget = {class = 4}", "forget = {class = 4}\nproxy = {class = 1}")
    found = [(j.scenario, j.method, j.seed) for j in stages(text).trials()]
    assert sorted(set(found)) == sorted(
        (f"class {c}", f"ft@{p}", 0) for c, p in product((4, 8), PERCENT)
    )


# -- pooled ------------------------------------------------------------------------------------


def row(scenario: str, method: str, seed: int, wall: float = 1.0, **metrics: float) -> Any:
    values = {k: {"value": v, "low": None, "high": None, "n": 10} for k, v in metrics.items()}
    return {
        "scenario": scenario,
        "model": "dense",
        "method": method,
        "seed": seed,
        "status": "ok",
        "sparsity": 0.0,
        "metrics": values,
        "cost": {"wall": wall, "images": 1},
    }


def some_rows(names: Sequence[str], seed: int = 0, lift: Mapping[str, float] | None = None) -> Any:
    """Rows of three seeds and two scenarios with random metrics."""
    draw = np.random.default_rng(seed)
    return [
        row(
            scenario,
            name,
            s,
            wall=float(draw.uniform(1, 2)),
            ra=float(draw.uniform(0.4, 0.5) + (lift or {}).get(name, 0.0)),
            ua=float(draw.uniform(0.9, 1.0)),
            ta=float(draw.uniform()),
            mia_auc=float(draw.uniform()),
        )
        for name, scenario, s in product(names, ("class 4", "class 8"), range(3))
    ]


NAMES = ["original", "retrain", "ft@13", "ft@2", "ft@100", "l1@13", "l1@100", "ga"]


def slow_pooled(rows: Any, name: str, metric: str) -> dict[int, float]:
    found = {}
    for s in range(3):
        mine = [r for r in rows if r["method"] == name and r["seed"] == s and r["status"] == "ok"]
        if len(mine) == 2:
            values = [
                r["cost"]["wall"] if metric == "seconds" else r["metrics"][metric]["value"]
                for r in mine
            ]
            found[s] = sum(values) / 2
    return found


def test_a_seed_counts_once_with_its_mean_over_scenarios() -> None:
    rows = some_rows(NAMES)
    table = Table(rows)
    for name, metric in product(NAMES, ("ra", "ua", "ta", "seconds")):
        assert table.pooled("dense", name, metric) == pytest.approx(slow_pooled(rows, name, metric))


def test_a_seed_that_lacks_a_scenario_is_left_out() -> None:
    rows = some_rows(["ft@13"])
    rows[4]["status"] = "diverged"
    table = Table(rows)
    assert table.pooled("dense", "ft@13", "ra") == pytest.approx(slow_pooled(rows, "ft@13", "ra"))
    assert set(table.pooled("dense", "ft@13", "ra")) == {0, 2}
    assert table.pooled("dense", "nobody", "ra") == {}


@pytest.mark.parametrize("by", [0.0, 0.4, -0.05])
@pytest.mark.parametrize("times", [1.0, 0.12])
def test_a_pooled_claim_is_tested_on_means_over_scenarios(by: float, times: float) -> None:
    rows = some_rows(NAMES)
    claim = Claim(
        text="",
        metric="ra",
        less=("dense", "ft@13"),
        than=("dense", "l1@13"),
        pooled=True,
        by=by,
        times=times,
    )
    (found,) = judge([claim], rows)
    a, b = slow_pooled(rows, "ft@13", "ra"), slow_pooled(rows, "l1@13", "ra")
    apart = [a[s] - times * b[s] + by for s in range(3)]
    half = stats.t.ppf(0.975, 2) * np.std(apart, ddof=1) / np.sqrt(3)
    assert found["difference"]["mean"] == pytest.approx(np.mean(apart))
    assert found["difference"]["low"] == pytest.approx(np.mean(apart) - half)
    word = (
        "reversed" if np.mean(apart) > half else "holds" if np.mean(apart) < -half else "not shown"
    )
    assert found["verdict"] == word
    assert found["scenario"] == ""
    assert found["pooled"] is True
    assert found.get("by", 0.0) == by
    assert found.get("times", 1.0) == times


def test_an_ordinary_claim_says_what_it_said() -> None:
    claim = Claim(text="", metric="ra", less=("dense", "ft@13"), than=("dense", "ga"))
    found = judge([claim], some_rows(NAMES))
    assert [one["scenario"] for one in found] == ["class 4", "class 8"]
    keys = {"text", "scenario", "metric", "less", "than", "difference", "verdict"}
    assert all(set(one) == keys for one in found)


# -- the best of the others --------------------------------------------------------------------


def test_lines_and_what_is_enough() -> None:
    rows = some_rows(NAMES, lift={"ft@13": 0.3, "ft@100": 0.4, "original": 0.3})
    found = frugality(size(), Table(rows))
    assert found is not None
    lines = {line["family"]: line for line in found["lines"]}
    assert list(lines) == ["original", "retrain", "ft", "l1", "ga"]
    assert [p["fraction"] for p in lines["ft"]["points"]] == [0.02, 0.13, 1.0]
    assert [p["fraction"] for p in lines["ga"]["points"]] == [None]
    assert lines["ft"]["enough"] == 0.13
    assert lines["l1"]["enough"] is None
    point = lines["ft"]["points"][1]
    values = list(slow_pooled(rows, "ft@13", "ra").values())
    assert point["ra"]["mean"] == pytest.approx(np.mean(values))
    assert point["ra"]["std"] == pytest.approx(np.std(values, ddof=1))
    mine, full = (slow_pooled(rows, n, "seconds") for n in ("ft@13", "retrain"))
    ratio = np.mean([mine[s] / full[s] for s in range(3)])
    assert point["seconds_ratio"]["mean"] == pytest.approx(ratio)
    assert found["shown"] == ["original", "retrain", "ft@13", "l1@13", "ga"]


def test_the_best_of_the_others_by_ra_and_among_those_that_forgot() -> None:
    rows = some_rows(NAMES, lift={"ft@13": 0.3, "ga": 0.2, "l1@13": 0.45, "l1@100": 0.5})
    for one in rows:
        one["metrics"]["ua"]["value"] = 0.5 if one["method"] == "ft@13" else 0.97
    found = frugality(size(), Table(rows))
    assert found is not None
    best = {(e["fraction"], e["of"]): e for e in found["best"]}
    assert {key: e["name"] for key, e in best.items()} == {
        (0.13, "all"): "ft@13",
        (0.13, "forgotten"): "ga",
        (1.0, "all"): "ga",
        (1.0, "forgotten"): "ga",
    }
    entry = best[0.13, "forgotten"]
    mine, theirs = (slow_pooled(rows, n, "ra") for n in ("l1@13", "ga"))
    assert entry["difference"]["mean"] == pytest.approx(
        np.mean([mine[s] - theirs[s] for s in range(3)])
    )
    assert entry["relative"]["mean"] == pytest.approx(
        np.mean([mine[s] / theirs[s] - 1 for s in range(3)])
    )
    assert entry["claims"]["time"] == "reversed"


def test_forty_points_more_hold() -> None:
    rows = some_rows(["original", "retrain", "ft@13", "l1@13"], lift={"l1@13": 0.5})
    for one in rows:
        one["cost"]["wall"] = 0.01 if one["method"] == "l1@13" else one["cost"]["wall"]
    found = frugality(size(), Table(rows))
    assert found is not None
    (entry, _) = found["best"]
    assert entry["claims"] == {"points": "holds", "relative": "holds", "time": "holds"}
    assert (
        "40 points more (held), or 40 % more (held), in 0.12 × the time (held)"
        in (frugality_section({"frugality": found}) or {})["best"][0]
    )


def test_other_settings_of_the_subject_are_no_competitors() -> None:
    text = MINI + '[size.digits.methods.l1-hard]\nmethod = "l1-sparse"\nfractions = [0.13]\n'
    rows = some_rows([*NAMES, "l1-hard@13"], lift={"l1-hard@13": 0.5})
    found = frugality(size(text), Table(rows))
    assert found is not None
    assert "l1-hard@13" not in {e["name"] for e in found["best"]}


def test_without_pooling_there_is_nothing() -> None:
    assert frugality(size(MINI.replace("[size.digits]\nseeds = 2\npooled = true", "[size.digits]")),
                     Table(some_rows(NAMES))) is None  # fmt: skip


def test_tables_show_the_member_next_to_the_fraction() -> None:
    plan = size(MINI.replace("shared_search", "search_fraction = 0.6\nshared_search"))
    assert shown(plan, NAMES) == ["original", "retrain", "ft@100", "l1@100", "ga"]


# -- a row -------------------------------------------------------------------------------------


def test_the_class_that_fares_worst(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    found = worst_class(Subject(trained, trained, class_split, device=torch.device("cpu")))
    targets = trained.task.records.targets
    trained.network.eval()
    shares = {}
    for c in (0, 2):
        mine = [i for i in class_split.retain.tolist() if targets[i] == c]
        right = sum(
            int(trained.network(trained.task.records.inputs[i : i + 1]).argmax()) == c  # type: ignore[union-attr]
            for i in mine
        )
        shares[c] = right / len(mine)
    worst = min(shares, key=shares.__getitem__)
    assert found["class"] == worst
    assert found["value"] == pytest.approx(shares[worst])
    assert found["n"] == 40
    assert found["low"] <= found["value"] <= found["high"]


# -- end to end --------------------------------------------------------------------------------


def test_rows_hold_what_was_asked_for(done: Path) -> None:
    document = results(done)
    assert len(document["rows"]) == 2 * 2 * 8
    probed = set()
    for one in document["rows"]:
        assert one["status"] == "ok"
        assert one["metrics"]["ra_worst"]["value"] <= one["metrics"]["ra"]["value"]
        assert "mia_efficacy" not in one["metrics"]
        after = {"linear_probe", "relearn_retain"} & set(one["metrics"])
        probed |= {one["method"]} if len(after) == 2 else set()
        assert len(after) in (0, 2)
    assert probed == {"original", "retrain", "ft@13"}


def test_every_family_is_given_the_same_records(done: Path) -> None:
    """Images that were trained on: twice the part, which is 13 % of D_r."""
    rows = results(done)["rows"]
    for scenario, seed in product(("class 4", "class 8"), (0, 1)):
        found = {
            r["method"]: r["cost"]["images"]
            for r in rows
            if (r["scenario"], r["seed"]) == (scenario, seed)
        }
        assert found["ft@13"] == found["l1@13"] == 2 * round(0.13 * found["ft@100"] / 2)
        assert found["ft@2"] == 2 * round(0.02 * found["ft@100"] / 2)


def test_the_document_has_pooled_lines_and_claims(done: Path) -> None:
    document = results(done)
    found = document["frugality"]
    assert found["fraction"] == 0.13
    ft = next(line for line in found["lines"] if line["family"] == "ft")
    assert [p["name"] for p in ft["points"]] == ["ft@2", "ft@13", "ft@100"]
    assert {"ra", "ua", "ta", "gap_a", "seconds", "ra_worst"} <= set(ft["points"][0])
    assert "linear_probe" in ft["points"][1]
    assert {(c["verdict"], c["pooled"]) for c in document["claims"]} <= {
        (word, True) for word in ("holds", "reversed", "not shown")
    }
    (search,) = document["search"]
    assert (search["scenario"], search["method"]) == ("class 8", "ft@13")
    lrs = {r["options"].get("lr") for r in document["rows"] if r["method"].startswith("ft@")}
    assert lrs == {search["chosen"]["lr"]}


def test_the_same_bench_gives_the_same_numbers(done: Path, tmp_path: Path) -> None:
    run_bench(Run(), str(done / "mini.toml"), tmp_path / "out", jobs=1)
    first, again = (
        [{k: r[k] for k in ("scenario", "method", "seed", "metrics")} for r in results(at)["rows"]]
        for at in (done, tmp_path)
    )
    assert first == again


# -- the page ----------------------------------------------------------------------------------


def test_the_page_shows_pooled_results(done: Path) -> None:
    page = (done / "out" / "report.html").read_text()
    assert len(bench_page(results(done))) == len(page)  # but for the order of keys
    for title in ("All scenarios together", "RA against the fraction of D_r",
                  "UA against the fraction of D_r", "RA against time",
                  "Beside the best of the others", "Every scenario by itself"):  # fmt: skip
        assert title in page
    assert "Scenario: class 4" not in page
    assert "less by 90.0" in page
    assert "less than 5 × the other" in page
    assert len(re.findall(r"<svg", page)) == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_one_fraction_needs_no_curves(done: Path) -> None:
    document = results(done)
    for line in document["frugality"]["lines"]:
        line["points"] = line["points"][:1]
    found = frugality_section(document)
    assert found is not None
    assert [figure["title"] for figure in found["figures"]] == ["Gap-A of every method"]


def test_a_bench_without_it_has_no_such_section() -> None:
    assert frugality_section({"frugality": None}) is None
    assert frugality_section({}) is None


def twelve() -> list[dict[str, Any]]:
    families = ["original", "retrain", "dfmu", "ft", *(f"m{i}" for i in range(10))]
    methods = {"ft": "finetune", "dfmu": "dfmu"}
    return [
        {
            "family": name,
            "method": methods.get(name, name),
            "points": [
                {
                    "name": name,
                    "fraction": f if i > 1 else None,
                    "ra": {"mean": 0.5 + 0.03 * i, "low": 0.4, "high": None if i == 3 else 1.2},
                    "seconds": {"mean": (1 + i) * f, "low": None, "high": None},
                }
                for f in ((0.01, 1.0) if i > 1 else (1.0,))
            ],
        }
        for i, name in enumerate(families)
    ]


def test_twelve_lines_look_different() -> None:
    lines = [line for line in twelve() if line["family"] not in ("original", "retrain")]
    made = styles(lines, "dfmu")
    looks = {(s["color"], s["marker"], str(s.get("ls", "-"))) for s in made.values()}
    assert len(looks) == len(made) == 12
    thick = sorted(made, key=lambda name: -made[name]["lw"])
    assert thick[:2] == ["dfmu", "ft"]


@pytest.mark.parametrize("kind", ["fraction", "time"])
def test_plots_name_every_line_and_repeat(kind: str) -> None:
    lines = twelve()
    for line in lines:
        for point in line["points"]:
            point["ra"]["high"] = None if point["ra"]["high"] is None else 1.2
            point["ra"]["low"] = None if point["ra"]["high"] is None else 0.4
    drawn = styles(
        [line for line in lines if line["family"] not in ("original", "retrain")], "dfmu"
    )
    made = [
        over_fraction(lines, drawn, "ra", "x")
        if kind == "fraction"
        else over_time(lines, drawn, "x")
        for _ in range(2)
    ]
    assert made[0] == made[1]
    for name in drawn:
        assert f">{name}<" in made[0]
    assert "nan" not in made[0].lower()


# -- the recipes that come along ---------------------------------------------------------------


def test_the_recipe_asks_for_every_fraction() -> None:
    _, recipe = recipes.source("dfmu2026")
    wanted = {f"@{p}" for p in (1, 2, 5, 13, 25, 50, 100)}
    for name, classes, seeds in (("digits", 10, 5), ("cifar10-small", 3, 3)):
        plan = recipe.size[name]
        assert len(plan.cases) == classes
        assert plan.seeds >= seeds
        assert plan.search_seed not in range(plan.seeds)
        families = {plan.family(m) for m in plan.methods}
        assert {"dfmu", "ft", "l1", "ssd", "salun", "scrub", "neggrad-plus", "scratch"} <= families
        for family in families - {"boundary-shrink", "boundary-expand"}:
            members = plan.members(family)
            left = {"@50"} if name == "cifar10-small" else set()  # for time
            left |= {"@100"} if left and family == "scratch" else set()
            assert {m.removeprefix(family) for m in members} == wanted - left
            assert len({str(plan.methods[m].options) for m in members}) == 1
    assert all(claim.pooled for claim in recipe.claims)


def test_the_ablation_changes_one_option_at_a_time() -> None:
    _, recipe = recipes.source("dfmu-ablation")
    plan = recipe.size["digits"]
    base = plan.methods["dfmu"]
    for name, method in plan.methods.items():
        options = {k: v for k, v in method.options.items() if k != "inner"}
        if method.method == base.method and name != "dfmu-raw":
            assert len(options) == (name != "dfmu")
    assert all(claim.pooled for claim in recipe.claims)


def test_a_few_rows_of_the_recipe_run(tmp_path: Path) -> None:
    run_bench(Run(), "dfmu2026", tmp_path / "out", size="digits-ci", jobs=1)
    document = results(tmp_path)
    assert [row["sentence"] for row in document["rows"] if row["status"] != "ok"] == []
    assert {e["name"] for e in document["frugality"]["best"]} <= {
        "ft@13", "ft@100", "boundary-shrink"}  # fmt: skip
    assert document["claims"]
