"""The public names: one table, sorted, importable, explained; and light until they are touched."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import efface

EXPLAINED = (">>>", "Example", "``efface", ":func:", ":meth:", ":class:", "Source:")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_all_is_the_lazy_table() -> None:
    assert set(efface.__all__) == {*efface._PLACES, *efface._ROOMS}
    assert efface.__all__ == sorted(efface.__all__)
    assert list(efface._PLACES) == sorted(efface._PLACES)
    assert list(efface._ROOMS) == sorted(efface._ROOMS)
    assert dir(efface) == sorted([*efface.__all__, "__version__"])


@pytest.mark.parametrize("name", efface.__all__)
def test_every_name_is_what_the_table_says(name: str) -> None:
    value = getattr(efface, name)
    if name in efface._ROOMS:
        assert isinstance(value, types.ModuleType)
        assert value.__name__ == f"efface.{name}"
    else:
        assert value.__name__ == name
        assert value.__module__.split(".")[1] == efface._PLACES[name]


@pytest.mark.parametrize("name", efface.__all__)
def test_every_name_is_explained(name: str) -> None:
    value = getattr(efface, name)
    text = inspect.getdoc(value) or ""
    assert len(text.splitlines()[0]) > 10
    if isinstance(value, types.ModuleType):
        return
    methods = [inspect.getdoc(v) or "" for n, v in vars(value).items() if not n.startswith("_")]
    assert any(mark in part for part in (text, *methods) for mark in EXPLAINED), (
        f"{name} has neither an example nor a reference in its docstring"
    )


def test_functions_do_not_share_a_name_with_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(efface.__path__)}
    assert not modules & set(efface._PLACES)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'efface' has no attribute 'nothing'"):
        _ = efface.nothing


def test_import_alone_is_light() -> None:
    heavy = "('torch', 'numpy', 'scipy', 'sklearn', 'typer', 'rich', 'pydantic', 'matplotlib')"
    code = f"import sys, efface; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_version_is_the_package_s() -> None:
    try:
        assert version("efface") == efface.__version__
    except PackageNotFoundError:  # used from a source folder that is not installed
        pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
        assert f'version = "{efface.__version__}"' in pyproject.read_text(encoding="utf-8")
