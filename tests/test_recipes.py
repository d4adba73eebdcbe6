"""Recipes and ``efface bench``: what is read, what is run, what is kept, what is concluded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import efface
from efface.console import Run
from efface.errors import InputError, OutputError
from efface.recipes import recipe as recipes
from efface.recipes.bench import run_bench, with_seeds
from efface.recipes.jobs import gap
from efface.recipes.models import Bench, Job, original_key, reference_key
from efface.recipes.probe import Spent
from efface.recipes.recipe import Claim, parse
from efface.recipes.spread import spread
from efface.recipes.stages import at_edge
from efface.recipes.store import TRAINING, Store, code_digest
from efface.recipes.summary import curves, judge, summarise
from efface.recipes.transfer import downstream, least_useful, probe, restricted

from .test_cli import efface as command

MINI = """
title = "Mini"
source = "a test"
about = "Small."
[[claims]]
text = "l1-sparse is nearer than FT"
metric = "average_gap"
less = ["dense", "l1-sparse"]
than = ["dense", "ft"]
[paper.dense.retrain]
ua = [100.0, 0.0]
[paper.dense.ft]
ua = [22.5, 8.2]
average_gap = 25.8
[size.digits]
seeds = 2
rewind = 1
[[size.digits.models]]
name = "dense"
[[size.digits.models]]
name = "omp"
like = "same-mask"
sparsities = [0.8]
pruner = {method = "omp", scope = "conv"}
[size.digits.task]
name = "digits"
fit = {epochs = 3, batch_size = 64, lr = 0.1}
[size.digits.forget]
class = 3
[size.digits.proxy]
class = 5
[size.digits.methods.ft]
method = "finetune"
options = {epochs = 1}
search = {lr = [0.01, 0.1]}
[size.digits.methods.l1-sparse]
method = "l1-sparse"
options = {epochs = 1, lr = 0.1, alpha = 1e-2}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bench of the mini recipe."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "mini.toml").write_text(MINI)
    run_bench(Run(), str(folder / "mini.toml"), folder / "out", jobs=1)
    return folder


def results(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return value


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names())
def test_the_recipes_that_come_along_can_be_read(name: str) -> None:
    _, recipe = recipes.source(name)
    assert recipe.name == name
    assert recipe.size
    whole = []
    for size in recipe.size.values():
        models = [model.name for model in size.models]
        assert len(set(models)) == len(models)
        rows = {
            (model.name, method)
            for scenario in size.cases
            for model in size.models_in(scenario)
            for method in size.methods_of(model, scenario)
        }
        whole.append(all({claim.less, claim.than} <= rows for claim in recipe.claims))
    assert any(whole)
    for model in recipe.paper:
        assert any(model in [m.name for m in size.models] for size in recipe.size.values())


def test_the_papers_recipes_have_the_sizes_that_are_promised() -> None:
    for name in ("jia2023-classwise", "jia2023-random10"):
        _, recipe = recipes.source(name)
        assert list(recipe.size) == ["digits", "cifar10-small", "cifar10-full"]
        assert recipe.size["digits"].seeds >= 10
        assert recipe.size["cifar10-small"].seeds >= 3
        for size in recipe.size.values():
            wanted = {"finetune", "gradient-ascent", "fisher-forgetting", "influence", "l1-sparse"}
            assert wanted <= {method.method for method in size.methods.values()}
    _, classwise = recipes.source("jia2023-classwise")
    assert classwise.size["cifar10-small"].seeds_of("ft") == 5


def test_published_average_gaps_follow_from_the_published_values() -> None:
    """The paper's own arithmetic; one cell of its table (IU, random, sparse) is off by rounding."""
    for name in ("jia2023-classwise", "jia2023-random10"):
        _, recipe = recipes.source(name)
        for model, methods in recipe.paper.items():
            base: Any = methods["retrain"]
            for method, cells in methods.items():
                if "average_gap" not in cells:
                    continue
                apart = [
                    abs(cells[k][0] - base[k][0])  # type: ignore[index]
                    for k in ("ua", "mia_efficacy", "ra", "ta")
                ]
                known = (name, model, method) == ("jia2023-random10", "omp-95", "iu-jia")
                assert np.mean(apart) == pytest.approx(
                    cells["average_gap"], abs=0.05 if known else 0.0151
                )


WRONG = {
    "unknown key": (MINI.replace("rewind = 1", "rewindd = 1"), "rewindd"),
    "unknown option": (MINI.replace("options = {epochs = 1}", "options = {epoch = 1}"), "epoch"),
    "unknown method": (MINI.replace('method = "finetune"', 'method = "fine"'), "fine"),
    "unknown pruner": (MINI.replace('method = "omp", ', 'method = "opm", '), "opm"),
    "no proxy": (MINI.replace("[size.digits.proxy]\nclass = 5\n", ""), "proxy"),
    "proxy is the forget set": (MINI.replace("class = 5", "class = 3"), "proxy"),
    "two selections": (MINI.replace("class = 5", "class = 5\nrandom = 0.1"), "exactly one"),
    "no TOML": ("title = ", "TOML"),
    "no size": ('title = "x"\nsource = ""\nabout = ""\n', "size"),
    "sparsity": (MINI.replace("sparsities = [0.8]", "sparsities = [1.0]"), "sparsity"),
    "seeds": (MINI.replace("seeds = 2", "seeds = 0"), "seeds"),
    "option out of range": (MINI.replace("alpha = 1e-2", "alpha = -1"), "alpha"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_refused_in_one_sentence(case: str) -> None:
    text, word = WRONG[case]
    with pytest.raises(InputError, match=word) as caught:
        parse(text, "mini")
    assert str(caught.value).count("\n") == 0
    assert str(caught.value)[-1] in ".?"


def test_what_is_wrong_with_the_command_is_said_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, options, word in (
        ("jia2023-classwize", {}, "did you mean 'jia2023-classwise'"),
        ("jia2023-classwise", {"size": "digit"}, "did you mean 'digits'"),
        ("jia2023-classwise", {"seeds": 0}, "--seeds"),
        (str(tmp_path / "absent.toml"), {}, "cannot be read"),
    ):
        with pytest.raises(InputError, match=word):
            run_bench(Run(), name, out, **options)  # type: ignore[arg-type]
        assert not out.exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="other files"):
        run_bench(Run(), "jia2023-classwise", tmp_path, size="digits")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_of_another_recipe_is_left_alone(done: Path) -> None:
    before = sorted((done / "out").rglob("*"))
    with pytest.raises(OutputError, match="another folder"):
        run_bench(Run(force=True), "jia2023-classwise", done / "out", size="digits")
    assert sorted((done / "out").rglob("*")) == before


# -- running ----------------------------------------------------------------------------------


def test_there_is_a_row_for_every_model_method_and_seed(done: Path) -> None:
    found = results(done)
    assert found["schema"] == "efface.bench/1"
    rows = {(r["model"], r["method"], r["seed"]) for r in found["rows"]}
    methods = ("original", "retrain", "ft", "l1-sparse")
    assert rows == {(m, n, s) for m in ("dense", "omp-80") for n in methods for s in (0, 1)}
    assert len(found["rows"]) == len(rows)
    for row in found["rows"]:
        assert {"ua", "ra", "ta", "mia_efficacy", "mia_auc"} <= row["metrics"].keys()
        assert row["sparsity"] == pytest.approx(0.8 if row["model"] == "omp-80" else 0.0, abs=1e-3)
        if row["method"] == "retrain":
            assert row["metrics"]["ua"]["value"] == 1.0


def test_nothing_is_told_of_the_machine(done: Path) -> None:
    assert results(done)["command"] == "efface bench mini.toml --size digits --out mini-digits"
    for name in ("results.json", "report.html"):
        assert str(done) not in (done / "out" / name).read_text()


def test_a_row_says_what_the_verbs_say(done: Path) -> None:
    """The slow twin: the same request made by hand."""
    task = recipes.parse(MINI, "mini").size["digits"].task.build()
    split = efface.Split.by_class(task, 3)
    found = results(done)
    chosen = next(
        s["chosen"] for s in found["search"] if (s["model"], s["method"]) == ("dense", "ft")
    )
    before = efface.train(task, seed=1, rewind=1)
    after = efface.forget(before, split, efface.unlearn.FineTune(epochs=1, **chosen), seed=1)
    reference = efface.retrain(task, split, seed=1)
    result = efface.audit(before, after, split, [reference])
    row = next(
        r for r in found["rows"] if (r["model"], r["method"], r["seed"]) == ("dense", "ft", 1)
    )
    theirs = next(
        r for r in found["rows"] if (r["model"], r["method"], r["seed"]) == ("dense", "retrain", 1)
    )
    for name in ("ua", "ra", "ta", "mia_efficacy", "mia_auc"):
        assert row["metrics"][name]["value"] == result[name]["value"]
        assert theirs["metrics"][name]["value"] == result[name]["reference"]
    assert gap(row["metrics"], theirs["metrics"]) == pytest.approx(result.average_gap)
    assert gap(row["metrics"], theirs["metrics"], "gap_a") == pytest.approx(result.gap_a)


def test_the_search_sees_the_proxy_only(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(done)
    assert {(s["model"], s["method"]) for s in found["search"]} == {
        ("dense", "ft"),
        ("omp-80", "ft"),
    }
    for entry in found["search"]:
        best = min(entry["tried"], key=lambda t: t["gap"])
        assert entry["chosen"] == best["options"]
        rows = [
            r
            for r in found["rows"]
            if (r["model"], r["method"]) == (entry["model"], entry["method"])
        ]
        assert all(r["options"] == entry["chosen"] for r in rows)
    bench = Bench(MINI, "mini", "digits", done / "out", done / "out" / "models")
    trial = Job("trial", "dense", 0, "proxy", "ft", {"lr": 0.1})
    assert bench.data(trial.which)[1].label == 5
    assert reference_key(bench, trial) != reference_key(bench, Job("row", "dense", 0))


def test_a_choice_at_the_edge_of_its_grid_is_pointed_out() -> None:
    assert at_edge({"lr": (0.1, 0.2, 0.3)}, {"lr": 0.2}) == []
    assert at_edge({"lr": (0.3, 0.2, 0.1)}, {"lr": 0.1}) == ["lr"]
    assert at_edge({"lr": (0.1, 0.2)}, {"lr": 0.1}) == []  # two values have nothing but edges


def test_a_second_run_does_nothing_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import efface.recipes.jobs as jobs

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was made again")

    for verb in ("train", "retrain", "prune", "forget"):
        monkeypatch.setattr(jobs.verbs, verb, refuse)
    before = results(done)
    run_bench(Run(force=True), str(done / "mini.toml"), done / "out", jobs=1)
    after = results(done)
    assert before["rows"] == after["rows"]
    assert before["summary"] == after["summary"]


def test_a_damaged_model_is_made_again_and_that_is_said(tmp_path: Path, done: Path) -> None:
    bench = Bench(MINI, "mini", "digits", done / "out", done / "out" / "models")
    key = original_key(bench, Job("original", "dense", 0))
    good = (done / "out" / "models" / f"{Store(tmp_path, print).path(key).name}").read_bytes()
    said: list[str] = []
    store = Store(tmp_path, said.append)
    broken = bytearray(good)
    broken[-5] ^= 1
    store.path(key).write_bytes(bytes(broken))
    task, _ = bench.data("forget")
    again = store.get(key, task, lambda j: efface.train(task, seed=0, rewind=1, journal=j))
    assert len(said) == 1
    assert "damaged" in said[0]
    assert store.get(key, task, lambda j: pytest.fail("it is whole now")).digest == again.digest
    assert len(said) == 1


def test_the_key_of_a_model_changes_with_what_it_depends_on() -> None:
    def key(text: str, seed: int = 0, kind: Any = "original", model: str = "dense") -> Any:
        bench = Bench(text, "mini", "digits", Path("out"), Path("models"))
        make = original_key if kind == "original" else reference_key
        return make(bench, Job(kind, model, seed))

    base = key(MINI)
    assert key(MINI) == base
    assert key(MINI, seed=1) != base
    assert (
        key(MINI.replace("lr = 0.1}\n[size.digits.forget]", "lr = 0.2}\n[size.digits.forget]"))
        != base
    )
    assert key(MINI, model="omp-80") != base
    assert key(MINI, kind="reference") != key(
        MINI.replace("class = 3", "class = 4"), kind="reference"
    )
    assert key(MINI.replace("class = 3", "class = 4")) == base
    assert len(code_digest(TRAINING)) == 16
    assert code_digest(TRAINING) != code_digest(())


def test_the_number_of_seeds_can_be_changed() -> None:
    _, recipe = recipes.source("jia2023-classwise")
    plan = with_seeds(recipe.size["cifar10-small"], 2)
    assert plan.seeds == 2
    assert plan.most_seeds() == 2
    assert recipe.size["cifar10-small"].most_seeds() == 5


def test_what_diverges_is_a_row_that_says_so(tmp_path: Path) -> None:
    text = MINI.replace(
        "options = {epochs = 1}\nsearch = {lr = [0.01, 0.1]}", "options = {epochs = 1, lr = 1e12}"
    )
    text = text.replace("[size.digits.proxy]\nclass = 5\n", "").replace("seeds = 2", "seeds = 1")
    (tmp_path / "mini.toml").write_text(text)
    run_bench(Run(), str(tmp_path / "mini.toml"), tmp_path / "out", jobs=1)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    bad = [r for r in found["rows"] if r["status"] == "diverged"]
    assert {r["method"] for r in bad} == {"ft"}
    assert all("learning rate" in r["sentence"] for r in bad)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What failed" in page


@pytest.mark.slow
def test_killed_at_random_it_comes_to_the_same_rows(tmp_path: Path, done: Path) -> None:
    words = [sys.executable, "-m", "efface", "bench", str(done / "mini.toml")]
    out = tmp_path / "out"
    draw = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen([*words, "--out", str(out)], stderr=subprocess.DEVNULL)
        time.sleep(float(draw.uniform(2, 8)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(2)
    subprocess.run([*words, "--out", str(out), "--force"], check=True, capture_output=True)
    mine = json.loads((out / "results.json").read_text())

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k not in ("cost",)}

    assert [plain(r) for r in mine["rows"]] == [plain(r) for r in results(done)["rows"]]


# -- concluding -------------------------------------------------------------------------------


def row(model: str, method: str, seed: int, **values: float) -> dict[str, Any]:
    metrics = {k: {"value": v, "low": v, "high": v, "n": 10} for k, v in values.items()}
    return {
        "model": model,
        "method": method,
        "seed": seed,
        "status": "ok",
        "sparsity": 0.0 if model == "dense" else 0.9,
        "metrics": metrics,
        "cost": {"wall": 1.0 + seed},
    }


FOUR = ("ua", "mia_efficacy", "ra", "ta")


def test_gaps_are_of_means_and_also_per_seed() -> None:
    recipe = parse(MINI, "mini")
    rows = [
        row("dense", "retrain", 0, **dict.fromkeys(FOUR, 0.8)),
        row("dense", "retrain", 1, **dict.fromkeys(FOUR, 1.0)),
        row("dense", "ft", 0, **dict.fromkeys(FOUR, 0.8)),
        row("dense", "ft", 1, **dict.fromkeys(FOUR, 1.0)),
    ]
    entry = next(e for e in summarise(recipe, rows) if e["method"] == "ft")
    assert entry["average_gap"]["value"] == pytest.approx(0.0)  # of the means: none
    assert entry["average_gap"]["mean"] == pytest.approx(0.1)  # of each seed: a tenth
    assert entry["metrics"]["ua"]["std"] == pytest.approx(np.std([0.8, 1.0], ddof=1))
    assert entry["metrics"]["ua"]["paper"] == {
        "mean": pytest.approx(0.225),
        "std": pytest.approx(0.082),
        "gap": pytest.approx(0.775),
    }
    assert entry["average_gap"]["paper"] == 25.8
    assert entry["gap_a"]["value"] is None


def test_deviations_are_over_training_seeds() -> None:
    assert spread([])["mean"] is None
    one = spread([0.5])
    assert (one["mean"], one["std"], one["low"], one["n"]) == (0.5, None, None, 1)
    two = spread([0.0, 1.0])
    assert two["low"] < 0 < 1 < two["high"]  # two seeds say little, and the interval says so


@pytest.mark.parametrize(
    ("less", "than", "word"),
    [
        ([0.1, 0.11, 0.12], [0.3, 0.31, 0.32], "holds"),
        ([0.3, 0.31, 0.32], [0.1, 0.11, 0.12], "reversed"),
        ([0.1, 0.3, 0.2], [0.2, 0.1, 0.3], "not shown"),
        ([0.1], [0.9], "not shown"),
    ],
)
def test_a_claim_needs_an_interval_on_one_side(less: Any, than: Any, word: str) -> None:
    claim = Claim(text="x", metric="ua", less=("dense", "a"), than=("dense", "b"))
    rows = [row("dense", "a", s, ua=v) for s, v in enumerate(less)]
    rows += [row("dense", "b", s, ua=v) for s, v in enumerate(than)]
    (found,) = judge([claim], rows)
    assert found["verdict"] == word
    assert found["difference"]["mean"] == pytest.approx(np.mean(less) - np.mean(than))


def test_a_claim_is_paired_by_seed() -> None:
    claim = Claim(text="x", metric="ua", less=("dense", "a"), than=("dense", "b"))
    rows = [row("dense", "a", s, ua=v) for s, v in ((0, 0.1), (1, 0.5), (2, 0.9))]
    rows += [row("dense", "b", s, ua=v) for s, v in ((2, 0.92), (1, 0.52), (0, 0.12), (3, 0.0))]
    (found,) = judge([claim], rows)
    assert found["difference"]["n"] == 3
    assert found["verdict"] == "holds"


def test_curves_run_over_sparsity() -> None:
    recipe = parse(
        MINI.replace(
            "[paper.dense.retrain]",
            '[[curves]]\nmetric = "ua"\nmethods = ["ft"]\n[paper.dense.retrain]',
        ),
        "mini",
    )
    rows = [row("omp-80", "ft", 0, ua=0.4), row("dense", "ft", 0, ua=0.2)]
    (drawn,) = curves(recipe, rows)
    assert [p["x"] for p in drawn["groups"][0]["points"]] == [0.0, 0.9]
    assert [p["mean"] for p in drawn["groups"][0]["points"]] == [0.2, 0.4]
    assert drawn["groups"][0]["paper"] == [{"x": 0.0, "y": (22.5, 8.2)}]


def test_the_time_of_killed_runs_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    path.write_text("100.0")  # as a run that was killed left it
    spent = Spent(path)
    assert 100 <= spent.read()["wall"] < 110
    assert 100 <= Spent(path).earlier < 110
    path.write_text("nonsense")
    assert Spent(path).earlier == 0.0


def test_ways_of_pruning_are_lines_of_their_own() -> None:
    curve = '[[curves]]\nmetric = "ua"\nmethods = ["ft"]\n'
    recipe = parse(MINI.replace("[paper.dense.retrain]", f"{curve}[paper.dense.retrain]"), "mini")
    rows = [row(m, "ft", 0, ua=0.1) for m in ("dense", "omp-50", "omp-90", "imp-90")]
    (drawn,) = curves(recipe, rows)
    lines = {g["label"]: [p["model"] for p in g["points"]] for g in drawn["groups"]}
    assert lines == {"omp, ft": ["dense", "omp-50", "omp-90"], "imp, ft": ["dense", "imp-90"]}


# -- transfer ---------------------------------------------------------------------------------


def test_classes_are_chosen_and_reported_on_different_records() -> None:
    task = recipes.parse(MINI, "mini").size["digits"].task.build()
    source = restricted(task, (0, 1, 2))
    assert set(source.records.targets.tolist()) == {0, 1, 2}
    assert set(source.test_records.targets.tolist()) == {0, 1, 2}
    assert len(source.ids_) == len(source.records)
    assert set(source.ids_) < set(task.ids_)
    data = downstream(task, (7, 8), per_class=20)
    rows = [{r.numpy().tobytes() for r in part.inputs} for part in (data.fit, data.choose)]
    assert not rows[0] & rows[1]
    assert data.fit.targets.bincount()[7:].tolist() == [20, 20]
    with pytest.raises(InputError, match="needs"):
        downstream(task, (7, 8), per_class=500)
    with pytest.raises(InputError, match="no record"):
        restricted(task, (0, 77))


def test_a_probe_reads_features_and_leaves_the_network_alone() -> None:
    task = recipes.parse(MINI, "mini").size["digits"].task.build()
    model = efface.train(restricted(task, (0, 1, 2, 3)), seed=0)
    digest = model.digest
    data = downstream(task, (7, 8), per_class=30)
    found = probe(model, data, data.report)
    assert 0.7 < found["value"] <= 1.0
    assert model.digest == digest
    untrained = model.copy()
    with torch.no_grad():
        for p in untrained.network.parameters():
            p.zero_()
    assert probe(untrained, data, data.report)["value"] < 0.7  # features of nothing say nothing


def test_the_least_useful_classes_are_those_whose_removal_helps() -> None:
    without = {0: [0.7, 0.6], 1: [0.9, 0.8], 2: [0.8, 0.9], 3: [0.5, 0.5]}
    classes, influence = least_useful([0.7, 0.7], without, 2)
    assert classes == (1, 2)
    assert influence[3] == pytest.approx([0.2, 0.2])


# -- showing ----------------------------------------------------------------------------------


def test_the_page_shows_every_method_and_runs_nothing(done: Path) -> None:
    page = (done / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for word in ("original", "retrain", "ft", "l1-sparse", "omp-80", "What was searched", "22.5"):
        assert word in page
    assert page.count("<svg") >= 2


def test_the_page_escapes_what_a_recipe_says(done: Path) -> None:
    from efface.report import bench_page

    document = results(done) | {"title": "<script>alert(1)</script>", "about": "a < b & c"}
    page = bench_page(document)
    assert "<script>" not in page
    assert "a &lt; b &amp; c" in page


def test_a_claim_is_told_with_its_interval(done: Path) -> None:
    (claim,) = results(done)["claims"]
    assert claim["verdict"] in {"holds", "reversed", "not shown"}
    assert claim["difference"]["low"] <= claim["difference"]["mean"] <= claim["difference"]["high"]
    page = (done / "out" / "report.html").read_text()
    assert claim["text"] in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing-of-the-kind", "--out", "x"], "unknown"),
        (["jia2023-classwise", "--out", "x", "--size", "huge"], "no size"),
        (["jia2023-classwise", "--out", "x", "--seeds", "0"], "--seeds"),
        (["jia2023-classwise", "--out", "x", "--jobs", "-1"], "--jobs"),
        (["jia2023-classwise", "--out", "x", "--device", "abacus"], "not available"),
        (["absent.toml", "--out", "x"], "cannot be read"),
    ],
)
def test_wrong_use_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = command("bench", *words)
    assert found.code == 2
    (line,) = found.err.strip().splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


SLIPS = {
    "claim": (MINI.replace('than = ["dense", "ft"]', 'than = ["dense", "fft"]'), "fft"),
    "metric": (MINI.replace('metric = "average_gap"', 'metric = "averagegap"'), "averagegap"),
    "models of a method": (MINI + "models = {dens = {alpha = 1e-3}}\n", "dens"),
    "reserved": (MINI + '[size.digits.methods.retrain]\nmethod = "finetune"\n', "retrain"),
    "empty search": (MINI.replace("lr = [0.01, 0.1]", "lr = []"), "search"),
    "one name twice": (MINI.replace("sparsities = [0.8]", "sparsities = [0.8, 0.8]"), "its own"),
    "no pruner": (MINI.replace('method = "omp", scope', "scope"), "no method"),
}


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_in_a_recipe_is_noticed(case: str) -> None:
    text, word = SLIPS[case]
    with pytest.raises(InputError, match=word):
        parse(text, "mini")


LATE = {
    "rewind beyond the end": (MINI.replace("rewind = 1", "rewind = 30"), "none of the 3 epochs"),
    "no rewind": (MINI.replace("rewind = 1\n", ""), "rewind = EPOCH"),
    "proxy in other words": (MINI.replace("class = 5", "classes = [3]"), "forget set"),
    "network": (MINI.replace('name = "digits"\n', 'name = "digits"\nnetwork = "MLP"\n'), "MLP"),
    "no such class": (MINI.replace("class = 3", "class = 33"), "33"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    text, word = LATE[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    found = command("bench mine.toml --out out")
    assert found.code == 2
    assert word in found.err
    assert not (tmp_path / "out").exists()


def test_a_method_that_cannot_run_is_a_row_that_says_why(tmp_path: Path) -> None:
    text = MINI.replace("class = 3", "random = 0.1").replace("seeds = 2", "seeds = 1")
    text += '[size.digits.methods.off]\nmethod = "logit-off"\n'
    (tmp_path / "mine.toml").write_text(text)
    run_bench(Run(), str(tmp_path / "mine.toml"), tmp_path / "out", jobs=1)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    (bad,) = [r for r in found["rows"] if r["status"] == "failed" and r["model"] == "dense"]
    assert "split made by class" in bad["sentence"]


@pytest.mark.parametrize("content", ['{"metrics": {}}', '{"metrics": 3}', "[1]", "\x00"])
def test_a_damaged_row_is_made_again(done: Path, content: str) -> None:
    before = results(done)
    path = sorted((done / "out" / "rows").iterdir())[0]
    path.write_text(content)
    run_bench(Run(force=True), str(done / "mini.toml"), done / "out", jobs=1)
    both = [
        [{k: v for k, v in row.items() if k != "cost"} for row in found["rows"]]
        for found in (before, results(done))
    ]
    assert both[0] == both[1]
