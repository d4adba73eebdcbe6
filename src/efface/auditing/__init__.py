"""The audit: findings with intervals, beside the untouched original and retrained models."""

from __future__ import annotations

import datetime
from typing import Any

from efface.auditing.base import Audit, Cache, Finding, Subject, check_subject, last_step
from efface.auditing.blocks import BlockContrast
from efface.auditing.distance import OutputDistance, RunTime, WeightDistance
from efface.auditing.mask_trace import MaskMembership, MaskTrace, TraceBetween, TraceRemoved
from efface.auditing.masks import (
    MaskCeiling,
    MaskChance,
    MaskInitial,
    MaskOtherInit,
    MaskOverlap,
)
from efface.auditing.membership import HeldOutAUC, JiaSVC, LowFPR, Margin
from efface.auditing.probing import LinearProbe, class_only
from efface.auditing.relearning import Relearn
from efface.auditing.standing import standing
from efface.auditing.utility import ForgottenClass, PerClass, Utility
from efface.auditing.verdict import Verdict, decide
from efface.cost import versions
from efface.fitting import Progress
from efface.seeds import rng
from efface.trained import TrainedModel

__all__ = [
    "Audit",
    "Cache",
    "Finding",
    "Subject",
    "Verdict",
    "check_subject",
    "decide",
    "examine",
]

FIRST_FLOOR: tuple[Audit, ...] = (
    Utility("ua"),
    Utility("ra"),
    Utility("ta"),
    JiaSVC(),
    HeldOutAUC(),
    LowFPR(),
    Margin(),
    ForgottenClass(),
    PerClass(),
    OutputDistance("forget"),
    OutputDistance("retain"),
    OutputDistance("test"),
    WeightDistance("original"),
    WeightDistance("reference"),
    MaskOverlap("iou"),
    MaskOverlap("iom"),
    MaskChance(),
    MaskInitial(),
    MaskCeiling(),
    MaskOtherInit(),
    MaskTrace(),
    TraceBetween(),
    TraceRemoved(),
    MaskMembership(),
    MaskMembership(auc=True),
    RunTime("rte_seconds"),
    RunTime("rte_ratio"),
    LinearProbe(),
    Relearn(),
    Relearn(added=10, epochs=5),
    BlockContrast(),
)


def examine(subject: Subject, *, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Every finding of the first floor, the gaps and the verdict, as the JSON value of an audit."""
    findings = []
    for i, audit in enumerate(FIRST_FLOOR):
        findings.append(audit(subject, rng(seed, "audit", i)))
        if progress:
            progress("audit", i + 1, len(FIRST_FLOOR))
    gaps = {f.name: f.gap for f in findings}
    verdict = decide(subject)
    return {
        "subject": describe(subject, verdict, seed),
        "split": subject.split.sizes(),
        "findings": [f.to_dict() for f in findings],
        "average_gap": _mean([gaps[n] for n in ("ua", "mia_efficacy", "ra", "ta")]),
        "gap_a": _mean([gaps[n] for n in ("ua", "mia_auc", "ra", "ta")]),
        "verdict": verdict.word,
        "not_shown": not_shown(subject),
    }


def _mean(gaps: list[float | None]) -> float | None:
    known = [gap for gap in gaps if gap is not None]
    return sum(known) / len(gaps) if len(known) == len(gaps) else None


def describe(subject: Subject, verdict: Verdict, seed: int) -> dict[str, Any]:
    """What was asked, what was done, to which models, at what cost."""
    split, after = subject.split, subject.after
    last = last_step(after)
    method = last.method if last and last.verb == "forget" else None
    title = method["method"] if method else "untouched" if after is subject.before else "retrain"
    return {
        "task": split.task.name,
        "selector": dict(split.selector),
        "method": {"name": title, **_settings(method, last)} if method else None,
        "title": title,
        "asked": f"Forget {len(split.forget)} of {len(split.forget) + len(split.retain)} training "
        f"records: {_words(split.selector)}.",
        "done": _done(subject, title),
        "assumptions": list(last.detail.get("assumptions", ())) if method and last else [],
        "verdict_sentence": verdict.sentence,
        "before": _model(subject, subject.before),
        "after": _model(subject, after),
        "references": [_model(subject, r) | _kind(r) for r in subject.references],
        "originals": [_model(subject, o) | _kind(o) for o in subject.originals],
        "cost": {
            "method": _cost(after, last.cost if last else {}) if method else None,
            "retrain": _cost(subject.references[0]) if subject.references else None,
            "original": _cost(subject.before),
        },
        "seed": seed,
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tier": 1 if subject.references else 0,
    }


def _settings(method: Any, step: Any) -> dict[str, Any]:
    """What the method was given, and what the fits that it ran were given in the end."""
    given = {k: v for k, v in method.items() if k != "method" and v is not None}
    fits = step.detail.get("fits") or [{}]
    run = {k: fits[-1][k] for k in ("epochs", "lr", "batch_size") if k in fits[-1]}
    facts = {k: v for k, v in step.detail.items() if k == "cap"}
    return given | run | facts


def _words(selector: Any) -> str:
    kind = selector.get("kind")
    if kind == "class":
        return f"every record of class {selector['class']}"
    if kind == "random":
        return f"a random {selector['fraction']:.0%} (seed {selector['seed']})"
    if kind == "where":
        return f"those with {selector['expression']}"
    return "those on a list of IDs"


def _done(subject: Subject, title: str) -> str:
    if title == "untouched":
        return "Nothing: this is the original model, audited as a control."
    if title == "retrain":
        return "The model was trained anew without these records, from fresh weights."
    before, after = subject.before, subject.after
    done = f"The method {title} was run"
    if before.mask is not None:
        done += f" on a model with {before.sparsity:.0%} of its weights pruned"
    elif after.mask is not None:
        done += (
            f"; in the layers that it touched {after.sparsity:.0%} of the weights are pruned now"
        )
    return f"{done}."


def _model(subject: Subject, model: TrainedModel) -> dict[str, Any]:
    layers = model.mask.layers() if model.mask else []
    return {"digest": subject.digest(model), "sparsity": model.sparsity, "layers": layers}


def _kind(model: TrainedModel) -> dict[str, Any]:
    step = last_step(model)
    return {"like": step.detail.get("like") if step else None, "seed": model.lineage[0].seed}


def _cost(model: TrainedModel, cost: Any = None) -> dict[str, Any] | None:
    """The cost of the last step, or of all steps together."""
    if not model.lineage:
        return None
    last = dict(cost if cost is not None else model.lineage[-1].cost)
    keys = ("wall", "cpu", "images", "threads", "foreign_load")
    if cost is None:
        for key in ("wall", "cpu", "images"):
            last[key] = sum(s.cost.get(key) or 0 for s in model.lineage)
    return {key: last.get(key) for key in keys}


def not_shown(subject: Subject) -> list[str]:
    """What this audit does not show; always printed."""
    k = len(subject.references)
    lines = [
        "That no trace of the records is left in the weights: the audit looks at behaviour only.",
        "What an attacker with many shadow models could find about single records.",
        "Whether the records can be re-learned faster than by a model that never saw them"
        + (
            "."
            if class_only(subject) or k == 0
            else ", beyond the few epochs and records tried here."
        ),
        "Whether near-duplicates of the forgotten records remain among the retained ones.",
        "Copies, backups, caches and models derived from the original: delete those as well.",
    ]
    if k == 0:
        lines.insert(0, "Anything in comparison with retraining: no retrained model was given.")
    elif k == 1:
        lines.insert(0, "The noise between retrained models: only one was given.")
    if subject.before.trained_by() is None:
        lines.append(
            "That the retrained models were trained as the original was: it came from elsewhere."
        )
    here = standing(subject)
    if here is not None and len(here.scored) < 3:
        lines.append(
            "Forgetting in the pruned topology, which the forgotten records helped to shape: that "
            "takes three retrained models pruned by themselves, from the same initial weights."
        )
    return lines
