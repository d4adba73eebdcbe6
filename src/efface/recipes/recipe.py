"""Recipes: an experiment of a paper in one TOML file, every hyper-parameter in it.

A recipe has sizes (the same experiment on other data), each with models (dense, pruned), methods
with their options and, where a value was searched, the grid and the proxy forget set of the
search. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from efface.errors import InputError, MethodError, nearest
from efface.recipes.frugality import AFTER
from efface.recipes.plan import Size
from efface.recipes.sources import Part
from efface.recipes.undoing import SIDES, UNDONE

TOPOLOGY = (
    *("mask_iou", "mask_iom", "mask_iou_before", "mask_iou_chance", "mask_iou_initial"),
    *("mask_iou_ceiling", "mask_iou_other_init", "mask_trace"),
    *("mask_trace_between", "mask_lean", "mask_lean_before", "mask_lean_goal"),
)
"""What a row of a pruned model says of its mask, beside masks pruned after retraining."""

MEASURED = (
    *("ua", "ra", "ta", "mia_efficacy", "mia_auc", "margin_forget"),
    *("forget_class_test_accuracy", "asr", "asr_paper", "probe", "kept_accuracy"),
    *("mia_tpr_at_1fpr", *TOPOLOGY, *UNDONE),
    *("ra_worst", *AFTER),
)
"""What a row holds, as far as it applies."""

METRICS = (*MEASURED, *SIDES, "average_gap", "gap_a", "seconds", "cost")
"""What a claim or a curve can be about."""


class Claim(Part):
    """A claim to test: a metric of one (model, method) is less than that of another.

    It is tested in each scenario that has both, in one, or, ``pooled``, on the means over all. With
    a margin ``by`` it is that less + by is less than the other; with ``times`` that less is less
    than so many times the other.
    """

    text: str
    metric: str
    less: tuple[str, str]
    than: tuple[str, str]
    scenario: str | None = None
    pooled: bool = False
    by: float = 0.0
    times: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _where(self) -> Claim:
        if self.pooled and self.scenario is not None:
            raise ValueError("a pooled claim is about all scenarios; name none")
        return self


class Curve(Part):
    """A plot against sparsity: one line for each of some methods (``original`` is one)."""

    metric: str
    methods: tuple[str, ...]


class Recipe(Part):
    """An experiment; see ``efface/recipes/*.toml`` for those that come along."""

    name: str
    title: str
    source: str
    about: str
    claims: tuple[Claim, ...] = ()
    curves: tuple[Curve, ...] = ()
    paper: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...] | float]]] = {}
    size: Mapping[str, Size] = Field(min_length=1)

    @model_validator(mode="after")
    def _named(self) -> Recipe:
        """Claims and curves speak of metrics, scenarios, models and methods that some size has."""
        rows = {
            (scenario, model.name, method)
            for size in self.size.values()
            for scenario in size.cases
            for model in size.models_in(scenario)
            for method in size.methods_of(model, scenario)
        }
        for claim in self.claims:
            for pair in (claim.less, claim.than):
                where = claim.scenario
                if not any(row[1:] == pair and where in (None, row[0]) for row in rows):
                    at = f" in scenario {where!r}" if where is not None else ""
                    raise ValueError(f"a claim speaks of {' · '.join(pair)}{at}, which no size has")
            if claim.metric not in METRICS:
                raise ValueError(f"a claim's metric {claim.metric!r} is unknown")
        for curve in self.curves:
            strange = set(curve.methods) - {method for _, _, method in rows}
            if strange or curve.metric not in METRICS:
                raise ValueError(f"a curve speaks of {strange or {curve.metric}}, which is unknown")
        return self


def names() -> list[str]:
    """The recipes that come along."""
    folder = resources.files("efface.recipes")
    found = (Path(f.name) for f in folder.iterdir() if f.name.endswith(".toml"))
    return sorted(path.stem for path in found)


def source(recipe: str) -> tuple[str, Recipe]:
    """A recipe by its name, or from a TOML file: its text, and what it says.

    Raises:
        InputError: If there is none of that name, or the file is no recipe; the sentence names the
            key that is wrong.
    """
    if recipe.endswith(".toml"):
        path = Path(recipe)
        try:
            text = path.read_text()
        except OSError as error:
            raise InputError(f"{recipe} cannot be read ({error.strerror}); check it.") from None
    elif recipe in names():
        text = (resources.files("efface.recipes") / f"{recipe}.toml").read_text()
    else:
        raise InputError(
            f"recipe {recipe!r} is unknown; {nearest(recipe, names())} One of your own is given "
            "as FILE.toml."
        )
    return text, parse(text, Path(recipe).stem)


def parse(text: str, name: str) -> Recipe:
    """A recipe from TOML.

    Raises:
        InputError: If it is no TOML, or holds an unknown key or a value that does not fit.
    """
    try:
        values = tomllib.loads(text)
        return Recipe(name=name, **_with_common(values))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {name} is not TOML ({error}); correct it.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = "this key is unknown"
        raise InputError(f"recipe {name}, {where}: {what}; correct it.") from None
    except MethodError as error:
        raise InputError(f"recipe {name}: {error}") from None


def _with_common(values: dict[str, Any]) -> dict[str, Any]:
    """Sizes with what the recipe says for all of them: ``[common]`` lies beneath each size."""
    from efface.options import merged

    common = values.pop("common", {})
    sizes = values.get("size", {})
    if isinstance(common, Mapping) and isinstance(sizes, Mapping):
        values["size"] = {
            n: merged(common, s) if isinstance(s, Mapping) else s for n, s in sizes.items()
        }
    return values
