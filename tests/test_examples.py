"""The shipped example: its Python flow, its README on the command line, and what it promises."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

import efface

from .test_docs import EXAMPLES, playing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of examples/ to run in; the module is forgotten afterwards."""
    copy = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES.parent, copy, dirs_exist_ok=True)
    yield copy
    sys.modules.pop("breast_cancer", None)


@pytest.fixture(scope="module")
def played(folder: Path) -> Path:
    """The folder after the README was followed from top to bottom."""
    with pytest.MonkeyPatch.context() as patch, playing(folder, patch) as player:
        assert player.play(EXAMPLES) > 10
    return folder


@pytest.fixture(scope="module")
def example(folder: Path) -> Iterator[types.ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import breast_cancer

        yield breast_cancer


def test_readme_leaves_what_it_says(played: Path, example: types.ModuleType) -> None:
    audit = json.loads((played / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert audit["verdict"] == "indistinguishable"
    assert audit["subject"]["selector"]["expression"] == "site == 'east'"
    assert (played / "audit-2" / "report.html").stat().st_size > 10_000


def test_requests_add_up(played: Path, example: types.ModuleType) -> None:
    task = example.task
    third = efface.load(played / "forgot-3.safetensors", task)
    gone = {task.ids_[i] for i in third.forgotten.positions(task).tolist()}
    table = task.table()
    asked = (table["site"] == "east") | np.isin(table["subject"], ["s000", "s003"])
    asked |= (table["mean_radius"] > 25) | np.isin(table["id"], ["p016", "p018", "p031", "p050"])
    assert gone == set(table["id"][asked])
    assert len(third.forgotten.requests) == 3


def test_reference_of_the_second_request_leaves_out_the_first(
    played: Path, example: types.ModuleType
) -> None:
    reference = efface.load(played / "retrained-4.safetensors", example.task)
    second = efface.load(played / "forgot-2.safetensors", example.task)
    assert reference.forgotten.tags == second.forgotten.tags
    assert reference.lineage[0].verb == "retrain"


def test_no_id_of_a_patient_is_written_down(played: Path) -> None:
    for path in [*played.glob("*.safetensors"), *played.glob("audit*/*")]:
        data = path.read_bytes()
        assert b"s003" not in data, path.name
        assert b"p018" not in data, path.name


def test_table_is_the_real_one(example: types.ModuleType) -> None:
    task, table = example.task, load_breast_cancer()
    rows = [int(record[1:]) for record in task.ids_]
    assert list(task.columns["mean_radius"]) == list(table.data[rows, 0])
    flipped = task.records.targets.numpy() != table.target[rows]
    assert set(np.asarray(task.columns["site"])[flipped]) == {"east"}
    assert 0.2 < flipped[np.asarray(task.columns["site"]) == "east"].mean() < 0.5


def test_patients_are_not_torn_apart(example: types.ModuleType) -> None:
    ids, subjects, _, wrong = example.invented(569)
    inside = set(example.task.subjects_)
    theirs = [record for record, subject in zip(ids, subjects, strict=True) if subject in inside]
    assert theirs == example.task.ids_
    assert len(set(subjects)) < len(ids)
    assert wrong.any()


def test_task_is_the_same_every_time(example: types.ModuleType) -> None:
    again = example.make_task()
    assert again.data_fingerprint == example.task.data_fingerprint
    assert again.ids_ == example.task.ids_
