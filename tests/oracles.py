"""Slow twins: every fast path again, from its definition, with loops, in float64.

Nothing here may import from efface: a twin that shares code with its sibling proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

# --- statistics -----------------------------------------------------------------------------------


def kernel(positive: float, negative: float) -> float:
    """1 where the positive scores higher, a half for a tie (Mann-Whitney)."""
    return 1.0 if positive > negative else 0.5 if positive == negative else 0.0


def pairwise_auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Share of pairs that the positive wins."""
    total = 0.0
    for p in positive:
        for n in negative:
            total += kernel(p, n)
    return total / (len(positive) * len(negative))


def delong_variance(positive: Sequence[float], negative: Sequence[float]) -> float:
    """DeLong et al. 1988: S10/m + S01/n from the structural components V10 and V01."""
    m, n = len(positive), len(negative)
    area = pairwise_auc(positive, negative)
    v10 = [sum(kernel(p, q) for q in negative) / n for p in positive]
    v01 = [sum(kernel(p, q) for p in positive) / m for q in negative]
    s10 = sum((v - area) ** 2 for v in v10) / (m - 1)
    s01 = sum((v - area) ** 2 for v in v01) / (n - 1)
    return s10 / m + s01 / n


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p)."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def clopper_pearson(k: int, n: int, level: float) -> tuple[float, float]:
    """The p at which k or more, and k or fewer, have probability (1 - level) / 2, by bisection."""
    tail = (1 - level) / 2

    def solve(too_low: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return low

    lower = 0.0 if k == 0 else solve(lambda p: binomial_tail(k, n, p) < tail)
    upper = 1.0 if k == n else solve(lambda p: 1 - binomial_tail(k + 1, n, p) > tail)
    return lower, upper


def roc_points(positive: Sequence[float], negative: Sequence[float]) -> list[tuple[float, float]]:
    """(FPR, TPR) of "score >= threshold" at every distinct score, from (0, 0)."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*positive, *negative}, reverse=True):
        fpr = sum(s >= threshold for s in negative) / len(negative)
        tpr = sum(s >= threshold for s in positive) / len(positive)
        points.append((fpr, tpr))
    return points


def cross_fitted_hits(
    halves: Sequence[tuple[Sequence[float], Sequence[float]]], fpr: float
) -> tuple[int, list[float]]:
    """Hits over (positives, negatives) halves, and each half's false-positive rate.

    The threshold is the lowest negative score that flags ("score > threshold") at most the share
    ``fpr`` of its own half.
    """
    hits, rates = 0, []
    for judged, judge in halves:
        for threshold in sorted(judge):
            flagged = sum(s > threshold for s in judge)
            if flagged <= fpr * len(judge) + 1e-9:
                break
        hits += sum(s > threshold for s in judged)
        rates.append(flagged / len(judge))
    return hits, rates


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def percentile_bootstrap(
    values: Sequence[float],
    generator: np.random.Generator,
    statistic: Callable[[list[float]], float],
    resamples: int,
    level: float,
) -> tuple[float, float]:
    """One resample after the other."""
    found = []
    for _ in range(resamples):
        chosen = generator.integers(0, len(values), len(values))
        found.append(statistic([values[int(i)] for i in chosen]))
    return percentile(found, (1 - level) / 2), percentile(found, (1 + level) / 2)


def js_distance(p: Sequence[float], q: Sequence[float]) -> float:
    """Square root of the mean base-2 divergence of two distributions to their midpoint."""
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        divergence += 0.5 * a * math.log2(a / middle) if a > 0 else 0.0
        divergence += 0.5 * b * math.log2(b / middle) if b > 0 else 0.0
    return math.sqrt(max(divergence, 0.0))


def margin(logits: Sequence[float], target: int) -> float:
    """log p_y - log of the sum of the other probabilities; for moderate logits."""
    weights = [math.exp(z) for z in logits]
    total = sum(weights)
    others = sum(w / total for c, w in enumerate(weights) if c != target)
    return math.log(weights[target] / total) - math.log(others)


def modified_entropy(p: Sequence[float], target: int) -> float:
    """Song & Mittal 2021, for one row with every probability strictly between 0 and 1."""
    found = -(1 - p[target]) * math.log(p[target])
    for c, share in enumerate(p):
        if c != target:
            found -= share * math.log(1 - share)
    return found


# --- training -------------------------------------------------------------------------------------


def cut(positions: Sequence[int], size: int) -> list[list[int]]:
    """Batches in order; a last batch of one record joins the one before."""
    batches: list[list[int]] = []
    for position in positions:
        if not batches or len(batches[-1]) == size:
            batches.append([])
        batches[-1].append(position)
    if len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of a step, counted from 0: a straight line up, then the schedule's shape."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps + 1)
    rest = (step - warmup * steps) / (steps - warmup * steps)
    if schedule == "linear":
        return peak * (1 - rest)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * rest)) / 2
    if schedule == "step":
        return peak * (1.0 if step < steps / 2 else 0.1 if step < 3 * steps / 4 else 0.01)
    return peak


class ScalarOptimizer:
    """SGD with Nesterov momentum, Adam and AdamW, one number at a time, from their formulas."""

    def __init__(self, kind: str, momentum: float, weight_decay: float) -> None:
        self.kind, self.mu, self.decay = kind, momentum, weight_decay
        self.state: dict[str, list[list[float]]] = {}
        self.steps: dict[str, int] = {}

    def updated(self, name: str, w: list[float], g: list[float], lr: float) -> list[float]:
        """The new weights."""
        self.steps[name] = t = self.steps.get(name, 0) + 1
        memory = self.state.setdefault(name, [[0.0, 0.0] for _ in w])
        return [
            self._sgd(*row, lr) if self.kind == "sgd" else self._adam(*row, lr, t)
            for row in zip(w, g, memory, strict=True)
        ]

    def _sgd(self, w: float, g: float, memory: list[float], lr: float) -> float:
        g = g + self.decay * w
        memory[0] = self.mu * memory[0] + g  # v ← μv + g
        return w - lr * (g + self.mu * memory[0])  # Nesterov: look ahead along v

    def _adam(self, w: float, g: float, memory: list[float], lr: float, t: int) -> float:
        if self.kind == "adamw":
            w = w - lr * self.decay * w
        else:
            g = g + self.decay * w
        memory[0] = 0.9 * memory[0] + 0.1 * g
        memory[1] = 0.999 * memory[1] + 0.001 * g * g
        first, second = memory[0] / (1 - 0.9**t), memory[1] / (1 - 0.999**t)
        return w - lr * first / (math.sqrt(second) + 1e-8)


@dataclass
class HandStream:
    """A stream of the hand-written loop: who comes when, and how often."""

    permutation: Callable[[int], Sequence[int]]
    size: int
    period: int = 1
    turn: int = -1
    queue: list[list[int]] = field(default_factory=list)

    def next(self) -> tuple[int, list[int]]:
        """(pass, positions) of the next batch; a new pass starts where the last one ends."""
        if not self.queue:
            self.turn += 1
            self.queue = cut(self.permutation(self.turn), self.size)
        return self.turn, self.queue.pop(0)


def train_by_hand(
    network: nn.Module,
    streams: dict[str, HandStream],
    loss: Callable[[nn.Module, dict[str, tuple[int, list[int]]], int], torch.Tensor],
    optimizer: ScalarOptimizer,
    rates: Sequence[float],
    *,
    dropped: Callable[[int], dict[str, torch.Tensor]] = lambda step: {},
    frozen_bn: bool = False,
) -> list[float]:
    """A plain loop over steps in place, updates by loops over numbers; the loss of every step."""
    losses = []
    for step, lr in enumerate(rates):
        network.train()
        for module in network.modules():
            if frozen_bn and isinstance(module, nn.BatchNorm2d):
                module.eval()
        batches = {n: s.next() for n, s in streams.items() if step % s.period == 0}
        value = loss(network, batches, step)
        named = dict(network.named_parameters())
        gradients = torch.autograd.grad(value, list(named.values()))
        losses.append(float(value.detach()))
        for (name, p), g in zip(named.items(), gradients, strict=True):
            new = optimizer.updated(name, p.flatten().tolist(), g.flatten().tolist(), lr)
            gone = dropped(step).get(name)
            for i, is_gone in enumerate([] if gone is None else gone.flatten().tolist()):
                new[i] = 0.0 if is_gone else new[i]
            p.data = torch.tensor(new, dtype=p.dtype).reshape(p.shape)
    return losses
