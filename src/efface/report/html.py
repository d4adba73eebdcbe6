"""Findings to one self-contained HTML page: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from efface.report import after, plots, topology
from efface.report.words import (
    DASH,
    VERDICTS,
    Metric,
    closeness,
    interval,
    metric,
    number,
    seconds,
    significant,
)

if TYPE_CHECKING:
    import jinja2

    from efface.report.result import AuditResult

_PICTURES = ("histogram", "bars", "curve")
"""Kinds of series that have a section each; others belong to a section of several."""
_COLUMNS = ("ua", "ra", "ta", "mia_efficacy", "mia_auc")
_SELECTORS = {
    "class": "all records of class {class}",
    "ids": "{n} records given by their IDs",
    "random": "a random {percent} of the records (seed {seed})",
    "where": "the records where {expression}",
}


def audit_page(result: AuditResult) -> str:
    """The report of one audit.

    Args:
        result: What the audit found.

    Returns:
        A whole HTML document.

    Example:
        >>> from efface.report import AuditResult
        >>> result = AuditResult({"title": "l1-sparse"}, {"forget": 1, "retain": 8, "test": 2},
        ...                      (), None, None, "not measurable", ("Backups.",))
        >>> page = audit_page(result)
        >>> page.startswith("<!doctype html>"), "Backups." in page
        (True, True)
    """
    subject = result.subject
    rows = [_finding(finding) for finding in result.findings if not after.silent(finding)]
    shape = topology.section(result.findings, rows, "m")
    # in a section of their own, where there is one; else the reason once
    plain = [r for r in rows if not topology.is_topology(r) and not after.is_after(r)] + [
        r for r in rows if shape is None and r["name"] == "mask_iou"
    ]
    mine = [row for row in rows if after.is_after(row)]
    average = {"average gap": result.average_gap, "gap-A": result.gap_a}
    return render(
        "audit.html.j2",
        subject=subject,
        split=result.split,
        selection=_selection(subject.get("selector")),
        verdict=_verdict(result.verdict),
        averages=[_average(name, gap) for name, gap in average.items()],
        compared=[row for row in plain if row["compared"]],
        others=[row for row in plain if not row["compared"]],
        findings=rows if shape else plain + mine,
        topology=shape,
        later=after.section(result.findings, rows, "f"),
        pictures=_pictures(result.to_dict(), "a"),
        layers=_layers(subject),
        costs=_costs(subject.get("cost") or {}),
        not_shown=result.not_shown,
    )


def story_page(story: Mapping[str, Any]) -> str:
    """One report over many methods and settings, as ``efface demo`` and ``efface bench`` write it.

    Args:
        story: ``title``, ``intro``, ``task``, ``command``, ``seed``, ``versions``, ``created``,
            ``duration_seconds``, ``notes``, ``sections`` (each with ``heading``, ``text``,
            ``rows`` of methods and ``cells``: whole audits to show pictures of), ``not_shown`` and
            ``reproduce``. What is absent is left out.

    Returns:
        A whole HTML document.

    Example:
        >>> "Nothing here" in story_page({"title": "Nothing here", "sections": []})
        True
    """
    sections = [_section(part, index) for index, part in enumerate(story.get("sections") or ())]
    return render("story.html.j2", story=story, sections=sections, columns=_columns())


def render(template: str, **values: Any) -> str:
    """A template of this package, filled."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("efface.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "seconds": seconds,
        "significant": significant,
        "when": _when,
    }
    environment.globals["DASH"] = DASH
    return environment


def _when(created: str) -> str:
    """``2026-11-21T12:00:00Z`` for readers: ``2026-11-21 12:00 UTC``; other texts as they are."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*(Z|\+00:00)$", r"\1 \2 UTC", created)


def _selection(selector: Mapping[str, Any] | None) -> str:
    """What was to be forgotten, in words."""
    if not selector or selector.get("kind") not in _SELECTORS:
        return ""
    percent = number(selector.get("fraction"), "percent")
    return _SELECTORS[selector["kind"]].format_map({"seed": DASH, **selector, "percent": percent})


def _verdict(word: str) -> dict[str, str]:
    tone, icon, sentence = VERDICTS[word]
    return {"word": word, "tone": tone, "icon": icon, "sentence": sentence}


def _average(name: str, gap: float | None) -> dict[str, str]:
    word, tone = closeness(gap, None, "percent")
    return {"name": name, "text": _points(gap, "percent"), "word": word, "tone": tone}


def _points(gap: float | None, kind: str) -> str:
    """A gap as text; of percents it is in points."""
    return number(gap, kind, unit=False)


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    """One finding as a row of texts."""
    name = finding["name"]
    how = metric(name)
    measured = finding.get("status", "ok") == "ok"
    gap, floor = finding.get("gap"), finding.get("floor")
    word, tone = closeness(gap, floor, how.kind)
    return {
        "name": name,
        "metric": how,
        "measured": measured,
        "sentence": finding.get("sentence") or "",
        "value": number(finding.get("value"), how.kind),
        "interval": interval(finding.get("low"), finding.get("high"), how.kind),
        "n": finding.get("n"),
        "original": number(finding.get("original"), how.kind),
        "reference": number(finding.get("reference"), how.kind),
        "gap": _points(gap, how.kind),
        "floor": _points(floor, how.kind),
        "word": word,
        "tone": tone,
        "compared": gap is not None
        or finding.get("reference") is not None
        or finding.get("direction") == "match",
    }


def _pictures(audit: Mapping[str, Any], salt: str) -> list[dict[str, Any]]:
    """The series of an audit's findings as figures."""
    selector = (audit.get("subject") or {}).get("selector") or {}
    mark = str(selector["class"]) if selector.get("kind") == "class" else None
    found = []
    for index, finding in enumerate(audit["findings"]):
        series = finding.get("series")
        if not series or series["kind"] not in _PICTURES:
            continue
        key, kind = f"{salt}{index}", series["kind"]
        if kind == "histogram":
            drawn = [
                plots.histogram(panel, series["x_label"], f"{key}-{at}")
                for at, panel in enumerate(series["panels"])
            ]
            groups = series["panels"][0]["groups"] if series["panels"] else []
        else:
            drawn = [plots.bars(series, key, mark) if kind == "bars" else plots.curve(series, key)]
            groups = series["groups"]
        found.append(
            {
                "kind": kind,
                "metric": metric(finding["name"]),
                "svgs": drawn,
                "legend": _legend([str(group["label"]) for group in groups]),
            }
        )
    return sorted(found, key=lambda picture: _PICTURES.index(picture["kind"]))


def _legend(labels: Sequence[str]) -> list[dict[str, Any]]:
    return [{"label": label, "place": plots.role(label, at)} for at, label in enumerate(labels)]


def _layers(subject: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sparsity per layer before and after; nothing when no layer has a mask."""
    sides = {
        side: {layer["name"]: layer for layer in (subject.get(side) or {}).get("layers") or ()}
        for side in ("before", "after")
    }
    if not any(layer["sparsity"] for layers in sides.values() for layer in layers.values()):
        return None
    names = list(dict.fromkeys(name for layers in sides.values() for name in layers))
    shares = [
        (side, [100 * layers[n]["sparsity"] if n in layers else None for n in names])
        for side, layers in sides.items()
    ]
    return {
        "svg": plots.lying_bars(names, shares, "weights removed, %", "layers", limit=100),
        "legend": _legend([side for side, _ in shares]),
        "rows": [(name, *(layers.get(name) for layers in sides.values())) for name in names],
        "totals": {side: (subject.get(side) or {}).get("sparsity") for side in sides},
    }


def _costs(cost: Mapping[str, Any]) -> dict[str, Any] | None:
    """Cost of the method, of retraining and of the original training."""
    words = {"method": "forgetting", "retrain": "retraining", "original": "original training"}
    rows = [(word, cost[key]) for key, word in words.items() if cost.get(key)]
    if not rows:
        return None
    roles = ["after", "retrained", "before"]
    present = [role for role, key in zip(roles, words, strict=True) if cost.get(key)]
    return {
        "rows": rows,
        "bars": list(zip(present, rows, strict=True)),
        "longest": max(row.get("wall") or 0.0 for _, row in rows) or 1.0,
    }


def _columns() -> list[tuple[str, Metric]]:
    return [(name, metric(name)) for name in _COLUMNS]


def _section(part: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One section of a story: its table's rows, plots and pictures."""
    rows = [_method_row(row) for row in part.get("rows") or ()]
    cells = [
        {
            "title": (cell.get("subject") or {}).get("title") or "audit",
            "verdict": _verdict(cell["verdict"]),
            "pictures": [
                picture
                for picture in _pictures(cell, f"s{index}c{at}")
                if picture["kind"] == "histogram"
            ],
        }
        for at, cell in enumerate(part.get("cells") or ())
    ]
    gaps = [row for row in rows if row["average_gap"] is not None or row["gap_a"] is not None]
    floors = [row["average_gap"] for row in rows if row["method"] == "retrain"]
    timed = [row for row in gaps if row["rte_seconds"] and row["average_gap"] is not None]
    return {
        "heading": part["heading"],
        "text": part.get("text") or "",
        "rows": rows,
        "dots": plots.gap_dots(gaps, floors[0] if floors else None, f"g{index}") if gaps else "",
        "scatter": plots.time_and_gap(timed, f"t{index}") if len(timed) > 1 else "",
        "floor": bool(floors) and floors[0] is not None,
        "cells": cells,
    }


def _method_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """One method of a story's table, texts beside the numbers that the plots need."""
    model = row.get("model") or ""
    method = str(row["method"])
    word, tone = closeness(row.get("average_gap"), None, "percent")
    href = row.get("href")
    return {
        "method": method,
        "model": model,
        "label": f"{method} · {model}" if model else method,
        "sparse": model.startswith("sparse"),
        "place": plots.role(method, 1) if method in ("original", "retrain") else 1,
        "cells": [_method_cell(row.get(name), how) for name, how in _columns()],
        "average_gap": row.get("average_gap"),
        "gap_a": row.get("gap_a"),
        "word": word,
        "tone": tone,
        "rte_seconds": row.get("rte_seconds"),
        "rte_ratio": row.get("rte_ratio"),
        "verdict": _verdict(row["verdict"]) if row.get("verdict") else None,
        # Only links to files beside the report: a scheme could run a script.
        "href": href if href and not re.match(r"\s*[A-Za-z][\w+.-]*:", href) else None,
        "sentence": row.get("sentence") or "",
    }


def _method_cell(cell: Mapping[str, Any] | None, how: Metric) -> dict[str, str]:
    cell = cell or {}
    gap = cell.get("gap")
    return {
        "value": number(cell.get("value"), how.kind),
        "interval": interval(cell.get("low"), cell.get("high"), how.kind),
        "gap": _points(gap, how.kind) if gap is not None else "",
        "tone": closeness(gap, None, how.kind)[1],
        "word": closeness(gap, None, how.kind)[0],
    }
