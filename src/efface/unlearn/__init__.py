"""Unlearners: one file per method family, found by looking into this folder."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from efface.errors import MethodError, nearest
from efface.options import changed, check_known, convert, in_words, merged
from efface.sparsify import PRUNERS, Pruner, build_pruner
from efface.unlearn.amnesiac import Amnesiac, AmnesiacControl
from efface.unlearn.ascent import GradientAscent, NegGradPlus
from efface.unlearn.base import (
    Chain,
    Masked,
    PruneFirst,
    Unlearner,
    check_needs,
    filled,
    needs_of,
    to_json,
)
from efface.unlearn.boundary import BoundaryExpand, BoundaryShrink
from efface.unlearn.certified import Certified
from efface.unlearn.class_pruning import ClassPruning
from efface.unlearn.dfmu import DFMU
from efface.unlearn.difference import CheckpointDifference
from efface.unlearn.finetune import FineTune, L1Sparse
from efface.unlearn.fisher import FisherForgetting
from efface.unlearn.from_dense import FromDense
from efface.unlearn.frugal import Frugal
from efface.unlearn.influence import Influence
from efface.unlearn.logit_off import LogitOff
from efface.unlearn.partial import LayerwisePartial
from efface.unlearn.presets import PRESETS, Preset
from efface.unlearn.proximal import ProximalL1
from efface.unlearn.relabel import RandomLabel
from efface.unlearn.replaying import Replay
from efface.unlearn.retrain import Retrain
from efface.unlearn.salun import SalUn
from efface.unlearn.scrub import Scrub
from efface.unlearn.sfron import SFRon
from efface.unlearn.ssd import SSD
from efface.unlearn.unprune import Unprune
from efface.unlearn.unsir import Unsir

__all__ = [
    "DFMU",
    "SSD",
    "Amnesiac",
    "AmnesiacControl",
    "BoundaryExpand",
    "BoundaryShrink",
    "Certified",
    "Chain",
    "CheckpointDifference",
    "ClassPruning",
    "FineTune",
    "FisherForgetting",
    "FromDense",
    "Frugal",
    "GradientAscent",
    "Influence",
    "L1Sparse",
    "LayerwisePartial",
    "LogitOff",
    "Masked",
    "NegGradPlus",
    "ProximalL1",
    "PruneFirst",
    "RandomLabel",
    "Replay",
    "Retrain",
    "SFRon",
    "SalUn",
    "Scrub",
    "Unlearner",
    "Unprune",
    "Unsir",
    "build",
    "catalogue",
    "check_needs",
    "filled",
    "methods",
    "presets",
    "pruners",
    "to_json",
]

ALIASES = {
    "ft": "finetune",
    "ga": "gradient-ascent",
    "l1": "l1-sparse",
    "ff": "fisher-forgetting",
    "iu": "influence",
    "cu": "certified",
    "tf-idf": "class-pruning",
}


@cache
def methods() -> dict[str, type[Any]]:
    """Name → class of every unlearner in this folder.

    Raises:
        MethodError: If two classes carry one name.
    """
    found: dict[str, type[Any]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for item in vars(module).values():
            value: Any = item
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and hasattr(value, "__dataclass_fields__") and hasattr(value, "needs"):
                if value.name in found:
                    raise MethodError(f"two unlearners are called {value.name!r}; rename one.")
                found[value.name] = value
    return dict(sorted(found.items()))


def presets() -> dict[str, Preset]:
    """Name → preset, of those whose method is there.

    >>> presets()["partial-ascent"].method
    'layerwise-partial'
    """
    return {name: preset for name, preset in PRESETS.items() if preset.method in methods()}


def build(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make a method from its name and options (nested ones as mappings with ``"method"``).

    Options may be text, as the command line gives them; they are converted and checked.

    Args:
        name: The name of a method or preset, or an alias.
        options: Option → value.

    Raises:
        MethodError: For an unknown name or option (with the nearest one), a value of the wrong
            type or out of range, or an option that is required and missing.

    >>> build("ft", {"epochs": "3"})
    FineTune(epochs=3, lr=None, bn='train')
    """
    known = methods()
    name = ALIASES.get(name, name)
    if name in presets():
        preset = PRESETS[name]
        name, options = preset.method, _over(preset.options, options or {})
    if name in PRUNERS and name not in known:
        return build_pruner(name, options)
    if name not in known:
        names = [*methods(), *presets(), *ALIASES]
        raise MethodError(f"method {name!r} is unknown; {nearest(name, names)}")
    cls = known[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for option, value in (options or {}).items():
        check_known(name, option, cls)
        hint = hints[option]
        if hint in (Unlearner, Pruner):
            values[option] = _nested(name, option, value, fields[option])
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[option] = _grouped(name, option, value, hint)
        else:
            values[option] = convert(name, option, value, hint)
    missing = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
    ]
    if missing:
        raise MethodError(f"{name} needs {', '.join(missing)}, which only Python can give.")
    return cls(**values)


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's options with those given laid over them; another inner method brings its own."""
    own = {}
    for option, value in base.items():
        more = given.get(option)
        named = more.get("method") if isinstance(more, Mapping) else None
        same = named is None or not isinstance(value, Mapping)
        if same or ALIASES.get(str(named), named) == value.get("method"):
            own[option] = value
    return merged(own, given)


def _nested(name: str, option: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """A method inside a wrapper: an object, a name, or options with or without a name."""
    inner = value
    if isinstance(value, str | Mapping):
        options = {"method": value} if isinstance(value, str) else dict(value)
        kind = options.pop("method", None)
        if field.default_factory is not dataclasses.MISSING:
            usual = field.default_factory()
            if kind is None or ALIASES.get(str(kind), kind) == usual.name:  # what is left out stays
                own = {f.name: getattr(usual, f.name) for f in dataclasses.fields(usual)}
                kind, options = usual.name, merged(own, options)
        inner = build(str(kind), options)
    wanted: Any = Pruner if option == "pruner" else Unlearner
    if not isinstance(inner, wanted):
        what = f"a pruner ({', '.join(PRUNERS)})" if wanted is Pruner else "a method"
        raise MethodError(f"{name}: {option} must be {what}, not {value!r}.")
    return inner


def _grouped(name: str, option: str, value: Any, cls: type[Any]) -> Any:
    """A group of options: an object, or some of its options as a mapping."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise MethodError(
            f"{name}: {option} is a group of options; give one of them, such as "
            f"{option}.{dataclasses.fields(cls)[0].name}=…, not {value!r}."
        )
    options = {key: one for key, one in value.items() if key != "method"}
    return changed(f"{name}: {option}", cls(), options)


def catalogue(name: str | None = None) -> list[dict[str, Any]]:
    """What each method and preset is, needs and takes; or the one named, which may be a pruner.

    Raises:
        MethodError: If there is no method of that name.
    """
    if name is None:
        entries = [_entry(cls) for cls in methods().values()]
        return sorted([*entries, *map(_preset, presets())], key=lambda entry: str(entry["name"]))
    if name in presets():
        return [_preset(name)]
    found = methods() | {pruner: _class_of(pruner) for pruner in PRUNERS}
    name = ALIASES.get(name, name)
    if name not in found:
        names = [*found, *presets(), *ALIASES]
        raise MethodError(f"method {name!r} is unknown; {nearest(name, names)}")
    return [_entry(found[name]) | {"name": name}]


def _class_of(pruner: str) -> type[Any]:
    """A pruner's class; that of a criterion's name is the schedule it is mostly used with."""
    factory: Any = PRUNERS[pruner]
    cls: type[Any] = getattr(factory, "func", factory)
    return cls


def pruner_classes() -> dict[str, type[Any]]:
    """Name → class of every pruner, those that stand for a criterion left out."""
    return {name: cls for name, cls in PRUNERS.items() if isinstance(cls, type)}


def pruners() -> list[dict[str, Any]]:
    """What each pruner is and takes, as :func:`catalogue` says it of methods."""
    return [_entry(cls) for cls in pruner_classes().values()]


def _entry(cls: type[Any]) -> dict[str, Any]:
    return {
        "name": cls.name,
        "title": cls.title,
        "paper": cls.paper,
        "needs": sorted(_needs(cls)),
        "options": _listed(cls),
        "doc": inspect.getdoc(cls) or "",
    }


def _listed(cls: type[Any]) -> list[dict[str, Any]]:
    """Options of a class; those of a group after its name and a dot."""
    hints = typing.get_type_hints(cls)
    options: list[dict[str, Any]] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            group = _listed(hints[f.name])
            options += [o | {"name": f"{f.name}.{o['name']}"} for o in group]
        else:
            kind = in_words(hints[f.name])
            options.append({"name": f.name, "type": kind, "default": _default(f)})
    return options


def _preset(name: str) -> dict[str, Any]:
    """The same of a preset, with its own defaults and, after a dot, what the inner method takes."""
    preset, made = PRESETS[name], build(name)
    return {
        "name": name,
        "title": preset.title,
        "paper": preset.paper,
        "needs": sorted(needs_of(made)),
        "options": _options(made),
        "doc": preset.doc,
    }


def _options(made: Any) -> list[dict[str, str]]:
    """Options of a method as it is made, those of what it contains after its own."""
    options = []
    for entry in _entry(type(made))["options"]:
        value = getattr(made, entry["name"])
        inside = isinstance(value, Unlearner | Pruner)
        options.append(entry | {"default": value.name if inside else str(value)})
        if inside:
            inner = _options(value)
            options += [o | {"name": f"{entry['name']}.{o['name']}"} for o in inner]
    return options


def _needs(cls: type[Any]) -> frozenset[str]:
    """What a method or pruner needs as it is by default."""
    declared = cls.needs if hasattr(cls, "needs") else cls().requires
    return declared if isinstance(declared, frozenset) else cls().needs


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    made = field.default_factory
    return "required" if made is dataclasses.MISSING else str(made().name)
