"""Results of a bench to one self-contained HTML page: tables per model, tested claims, plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.report import plots
from efface.report.bench_frugality import frugality_section
from efface.report.bench_masks import is_base, masks
from efface.report.bench_stability import stability_section
from efface.report.bench_undo import undo_section, undone
from efface.report.html import render
from efface.report.words import closeness, interval, metric, number, significant

COLUMNS = (
    *("ua", "mia_efficacy", "ra", "ta", "mia_auc", "forget_class_test_accuracy"),
    *("asr", "asr_paper", "probe", "kept_accuracy"),
)
_TONES = {"holds": ("good", "✓"), "reversed": ("bad", "✗"), "not shown": ("flat", "?")}


def bench_page(document: Mapping[str, Any]) -> str:
    """The report of ``efface bench``.

    Args:
        document: What ``results.json`` holds (schema ``efface.bench/1``).

    Returns:
        A whole HTML document.

    Example:
        >>> document = {"title": "A bench", "recipe": "r", "size": "s", "source": "", "about": "",
        ...             "command": "efface bench r", "seeds": 1, "seed": 0, "environment": {},
        ...             "created": "2026-01-01T00:00:00Z", "cost": {"wall": 1.0}, "plan": {},
        ...             "search": [], "rows": [], "summary": [], "claims": [], "curves": []}
        >>> "A bench" in bench_page(document)
        True
    """
    entries = document["summary"]
    columns = [name for name in COLUMNS if any(name in e["metrics"] for e in entries)]
    names = list(dict.fromkeys(entry.get("scenario", "") for entry in entries))
    alone = [_claim(claim) for claim in document["claims"] if not claim.get("pooled")]
    pooled = [_claim(claim) for claim in document["claims"] if claim.get("pooled")]
    grid = _grid(alone, names) if alone and len(names) > 2 else None
    frugality = frugality_section(document)
    each = [] if frugality else list(enumerate(names))  # one by one they are in results.json
    return render(
        "bench.html.j2",
        bench=document,
        columns=[(name, metric(name)) for name in columns],
        scenarios=[_scenario(document, name, columns, i) for i, name in each],
        traces=any(entry.get("trace_removed") for entry in entries),
        claims=pooled if grid else [*alone, *pooled],
        claim_grid=grid,
        claimed_in=any(claim["scenario"] for claim in alone),
        frugality=frugality,
        curves=[_curve(curve, i) for i, curve in enumerate(document["curves"])],
        influence=_influence(document.get("influence")),
        stability=stability_section(document.get("stability")),
        undo=undo_section(document),
        search=[_searched(found) for found in document["search"]],
        failed=[row for row in document["rows"] if row["status"] != "ok"],
    )


def _scenario(
    document: Mapping[str, Any], name: str, columns: Sequence[str], index: int
) -> dict[str, Any]:
    """All models of a scenario; a recipe with one forget set has one, without a name."""
    entries = [e for e in document["summary"] if e.get("scenario", "") == name]
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    plan = (document["plan"].get("scenarios") or {}).get(name, {})
    asked = {k: v for k, v in plan.get("forget", {}).items() if v not in (None, 0, 0.0, {}, [])}
    return {
        "name": name,
        "forget": ", ".join(f"{k.replace('_', ' ')} = {v}" for k, v in asked.items()),
        "sections": [
            _section([e for e in entries if e["model"] == model], model, columns, f"{index}-{i}")
            for i, model in enumerate(models)
        ],
        "dots": [_dots(entries, kind, text, index) for kind, text in _GAPS if _has(entries, kind)],
    }


_NAMES = {
    **{"average_gap": "average gap", "gap_a": "gap-A", "seconds": "seconds", "cost": "cost"},
    **{"memory": "still remembered", "damage": "lost beside it"},
    "ra_worst": "RA of the worst class",
}
_GAPS = (
    ("average_gap", "average gap to retraining, points (left is better)"),
    ("gap_a", "gap-A, points (left is better)"),
)


def _has(entries: Sequence[Mapping[str, Any]], kind: str) -> bool:
    return any(entry[kind]["mean"] is not None for entry in entries)


def _section(
    entries: Sequence[Mapping[str, Any]], model: str, columns: Sequence[str], salt: str
) -> dict[str, Any]:
    sparsity = next((e["sparsity"] for e in entries if e["sparsity"]), 0.0)
    return {
        "model": model,
        "sparsity": number(sparsity, "percent") if sparsity else "",
        "rows": [_row(entry, columns) for entry in entries],
        "masks": masks(entries, f"masks-{salt}"),
        "undo": undone(entries),
    }


def _row(entry: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    average, other = entry["average_gap"], entry["gap_a"]
    word, tone = closeness(average["value"], None, "percent")
    return {
        "method": entry["method"],
        "n": entry["n"],
        "base": is_base(entry["method"]),
        "cells": [_cell(entry["metrics"].get(name), metric(name).kind) for name in columns],
        "average": number(average["value"], "percent", False),
        "average_seeds": _spread(average, "percent"),
        "average_paper": number(average["paper"] / 100, "percent", False)
        if "paper" in average
        else "",
        "word": word,
        "tone": tone,
        "other": number(other["value"], "percent", False),
        "other_seeds": _spread(other, "percent"),
        "seconds": number(entry["seconds"]["mean"], "seconds"),
        "ratio": ""
        if entry["seconds_ratio"] is None
        else f"{significant(entry['seconds_ratio'])} ×",
    }


def _spread(entry: Mapping[str, Any], kind: str) -> str:
    """``3.1 ± 0.4``, or the mean alone where one seed is all there is."""
    if entry["mean"] is None:
        return ""
    text = number(entry["mean"], kind, False)
    return text if entry["std"] is None else f"{text} ± {number(entry['std'], kind, False)}"


def _cell(entry: Mapping[str, Any] | None, kind: str) -> dict[str, str]:
    if entry is None:
        empty = dict.fromkeys(("gap", "apart", "paper", "tone", "word"), "")
        return {"value": number(None), **empty}
    gap, paper, apart = entry.get("gap"), entry.get("paper"), entry.get("apart")
    word, tone = closeness(gap, None, kind)
    theirs = ""
    if paper:
        theirs = _spread({"mean": paper["mean"], "std": paper["std"]}, kind)
        if paper["gap"] is not None and gap is not None:
            theirs += f" ({number(paper['gap'], kind, False)})"
    return {
        "value": _spread(entry, kind),
        "gap": "" if gap is None else number(gap, kind, False),
        "apart": interval(apart["low"], apart["high"], kind) if apart else "",
        "paper": theirs,
        "tone": tone,
        "word": word,
    }


def said(claim: Mapping[str, Any]) -> str:
    """What was found of a claim: one with a margin is not held where the other side is shown.

    >>> said({"verdict": "reversed", "by": 0.4})
    'not held'
    """
    margin = "by" in claim or "times" in claim
    return "not held" if margin and claim["verdict"] == "reversed" else str(claim["verdict"])


def _claim(claim: Mapping[str, Any]) -> dict[str, Any]:
    tone, icon = _TONES[claim["verdict"]]
    how = metric(claim["metric"])
    apart = claim["difference"]
    kind = {"mia_auc": "score", "seconds": "seconds"}.get(claim["metric"], "percent")
    kind = "score" if claim["metric"].startswith("mask_") else kind
    return {
        "text": claim["text"],
        "scenario": claim.get("scenario", ""),
        "less": " · ".join(claim["less"]["of"]),
        "than": " · ".join(claim["than"]["of"]),
        "values": (_spread(claim["less"], kind), _spread(claim["than"], kind)),
        "difference": number(apart["mean"], kind, False),
        "interval": interval(apart["low"], apart["high"], kind),
        "n": apart["n"],
        "metric": _NAMES.get(claim["metric"]) or how.short or how.label,
        "pooled": claim.get("pooled", False),
        "margin": _margin(claim, kind),
        "word": said(claim),
        "tone": tone,
        "icon": icon,
    }


def _margin(claim: Mapping[str, Any], kind: str) -> str:
    """What a claim asks for beyond less; nothing where it asks for no more."""
    parts = []
    if "times" in claim:
        parts.append(f"less than {significant(claim['times'])} × the other")
    if "by" in claim:
        size = number(abs(claim["by"]), kind, False)
        parts.append(f"less by {size}" if claim["by"] > 0 else f"at most {size} more")
    return ", ".join(parts)


def _grid(claims: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> dict[str, Any]:
    """Claims as rows and scenarios as columns, where a row for each of both would be too many."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for claim in claims:
        about = tuple(claim[k] for k in ("text", "metric", "less", "than"))
        row = rows.setdefault(about, {**claim, "cells": dict.fromkeys(scenarios)})
        row["cells"][claim["scenario"]] = claim if claim["n"] else None
    return {"scenarios": scenarios, "rows": list(rows.values())}


def _dots(entries: Sequence[Mapping[str, Any]], kind: str, text: str, index: int) -> dict[str, Any]:
    rows = [
        {
            "label": f"{e['method']} · {e['model']}",
            "value": e[kind]["mean"],
            "low": e[kind]["low"] and max(0.0, e[kind]["low"]),
            "high": e[kind]["high"],
            "paper": e[kind]["paper"] / 100 if "paper" in e[kind] else None,
            "open": bool(e["sparsity"]),
        }
        for e in sorted(entries, key=lambda e: e["method"] not in ("original", "retrain"))
        if e[kind]["mean"] is not None
    ]
    order = {m: i for i, m in enumerate(dict.fromkeys(e["method"] for e in entries))}
    rows.sort(key=lambda row: order[row["label"].split(" · ")[0]])
    return {
        "title": "Average gap" if kind == "average_gap" else "Gap-A",
        "svg": plots.interval_dots(rows, text, f"dots-{kind}{index or ''}"),
        "paper": any(row["paper"] is not None for row in rows),
    }


def _curve(curve: Mapping[str, Any], index: int) -> dict[str, Any]:
    how = metric(curve["metric"])
    groups = [group for group in curve["groups"] if group["points"]]
    special = any(g["label"] in ("original", "retrain") for g in groups)
    free = iter(((1, 3, 4) if special else (0, 1, 2, 3, 4)) * len(groups))
    places = [plots.role(g["label"], next(free)) for g in groups]
    name = _NAMES.get(curve["metric"]) or how.short or how.label
    label = f"{name}, {'points' if curve['metric'] in ('average_gap', 'gap_a') else '%'}"
    return {
        "title": how.label if how.short else name.capitalize(),
        "scenario": curve.get("scenario", ""),
        "svg": plots.against(groups, places, "weights removed, %", label, f"curve{index}"),
        "legend": [
            {"label": g["label"], "place": place} for g, place in zip(groups, places, strict=True)
        ],
        "paper": any(group["paper"] for group in groups),
    }


def _searched(found: Mapping[str, Any]) -> dict[str, Any]:
    def text(options: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in options.items()
        )

    return {
        "scenario": found.get("scenario", ""),
        "model": found["model"],
        "method": found["method"],
        "chosen": text(found["chosen"]),
        "edge": ", ".join(found.get("edge") or ()),
        "tried": [
            (
                text(t["options"]),
                number(t["gap"], "percent", False),
                t["options"] == found["chosen"],
            )
            for t in found["tried"]
        ],
    }


def _influence(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What each source class is worth to the downstream task."""
    if found is None:
        return None
    rows = [
        {
            "class": c,
            "text": _spread(entry, "percent"),
            "interval": interval(entry["low"], entry["high"], "percent"),
            "chosen": int(c) in found["chosen"],
        }
        for c, entry in found["classes"].items()
    ]
    return {"rows": rows, "whole": _spread(found["whole"], "percent")}
