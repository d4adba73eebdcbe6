"""Distances: of answers, of weights, of masks; and what forgetting cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch

from efface.auditing.base import Finding, Part, Subject, absent
from efface.signals import softmax
from efface.stats import bootstrap, js_distance
from efface.trained import TrainedModel

NO_REFERENCE = "needs a retrained model to compare with; make one with efface retrain."


@dataclass(frozen=True)
class OutputDistance:
    """Mean Jensen–Shannon distance (0 to 1) between the answers of the model and of retrained ones.

    The floor is the mean distance between two retrained models.
    """

    part: Part

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        name = f"js_{self.part}"
        if not subject.references:
            return absent(name, NO_REFERENCE, "not_estimable")

        def answers(model: TrainedModel) -> npt.NDArray[np.float64]:
            return softmax(subject.logits(model, self.part))

        references = [answers(model) for model in subject.references]

        def distance(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            found: npt.NDArray[np.float64] = np.mean([js_distance(p, q) for q in references], 0)
            return found

        per_record = distance(answers(subject.after))
        if len(per_record) < 2:
            return absent(name, "needs two records at least.", "not_estimable")
        found = bootstrap(per_record, generator)
        pairs = [float(js_distance(p, q).mean()) for p, q in combinations(references, 2)]
        words = {"forget": "forgotten", "retain": "retained", "test": "test"}
        return Finding(
            name,
            found.value,
            found.low,
            found.high,
            found.n,
            direction="lower",
            floor=float(np.mean(pairs)) if pairs else None,
            original=float(distance(answers(subject.before)).mean()),
            sentence=f"Distance of its answers on {words[self.part]} records from retrained "
            f"models': {found.value:.3f} (0 equal, 1 opposite).",
        )


def weight_distance(a: TrainedModel, b: TrainedModel) -> float:
    """Euclidean distance between all trainable weights of two models."""
    other = dict(b.network.named_parameters())
    parts = [
        (p.detach().double() - other[n].detach().double()).square().sum()
        for n, p in a.network.named_parameters()
    ]
    return float(torch.stack(parts).sum().sqrt())


def _shapes(model: TrainedModel) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.shape) for p in model.network.parameters())


@dataclass(frozen=True)
class WeightDistance:
    """How far the weights moved from the original, or lie from retrained ones (‖θ − θ′‖₂).

    Two retrained networks are far apart themselves (hidden units can be swapped), so the second is
    to be read beside its floor.
    """

    to: str

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        name = f"weight_distance_{self.to}"
        n = sum(p.numel() for p in subject.after.network.parameters())
        compared = subject.references if self.to == "reference" else ()
        if len({_shapes(m) for m in (subject.before, subject.after, *compared)}) > 1:
            why = "only defined between networks of the same shapes; some of these were compacted."
            return absent(name, why, "undefined")
        if self.to == "original":
            value = weight_distance(subject.after, subject.before)
            text = f"The weights lie {value:.2f} from the original's (one measurement)."
            return Finding(name, value, n=n, direction="info", original=0.0, sentence=text)
        if not subject.references:
            return absent(name, NO_REFERENCE, "not_estimable")
        references = subject.references
        each = [weight_distance(subject.after, r) for r in references]
        pairs = [weight_distance(a, b) for a, b in combinations(references, 2)]
        value = float(np.mean(each))
        return Finding(
            name,
            value,
            n=n,
            direction="info",
            floor=float(np.mean(pairs)) if pairs else None,
            original=float(np.mean([weight_distance(subject.before, r) for r in references])),
            sentence=f"The weights lie {value:.2f} from retrained ones (mean over {len(each)}; no "
            "interval: read it beside the distance between two retrained models).",
        )


def step_cost(model: TrainedModel, key: str, since: int = 0) -> float:
    """Sum of a cost over the steps of a model's lineage, from the given one on."""
    return sum(float(step.cost.get(key) or 0) for step in model.lineage[since:])


@dataclass(frozen=True)
class RunTime:
    """RTE: seconds that forgetting took, or their ratio to retraining on the same machine."""

    name: str = "rte_seconds"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        since = len(subject.before.lineage) if subject.after is not subject.before else None
        if since is None:
            return absent(self.name, "nothing was done to this model.", "undefined")
        if not any(s.verb in ("forget", "retrain") for s in subject.after.lineage):
            return absent(self.name, "the lineage holds no cost of forgetting.", "not_estimable")
        retrained = subject.after.lineage[0].verb == "retrain"
        seconds = step_cost(subject.after, "wall", 0 if retrained else since)
        others = [step_cost(r, "wall") for r in subject.references]
        mean = float(np.mean(others)) if others else None
        if self.name == "rte_seconds":
            return Finding(
                self.name,
                seconds,
                n=1,
                direction="lower",
                reference=mean,
                floor=max(others) - min(others) if len(others) > 1 else None,
                sentence=f"Forgetting took {seconds:.1f} s (one run)"
                + (f"; retraining {mean:.1f} s." if mean is not None else "."),
            )
        machines = {
            (s.cost.get("machine"), s.cost.get("threads"))
            for model in (subject.after, *subject.references)
            for s in model.lineage[-1:]
        }
        if mean is None or len(machines) > 1:
            why = "the retrained models were made on another machine or with other threads."
            return absent(self.name, NO_REFERENCE if mean is None else why, "not_estimable")
        ratio = seconds / mean
        return Finding(
            self.name,
            ratio,
            n=1,
            direction="lower",
            reference=1.0,
            sentence=f"Forgetting took {ratio:.1%} of the time of retraining, on the same machine "
            "(one run).",
        )
