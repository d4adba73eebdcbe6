"""Membership inference: can one tell that a record was trained on?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from efface.auditing.base import Finding, Part, Subject, absent, compared
from efface.auditing.utility import shown
from efface.signals import confidence, margin, softmax
from efface.stats import Interval, auc, bootstrap, rate, roc, tpr_at_fpr
from efface.trained import TrainedModel

LEAST = 10
"""Fewer members or non-members than this, and an AUC says nothing."""


def margins(subject: Subject, model: TrainedModel, part: Part) -> npt.NDArray[np.float64]:
    """True-class margins of a part, finite."""
    values = margin(subject.logits(model, part), subject.targets(part))
    return np.clip(values, -1e6, 1e6)


def svc_efficacy(
    members: npt.NDArray[np.float64],
    outsiders: npt.NDArray[np.float64],
    forget: npt.NDArray[np.float64],
) -> int:
    """How many forgotten records a support-vector attack calls non-members (protocol ``jia-svc``).

    The attack is fitted on the model that it attacks, nothing held out, as in the code that Jia et
    al. released: scikit-learn's SVC, RBF kernel, C = 3, gamma = "auto", on one feature.

    Args:
        members: Softmax probability of the true label, first n records of D_r ``[n]``.
        outsiders: The same on test records ``[m]``.
        forget: The same on D_f ``[k]``.

    Returns:
        Records of D_f predicted non-member, at most k.
    """
    return int((_fitted_svc(members, outsiders).predict(forget[:, None]) == 0).sum())


def _fitted_svc(members: npt.NDArray[np.float64], outsiders: npt.NDArray[np.float64]) -> Any:
    """The attack, fitted on one feature: 1 is a member."""
    from sklearn.svm import SVC

    features = np.concatenate([members, outsiders])[:, None]
    labels = np.r_[np.ones(len(members)), np.zeros(len(outsiders))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SVC(C=3, gamma="auto", kernel="rbf", cache_size=500, random_state=0).fit(
            features, labels
        )


def svc_at_balance(
    members: npt.NDArray[np.float64],
    outsiders: npt.NDArray[np.float64],
    forget: npt.NDArray[np.float64],
    balance: float,
    size: int,
    generator: np.random.Generator,
) -> dict[str, float]:
    """What the attack of :func:`svc_efficacy` says when a given share of its records are members.

    Args:
        members: Softmax probability of the true label, records of D_r ``[n]``.
        outsiders: The same, test records ``[m]``.
        forget: The same, D_f ``[k]``.
        balance: Share of members among the records that the attack is fitted on, between 0 and 1.
        size: How many records it is fitted on: drawn from members and outsiders.
        generator: Which.

    Returns:
        ``accuracy`` on the records that it was fitted on, as the released code has it,
        ``mia_efficacy``, the share of D_f that it calls non-member, and ``auc``, how well the
        probability itself tells the same members from the same non-members (0.5: not at all).

    Raises:
        ValueError: If there are too few members or outsiders for this balance and size.

    >>> draw, sure = np.random.default_rng(0), np.linspace(0.8, 1.0, 90)
    >>> svc_at_balance(sure, sure - 0.8, sure, 0.9, 100, draw)["mia_efficacy"]
    0.0
    """
    n = round(balance * size)
    if not 0 < n <= len(members) or not 0 < size - n <= len(outsiders):
        raise ValueError(f"{len(members)} and {len(outsiders)} do not give {n} of {size}")
    inside = members[generator.permutation(len(members))[:n]]
    outside = outsiders[generator.permutation(len(outsiders))[: size - n]]
    attack = _fitted_svc(inside, outside)
    hits = (attack.predict(inside[:, None]) == 1).sum()
    hits += (attack.predict(outside[:, None]) == 0).sum()
    return {
        "accuracy": float(hits / size),
        "mia_efficacy": float((attack.predict(forget[:, None]) == 0).mean()),
        "auc": auc(inside, outside).value,
    }


@dataclass(frozen=True)
class JiaSVC:
    """MIA-efficacy as the papers report it; for comparison with the literature only.

    n = min(|D_r|, test records) members: the *first* n of D_r in file order; all test records
    (without a forgotten class). The score is the share of D_f called non-member; the target is
    retrain's value, not 1. Source: Jia et al. 2023, and their released code.
    """

    name: str = "mia_efficacy"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        seen = subject.seen_test
        n = min(len(subject.split.retain), int(seen.sum()))
        total = len(subject.split.forget)

        def sure(model: TrainedModel, part: Part) -> npt.NDArray[np.float64]:
            return confidence(softmax(subject.logits(model, part)), subject.targets(part))

        def measure(model: TrainedModel) -> Interval:
            members = sure(model, "retain")[:n]
            called = svc_efficacy(members, sure(model, "test")[seen], sure(model, "forget"))
            return rate(called, total)

        finding = compared(subject, self.name, measure)
        return replace(
            finding,
            sentence=f"A simple attack (protocol jia-svc, n = {n} members) takes "
            f"{finding.value:.1%} of the forgotten records for records never trained on. A legacy "
            "number: compare it with retraining only; higher is not better.",
        )


@dataclass(frozen=True)
class HeldOutAUC:
    """Our attack: do margins of D_f lie above those of unseen records of the same classes?

    The score is the margin of the true class (log-odds); no threshold is fitted for it, so nothing
    is tested on what it was fitted on. Non-members are test records in the class proportions of
    D_f: for a forgotten class, *inside that class*. 0.5 means that the two cannot be told apart.
    DeLong's interval.
    """

    name: str = "mia_auc"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        matched = subject.matched_test
        why = _too_few(subject, matched)
        if why or matched is None:
            return absent(self.name, why, "not_estimable")

        def scores(model: TrainedModel) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
            return margins(subject, model, "forget"), margins(subject, model, "test")[matched]

        groups: list[dict[str, Any]] = []
        for label, model in shown(subject):
            x, y = roc(*scores(model))
            pick = np.unique(np.linspace(0, len(x) - 1, 120).astype(int))
            groups.append({"label": label, "x": x[pick].tolist(), "y": y[pick].tolist()})
        finding = compared(subject, self.name, lambda model: auc(*scores(model)))
        inside = " inside the class" if subject.split.label is not None else ""
        return replace(
            finding,
            sentence=f"An attacker who compares forgotten with unseen records{inside} tells them "
            f"apart with AUC {finding.value:.3f} (0.5: not at all"
            + ("" if finding.reference is None else f"; retrained: {finding.reference:.3f}")
            + ").",
            series={
                "kind": "curve",
                "x_label": "false alarms",
                "y_label": "hits",
                "log_x": False,
                "groups": groups,
            },
        )


def _too_few(subject: Subject, matched: npt.NDArray[np.int64] | None) -> str:
    if matched is None:
        return "a class of the forget set has no test record to compare with."
    members = len(subject.split.forget)
    if min(members, len(matched)) < LEAST:
        return f"{members} forgotten and {len(matched)} matching test records: {LEAST} each needed."
    return ""


@dataclass(frozen=True)
class LowFPR:
    """Share of D_f that the same attack finds at 1 % false alarms, threshold held out."""

    name: str = "mia_tpr_at_1fpr"
    fpr: float = 0.01

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        matched = subject.matched_test
        needed = int(2 / self.fpr)
        if matched is None or len(matched) < needed:
            there = 0 if matched is None else len(matched)
            why = f"{there} matching test records; {needed} needed for a held-out threshold."
            return absent(self.name, why, "not_estimable")
        seed = int(generator.integers(2**63))

        def measure(model: TrainedModel) -> Interval:
            found = tpr_at_fpr(
                margins(subject, model, "forget"),
                margins(subject, model, "test")[matched],
                self.fpr,
                generator=np.random.default_rng(seed),
            )
            assert found is not None
            return found

        finding = compared(subject, self.name, measure, direction="match")
        return replace(
            finding,
            sentence=f"At {self.fpr:.0%} false alarms the attack finds {finding.value:.1%} of the "
            "forgotten records.",
        )


@dataclass(frozen=True)
class Margin:
    """Mean margin of the true class on D_f: the verdict's first statistic.

    log p_y − log Σ_{c≠y} p_c, in nats; high means that the model is sure of the right answer.
    """

    name: str = "margin_forget"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        seed = int(generator.integers(2**63))

        def measure(model: TrainedModel) -> Interval:
            values = margins(subject, model, "forget")
            if len(values) < 2:
                return Interval(float(values[0]), float(values[0]), float(values[0]), 1)
            return bootstrap(values, np.random.default_rng(seed))

        finding = compared(subject, self.name, measure, series=_histograms(subject))
        beside = "" if finding.reference is None else f", retrained {finding.reference:.2f}"
        return replace(
            finding,
            sentence=f"How sure the model is of the right answer on forgotten records: "
            f"{finding.value:.2f} nats (before {finding.original:.2f}{beside}).",
        )


def _histograms(subject: Subject) -> dict[str, Any]:
    titles = {"forget": "forgotten records", "retain": "retained records", "test": "test records"}
    panels = []
    for part, title in titles.items():
        data = {label: margins(subject, model, part) for label, model in shown(subject)}  # type: ignore[arg-type]
        if part == "test":
            data = {label: values[subject.seen_test] for label, values in data.items()}
        low, high = np.percentile(np.concatenate(list(data.values())), [0.5, 99.5])
        edges = np.linspace(low, max(high, low + 1e-3), 31)
        groups = [
            {
                "label": label,
                "counts": np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0].tolist(),
            }
            for label, v in data.items()
        ]
        panels.append({"title": title, "edges": edges.tolist(), "groups": groups})
    return {"kind": "histogram", "x_label": "margin (nats); below 0 wrong", "panels": panels}
