"""Pruning: criterion × selection × schedule × recovery."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from efface.errors import MethodError, nearest
from efface.options import check_known, convert
from efface.sparsify.criteria import (
    CRITERIA,
    Criterion,
    Grasp,
    Magnitude,
    Random,
    Snip,
    SynFlow,
    Taylor,
)
from efface.sparsify.parts import Pruner, initial_weights, rewind_epoch
from efface.sparsify.rewinding import IMP, OMP, AtInit
from efface.sparsify.schedules import Gradual, OneShot
from efface.sparsify.selection import dead_layers, narrow, select

__all__ = [
    "CRITERIA",
    "IMP",
    "OMP",
    "PRUNERS",
    "AtInit",
    "Criterion",
    "Gradual",
    "Grasp",
    "Magnitude",
    "OneShot",
    "Pruner",
    "Random",
    "Snip",
    "SynFlow",
    "Taylor",
    "build_pruner",
    "dead_layers",
    "initial_weights",
    "narrow",
    "rewind_epoch",
    "select",
]

PRUNERS: dict[str, Callable[..., Pruner]] = {
    **{cls.name: cls for cls in (OneShot, OMP, IMP, Gradual, AtInit)},
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
