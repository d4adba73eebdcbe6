"""The report: what is written can be read back, nothing is lost, nothing breaks out of the page."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from efface.errors import InputError, OutputError
from efface.report import AuditResult, audit_page, plots, story_page, words

EVIL = "<script>alert('$x$')</script> & \"q\""


def finding(name: str, value: float | None = None, **values: Any) -> dict[str, Any]:
    keys = ("low", "high", "n", "reference", "gap", "floor", "original", "series")
    return {
        "name": name,
        "value": value,
        "direction": "match",
        "status": "ok",
        "sentence": "",
        **dict.fromkeys(keys),
        **values,
    }


def groups(key: str, *values: list[Any]) -> list[dict[str, Any]]:
    labels = ("before", "after", "retrained")
    return [{"label": label, key: value} for label, value in zip(labels, values, strict=True)]


HISTOGRAM = {
    "kind": "histogram",
    "x_label": "margin of the true class",
    "panels": [
        {
            "title": f"{part} set",
            "edges": [-2.0, 0.0, 2.0, 4.0],
            "groups": groups("counts", [0, 3, 9], [8, 3, 1], [0, 0, 0]),
        }
        for part in ("forget", "retain", "test")
    ],
}
BARS = {
    "kind": "bars",
    "x_label": "class",
    "y_label": "accuracy",
    "labels": ["0", "1", EVIL],
    "groups": groups("values", [0.9, 1.0, 0.8], [0.9, None, 0.7], [0.95, 0.0, 0.85]),
}
CURVE = {
    "kind": "curve",
    "x_label": "false alarms",
    "y_label": "recognised",
    "log_x": True,
    "groups": [{"label": "数字 attack", "x": [0.01, 0.1, 1.0], "y": [0.0, 0.3, 1.0]}],
}
FINDINGS = (
    finding("ua", 0.9312, low=0.91, high=0.948, n=143, reference=0.95, gap=0.0188, floor=0.02),
    finding("ra", 0.98, reference=0.99, gap=0.01, floor=0.001, original=1.0),
    finding("ta", 0.9, reference=0.97, gap=0.07, floor=0.01),
    finding("mia_efficacy", 0.4, reference=0.7, gap=0.3),
    finding("mia_auc", 0.642, reference=0.5, gap=0.142, direction="lower", series=CURVE),
    finding(
        "mia_tpr_at_1fpr", status="not_estimable", sentence="Too few unseen records: only 36."
    ),
    finding("margin_forget", -3.0, reference=-4.5, gap=1.5, floor=0.4, series=HISTOGRAM),
    finding("accuracy_per_class", status="undefined", direction="info", sentence="See the picture.",
            series=BARS),
    finding("rte_seconds", 0.8, direction="lower"),
    finding("some_new_number", 12345.6, direction="info", sentence="New here."),
    finding("another_gap", direction="match", status="undefined"),
)  # fmt: skip
LAYER = {"name": "conv1.weight", "sparsity": 0.5, "kept": 1000, "total": 2000}
COST = {"wall": 0.8, "cpu": 0.7, "images": 5000, "threads": 1, "foreign_load": 0.1}
SUBJECT: dict[str, Any] = {
    "task": "digits",
    "selector": {"kind": "class", "class": 1},
    "method": {"name": "l1-sparse", "alpha": 0.001},
    "title": f"l1-sparse {EVIL}",
    "asked": "Forget class 1.",
    "done": "It was forgotten.",
    "verdict_sentence": "Traces are left.",
    "before": {"digest": "ab" * 32, "sparsity": 0.5, "layers": [LAYER]},
    "after": {"digest": "cd" * 32, "sparsity": 0.5, "layers": [LAYER]},
    "references": [{"digest": "ef" * 32, "like": "dense", "seed": 1}],
    "cost": {"method": COST, "retrain": {**COST, "wall": 8.0}, "original": None},
    "reproduce": ["efface train digits --out original.safetensors " + "--set key=value " * 9],
    "seed": 0,
    "versions": {"efface": "0.1.0"},
    "created": "2026-11-21T12:00:00Z",
    "tier": 1,
    "note": f"A note {EVIL}",
}


@pytest.fixture
def result() -> AuditResult:
    split = {"forget": 143, "retain": 1294, "test": 360}
    limits = (f"Backups {EVIL}",)
    return AuditResult(SUBJECT, split, FINDINGS, 0.1, None, "under-forgotten", limits)


@pytest.fixture
def story(result: AuditResult) -> dict[str, Any]:
    number = {"value": 0.5, "low": 0.4, "high": 0.6, "gap": 0.05}
    row: dict[str, Any] = {"method": "finetune", "model": "sparse 90 %", "average_gap": 0.04}
    row |= {"gap_a": 0.12, "rte_seconds": 0.5, "rte_ratio": 0.1, "verdict": "over-forgotten"}
    row |= dict.fromkeys(("ua", "ra", "ta", "mia_efficacy"), number) | {"mia_auc": None}
    row |= {"href": "cells/a/report.html", "sentence": f"So it is {EVIL}."}
    retrain = row | {"method": "retrain", "model": "dense", "average_gap": 0.01, "href": None}
    hostile = row | {"method": EVIL, "href": "javascript:alert(1)", "average_gap": None}
    section = {"heading": "Forget one class", "text": "", "rows": [retrain, row, hostile]}
    section["cells"] = [json.loads(result.to_json())]
    return {"title": f"Demo {EVIL}", "sections": [section, {"heading": "Empty", "rows": []}]}


def visible(page: str) -> str:
    """The page's text without tags, style and entities."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_json_round_trip_is_canonical(result: AuditResult) -> None:
    text = result.to_json()
    again = AuditResult.from_json(text)
    assert again == result
    assert again.to_json() == text
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert json.loads(text)["schema"] == "efface.audit/1"
    assert json.loads(text)["gap_a"] is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(result: AuditResult, bad: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(result, findings=(finding("ua", bad),)).to_json()
    text = result.to_json().replace("0.9312", json.dumps(bad))
    with pytest.raises(InputError, match="no JSON number"):
        AuditResult.from_json(text)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": "efface.audit/2"}', '{"schema": "efface.audit/1", "split": {}}'],
)
def test_what_is_no_audit_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        AuditResult.from_json(text)


def test_unknown_names_are_refused_with_a_hint(result: AuditResult) -> None:
    assert result["ua"]["value"] == 0.9312
    with pytest.raises(KeyError, match="did you mean 'mia_auc'"):
        result["mia_acu"]
    with pytest.raises(ValueError, match="indistinguishable"):
        replace(result, verdict="indistinguishible")


def test_save_writes_whole_files_and_refuses_to_replace(
    result: AuditResult, tmp_path: Path
) -> None:
    folder = tmp_path / "audit"
    assert result.save(folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["audit.json", "report.html"]
    assert AuditResult.from_json((folder / "audit.json").read_text("utf-8")) == result
    with pytest.raises(OutputError, match="exists already"):
        result.save(folder)
    odd = replace(result, subject={**SUBJECT, "reproduce": ["efface \udcff"]})
    odd.save(folder, {"id": ["a", "b"], "margin": [1.5, None]}, force=True)
    assert (folder / "per_record.csv").read_text() == "id,margin\na,1.5\nb,\n"
    assert AuditResult.from_json((folder / "audit.json").read_text("utf-8")) == odd


def test_every_finding_is_rendered(result: AuditResult) -> None:
    text = visible(audit_page(result)).replace(words.NBSP, " ")
    for item in FINDINGS:
        assert words.metric(item["name"]).label in text, item["name"]
    for shown in ("93.1 % [91.0, 94.8]", "0.642", "−3", "12,300", "Some new number", "0.8 s"):
        assert shown in text
    for sentence in (*result.not_shown, "Forget class 1.", "It was forgotten.", SUBJECT["note"]):
        assert sentence in text
    for word in (
        "within noise",
        "apart",
        "far",
        "beyond noise",
        "Traces are left.",
        "cdcdcdcdcdcd",
    ):
        assert word in text
    assert "cd" * 7 not in text


def test_what_is_missing_is_a_dash_with_its_reason(result: AuditResult) -> None:
    page = audit_page(result)
    text = visible(page)
    assert "Too few unseen records: only 36." in text
    assert "Not measured; no reason was recorded." in text
    assert "A dash: a part of the average could not be measured," in text  # gap_a
    assert not re.search(r"\b(None|nan|NaN|null|inf|Undefined)\b", text)


@pytest.mark.parametrize("verdict", words.VERDICTS)
def test_an_almost_empty_audit_still_makes_a_page(verdict: str) -> None:
    split = {"forget": 1, "retain": 8, "test": 2}
    page = audit_page(AuditResult({}, split, (), None, None, verdict))
    text = visible(page)
    assert verdict in text
    assert "no retrained model" in text
    assert not re.search(r"\b(None|nan|Undefined)\b", text)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"kind": "class", "class": 3}, "all records of class 3"),
        ({"kind": "ids", "n": 17}, "17 records given by their IDs"),
        ({"kind": "random", "fraction": 0.1, "seed": 0}, "a random 10.0 % of the records (seed 0)"),
        ({"kind": "where", "expression": "age < 30"}, "the records where age < 30"),
    ],
)
def test_selectors_are_put_in_words(
    result: AuditResult, selector: dict[str, Any], expected: str
) -> None:
    page = audit_page(replace(result, subject={"selector": selector}))
    assert f"To forget {expected}." in visible(page).replace(words.NBSP, " ")


def test_pages_are_self_contained_escaped_and_well_formed(
    result: AuditResult, story: dict[str, Any]
) -> None:
    for page in (audit_page(result), story_page(story)):
        found = Tags(page)
        assert found.open == []  # every element is closed, in order
        names = [tag for tag, _ in found.tags]
        assert "script" not in names
        assert page.count("&lt;script&gt;") >= 3  # the hostile text is there, as text
        ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        used = set(re.findall(r"url\(#([^)]+)\)", page))
        assert used
        assert used <= set(ids)
        for tag, attributes in found.tags:
            for key in ("src", "href", "xlink:href"):
                target = attributes.get(key) or "#"
                assert target.startswith(("#", "data:", "cells/")), (tag, target)
            assert not any(key.startswith("on") for key in attributes)
        levels = [int(name[1]) for name in names if re.fullmatch("h[1-6]", name)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
        for tag, attributes in found.tags:
            assert tag != "svg" or attributes["aria-label"]
            assert tag != "th" or attributes["scope"]
        assert names.count("table") == names.count("caption")
        assert len(page.encode()) < 400_000


def test_story_shows_each_row_and_drops_links_with_a_scheme(story: dict[str, Any]) -> None:
    page = story_page(story)
    text = visible(page).replace(words.NBSP, " ")
    for shown in ("finetune · sparse 90 %", "50.0 % [40.0, 60.0] gap 5.0, apart", "0.5 s"):
        assert shown in text
    assert "over-forgotten" in text
    assert 'href="cells/a/report.html"' in page
    assert "javascript:" not in page


def test_equal_input_gives_equal_bytes(result: AuditResult, story: dict[str, Any]) -> None:
    assert audit_page(result) == audit_page(result)
    assert story_page(story) == story_page(story)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    svg = plots.bars(BARS, "x", mark="1")
    assert dict(mpl.rcParams) == before
    assert "1 (forgotten)" in svg
    assert "$x$" in svg  # no mathematics is made of a user's text
    assert "#a0b0" not in svg
    assert plots.bars(BARS, "y") != svg


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("EFFACE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium: install one or set EFFACE_CHROMIUM")
    return found


def load(page: Path, profile: Path) -> tuple[str, str]:
    """The DOM after loading, and what the browser logged."""
    options = (
        "--headless --hide-scrollbars --no-sandbox --disable-gpu --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--allow-file-access-from-files --window-size=1280,2000 "
        "--enable-logging=stderr --v=0 --dump-dom"
    )
    done = subprocess.run(
        [browser(), *options.split(), f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


FRAME = """<!doctype html><title>waiting</title>
<iframe src="{page}" style="width:375px;height:2000px;border:0" onload="
  const root = this.contentDocument.documentElement;
  document.title = 'width ' + root.scrollWidth + ' of ' + root.clientWidth;
"></iframe>"""


@pytest.mark.parametrize("kind", ["audit", "story"])
def test_pages_load_in_a_browser_and_fit_a_phone(
    result: AuditResult, story: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(audit_page(result) if kind == "audit" else story_page(story), "utf-8")
    dom, log = load(page, tmp_path / "profile")
    assert "What this report does not show" in dom
    assert "CONSOLE" not in log
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=page.name), "utf-8")
    dom, _ = load(frame, tmp_path / "profile")
    assert "<title>width 375 of 375</title>" in dom
