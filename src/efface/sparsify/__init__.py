"""Pruning: criterion × selection × schedule × recovery."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from efface.errors import MethodError, nearest
from efface.options import check_known, convert
from efface.sparsify.block_criteria import BLOCK_CRITERIA
from efface.sparsify.compaction import compact
from efface.sparsify.criteria import (
    CRITERIA,
    Criterion,
    Gradient,
    Grasp,
    Magnitude,
    Random,
    Snip,
    SynFlow,
    Taylor,
)
from efface.sparsify.filters import FILTER_CRITERIA, filter_scores, select_filters
from efface.sparsify.groups import (
    Group,
    Groups,
    filter_groups,
    is_structured,
    kept_filters,
    mask_of,
)
from efface.sparsify.parts import Pruner, rewind_epoch
from efface.sparsify.rewinding import IMP, OMP, AtInit
from efface.sparsify.schedules import Gradual, OneShot
from efface.sparsify.selection import dead_layers, narrow, select
from efface.sparsify.sfp import SFP
from efface.trained import TrainedModel

__all__ = [
    "BLOCK_CRITERIA",
    "CRITERIA",
    "FILTER_CRITERIA",
    "IMP",
    "OMP",
    "PRUNERS",
    "SFP",
    "AtInit",
    "Criterion",
    "Gradient",
    "Gradual",
    "Grasp",
    "Group",
    "Groups",
    "Magnitude",
    "OneShot",
    "Pruner",
    "Random",
    "Snip",
    "SynFlow",
    "Taylor",
    "build_pruner",
    "compact",
    "dead_layers",
    "filter_groups",
    "filter_scores",
    "is_structured",
    "kept_filters",
    "made_by",
    "mask_of",
    "narrow",
    "rewind_epoch",
    "select",
    "select_filters",
]

PRUNERS: dict[str, Callable[..., Pruner]] = {
    **{cls.name: cls for cls in (OneShot, OMP, IMP, Gradual, AtInit, SFP)},
    **{name: partial(AtInit, criterion=name) for name in ("synflow", "snip", "grasp")},
    **{name: partial(OneShot, criterion=name) for name in ("magnitude", "taylor", "random")},
}
"""Every pruner by its name; that of a criterion stands for the schedule it is mostly used with."""


def build_pruner(name: str, options: Mapping[str, Any] | None = None) -> Pruner:
    """Make a pruner from its name and options, which may be text.

    Args:
        name: One of :data:`PRUNERS`.
        options: Option → value.

    Raises:
        MethodError: For an unknown name or option (with the nearest one), or a value of the wrong
            type or out of range.

    >>> build_pruner("snip", {"sparsity": "0.8"}).criterion
    'snip'
    """
    if name not in PRUNERS:
        raise MethodError(f"pruning method {name!r} is unknown; {nearest(name, PRUNERS)}")
    factory: Any = PRUNERS[name]
    cls, fixed = getattr(factory, "func", factory), getattr(factory, "keywords", {})
    hints = typing.get_type_hints(cls)
    values = {}
    for option, value in (options or {}).items():
        check_known(name, option, cls)
        if option in fixed:
            raise MethodError(
                f"{name} fixes the option {option!r}; to choose it, prune with {cls.name}."
            )
        values[option] = convert(name, option, value, hints[option])
    return factory(**values)  # type: ignore[no-any-return]


def made_by(trained: TrainedModel) -> Pruner | None:
    """The pruner that made a model's mask; None where efface did not.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: efface.networks.MLP((4, 8, 2)), (x, y), (x, y))
        >>> made_by(efface.prune(efface.train(task), OneShot(sparsity=0.5, recovery=0))).sparsity
        0.5
    """
    methods = [step.method for step in reversed(trained.lineage)]
    for method in methods if trained.maker is None else [trained.maker]:
        options = _pruner_in(method)
        if options is not None:
            return build_pruner(options.pop("method"), options) if options else None
    return None


def _pruner_in(method: Any) -> dict[str, Any] | None:
    """The options of the last pruner in a method's settings; empty where a mask was given."""
    if not isinstance(method, Mapping):
        return None
    if method.get("method") in PRUNERS:
        return dict(method)
    found = [_pruner_in(value) for value in method.values()]
    last = next((options for options in reversed(found) if options is not None), None)
    return {} if last is None and method.get("method") == "masked" else last
