"""Options as text or JSON, checked against the types of a dataclass: defaults live there alone."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from efface.errors import MethodError, nearest


def convert(owner: str, option: str, value: Any, hint: Any) -> Any:
    """A value of the type that an option asks for; text is converted.

    Raises:
        MethodError: If it is not of that type.

    >>> convert("finetune", "epochs", "3", int | None)
    3
    """
    words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if isinstance(value, str) and value.lower() in ("none", "null") and value not in words:
        value = None
    try:
        return TypeAdapter(hint).validate_python(value)
    except PydanticSchemaGenerationError:
        raise MethodError(f"{owner}: {option} can only be given in Python.") from None
    except ValidationError:
        raise MethodError(f"{owner}: {option} must be {in_words(hint)}, not {value!r}.") from None


def check_known(owner: str, option: str, cls: type[Any]) -> None:
    """Check that a dataclass has an option.

    Raises:
        MethodError: Naming the nearest one and all there are.
    """
    known = [f.name for f in dataclasses.fields(cls)]
    if option not in known:
        hint = nearest(option, known) if known else "it has none."
        raise MethodError(
            f"{owner} has no option {option!r} (options: {', '.join(known) or 'none'}); {hint}"
        )


def changed(owner: str, instance: Any, options: Mapping[str, Any]) -> Any:
    """A dataclass instance with some of its fields changed.

    Raises:
        MethodError: For an unknown option or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(instance))
    values = {}
    for option, value in options.items():
        check_known(owner, option, type(instance))
        values[option] = convert(owner, option, value, hints[option])
    return dataclasses.replace(instance, **values)


def in_words(hint: Any) -> str:
    """A type in words.

    >>> in_words(float | None)
    'a number or none'
    """
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(in_words(part) for part in typing.get_args(hint))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(hint, "none" if hint is type(None) else getattr(hint, "__name__", str(hint)))


def parse_sets(pairs: list[str]) -> dict[str, Any]:
    """``["a=1", "inner.b=2"]`` as nested options.

    Raises:
        MethodError: If a pair has no ``=``, or an option is both a value and a group.

    >>> parse_sets(["alpha=1e-3", "inner.lr=0.1"])
    {'alpha': '1e-3', 'inner': {'lr': '0.1'}}
    """
    nested: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise MethodError(f"--set takes option=value, not {pair!r}.")
        *groups, leaf = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise MethodError(f"--set {pair!r}: {group!r} has been given a value already.")
        place[leaf] = value
    return nested


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options with others laid over them.

    >>> merged({"inner": {"method": "ft", "lr": 1}}, {"inner": {"lr": 2}})
    {'inner': {'method': 'ft', 'lr': 2}}
    """
    result = dict(base)
    for name, value in more.items():
        below = result.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        result[name] = value
    return result
