"""``efface log``, ``train --record`` and ``forget --log``, end to end, with bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import efface.updates.folder as folders
from efface.checkpoint import read_file
from efface.console import Run
from efface.errors import InputError, MethodError, MismatchError
from efface.logs import run_show
from efface.logs.recording import read_cohorts, recording
from efface.logs.showing import _event
from efface.logs.words import seconds, size
from efface.updates.log import UpdateLog

from .test_bad_input import check_sentence, refused
from .test_cli import Answer, done, efface, snapshot, workplace, write_task

WIDE = """
def network():
    return nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 3))

options["fit"] = efface.Settings(epochs=8, batch_size=8, lr=0.05)
"""
"""A network with two layers that are pruned, and 15 steps an epoch."""

SLOW = """
import time
def forward(network, inputs):
    time.sleep({})
    return network(inputs)
options["forward"] = forward
"""

TRAIN = "train mine:task --out m.st --record log"
COHORT = "--cohort leave.txt --cohort-epochs 3"
FORGET = "forget mine:task --model m.st --ids who.txt --log log"

FOLDER: dict[str, Path] = {}
"""A folder with a model, its log, and models that forgot; made once, copied for every test."""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a task whose layers are pruned, and lists of IDs."""
    with workplace(tmp_path, monkeypatch) as folder:
        write_task(folder, WIDE)
        names = [f"patient-{i:04d}" for i in range(8)]
        (folder / "leave.txt").write_text("\n".join(names))
        (folder / "who.txt").write_text("\n".join(names[:2]))
        yield folder


@pytest.fixture
def lab(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with ``m.st`` and its ``log``, and ``f.st``, which forgot by subtraction."""
    if not FOLDER:
        done(f"{TRAIN} {COHORT}")
        done(f"{FORGET} --method amnesiac --out f.st")
        FOLDER["made"] = tmp_path_factory.mktemp("made")
        shutil.copytree(bare, FOLDER["made"], dirs_exist_ok=True)
    shutil.copytree(FOLDER["made"], bare, dirs_exist_ok=True)
    return bare


def shown(words: str = "log show log") -> dict[str, Any]:
    return done(words, "--json").json


def segments(lab: Path) -> list[Path]:
    return sorted((lab / "log/segments").glob("*.seg"))


def contents(lab: Path) -> dict[str, Any]:
    """Everything that a log says, but for file names and dates."""
    with UpdateLog.open(lab / "log") as log:
        live = log.live()
        return {
            "updates": [(s, r, bytes(p)) for s, r, p in log.frames(live)],
            "tags": log.tags(),
            "steps": [log.steps_of([n]).tolist() for n in range(120)],
            "states": log.info()["states"],
            "rates": log.rates(live).tolist(),
        }


# -- the whole way --------------------------------------------------------------------------------


def test_the_whole_way(lab: Path) -> None:
    facts = shown("log show log mine:task --ids who.txt --model m.st")
    assert (facts["epochs"], facts["states"]["live"], facts["records"]) == (8, 115, 120)
    assert facts["steps"] == 5 * 14 + 3 * 15
    assert facts["cohorts"] == {"records": 8, "cohorts": 1, "since": 5}
    assert facts["states_kept"] == [5]
    assert (facts["keep"], facts["values"], facts["attribution"]) == (0.1, "bf16", "batch")
    costs = facts["forgetting"]
    assert (costs["records"], costs["due"], costs["verdict"]) == (2, 3, "warn")
    assert (costs["replay"]["start"], costs["replay"]["epochs"]) == (5, 3)
    assert 0 < costs["replay"]["seconds"] < 60

    done(f"{FORGET} --method replay --out r.st")
    weights = {name: _digest(name) for name in ("m.st", "f.st", "r.st")}
    assert len(set(weights.values())) == 3
    purged = done("log purge log --forgotten-by f.st --json").json
    assert (purged["records"], purged["steps"], purged["not_subtracted"]) == (2, 3, 0)
    assert done("log verify log --json").json["whole"]
    after = shown()
    assert after["states"]["purged"] == 3
    assert after["purged"]["records"] == 2
    assert after["bytes"] < facts["bytes"]


def _digest(name: str) -> str:
    return str(done("show", name, "--json").json["weights_digest"])


def test_sizes_are_those_of_the_files(lab: Path) -> None:
    """Against the files, and against the definition: 4 bytes for each of 4,099 weights."""
    facts = shown()
    assert facts["bytes"] == sum(path.stat().st_size for path in segments(lab))
    assert facts["dense_bytes"] == 4 * (4 * 512 + 512 + 512 * 3 + 3)
    with UpdateLog.open(lab / "log") as log:
        found = [len(p) for _, _, p in log.frames(log.live())]
    assert facts["bytes_per_step"] == pytest.approx(np.mean(found))
    assert facts["times_smaller"] == pytest.approx(facts["dense_bytes"] / np.mean(found))
    assert sum(epoch["bytes"] for epoch in facts["per_epoch"]) == sum(found)
    assert [epoch["stored"] for epoch in facts["per_epoch"]] == [14] * 5 + [15] * 3


def test_text_for_people(lab: Path) -> None:
    text = done("log show log").out
    assert "115 steps in 8 epochs, 115 stored; 120 records" in text
    assert "cohorts: 8 records in 1 cohort, from epoch 6 on" in text
    assert "the largest 10.0% of the changes, as bf16, by batch" in text
    text = done("log show log --ids who.txt --model m.st").out
    assert "subtract 3 of 115 steps: 2.6%" in text
    assert "train 3 of 8 epochs again: 38%" in text
    assert "exact; from epoch 6" in text
    assert (
        "subtract 0 of 115 steps, 3 before" in done("log show log --ids who.txt --model f.st").out
    )
    assert "1 of 1 segment" in done("log verify log").out
    assert done("log purge log --forgotten-by f.st").out.startswith("log: 2 records and 3 updates")
    assert "erased updates: 3 purged; 2 records purged" in done("log show log").out


def test_training_says_where_the_log_is(bare: Path) -> None:
    answer = done(TRAIN)
    assert "log holds the updates of 120 steps." in answer.out
    facts = done(f"{TRAIN} --force --json").json["log"]
    assert (facts["folder"], facts["steps"], facts["keep"]) == ("log", 120, 0.1)


def test_recording_changes_nothing(bare: Path) -> None:
    plain = done("train mine:task --out p.st --json").json
    assert done(f"{TRAIN} --json").json["weights_digest"] == plain["weights_digest"]
    assert "log" not in plain


def test_options_reach_the_recorder(bare: Path) -> None:
    sets = ["keep=0.5", "values=int8", "pick=random", "sensitive=who.txt", "retention=30"]
    done(TRAIN, *(word for pair in sets for word in ("--record-set", pair)))
    facts = shown()
    assert (facts["keep"], facts["values"], facts["pick"]) == (0.5, "int8", "random")
    assert (facts["sensitive"], facts["retention_days"]) == (2, 30)
    assert facts["states"]["live"] + facts["states"]["unrecorded"] == facts["steps"] == 120
    assert 8 <= facts["states"]["live"] <= 16  # two records, eight epochs


def test_no_plain_ids_in_a_log(lab: Path) -> None:
    done("log purge log --forgotten-by f.st")
    files = {name: data for name, data in snapshot(lab / "log").items() if data}
    assert len(files) >= 4
    assert not [name for name, data in files.items() if re.search(rb"patient-\d", data)]


def test_a_log_that_is_not_whole(lab: Path) -> None:
    """Of a training that has not ended, or whose recording failed."""
    with UpdateLog.open(lab / "log", write=True) as log:
        log.truncate(60)
    assert "its training has not ended" in done("log show log").out
    assert shown()["steps"] == 56  # the last step of each early epoch has no record outside
    with UpdateLog.open(lab / "log", write=True) as log:
        log.fail(60, "disk full")
    assert "recording ended early, at step 60: disk full" in done("log show log").out
    answer = efface(f"{FORGET} --method amnesiac --out g.st")
    check_sentence(answer, 2, "ended early, at step 60")
    with UpdateLog.open(lab / "log", write=True) as log:
        log.truncate(0)
    facts = shown()
    assert (facts["steps"], facts["epochs"], facts["bytes_per_step"]) == (0, 0, None)
    assert "0 steps in 0 epochs" in done("log show log").out
    assert done("log verify log --json").json["segments"] == []


def test_segments_elsewhere(bare: Path) -> None:
    """Anywhere that fsspec reaches; the log uses a folder of its own there."""
    place = bare / "store"
    place.mkdir()
    done(f"{TRAIN} --record-set segments=file://{place}")
    (own,) = place.iterdir()
    assert shown()["segments_at"] == f"file://{place}"
    assert own.name.startswith(shown()["id"] + "-")
    assert f"at file://{place}" in done("log show log").out
    assert done("log verify log --json").json["whole"]
    done(f"{FORGET} --method amnesiac --force --out f.st")
    done("log purge log --forgotten-by f.st")
    assert done("log verify log --json").json["whole"]
    next(own.glob("*.seg")).unlink()
    assert efface("log verify log").code == 1


def test_help() -> None:
    answer = efface("log")
    assert (answer.code, answer.err) == (0, "")
    assert all(name in answer.out for name in ("show", "verify", "purge"))
    assert "--forgotten-by" in efface("log purge --help").out


# -- killed, and given again ----------------------------------------------------------------------

BOOT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import efface.journal
efface.journal.Journal.__init__.__defaults__ = (0.02,)
{}
from efface.cli import main
main()
"""


def _start(words: str, more: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BOOT.format(more), *words.split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.parametrize("force", ["", " --force"])
def test_a_killed_training_goes_on_with_its_log(bare: Path, force: str) -> None:
    """Also with ``--force``: what must not be replaced then is the log that it goes on with."""
    words = f"{TRAIN} {COHORT}{force}"
    done(words)
    expected, model = contents(bare), _digest("m.st")
    shutil.rmtree(bare / "log")
    (bare / "m.st").unlink()
    write_task(bare, WIDE + SLOW.format(0.02))
    process = _start(words)
    while not (bare / "m.st.partial/fit-0000.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.7)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (bare / "m.st").exists()
    write_task(bare, WIDE + SLOW.format(0))
    assert "going on" in done(words).err
    assert _digest("m.st") == model
    assert contents(bare) == expected
    assert done("log verify log --json").json["whole"]


DIES = """
import os, signal
from efface.updates.log import UpdateLog
from efface.trained import TrainedModel
def dies(*args, real={0}, **more):
    {1}
    os.kill(os.getpid(), signal.SIGKILL)
{0} = dies
"""


@pytest.mark.parametrize(
    ("call", "more", "force"),
    [
        ("UpdateLog.finish", "", ""),
        ("UpdateLog.finish", "real(*args, **more)", " --force"),
        ("TrainedModel.save", "", ""),
        ("TrainedModel.save", "", " --force"),
        ("TrainedModel.save", "real(*args, **more)", ""),
    ],
)
def test_killed_at_the_end_of_training(bare: Path, call: str, more: str, force: str) -> None:
    """The fit has ended, the log may have, too, the model is not there, or just has been saved."""
    words = f"{TRAIN} {COHORT}"
    done(words)
    expected, model = contents(bare), _digest("m.st")
    shutil.rmtree(bare / "log")
    (bare / "m.st").unlink()
    process = _start(words, DIES.format(call, more))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = (bare / "m.st").exists()
    (bare / "m.st").unlink(missing_ok=True)
    assert saved == (call == "TrainedModel.save" and bool(more))
    done(words + force)
    assert _digest("m.st") == model
    assert contents(bare) == expected
    finished = shown()["finished"]
    assert finished == {"weights": model, "steps": 120}


def test_a_training_whose_log_is_gone_does_not_go_on(bare: Path) -> None:
    """What was trained before would not be in the new log."""
    words = f"{TRAIN} {COHORT}"
    process = _start(words, DIES.format("TrainedModel.save", ""))
    process.communicate()
    assert (bare / "m.st.partial").exists()
    shutil.move(bare / "log", bare / "moved")
    for force in ("", " --force"):
        answer = efface(words + force)
        assert answer.code == 2
        assert "m.st.partial" in answer.err.splitlines()[-1]
    shutil.move(bare / "moved", bare / "log")
    done(words)
    assert shown()["finished"]["steps"] == 120


KILLS = """
import os, signal
import efface.updates.upkeep as upkeep
def dies(*args, real=upkeep.{0}):
    {1}
    os.kill(os.getpid(), signal.SIGKILL)
upkeep.{0} = dies
"""


@pytest.mark.parametrize(
    ("call", "after"),
    [("put_switch", True), ("dispose", False), ("dispose", True), ("finish_vacuum", False)],
)
def test_an_interrupted_purge_ends_the_same(lab: Path, call: str, after: bool) -> None:
    copy = lab / "copy"
    shutil.copytree(lab / "log", copy / "log")
    done("log purge log --forgotten-by f.st")
    expected = contents(lab)
    shutil.rmtree(lab / "log")
    shutil.copytree(copy / "log", lab / "log")
    words = "log purge log --forgotten-by f.st"
    process = _start(words, KILLS.format(call, "real(*args)" if after else ""))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done(words)
    assert contents(lab) == expected
    assert done("log verify log --json").json["whole"]
    done(words)
    assert contents(lab) == expected


# -- purge ----------------------------------------------------------------------------------------


def test_purge_twice_is_once(lab: Path) -> None:
    done("log purge log --ids who.txt --forgotten-by f.st")
    before = contents(lab)
    again = done("log purge log --ids who.txt --forgotten-by f.st --json").json
    assert (again["records"], again["steps"], again["absent"]) == (0, 0, 2)
    assert contents(lab) == before


def test_purge_erases_those_steps_only(lab: Path) -> None:
    before = contents(lab)
    with UpdateLog.open(lab / "log") as log:
        gone = set(log.steps_of([0, 1]).tolist())
    done("log purge log --forgotten-by f.st")
    after = contents(lab)
    assert after["updates"] == [u for u in before["updates"] if u[0] not in gone]
    assert after["tags"] == [None, None, *before["tags"][2:]]
    assert after["steps"] == [[], [], *before["steps"][2:]]
    held = b"".join(path.read_bytes() for path in segments(lab))
    payloads = {step: payload for step, _, payload in before["updates"]}
    assert all((payloads[step] in held) == (step not in gone) for step in payloads)


def test_purge_says_what_it_costs_others(lab: Path) -> None:
    """A model that forgot by another way has not had the steps subtracted."""
    done(f"{FORGET} --method replay --out r.st")
    answer = done("log purge log --forgotten-by r.st")
    assert "3 steps of these had not been subtracted" in answer.out


def test_purge_deletes_states_that_have_seen_the_records(bare: Path) -> None:
    """Of 8 epochs under full shuffling, all states but none before the first epoch's end."""
    done(f"{TRAIN} --record-set checkpoints=2")
    assert shown()["states_kept"] == [2, 4, 6]
    done("log purge log --ids who.txt --force")
    assert shown()["states_kept"] == []


def test_purge_is_refused_before_the_model_forgot(lab: Path) -> None:
    log = snapshot(lab / "log")
    for words in (
        "log purge log --ids who.txt",
        "log purge log --ids leave.txt --forgotten-by f.st",
    ):
        check_sentence(efface(words), 2, "--force")
    answer = efface("log purge log --ids leave.txt --forgotten-by f.st")
    assert "6 of 8 records were not forgotten by f.st" in answer.err
    assert _same(log, snapshot(lab / "log"))
    assert done("log purge log --ids leave.txt --force --json").json["records"] == 8


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a log is as it was; who wrote last may differ."""
    return {k: v for k, v in before.items() if k != "lock"} == {
        k: v for k, v in after.items() if k != "lock"
    }


def test_purge_of_a_model_of_another_training(lab: Path) -> None:
    done("train mine:task --seed 5 --out other.st")
    done("forget mine:task --model other.st --ids who.txt --method ft --out of.st")
    answer = efface("log purge log --forgotten-by of.st")
    check_sentence(answer, 2, "of.st does not come from the training that log recorded")
    assert done("log purge log --forgotten-by of.st --force --json").json["records"] == 2


def test_purge_takes_no_control_for_forgetting(lab: Path) -> None:
    log = snapshot(lab / "log")
    done(f"{FORGET} --method amnesiac-control --set control=bn-only --out ctl.st")
    for more in ("", " --ids who.txt"):
        answer = efface(f"log purge log --forgotten-by ctl.st{more}")
        check_sentence(answer, 2, "by a control (amnesiac-control), which forgets nothing")
    assert _same(log, snapshot(lab / "log"))
    inside = "--method chain --set first=amnesiac-control --set second=ft"
    done(f"{FORGET} {inside} --out in.st")
    check_sentence(efface("log purge log --forgotten-by in.st"), 2, "by a control")
    assert done("log show log --ids who.txt --model ctl.st --json").code == 0
    assert done("log purge log --forgotten-by ctl.st --force --json").json["records"] == 2


def test_purge_says_what_it_wants(lab: Path) -> None:
    (lab / "none.txt").write_text("\n")
    (lab / "strangers.txt").write_text("nobody\npatient-0000\n")
    for words, said in {
        "log purge log": "say what to erase",
        "log purge log --expired --ids who.txt": "say what to erase",
        "log purge log --ids none.txt": "holds no ID",
        "log purge log --ids absent.txt": "cannot be read",
        "log purge log --ids strangers.txt --force": "1 of 2 IDs is not in log, and 0 records were",
        "log purge log --expired": "no retention limit",
        "log purge log --forgotten-by absent.st": "absent.st",
        "log purge log --forgotten-by who.txt": "who.txt",
    }.items():
        check_sentence(efface(words), 2, said)


def test_expired(bare: Path) -> None:
    done(f"{TRAIN} --record-set retention=30")
    answer = done("log purge log --expired")
    assert "0 updates erased" in answer.out
    assert "due in 30 days" in answer.out
    assert shown()["past_retention"] == 0
    manifest = folders.read_manifest(bare / "log")
    folders.write_manifest(bare / "log", manifest | {"created": "2020-02-29"})
    assert shown()["past_retention"] == 120
    assert done("log purge log --expired --json").json["steps"] == 120
    facts = shown()
    assert (facts["states"]["expired"], facts["past_retention"]) == (120, 0)
    assert facts["bytes"] == 0
    answer = efface(f"{FORGET} --method amnesiac --force --out f.st")
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert (answer.code, "expired" in line) == (2, True)
    assert done("log purge log --expired --json").json["steps"] == 0


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--record-set keep=0", "recording: keep must be in (0, 1], not 0.0"),
        ("--record-set keep=1.5", "recording: keep must be in (0, 1], not 1.5"),
        ("--record-set keep=-0.1", "recording: keep must be in (0, 1]"),
        ("--record-set keep=nan", "recording: keep must be in (0, 1]"),
        ("--record-set keep=some", "the recorder: keep must be a number, not 'some'"),
        ("--record-set kepp=0.1", "did you mean 'keep'?"),
        ("--record-set keep", "--record-set takes option=value"),
        ("--record-set values=bf17", "the recorder: values must be one of bf16"),
        ("--record-set folder=x", "say --record LOGDIR"),
        ("--record-set force=true", "say --force"),
        ("--record-set sensitive=absent.txt", "sensitive absent.txt cannot be read"),
        ("--record-set sensitive=none.txt", "sensitive none.txt holds no ID"),
        ("--record-set sensitive=strangers.txt", "1 of 2 sensitive IDs are not in the training"),
        ("--record-set attribution=record", "needs sensitive"),
        ("--record-set retention=0", "retention must be 1 day or more"),
        ("--record-set checkpoints=-1", "checkpoints must be 0 or more"),
        ("--record-set segments=nowhere://x", "segments cannot lie at nowhere://x"),
        ("--record-budget much", "budget must be a size such as 500MB or 2GiB, not 'much'"),
        ("--record-budget 0", "budget must be a size"),
        ("--cohort absent.txt", "--cohort absent.txt cannot be read"),
        ("--cohort none.txt", "--cohort none.txt holds no ID"),
        ("--cohort strangers.txt", "1 of 2 cohort IDs are not in the training data"),
        ("--cohort leave.txt --cohort-epochs 9", "cohort epochs must be 1 to 8"),
        ("--cohort leave.txt --cohort-epochs 0", "cohort epochs must be 1 to 8"),
        ("--cohort-epochs 3", "--cohort-epochs needs --cohort FILE"),
    ],
)
def test_recording_options(bare: Path, words: str, said: str) -> None:
    (bare / "none.txt").write_text("\n")
    (bare / "strangers.txt").write_text("nobody\npatient-0000\n")
    refused(bare, f"{TRAIN} {words}", said)


@pytest.mark.parametrize("words", ["--record-budget 1GB", "--record-set keep=0.2"])
def test_recording_options_without_a_log(bare: Path, words: str) -> None:
    refused(bare, f"train mine:task --out m.st {words}", words.split()[0], "needs --record LOGDIR")


def test_a_log_that_exists(lab: Path) -> None:
    log = snapshot(lab / "log")
    check_sentence(efface(f"{TRAIN} {COHORT}"), 2, "m.st exists already")
    again = f"train mine:task --record log {COHORT}"
    answer = efface(f"{again} --out again.st")
    check_sentence(answer, 2, "log holds the log of a finished training; give --force")
    answer = efface(f"{again} --seed 1 --out again.st")
    check_sentence(answer, 2, "log holds the log of another training; give --force")
    assert _same(log, snapshot(lab / "log"))
    (lab / "full").mkdir()
    (lab / "full/thesis.txt").write_text("mine")
    refused(lab, "train mine:task --out again.st --record full", "holds other files (thesis.txt)")
    refused(lab, "train mine:task --out again.st --record who.txt", "who.txt is a file")
    done(f"{again} --seed 1 --force --out again.st")
    assert shown()["seed"] == 1


@pytest.mark.parametrize("words", ["log show", "log verify", "log purge --ids who.txt --force"])
def test_not_a_log(lab: Path, words: str) -> None:
    verb, _, rest = words.removeprefix("log ").partition(" ")
    (lab / "empty").mkdir()
    for name in ("absent", "empty", "who.txt"):
        refused(lab, f"log {verb} {name} {rest}", f"{name} is no update log")


def test_damaged_manifest_and_index(lab: Path) -> None:
    manifest = lab / "log/manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"keep": 0.1', '"keep": 0.2'))
    refused(lab, "log show log", "manifest.json is damaged")
    manifest.write_text(json.dumps({"schema": "efface.updates/7"}))
    refused(lab, "log show log", "efface.updates/7")
    manifest.write_text(text)
    (lab / "log/index.sqlite").write_bytes(b"no index" * 1000)
    refused(lab, "log show log", "index.sqlite is damaged")
    (lab / "log/index.sqlite").unlink()
    refused(lab, "log verify log", "has no index.sqlite")


def _verified(code: int) -> Answer:
    answer = efface("log verify log --json")
    assert answer.code == code
    return answer


def test_a_damaged_segment(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, with exit code 1; steps in other segments can still be taken back."""
    real = UpdateLog.create.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        UpdateLog,
        "create",
        classmethod(lambda cls, *a, **k: real(cls, *a, frames_per_segment=20, **k)),
    )
    done(f"{TRAIN} {COHORT}")
    found = segments(bare)
    assert len(found) == 6
    assert _verified(0).json["whole"]
    data = bytearray(found[1].read_bytes())
    data[200] ^= 4
    found[1].write_bytes(bytes(data))
    bad = [s for s in _verified(1).json["segments"] if not s["ok"]]
    assert [s["name"] for s in bad] == [found[1].name]
    text = efface("log verify log")
    assert (text.code, "5 of 6 segments" in text.out) == (1, True)
    assert f"segment {found[1].name}" in text.out
    done(f"{FORGET} --method amnesiac --force --out f.st")  # cohorts come late
    found[-1].write_bytes(found[-1].read_bytes()[:100])
    answer = efface(
        "forget mine:task --model m.st --class 1 --log log --method amnesiac --force --out g.st"
    )
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert (answer.code, found[1].name in line, "step" in line) == (2, True, True)
    found[0].unlink()
    names = [s["name"] for s in _verified(1).json["segments"] if not s["ok"]]
    assert names == [found[0].name, found[1].name, found[-1].name]
    assert not (bare / "g.st").exists()


def test_two_writers(lab: Path) -> None:
    with UpdateLog.open(lab / "log", write=True):
        answer = efface("log purge log --forgotten-by f.st")
        check_sentence(answer, 2, "log is being written to by another process")
        words = f"train mine:task --record log {COHORT} --force --seed 3 --out again.st"
        check_sentence(efface(words), 2, "log is being written to by another process")
        assert shown()["states"]["live"] == 115  # reading needs no lock
        assert _verified(0).json["whole"]
    done("log purge log --forgotten-by f.st")


def test_another_key(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFACE_KEY", "another key")
    done("log show log")  # what needs no IDs needs no key
    done("log verify log")
    for words in (
        "log show log --ids who.txt",
        "log purge log --ids who.txt --force",
        "log purge log --forgotten-by f.st",
        f"{FORGET} --method amnesiac --out g.st",
    ):
        check_sentence(efface(words), 2, "another key", "EFFACE_KEY")


def test_show_with_a_selection(lab: Path) -> None:
    (lab / "strangers.txt").write_text("nobody\n")
    refused(lab, "log show log --class 1", "needs a task")
    refused(lab, "log show log mine:task", "exactly one of --ids")
    refused(lab, "log show log --model m.st", "exactly one of --ids")
    refused(lab, "log show log --ids strangers.txt", "1 of the 1 records is not in log: never")
    assert "another key" not in efface("log show log --ids strangers.txt").err
    (lab / "none.txt").write_text("\n")
    refused(lab, "log show log --ids none.txt", "the selection holds no record")
    costs = shown("log show log mine:task --class 1")["forgetting"]
    assert costs["verdict"] == "refuse"
    assert costs["replay"]["seconds"] is None
    refused(lab, "log show log mine:task --random 0.0001", "the forget set is empty")


def test_show_of_another_tasks_records(lab: Path) -> None:
    """The same IDs may be other records there."""
    recorded = shown("log show log mine:task --ids who.txt")
    with UpdateLog.open(lab / "log") as log:
        own = log.manifest["data"]["fingerprint"]
    ids = (lab / "who.txt").read_text().split()
    run_show(Run(), lab / "log", ids, data=own)
    with pytest.raises(MismatchError, match="give the task of that training"):
        run_show(Run(), lab / "log", ids, data="0" * 64)
    assert recorded["forgetting"]["reason"] is None


def test_show_with_a_model_of_another_training(lab: Path) -> None:
    done("train mine:task --seed 5 --out other.st")
    words = "log show log --ids who.txt --model other.st"
    refused(lab, words, "does not come from the training", "--force")
    assert shown(f"{words} --force")["forgetting"]["removed"] == 0


def test_show_says_what_is_impossible(lab: Path) -> None:
    with UpdateLog.open(lab / "log", write=True) as log:
        log.fail(110, "disk full")
    assert shown("log show log --ids who.txt")["forgetting"]["verdict"] == "impossible"
    text = done("log show log --ids who.txt").out
    assert "impossible: recording ended early, at step 110" in text


def test_events_in_words() -> None:
    event = {"date": "2026-01-02", "at": None, "kind": "purge", "records": 2, "requests": 1}
    assert _event(event) == "2026-01-02: purge (2 records, 1 request)"
    assert _event(event | {"why": "age"}).endswith("1 request, why age)")


def test_forget_with_and_without_a_log(lab: Path) -> None:
    words = "forget mine:task --model m.st --out g.st --method amnesiac"
    refused(lab, f"{words} --ids who.txt", "--log LOGDIR")
    refused(lab, f"{words} --ids who.txt --log absent", "absent")
    refused(lab, f"{words} --class 1 --log log", "--force")
    assert done(f"{words} --class 1 --log log --force --json").json["forgotten"] > 20
    again = done("forget mine:task --model m.st --class 1 --log log --method ft --out h.st --json")
    assert again.json["forgotten"] > 20


def test_a_log_of_another_training(lab: Path) -> None:
    done("train mine:task --seed 9 --out other.st --record log9")
    words = "forget mine:task --model m.st --ids who.txt --method amnesiac --out g.st --log log9"
    refused(lab, words, "give the log that was written when it was trained")


# -- reading cohorts and options ------------------------------------------------------------------


def test_cohort_files_agree(tmp_path: Path) -> None:
    pairs = {"a": "x", "b": "y", "c": "x"}
    files = {
        "one.csv": "cohort,id\n" + "".join(f"{v},{k}\n" for k, v in pairs.items()),
        "two.csv": "\ufeffID,Cohort,age\n" + "".join(f"{k},{v},3\n\n" for k, v in pairs.items()),
        "three.json": json.dumps(pairs),
        "four.json": json.dumps([{"id": k, "cohort": v} for k, v in pairs.items()]),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_cohorts(tmp_path / name) == pairs, name


def test_one_cohort(tmp_path: Path) -> None:
    for name, text in {
        "all.txt": "a\nb\n",
        "all.csv": "id,age\na,3\nb,4\n",
        "all.json": '["a", "b"]',
    }.items():
        (tmp_path / name).write_text(text)
        assert read_cohorts(tmp_path / name) == {"a": "all", "b": "all"}, name


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.csv", "id,cohort\na,1\na,2\n", "puts 'a' into two cohorts"),
        ("x.csv", "id,cohort\na\n", "a row without an ID or a cohort"),
        ("x.csv", "id,cohort\n", "holds no ID"),
        ("x.json", '[{"id": "a"}]', "must hold objects with id and cohort"),
        ("x.json", '["a", {"id": "b", "cohort": 1}]', "must hold objects with id and cohort"),
        ("x.json", '{"a": [1]}', "must hold objects with id and cohort"),
        ("x.json", "{", "is not JSON"),
        ("x.json", "{}", "holds no ID"),
        ("x.json", "[]", "holds no ID"),
        ("x.txt", "", "holds no ID"),
    ],
)
def test_cohort_files_that_lie(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        read_cohorts(tmp_path / name)
    assert "--cohort" in str(caught.value)
    assert "--ids" not in str(caught.value)


def test_recording_knows_its_key(tmp_path: Path) -> None:
    """A journal goes on with the same recording only; whether it was forced does not matter."""

    def key(*pairs: str, force: bool = False) -> dict[str, str]:
        return recording(tmp_path, None, list(pairs), None, None, force).key

    assert key() == key("keep=0.1") == key(force=True)
    assert key() != key("keep=0.2")
    assert recording(None, None, None, None, None).key == {}
    with pytest.raises(MethodError, match="folder"):
        key("folder=x")


def test_words() -> None:
    assert [size(n) for n in (0, 1023, 1024, 2**30)] == ["0 B", "1.00 KiB", "1.00 KiB", "1.00 GiB"]
    assert [seconds(n) for n in (0.3, 119, 7199, 7200)] == ["0 s", "119 s", "120 min", "2.0 h"]


def test_a_budget_is_kept_and_said(bare: Path) -> None:
    words = f"{TRAIN} --record-set keep=1 --set epochs=20"
    done(words)
    whole = shown()["bytes"]
    answer = done(f"{words} --record-budget {whole // 4} --force")
    facts = shown()
    assert facts["bytes"] <= whole // 4
    assert "note: the log would outgrow its budget" in answer.err
    assert {event["kind"] for event in facts["events"]} & {"keep", "thinned"}
    assert "(budget)" in done("log show log").out


def test_the_lineage_tells_of_the_log(lab: Path) -> None:
    detail = json.loads(read_file(lab / "m.st")[1]["lineage"])[0]["detail"]
    assert detail["log"]["id"] == shown()["id"]
    assert detail["cohorts"] == {"records": 8, "cohorts": 1, "since": 5}
