"""The recipe of amnesiac unlearning: recorded models, sub-classes, forgetting told from damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import efface
from efface.console import Run
from efface.datasets import digits
from efface.errors import InputError, SelectionError
from efface.recipes import recipe as recipes
from efface.recipes.bench import run_bench
from efface.recipes.models import Bench, Job, original, original_key, reference_key
from efface.recipes.recipe import parse
from efface.recipes.sources import Selection, Source, written_alike
from efface.recipes.store import Store, check_log
from efface.recipes.summary import judge, summarise
from efface.recipes.undoing import (
    KEEPS,
    curves_over_keep,
    side,
    stored,
    undo_metrics,
    verdict,
    weights,
)
from efface.report import bench_page
from efface.report.bench_undo import undo_section, undone

MINI = """
title = "Mini"
source = "a test"
about = "Small."
[[claims]]
text = "Pruning damages less"
metric = "damage"
less = ["momentum", "amnesiac-10"]
than = ["momentum", "amnesiac-100"]
[size.digits]
seeds = 2
record = {keep = 1.0}
[[size.digits.models]]
name = "momentum"
[[size.digits.models]]
name = "adam"
fit = {optimizer = "adam", lr = 3e-3}
network_options = {norm = false}
scenarios = ["class"]
[[size.digits.models]]
name = "cohort"
cohort_epochs = 1
scenarios = ["few"]
[size.digits.task]
name = "digits"
network = "DigitsCNN"
fit = {epochs = 2, batch_size = 64, lr = 0.1}
[size.digits.scenarios.class]
forget = {class = 3}
[size.digits.scenarios.few]
forget = {count = 12, vary = true, wrong_labels = 1.0}
[size.digits.methods.replay]
method = "replay"
scenarios = ["few"]
[size.digits.methods.amnesiac]
method = "amnesiac"
options = {force = true}
keeps = [1.0, 0.3, 0.1]
[size.digits.methods.unaffected]
method = "amnesiac-control"
options = {control = "unaffected", force = true}
on = ["momentum"]
scenarios = ["few"]
"""


def bench(text: str = MINI, folder: Path | None = None) -> Bench:
    out = folder or Path("out")
    return Bench(text, "mini", "digits", out, out / "models", device="cpu")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bench of the mini recipe."""
    folder = tmp_path_factory.mktemp("undo")
    (folder / "mini.toml").write_text(MINI)
    run_bench(Run(), str(folder / "mini.toml"), folder / "out", jobs=1)
    return folder


def results(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return value


def rows_of(document: dict[str, Any], model: str, method: str, scenario: str) -> list[Any]:
    asked = (model, method, scenario)
    return [r for r in document["rows"] if (r["model"], r["method"], r["scenario"]) == asked]


# -- what is to be forgotten -------------------------------------------------------------------


def test_a_sub_class_is_one_end_of_the_first_principal_component() -> None:
    """The slow twin: power iteration in float64, records one by one."""
    task = digits()
    found = written_alike(task, 1, 0.4)
    mine = [i for i, y in enumerate(task.records.targets.tolist()) if y == 1]
    assert set(found.tolist()) < set(mine)
    assert len(found) == round(0.4 * len(mine))
    assert found.tolist() == sorted(found.tolist())
    rows = [task.records.inputs[i].double().flatten().numpy() for i in mine]  # type: ignore[union-attr]
    middle = sum(rows) / len(rows)
    axis = np.ones(64)
    for _ in range(300):
        axis = sum((r - middle) * float((r - middle) @ axis) for r in rows)
        axis /= np.linalg.norm(axis)
    places = {i: float((r - middle) @ axis) for i, r in zip(mine, rows, strict=True)}
    sign = 1 if sum(p**3 for p in places.values()) > 0 else -1
    last = sorted(mine, key=lambda i: -sign * places[i])[: len(found)]
    assert sorted(last) == found.tolist()


def test_a_sub_class_is_a_split_of_records_and_not_of_a_class() -> None:
    task, split = Selection.model_validate({"class": 1, "alike": 0.4}).apply(digits())
    assert split.label is None
    assert set(task.records.targets[split.forget].tolist()) == {1}
    assert 1 in task.records.targets[split.retain].tolist()


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_so_many_records_are_drawn(count: int) -> None:
    _, split = Selection.model_validate({"count": count, "seed": 5}).apply(digits())
    assert len(split.forget) == count


def test_wrong_labels_go_with_the_records_that_were_drawn() -> None:
    plain = digits()
    chosen = Selection.model_validate({"count": 10, "wrong_labels": 1.0})
    task, split = chosen.apply(plain)
    changed = (task.records.targets != plain.records.targets).nonzero().flatten()
    assert changed.tolist() == split.forget.tolist()


def test_what_varies_is_another_selection_for_every_training_seed() -> None:
    job = Job("row", "momentum", 0, scenario="few")
    made = bench()
    first, second = (made.data_of(replace(job, seed=s))[1].forget.tolist() for s in (0, 1))
    assert first != second
    assert made.data_of(replace(job, scenario="class"))[0] is made.data("forget", "class")[0]
    keys = [original_key(made, replace(job, kind="original", seed=s)) for s in (0, 1)]
    assert keys[0]["data"] != keys[1]["data"]


@pytest.mark.parametrize(
    ("slip", "word"),
    [
        ({"alike": 0.4}, "exactly one"),
        ({"count": 3, "alike": 0.4}, "name the class"),
        ({"class": 1, "count": 3}, "exactly one"),
        ({"class": 1, "alike": 1.0}, "less than 1"),
        ({"class": 1, "vary": True}, "vary"),
        ({"count": 0}, "greater than or equal to 1"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(slip: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Selection.model_validate(slip)


def test_more_records_than_there_are_cannot_be_forgotten() -> None:
    with pytest.raises(SelectionError, match="1147 records"):
        Selection.model_validate({"count": 1147}).apply(digits())


# -- models of a size --------------------------------------------------------------------------


def test_a_model_may_be_trained_otherwise_than_the_size_says() -> None:
    made = bench()
    plain, other = (made.data("forget", "class", name)[0] for name in ("momentum", "adam"))
    assert (plain.fit.optimizer, other.fit.optimizer) == ("sgd", "adam")
    assert other.fit.batch_size == plain.fit.batch_size == 64
    assert any("norm" in name for name in plain.network().state_dict())
    assert not any("norm" in name for name in other.network().state_dict())


def test_the_key_of_a_model_is_that_of_its_own_training() -> None:
    def key(model: str, scenario: str = "class", text: str = MINI, seed: int = 0) -> Any:
        return original_key(bench(text), Job("original", model, seed, scenario=scenario))

    assert key("momentum") != key("adam")
    assert key("momentum", "few") != key("cohort", "few")
    assert key("momentum") != key("momentum", text=MINI.replace("keep = 1.0", "keep = 0.5"))
    text = MINI.replace("record = {keep = 1.0}", "").replace("cohort_epochs = 1", "")
    assert "record" not in key("momentum", text=text)
    base = Job("reference", "cohort", 0, scenario="few")
    plain = reference_key(bench(), replace(base, model="momentum"))
    assert reference_key(bench(), base) == plain  # its references are no cohort's


SLIPS = {
    "recorder option": (MINI.replace("keep = 1.0}", "keeep = 1.0}"), "keeep"),
    "recorder value": (MINI.replace("keep = 1.0}", "keep = 2.0}"), "keep"),
    "recorder folder": (MINI.replace("keep = 1.0}", 'folder = "x"}'), "folder"),
    "cohorts without a log": (MINI.replace("record = {keep = 1.0}", ""), "record"),
    "pruned and recorded": (
        MINI.replace('name = "momentum"', 'name = "momentum"\npruner = {method = "omp"}'),
        "logged",
    ),
    "pruned and trained otherwise": (
        MINI.replace('name = "adam"', 'name = "adam"\npruner = {method = "omp"}'),
        "is pruned",
    ),
    "keep out of range": (MINI.replace("keeps = [1.0,", "keeps = [1.5,"), "keep"),
    "keeps without keep": (MINI.replace('"replay"\n', '"replay"\nkeeps = [0.1, 0.2]\n'), "keep"),
    "one name twice": (MINI + '[size.digits.methods.amnesiac-10]\nmethod = "replay"\n', "already"),
}


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_in_a_recipe_is_noticed(case: str) -> None:
    text, word = SLIPS[case]
    with pytest.raises(InputError, match=word):
        parse(text, "mini")


def test_options_of_no_network_are_refused() -> None:
    with pytest.raises(InputError, match="name it"):
        Source.model_validate({"name": "digits", "network_options": {"norm": False}}).build()
    with pytest.raises(InputError, match="normm"):
        Source.model_validate(
            {"name": "digits", "network": "DigitsCNN", "network_options": {"normm": False}}
        ).build()


# -- logs beside models ------------------------------------------------------------------------


def test_a_recorded_model_is_kept_with_its_log(tmp_path: Path) -> None:
    job = Job("original", "momentum", 0, scenario="class")
    said: list[str] = []
    made = bench(folder=tmp_path)
    first = original(made, job, said.append)
    log = Store(made.store, said.append).log_path(original_key(made, job))
    assert first.log == log
    check_log(log, first, thorough=True)
    again = original(made, job, said.append)
    assert again.log == log
    assert again.digest == first.digest
    assert said == []


@pytest.mark.parametrize("harm", ["gone", "manifest", "segment", "key"])
def test_a_model_whose_log_is_gone_or_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    import shutil

    job = Job("original", "momentum", 0, scenario="class")
    said: list[str] = []
    made = bench(folder=tmp_path)
    first = original(made, job, said.append)
    assert first.log is not None
    if harm == "gone":
        shutil.rmtree(first.log)
    elif harm == "manifest":
        (first.log / "manifest.json").write_text("{}")
    elif harm == "key":
        monkeypatch.setenv("EFFACE_KEY", "another")
    else:
        segment = max(first.log.glob("segments/*"), key=lambda p: p.stat().st_size)
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 1
        segment.write_bytes(bytes(data))
    again = original(made, job, said.append)
    assert len(said) == 1
    assert "made again" in said[0]
    assert again.digest == first.digest
    assert again.log is not None
    check_log(again.log, again, thorough=True)


def test_a_log_of_another_training_is_not_its_own(tmp_path: Path) -> None:
    made = bench(folder=tmp_path)
    one, two = (
        original(made, Job("original", "momentum", seed, scenario="class"), print)
        for seed in (0, 1)
    )
    assert one.log is not None
    with pytest.raises(InputError, match="not the log of this model"):
        check_log(one.log, two)


# -- running -----------------------------------------------------------------------------------


def test_every_row_ran_and_the_page_tells_forgetting_from_damage(done: Path) -> None:
    found = results(done)
    assert [r["sentence"] for r in found["rows"] if r["status"] != "ok"] == []
    keeps = {f"amnesiac-{k}" for k in (100, 30, 10)}
    methods = {r["method"] for r in found["rows"] if r["model"] == "adam"}
    assert methods == {"original", "retrain", *keeps}
    page = (done / "out" / "report.html").read_text()
    for word in ("What a step takes on disk", "Still remembered", "Forgetting or damage"):
        assert word in page
    assert "<script" not in page
    assert str(done) not in page


def test_a_row_is_what_the_verbs_give(done: Path) -> None:
    """The slow twin: the same request made by hand."""
    made = bench()
    task, split = made.data("forget", "few", "momentum", 1)
    log = done / "by-hand"
    before = efface.train(
        task, seed=1, recorder=efface.updates.Recorder(log, keep=1.0), device="cpu"
    )
    method = efface.unlearn.build("amnesiac", {"keep": 0.1, "force": True})
    with pytest.warns(UserWarning, match="expect damage"):
        after = efface.forget(before, split, method, seed=1, log=log, device="cpu")
    theirs = efface.retrain(task, split, model=before, initial="own", seed=1, device="cpu")
    (row,) = (r for r in rows_of(results(done), "momentum", "amnesiac-10", "few") if r["seed"] == 1)
    audit = efface.audit(before, after, split, [theirs])
    for name in ("ua", "ra", "ta", "mia_auc"):
        assert row["metrics"][name]["value"] == audit[name]["value"]
    own, other, goal = (weights(m) for m in (after, before, theirs))
    moved = np.sqrt(sum((a - b) ** 2 for a, b in zip(own, other, strict=True)))
    assert row["metrics"]["moved"]["value"] == pytest.approx(moved / np.sqrt(other @ other))
    distance = np.linalg.norm(own - goal) / np.linalg.norm(other - goal)
    assert row["metrics"]["weight_distance"]["value"] == pytest.approx(distance)
    touched = row["metrics"]["steps_share"]["value"]
    entry = after.lineage[-1].detail["removed"][0]
    assert touched == entry["n"] / 36  # 2 epochs of 18 steps


def test_the_accuracy_on_the_class_and_on_the_others_add_up(done: Path) -> None:
    for row in rows_of(results(done), "momentum", "amnesiac-10", "class"):
        metrics = row["metrics"]
        assert (
            metrics["target_test_accuracy"]["value"]
            == (metrics["forget_class_test_accuracy"]["value"])
        )
        assert metrics["other_test_accuracy"]["value"] == metrics["ta"]["value"]
        assert metrics["target_test_accuracy"]["n"] + metrics["other_test_accuracy"]["n"] == 500


def test_the_original_has_not_moved_and_is_as_far_as_itself(done: Path) -> None:
    for row in rows_of(results(done), "momentum", "original", "few"):
        assert row["metrics"]["moved"]["value"] == 0
        assert row["metrics"]["weight_distance"]["value"] == 1
        assert "steps_share" not in row["metrics"]
    for row in rows_of(results(done), "momentum", "retrain", "few"):
        assert "weight_distance" not in row["metrics"]


def test_a_cohort_touches_few_steps_and_is_replayed_for_less(done: Path) -> None:
    found = results(done)

    def mean(model: str, method: str, metric: str) -> float:
        rows = rows_of(found, model, method, "few")
        return float(np.mean([r["metrics"][metric]["value"] for r in rows]))

    share = "steps_share"
    assert mean("cohort", "amnesiac-100", share) == pytest.approx(1 / 36)
    assert mean("momentum", "amnesiac-100", share) > 0.3
    images = {
        m: [r["cost"]["images"] for r in rows_of(found, m, "replay", "few")]
        for m in ("momentum", "cohort")
    }
    assert max(images["cohort"]) < min(images["momentum"])


def test_a_second_run_does_nothing_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import efface.recipes.jobs as jobs

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was made again")

    for verb in ("train", "retrain", "forget"):
        monkeypatch.setattr(jobs.verbs, verb, refuse)
    before = results(done)
    run_bench(Run(force=True), str(done / "mini.toml"), done / "out", jobs=1)
    assert before["rows"] == results(done)["rows"]


# -- storage -----------------------------------------------------------------------------------


def test_storage_is_measured_on_the_log(done: Path) -> None:
    """The slow twin: dense updates of a training by hand, pruned by sorting."""
    found = results(done)
    (first,) = (
        r["storage"] for r in rows_of(found, "momentum", "original", "class") if r["seed"] == 0
    )
    assert [kept["keep"] for kept in first["kept"]] == list(KEEPS)
    sizes = [kept["bytes"]["bf16"] for kept in first["kept"]]
    assert sizes == sorted(sizes, reverse=True)
    assert first["whole"] / sizes[-1] > 15
    norms = [kept["norm"] for kept in first["kept"]]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] == pytest.approx(1.0)
    assert [e["keep"] for e in found["storage"] if e["model"] == "adam"] == list(KEEPS)
    without = {r["scenario"] for r in found["rows"] if r.get("storage")}
    assert without == {"class"}


def test_a_log_of_pruned_updates_says_nothing_of_larger_shares(tmp_path: Path) -> None:
    made = bench(MINI.replace("keep = 1.0", "keep = 0.2"), tmp_path)
    model = original(made, Job("original", "momentum", 0, scenario="class"), print)
    assert model.log is not None
    found = stored(model.log, 3)
    assert found["keep"] == 0.2
    assert [kept["keep"] for kept in found["kept"]] == [0.1, 0.05, 0.01]


# -- forgetting, or damage ---------------------------------------------------------------------


def entry(mean: float, width: float = 0.01) -> dict[str, Any]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


@pytest.mark.parametrize(
    ("memory", "damage", "original_memory", "words"),
    [
        (0.0, 0.0, 0.5, "forgets"),
        (0.0, 0.3, 0.5, "forgets, damaged"),
        (0.4, 0.0, 0.5, "remembers"),
        (0.4, 0.3, 0.5, "remembers, damaged"),
        (-0.2, 0.0, 0.5, "over-forgets"),
        (0.0, 0.3, 0.0, "not measurable, damaged"),
        (0.012, 0.0, 0.5, "forgets"),  # shown, but a fiftieth of what was there
        (0.0, -0.2, 0.5, "forgets"),  # better than retrained is no damage
    ],
)
def test_words_for_forgetting_and_damage(
    memory: float, damage: float, original_memory: float, words: str
) -> None:
    assert verdict(entry(memory), entry(damage), entry(original_memory)) == words


def test_what_is_too_uncertain_is_not_called_forgotten() -> None:
    assert verdict(entry(0.1, 0.3), entry(0.0), entry(0.5)) == "unclear"
    none = {"mean": 0.1, "low": None, "high": None}
    assert verdict(none, entry(0.0), entry(0.5)) == ""


def row(method: str, seed: int, **values: float) -> dict[str, Any]:
    metrics = {k: {"value": v, "low": v, "high": v, "n": 10} for k, v in values.items()}
    about = {"model": "momentum", "method": method, "seed": seed, "scenario": "few"}
    return {**about, "status": "ok", "sparsity": 0.0, "metrics": metrics, "cost": {"wall": 1.0}}


def test_sides_are_signed_and_by_seed() -> None:
    rows = [
        row("retrain", 0, ua=0.8, mia_auc=0.5, ra=1.0, ta=0.9),
        row("retrain", 1, ua=1.0, mia_auc=0.4, ra=1.0, ta=0.8),
        row("amnesiac-10", 0, ua=0.4, mia_auc=0.7, ra=0.9, ta=0.9),
        row("amnesiac-10", 1, ua=0.8, mia_auc=0.4, ra=0.8, ta=0.8),
    ]
    found = next(e for e in summarise(parse(MINI, "mini"), rows) if e["method"] == "amnesiac-10")
    assert found["memory"]["mean"] == pytest.approx(np.mean([0.4, 0.2]))
    assert found["damage"]["mean"] == pytest.approx(np.mean([0.1 / 2, 0.2 / 2]))
    assert found["metrics"]["ua"]["apart"]["mean"] == pytest.approx(np.mean([-0.4, -0.2]))
    (claim,) = judge(
        [parse(MINI, "mini").claims[0].model_copy(update={"than": ("momentum", "amnesiac-10")})],
        rows,
    )
    assert claim["difference"]["mean"] == 0


def test_a_side_that_cannot_be_measured_is_absent() -> None:
    assert side("memory", row("x", 0, ra=1.0), {"ua": 1.0}) is None
    assert side("memory", row("x", 0, ua=0.25), {"ua": 1.0, "ra": 0.1}) == 0.75
    assert side("damage", row("x", 0, ra=0.25), {"ra": 1.0}) is None


def test_lines_run_over_keep(done: Path) -> None:
    found = results(done)
    lines = {(line["scenario"], line["model"]): line["points"] for line in found["over_keep"]}
    assert set(lines) == {
        ("class", "momentum"),
        ("class", "adam"),
        ("few", "momentum"),
        ("few", "cohort"),
    }
    assert [p["keep"] for p in lines["class", "adam"]] == [1.0, 0.3, 0.1]
    plan = parse(MINI, "mini").size["digits"]
    assert curves_over_keep(plan, found["summary"]) == found["over_keep"]


def test_a_bench_without_a_log_has_no_such_section() -> None:
    assert undo_section({"storage": []}) is None
    assert undone([{"metrics": {"ua": {"mean": 1.0}}}]) is None


def test_the_page_of_one_seed_needs_no_intervals(done: Path) -> None:
    found = results(done)
    rows = [r for r in found["rows"] if r["seed"] == 0]
    summary = summarise(parse(MINI, "mini"), rows)
    lines = curves_over_keep(parse(MINI, "mini").size["digits"], summary)
    page = bench_page(found | {"rows": rows, "summary": summary, "over_keep": lines, "seeds": 1})
    assert "Forgetting or damage" in page


def test_claims_in_many_scenarios_are_a_grid(done: Path) -> None:
    found = results(done)
    assert "less than momentum" not in bench_page(found)
    third = [e | {"scenario": "third"} for e in found["summary"] if e["scenario"] == "few"]
    page = bench_page(found | {"summary": [*found["summary"], *third]})
    assert page.count("momentum · amnesiac-10 less than momentum · amnesiac-100") == 1
    assert page.count(found["claims"][0]["text"]) == 1


def test_undo_metrics_need_no_reference(done: Path) -> None:
    made = bench(folder=done / "out")
    job = Job("original", "momentum", 0, scenario="class")
    model = original(made, job, print)
    from efface.auditing import Subject

    subject = Subject(model, model, made.data_of(job)[1], device=torch.device("cpu"))
    found = undo_metrics(made.selection("forget", "class"), subject, model, model, None)
    assert found["moved"]["value"] == 0
    assert "weight_distance" not in found


# -- the recipe that comes along ---------------------------------------------------------------


def test_the_recipe_has_the_grid_that_is_promised() -> None:
    _, recipe = recipes.source("gogineni2024")
    full = recipe.size["digits"]
    assert full.seeds >= 10
    assert recipe.size["cifar10-small"].seeds >= 3
    asked = [case.forget for case in full.cases.values()]
    assert {a.count for a in asked if a.count} == {1, 10, 100, 1000}
    assert any(a.label is not None and a.alike is None for a in asked)
    assert any(a.alike is not None for a in asked)
    settings = {
        (
            task.fit.optimizer,
            task.fit.momentum > 0,
            any("norm" in n for n in task.network().state_dict()),
        )
        for model in full.models
        for task in [full.task.changed(model.fit, model.network_options).build()]
    }
    for norm in (True, False):
        assert {("sgd", True, norm), ("sgd", False, norm)} <= settings
        assert any(kind == "adam" and n == norm for kind, _, n in settings)
    for keep in KEEPS:
        assert f"amnesiac-{100 * keep:g}" in full.methods
    controls = {m.options.get("control") for m in full.methods.values()}
    assert {"unaffected", "random", "same-norm", "bn-only"} <= controls
    forced = [m for m in full.methods.values() if m.method.startswith("amnesiac")]
    assert all(m.options["force"] for m in forced)


def test_a_few_rows_of_the_recipe_come_out_as_they_should(tmp_path: Path) -> None:
    """What its size ``digits-ci`` shows in seconds; the whole grid is in docs/results."""
    run_bench(Run(), "gogineni2024", tmp_path / "out", size="digits-ci", jobs=2)
    found = results(tmp_path)
    assert [r["sentence"] for r in found["rows"] if r["status"] != "ok"] == []

    def mean(method: str, metric: str, model: str = "momentum") -> float:
        rows = rows_of(found, model, method, "10 records")
        return float(np.mean([r["metrics"][metric]["value"] for r in rows]))

    summary = {(e["model"], e["method"]): e for e in found["summary"]}
    assert mean("original", "ua") < 0.5 < 0.9 < mean("retrain", "ua")
    assert summary["momentum", "original"]["verdict"] == "remembers"
    assert mean("unaffected", "ua") < mean("retrain", "ua") - 0.1  # the control still knows D_f
    assert mean("replay", "ua") > 0.9
    assert mean("amnesiac-100", "steps_share", "momentum-cohort") < 0.02
    assert mean("amnesiac-100", "steps_share") > 0.05
    damage = {k: summary["momentum", f"amnesiac-{k}"]["damage"]["mean"] for k in (100, 10, 1)}
    assert damage[100] > damage[10] > damage[1] - 0.01
