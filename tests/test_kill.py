"""Commands that are killed: no half-written file, the old one intact, the same command goes on.

Real processes get real signals. A task whose forward pass sleeps makes the work long enough to be
hit in the middle, and commits come at every few steps instead of every few seconds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_cli import done, efface, provide_model, snapshot, workplace, write_task

SLOW = """
import time
def forward(network, inputs):
    time.sleep({})
    return network(inputs)
options["forward"] = forward
"""
"""The same task, so that ``m.st`` is its model, too."""

BOOT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
import efface.journal
efface.journal.Journal.__init__.__defaults__ = (0.02,)
from efface.cli import main
main()
"""

DIES = """
import os, signal
def die(*names):
    if not {test}:
        return real(*names)
    os.kill(os.getpid(), signal.SIGKILL)
real, os.{call} = os.{call}, die
"""

TRAIN = "train mine:task --rewind 3 --out x.st --force --json"
FORGET = "forget mine:task --model m.st --class 1 --method prune-first "
FORGET += "--set inner.method=neggrad-plus --set inner.epochs=4 --out x.st --force --json"
REPRUNED = "retrain mine:task --class 1 --model p.st --like repruned --out x.st --force --json"
IMP = "prune mine:task --model r.st --method imp --sparsity 0.5 --out x.st --force --json"
SFP = (
    "prune mine:task --model m.st --method sfp --sparsity 0.5 --set epochs=6 --set recovery=3 "
    "--out x.st --force --json"
)
COMMANDS = {"train": TRAIN, "forget": FORGET, "repruned": REPRUNED, "imp": IMP, "sfp": SFP}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a slow task, its models, and an old file where the output shall be."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with workplace(tmp_path, monkeypatch) as folder:
        provide_model(folder)
        done("prune", "mine:task", "--model", "m.st", "--sparsity", 0.5, "--out", "p.st")
        done("train", "mine:task", "--rewind", 1, "--out", "r.st")
        write_task(folder, SLOW.format(0.008))
        (folder / "x.st").write_bytes(b"old")
        yield folder


def _expected(lab: Path, words: str) -> str:
    """The digest that the command gives when nothing interrupts it."""
    answer = done(words.replace("x.st", "whole.st"))
    (lab / "whole.st").unlink()
    assert answer.err == ""
    return str(answer.json["weights_digest"])


def _start(words: str, before: str = "") -> subprocess.Popen[str]:
    """The command in a process of its own, which leads its own group."""
    return subprocess.Popen(
        [sys.executable, "-c", before + BOOT, *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def _check_intact(lab: Path, before: dict[str, bytes | None]) -> None:
    """All files are as they were; what is new is the sidecar, or hidden and temporary."""
    after = snapshot(lab)
    assert {name: after.get(name) for name in before} == before
    for name in after.keys() - before.keys():
        assert name.startswith("x.st.partial") or name.startswith(".x.st."), name


def _check_end(lab: Path, expected: str, words: str) -> None:
    """The same command, run again here, goes on and ends where an uninterrupted one does."""
    answer = done(words)
    assert "going on" in answer.err
    assert answer.json["weights_digest"] == expected
    assert done("show", "x.st", "--json").json["weights_digest"] == expected
    assert not (lab / "x.st.partial").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("train", signal.SIGINT), ("forget", signal.SIGKILL), ("repruned", signal.SIGKILL)],
)
def test_killed_in_the_middle(lab: Path, name: str, kind: signal.Signals) -> None:
    words = COMMANDS[name]
    expected = _expected(lab, words)
    write_task(lab, SLOW.format(0.05))  # so slow that the signal comes before the end, surely
    before = snapshot(lab)
    process = _start(words)
    _wait_for(lab / "x.st.partial/fit-0000.safetensors", process)
    time.sleep(0.1)
    process.send_signal(kind)
    out, err = process.communicate()
    _check_intact(lab, before)
    assert out == ""
    if kind == signal.SIGINT:
        assert process.returncode == 1
        (line,) = err.splitlines()
        assert line.startswith("interrupted")
    else:
        assert process.returncode == -signal.SIGKILL
    write_task(lab, SLOW.format(0))  # the rest may be quick
    _check_end(lab, expected, words)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_the_worst_moment(lab: Path, call: str) -> None:
    """With the new file written in part, and written whole but not yet in its place."""
    write_task(lab, SLOW.format(0))
    words = COMMANDS["train"]
    expected, before = _expected(lab, words), snapshot(lab)
    final = {
        "fsync": "'.x.st.' in os.readlink(f'/proc/self/fd/{names[0]}')",
        "replace": "str(names[1]) == 'x.st'",
    }
    process = _start(words, DIES.format(call=call, test=final[call]))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    _check_intact(lab, before)
    assert [path for path in lab.iterdir() if path.name.startswith(".x.st.")]
    _check_end(lab, expected, words)


def _killed_at_random(process: subprocess.Popen[str], lab: Path, draw: random.Random) -> bool:
    """Send a signal at a random moment, half of the time once the work has begun; did it hit?"""
    kind = draw.choice([signal.SIGKILL, signal.SIGINT])
    if draw.random() < 0.7:
        known = len(list(lab.glob("x.st.partial/*")))
        while len(list(lab.glob("x.st.partial/*"))) <= known and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
    else:
        time.sleep(draw.uniform(0, 3))
    process.send_signal(kind)
    process.communicate()
    return process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_again_and_again(lab: Path, name: str) -> None:
    """A dozen kills per command: the work still ends, with the weights of an undisturbed run."""
    draw, words, kills = random.Random(name), COMMANDS[name], 0
    expected = _expected(lab, words)
    write_task(lab, SLOW.format(0.03))
    before = snapshot(lab)
    while kills < 12:
        if _killed_at_random(_start(words), lab, draw):
            kills += 1
            _check_intact(lab, before)
        else:  # it came to its end first: begin anew
            assert done("show", "x.st", "--json").json["weights_digest"] == expected
            (lab / "x.st").write_bytes(b"old")
    write_task(lab, SLOW.format(0))
    assert done(words).json["weights_digest"] == expected
    assert not (lab / "x.st.partial").exists()
    assert efface("show", "x.st").code == 0
    for path in lab.glob(".x.st.*"):  # left by kills in the middle of a write
        os.unlink(path)
