"""Bad input: one clear sentence, the right exit code, nothing written, nothing lost.

Every item of the list is here; each command runs as a user would type it, in a folder whose
contents are compared before and after, byte by byte.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from efface.checkpoint import describe_file, load
from efface.datasets import load_task
from efface.errors import CheckpointError

from .test_cli import Answer, done, efface, provide_model, snapshot, workplace, write_task


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a task and a trained model, ``m.st``."""
    with workplace(tmp_path, monkeypatch) as folder:
        provide_model(folder)
        yield folder


def check_sentence(answer: Answer, code: int, *said: str) -> None:
    """One sentence on stderr, nothing on stdout."""
    assert answer.code == code, answer.err
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ")
    assert line[-1] in ".?)" or "Invalid value" in line
    for words in said:
        assert words in line
    assert len(line) < 600


def refused(lab: Path, command: str, *said: str, code: int = 2, rest: tuple[Any, ...] = ()) -> None:
    """A command that must fail with these words and change nothing."""
    before = snapshot(lab)
    check_sentence(efface(command, *rest, "--json"), code, *said)
    assert snapshot(lab) == before


FORGET = "forget mine:task --model m.st --method ft --out x.st"
TRAIN = "train mine:task --out x.st"


# -- what to forget -------------------------------------------------------------------------------


def test_unknown_ids(lab: Path) -> None:
    """Up to ten are listed, with the count."""
    (lab / "few.txt").write_text("patient-0001\nnobody\n")
    refused(lab, f"{FORGET} --ids few.txt", "1 of 2 IDs are not in the training data", "'nobody'")
    (lab / "many.txt").write_text("\n".join(f"who-{i:02d}" for i in range(25)))
    many = ("25 of 25 IDs", "'who-09'", "and 15 more")
    refused(lab, f"{FORGET} --ids many.txt", *many)
    answer = efface(f"{FORGET} --ids many.txt")
    assert "who-10" not in answer.err
    refused(lab, "retrain mine:task --out x.st --ids few.txt", "'nobody'")
    audit = "audit mine:task --before m.st --after m.st --out d --ids few.txt"
    refused(lab, audit, "'nobody'")


def test_an_empty_forget_set(lab: Path) -> None:
    (lab / "none.txt").write_text("\n \n")
    (lab / "none.json").write_text("[]")
    (lab / "none.csv").write_text("id,name\n")
    for name in ("none.txt", "none.json", "none.csv"):
        refused(lab, f"{FORGET} --ids {name}", "the forget set is empty")
    refused(lab, f"{FORGET} --random 0.001", "the forget set is empty")
    refused(lab, FORGET, "the forget set is empty", rest=("--where", "age > 500"))
    refused(lab, "retrain mine:task --out x.st --random 0.001", "the forget set is empty")


def test_a_forget_set_of_everything(lab: Path) -> None:
    everything = "the forget set is everything (120 records)"
    (lab / "all.txt").write_text("\n".join(f"patient-{i:04d}" for i in range(120)))
    refused(lab, f"{FORGET} --ids all.txt", everything)
    refused(lab, f"{FORGET} --random 0.999", everything)
    refused(lab, FORGET, everything, rest=("--where", "age >= 0"))
    write_task(lab, "train = (train[0], torch.zeros(N, dtype=torch.long))\n", "other")
    done("train other:task --out o.st")
    command = "forget other:task --model o.st --method ft --class 0 --out x.st"
    refused(lab, command, everything)


def test_nothing_left_by_a_second_request(lab: Path) -> None:
    done("forget mine:task --model m.st --class 1 --method ft --out f.st")
    again = "forget mine:task --model f.st --method ft --out x.st"
    refused(lab, f"{again} --class 1", "have been forgotten by an earlier request")
    rest = ("--where", "target != 1")
    refused(lab, again, "nothing would be left to retain", rest=rest)


def test_a_class_that_does_not_exist(lab: Path) -> None:
    refused(lab, f"{FORGET} --class 7", "class 7 does not exist", "'0', '1', '2'")
    refused(lab, f"{FORGET} --class -1", "class -1 does not exist")
    refused(lab, f"{FORGET} --class cat", "--class", "cat")


def test_a_fraction_out_of_range(lab: Path) -> None:
    for fraction in ("0", "1", "1.5", "-0.1", "nan"):
        refused(lab, f"{FORGET} --random {fraction}", "must lie between 0 and 1")


def test_exactly_one_selection(lab: Path) -> None:
    one = "exactly one of --ids, --class, --random, --where"
    refused(lab, FORGET, one)
    refused(lab, f"{FORGET} --class 1 --random 0.1", one)
    refused(lab, "retrain mine:task --out x.st", one)
    refused(lab, "audit mine:task --before m.st --after m.st --out d --class 1 --random 0.1", one)


def test_ids_given_twice(lab: Path) -> None:
    (lab / "twice.txt").write_text("patient-0001\npatient-0002\npatient-0001\n")
    refused(lab, f"{FORGET} --ids twice.txt", "1 IDs are given twice", "'patient-0001'")


def test_ids_from_no_usable_file(lab: Path) -> None:
    refused(lab, f"{FORGET} --ids absent.txt", "absent.txt", "cannot be read")
    (lab / "folder").mkdir()
    refused(lab, f"{FORGET} --ids folder", "folder", "cannot be read")
    (lab / "bytes.txt").write_bytes(b"\xff\xfe\x00\xd8")
    refused(lab, f"{FORGET} --ids bytes.txt", "bytes.txt", "cannot be read")
    (lab / "half.json").write_text('["patient-0001"')
    refused(lab, f"{FORGET} --ids half.json", "half.json", "is not JSON")
    (lab / "table.json").write_text('{"ids": ["patient-0001"]}')
    refused(lab, f"{FORGET} --ids table.json", "must hold a JSON list")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("__import__('os').system('touch hacked')", "only comparisons"),
        ("age < 30 and open('hacked', 'w')", "only comparisons"),
        ("age.real < 30", "only comparisons"),
        ("age + 1 < 30", "only comparisons"),
        ("columns['age'] < 30", "only comparisons"),
        ("age", "only comparisons"),
        ("not age", "only comparisons"),
        ("True", "only comparisons"),
        ("1 < 2", "only comparisons"),
        ("age is 3", "only comparisons"),
        ("age == None", "only comparisons"),
        ("age < (1, 2)", "only comparisons"),
        ("age == (1, 2)", "only comparisons"),
        ("3 in age", "only comparisons"),
        ("(lambda: 3)() == age", "only comparisons"),
        ("age < 30 if age else 3", "only comparisons"),
        ("[a for a in age] == 3", "only comparisons"),
        ("f'{age}' == 'x'", "only comparisons"),
        ("(n := age) == 3", "only comparisons"),
        ("age <", "cannot be read"),
        ("", "cannot be read"),
        ("age = 3", "cannot be read"),
        ("import os", "cannot be read"),
        ("age < 30; age", "cannot be read"),
        ("(" * 300 + "age < 3" + ")" * 300, "cannot be read"),
        ("not " * 5000 + "age < 3", "cannot be read"),
        ("agee < 30", "did you mean 'age'?"),
        ("age < 'thirty'", "compares text with a number"),
        ("site == 3", "compares text with a number"),
        ("age in ('3', 4)", "compares text with a number"),
    ],
)
def test_where_with_anything_but_comparisons(lab: Path, expression: str, said: str) -> None:
    refused(lab, FORGET, "--where", said, rest=("--where", expression))
    assert not (lab / "hacked").exists()


# -- the task -------------------------------------------------------------------------------------


def _other(lab: Path, more: str, *said: str, code: int = 2) -> None:
    """Training a task with these lines must fail with these words."""
    write_task(lab, more, "other")
    refused(lab, "train other:task --out x.st", *said, code=code)


def test_repeated_ids_in_the_task(lab: Path) -> None:
    more = "options['ids'][5] = options['ids'][7] = 'patient-0000'\n"
    _other(lab, more, "2 record IDs occur more than once", "'patient-0000'")


def test_ids_of_another_length_than_the_data(lab: Path) -> None:
    _other(lab, "options['ids'].pop()\n", "ids has 119 entries", "120 records")
    _other(lab, "options['subjects'].pop()\n", "subjects has 119 entries")
    _other(lab, "options['columns']['age'].pop()\n", "age has 119 entries")


def test_a_column_that_is_not_there(lab: Path) -> None:
    _other(lab, "options['ids'] = 'agee'\n", "'agee'", "did you mean 'age'?")


def test_positional_ids_after_a_reordering(lab: Path) -> None:
    """Whatever reads the model notices that its positions mean other records now."""
    positional = "options['ids'] = None\n"
    write_task(lab, positional, "other")
    done("train other:task --out o.st")
    done("forget other:task --model o.st --class 1 --method ft --out f.st")
    kept = load_file(lab / "o.st")
    write_task(lab, positional + "train = tuple(t.flip(0) for t in train)\n", "other")
    said = ("record IDs are positions", "reordered")
    refused(lab, "forget other:task --model o.st --class 1 --method ft --out x.st", *said)
    refused(lab, "prune other:task --model o.st --out x.st", *said)
    refused(lab, "audit other:task --before o.st --after f.st --out d", *said)
    refused(lab, "retrain other:task --model f.st --class 2 --out x.st", *said)
    assert all(torch.equal(t, kept[n]) for n, t in load_file(lab / "o.st").items())


def test_two_records_that_changed_places(lab: Path) -> None:
    """A single exchange among 120 records is noticed, wherever it is."""
    positional = "options['ids'] = None\n"
    write_task(lab, positional, "other")
    done("train other:task --out o.st")
    swap = "turn = list(range(N)); turn[4], turn[5] = 5, 4\n"
    swap += "train = tuple(t[turn] for t in train)\n"
    write_task(lab, positional + swap, "other")
    command = "forget other:task --model o.st --class 1 --method ft --out x.st"
    refused(lab, command, "record IDs are positions")


def test_stable_ids_may_be_reordered(lab: Path) -> None:
    """The counterpart: with IDs of their own, records may lie anywhere."""
    flip = "train = tuple(t.flip(0) for t in train); options['ids'].reverse()\n"
    flip += "options['subjects'] = None; options['columns'] = {}\n"
    write_task(lab, flip, "mine")
    (lab / "who.txt").write_text("patient-0003\n")
    done(f"{FORGET} --ids who.txt")


def test_a_dataset_that_augments_by_itself(lab: Path) -> None:
    more = """
class Shaky:
    def __len__(self):
        return N
    def __getitem__(self, i):
        return inputs[i] + 0.1 * torch.randn(4), int(targets[i])
train = Shaky()
"""
    _other(lab, more, "augments by itself", "Task(augment=")


def test_data_of_no_use(lab: Path) -> None:
    _other(lab, "train = (inputs[:0], targets[:0])\noptions = {}\n", "the data set is empty")
    _other(lab, "train = iter([])\noptions = {}\n", "not a map-style data set")
    _other(lab, "train = [1, 2, 3]\noptions = {}\n", "pair (input, target)")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("absent:task", "module 'absent'"),
        ("mine.inner:task", "module 'mine.inner'"),
        ("mine:tusk", "did you mean 'task'?"),
        ("mine:", "has no ''"),
        (":task", "cannot be imported"),
        ("..up:task", "cannot be imported"),
        ("digit", "did you mean 'digits'?"),
        ("mine:N", "not an efface.Task"),
        ("breaks:task", "no such table"),
        ("quits:task", "cannot be imported"),
        ("typo:task", "SyntaxError"),
        ("makers:broken", "no such table"),
        ("makers:wants", "argument"),
        ("makers:leaves", "makers:leaves"),
        ("makers:nothing", "not an efface.Task"),
    ],
)
def test_a_task_that_cannot_be_imported(lab: Path, spec: str, said: str) -> None:
    (lab / "breaks.py").write_text("raise OSError('no such table')\n")
    (lab / "quits.py").write_text("import sys\nsys.exit(0)\n")
    (lab / "typo.py").write_text("def (:\n")
    (lab / "makers.py").write_text(
        "import sys\n"
        "def broken(): raise OSError('no such table')\n"
        "def wants(path): return path\n"
        "def leaves(): sys.exit(0)\n"
        "def nothing(): pass\n"
    )
    refused(lab, f"train {spec} --out x.st", said)
    refused(lab, f"forget {spec} --model m.st --class 1 --method ft --out x.st", said)


def test_a_network_that_breaks(lab: Path) -> None:
    """What goes wrong in the user's own code is one sentence, too; --debug shows where."""
    write_task(lab, "def network():\n    raise RuntimeError('no weights here')\n", "other")
    refused(lab, "train other:task --out x.st", "no weights here", "--debug", code=1)
    answer = efface("train other:task --out x.st --debug")
    assert answer.code == 1
    assert "Traceback" in answer.err


def test_debug_shows_where_and_keeps_the_code(lab: Path) -> None:
    """A traceback appears only with --debug; the exit code is the same."""
    answer = efface(f"{TRAIN} --set lr=-1 --debug")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert "lr must be positive" in answer.err.splitlines()[-1]


# -- methods and options --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("finetun", "did you mean 'finetune'?"),
        ("l1_sparse", "did you mean 'l1-sparse'?"),
        ("", "is unknown"),
        ("zzz", "known: "),
        ("one-shot", "one-shot"),
        ("masked", "mask"),
        ("ft --set epoch=3", "did you mean 'epochs'?"),
        ("retrain --set epochs=3", "has no option 'epochs'"),
        ("ft --set epochs=many", "epochs must be a whole number"),
        ("ft --set epochs=1.5", "epochs must be a whole number"),
        ("ft --set epochs=-1", "epochs must be 0 or more"),
        ("ft --set lr=0", "lr must be positive"),
        ("ft --set lr=nan", "lr must be positive"),
        ("ft --set bn=off", "bn must be one of train, frozen, recalibrate"),
        ("ft --set bn", "--set takes option=value"),
        ("ft --set =3", "--set takes option=value"),
        ("ft --set lr.x=3", "lr must be a number"),
        ("ft --set inner.lr=3", "has no option 'inner'"),
        ("l1-sparse --set alpha=-1", "alpha must be 0 or more"),
        ("l1-sparse --set schedule=linear", "schedule must be one of"),
        ("ga --set cap=0", "cap must be positive"),
        ("neggrad-plus --set beta=-0.5", "beta must be 0 or more"),
        ("prune-first --set inner.method=finetun", "did you mean 'finetune'?"),
        ("prune-first --set inner.lrr=1", "did you mean 'lr'?"),
        ("prune-first --set pruner.sparsity=1.5", "sparsity must lie in [0, 1)"),
        ("prune-first --set pruner.criterion=magic", "'magic'"),
        ("prune-first --set pruner=finetune", "pruner"),
        ("prune-first --set inner=one-shot", "inner"),
        ("prune-first --set inner=3", "'3'"),
        ("prune-first --set inner=ft --set inner.lr=1", "inner"),
    ],
)
def test_unknown_methods_and_options(lab: Path, method: str, said: str) -> None:
    name, *sets = method.split(" ")
    command = "forget mine:task --model m.st --class 1 --out x.st"
    refused(lab, command, said, rest=("--method", name, *sets))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('method = "finetun"', "did you mean 'finetune'?"),
        ("epochs = 3", "must name one"),
        ("method = 3", "method"),
        ('method = "ft"\nepochs = "many"', "epochs must be a whole number"),
        ('method = "ft"\nepochs = [1]', "epochs must be a whole number"),
        ('method = "ft', "cannot be read"),
        ('method = "prune-first"\ninner = 5', "inner"),
        ('method = "prune-first"\ninner = [1]', "inner"),
        ('method = "prune-first"\n[inner]\nmethod = {a = 1}', "method"),
    ],
)
def test_method_files_of_no_use(lab: Path, text: str, said: str) -> None:
    (lab / "plan.toml").write_text(text)
    command = "forget mine:task --model m.st --class 1 --out x.st --method plan.toml"
    refused(lab, command, said)


def test_an_absent_method_file(lab: Path) -> None:
    command = "forget mine:task --model m.st --class 1 --out x.st --method absent.toml"
    refused(lab, command, "absent.toml cannot be read")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{TRAIN} --set lr=fast", "lr must be a number"),
        (f"{TRAIN} --set lr=-1", "lr must be positive"),
        (f"{TRAIN} --set epochs=-1", "epochs must be 0 or more"),
        (f"{TRAIN} --set batch_size=0", "batch_size must be 1 or more"),
        (f"{TRAIN} --set momentum=1", "momentum must lie in [0, 1)"),
        (f"{TRAIN} --set optimizer=adm", "optimizer must be one of"),
        (f"{TRAIN} --set epoch=3", "did you mean 'epochs'?"),
        (f"{TRAIN} --rewind 9", "rewind must be one of the 8 epochs"),
        (f"{TRAIN} --rewind 0", "rewind must be one of the 8 epochs"),
        (f"{TRAIN} --seed one", "--seed"),
        (f"{TRAIN} --threads -1", "--threads must be 0 or more"),
        (f"{TRAIN} --device tpu", "device 'tpu' is not available"),
        (f"{TRAIN} --bogus", "--bogus"),
        ("train --out x.st", "TASK"),
        ("train mine:task", "--out"),
        ("trane mine:task --out x.st", "trane"),
        ("prune mine:task --model m.st --out x.st --sparsity 1.0", "sparsity must lie in [0, 1)"),
        ("prune mine:task --model m.st --out x.st --sparsity nan", "sparsity must lie in [0, 1)"),
        ("prune mine:task --model m.st --out x.st --method magic", "pruning method 'magic'"),
        ("prune mine:task --model m.st --out x.st --set scope=none", "scope must be one of"),
        ("prune mine:task --model m.st --out x.st --set recovery=-1", "recovery must be 0"),
        ("retrain mine:task --class 1 --out x.st --like new", "--like 'new'"),
        ("audit mine:task --before m.st --after m.st --out d --fail-on bad", "--fail-on 'bad'"),
        ("audit mine:task --before m.st --after m.st --out d --tier 5", "--tier must be"),
        ("audit mine:task --before m.st --after m.st --out d --tier 1", "--reference"),
        ("methods finetun", "did you mean 'finetune'?"),
        ("show absent.st", "absent.st cannot be read"),
        ("demo --task digit --out d", "did you mean 'digits'?"),
    ],
)
def test_values_of_the_wrong_type_or_out_of_range(lab: Path, command: str, said: str) -> None:
    refused(lab, command, said)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{FORGET} --random 0.1 --method logit-off", ("a split made by class", "--class")),
        ("retrain mine:task --class 1 --like same-mask --out x.st", ("pruned", "--model")),
        ("retrain mine:task --class 1 --model m.st --like same-mask --out x.st", ("pruned",)),
        ("retrain mine:task --class 1 --model p.st --like rewound --out x.st", ("--rewind",)),
        ("retrain mine:task --class 1 --model q.st --like repruned --out x.st", ("pruned",)),
    ],
)
def test_needs_that_are_not_met(lab: Path, command: str, said: tuple[str, ...]) -> None:
    """Says which, and how to get them."""
    done("prune mine:task --model m.st --sparsity 0.5 --out p.st")
    from torch.nn.utils import prune

    layer = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    prune.l1_unstructured(layer[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    save_file(layer.state_dict(), lab / "q.safetensors")
    done("adopt mine:task --weights q.safetensors --out q.st")
    refused(lab, command, *said)


def test_a_routine_of_ones_own_cannot_keep_a_mask(lab: Path) -> None:
    done("prune mine:task --model m.st --sparsity 0.5 --out p.st")
    write_task(lab, "options['train_fn'] = lambda network, data, seed: None\n")
    command = "retrain mine:task --class 1 --model p.st --like same-mask --out x.st"
    refused(lab, command, "train_fn", "cannot keep a mask")


# -- models ---------------------------------------------------------------------------------------

READERS = (
    "forget mine:task --model bad.st --class 1 --method ft --out x.st",
    "prune mine:task --model bad.st --out x.st",
    "retrain mine:task --model bad.st --class 1 --out x.st",
    "audit mine:task --before bad.st --after m.st --out d",
    "audit mine:task --before m.st --after bad.st --out d",
    "audit mine:task --before m.st --after m.st --reference bad.st --out d --class 1",
    "show bad.st",
    "adopt mine:task --weights bad.st --out x.st",
)


def _unreadable(lab: Path, data: bytes, *said: str) -> None:
    (lab / "bad.st").write_bytes(data)
    for command in READERS:
        refused(lab, command, "bad.st", *said)


def test_another_network(lab: Path) -> None:
    weights = load_file(lab / "m.st")
    own = {n: weights[n] for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
    extra = {"9.bias": torch.zeros(2)}
    cases = {
        "missing: '2.bias'": {n: t for n, t in own.items() if n != "2.bias"},
        "unexpected: '9.bias'": own | extra,
        "mis-shaped: '0.weight: (16, 5) instead of (16, 4)'": own
        | {"0.weight": torch.zeros(16, 5)},
    }
    for said, tensors in cases.items():
        save_file(tensors, lab / "other.safetensors")
        command = "adopt mine:task --weights other.safetensors --out x.st"
        refused(lab, command, "of another network", said)
    write_task(lab, "def network():\n    return nn.Linear(4, 3)\n")
    said = "m.st is a checkpoint of another network"
    refused(lab, f"{FORGET} --class 1", said, "missing: 'weight', 'bias'", "unexpected")


def test_a_truncated_model(lab: Path) -> None:
    data = (lab / "m.st").read_bytes()
    for length in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        _unreadable(lab, data[:length])


def test_a_file_of_something_else(lab: Path) -> None:
    _unreadable(lab, b"this is not a model, but it is longer than a header" * 9)
    _unreadable(lab, struct.pack("<Q", 2) + b"[]")
    _unreadable(lab, struct.pack("<Q", 2**60) + b"{}")


@pytest.mark.parametrize("kind", ["weights", "mask", "rewind"])
def test_flipped_bits_in_data(lab: Path, kind: str) -> None:
    """One bit of the network, of the mask, of the rewind weights."""
    done("train mine:task --rewind 1 --out t.st")
    done("prune mine:task --model t.st --sparsity 0.5 --out p.st")
    data = bytearray((lab / "p.st").read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + length]))
    name = {"weights": "2.weight", "mask": "mask.0.weight", "rewind": "rewind.2.weight"}[kind]
    data[8 + length + header[name]["data_offsets"][0]] ^= 1
    (lab / "bad.st").write_bytes(data)
    said = ("bad.st", "do not match the digest" if kind != "mask" else "mask")
    refused(lab, "forget mine:task --model bad.st --class 1 --method ft --out x.st", *said)
    shown = done("show bad.st --json").json
    assert shown["intact"] is False


def _says_intact(path: Path) -> bool:
    """Whether ``show`` would call a file intact; that it is refused is a no."""
    try:
        return bool(describe_file(path)["intact"])
    except CheckpointError:
        return False


def test_flipped_bits_anywhere(lab: Path) -> None:
    """Whichever bit is wrong, no damaged file is read as a model, and none makes a traceback."""
    done("train mine:task --rewind 1 --out t.st")
    done("prune mine:task --model t.st --sparsity 0.5 --out p.st")
    done("forget mine:task --model p.st --class 1 --method ft --out f.st")
    data = (lab / "f.st").read_bytes()
    task, path, draw = load_task("mine:task"), lab / "bad.st", random.Random(0)
    assert load(lab / "f.st", task).mask is not None
    for _ in range(300):
        bit = draw.randrange(8 * len(data))
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"bad\.st"):
            load(path, task)
        assert not _says_intact(path), bit


def test_damaged_metadata(lab: Path) -> None:
    """Metadata that still parse, but are not what was written."""
    with safe_open(lab / "m.st", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(lab / "m.st")
    for key in metadata:
        for value in ("", "null", metadata[key] + "x"):
            if value == metadata[key]:
                continue
            save_file(tensors, lab / "bad.st", metadata | {key: value})
            refused(lab, READERS[0], "bad.st")
            answer = efface("show bad.st")
            assert answer.code == 2 or "intact: NO" in answer.out
            assert "Traceback" not in answer.err
        save_file(tensors, lab / "bad.st", {k: v for k, v in metadata.items() if k != key})
        refused(lab, READERS[0], "bad.st")


def test_a_checkpoint_that_efface_did_not_write(lab: Path) -> None:
    save_file(load_file(lab / "m.st"), lab / "bad.st")
    for command in READERS[:-2]:
        refused(lab, command, "bad.st", "was not written by efface", "efface adopt")


class _Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle0"])
def test_a_pickle_as_checkpoint(lab: Path, form: str) -> None:
    """Refused with the way out; never opened."""
    value: dict[str, Any] = {"0.weight": torch.zeros(16, 4), "bomb": _Bomb(lab / "exploded")}
    path = lab / "theirs.pt"
    if form in ("zip", "legacy"):
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps({"bomb": value["bomb"]}, 4 if form == "pickle" else 0))
    said = ("bad.st", "no safetensors file") if form == "pickle0" else ("is a pickle", "save_file")
    _unreadable(lab, path.read_bytes(), *said)
    assert not (lab / "exploded").exists()


def test_a_header_length_that_looks_like_a_pickle(lab: Path) -> None:
    """The first bytes of a safetensors file are a length: 0x80 and "PK" are lengths, too."""
    tensors = load_file(lab / "m.st")
    own = {n: tensors[n] for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
    seen = set()
    for padding in [*range(0, 300, 4), *range(18_700, 19_300, 4)]:
        save_file(own, lab / "theirs.safetensors", {"note": "x" * padding})
        start = (lab / "theirs.safetensors").read_bytes()[:2]
        if start[:1] == b"\x80" or start == b"PK":
            seen.add(start[:1])
            command = "adopt mine:task --weights theirs.safetensors --out a.st"
            done(command, "--force")
    assert seen == {b"\x80", b"P"}


# -- outputs --------------------------------------------------------------------------------------

WRITERS = (
    "train mine:task --out {}",
    "adopt mine:task --weights w.safetensors --out {}",
    "prune mine:task --model m.st --sparsity 0.5 --out {}",
    "forget mine:task --model m.st --class 1 --method ft --out {}",
    "retrain mine:task --class 1 --out {}",
)
AUDIT = "audit mine:task --before m.st --after f.st --out {}"


@pytest.fixture
def full(lab: Path) -> Path:
    """With all that the writers need."""
    save_file(load_file(lab / "m.st"), lab / "w.safetensors")
    done("forget mine:task --model m.st --class 1 --method ft --out f.st")
    return lab


def test_an_output_that_exists(full: Path) -> None:
    (full / "taken").write_text("precious")
    for command in WRITERS:
        refused(full, command.format("taken"), "taken exists already", "--force")
    (full / "d").mkdir()
    (full / "d/audit.json").write_text("precious")
    refused(full, AUDIT.format("d"), "exists already", "--force")
    refused(full, "demo --out d", "d")
    (full / "e").mkdir()
    (full / "e/results.json").write_text("precious")
    refused(full, "demo --out e", "exists already", "--force")


def test_an_output_that_is_a_folder(full: Path) -> None:
    """Found out before any work, and --force does not remove folders."""
    (full / "folder").mkdir()
    (full / "folder/file").write_text("precious")
    for command in WRITERS:
        refused(full, command.format("folder"), "folder")
        refused(full, f"{command.format('folder')} --force", "folder")
        refused(full, f"{command.format('.')} --force")


def test_an_output_below_a_file(full: Path) -> None:
    for command in WRITERS:
        refused(full, command.format("m.st/sub/x.st"), "cannot be written", "m.st is not a folder")
    refused(full, AUDIT.format("m.st"), "cannot be written", "m.st is not a folder")
    refused(full, "demo --out m.st/demo", "cannot be written")


def test_an_output_without_permission(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked before any work (root may write anywhere, so the answer is made up)."""
    monkeypatch.setattr("efface.files.os.access", lambda path, mode: mode != os.W_OK)
    for command in (*WRITERS, AUDIT):
        refused(full, command.format("new/x.st"), "cannot be written", "you may write to")


def test_someone_elses_folder_is_no_demo(lab: Path) -> None:
    """A demo removes nothing that a demo has not written, whatever is asked."""
    (lab / "project/models").mkdir(parents=True)
    (lab / "project/models/best.bin").write_text("precious")
    for force in ("", " --force"):
        refused(lab, f"demo --out project{force}", "project")


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk(full: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Nothing under the final name, nothing beside it, and the old file intact with --force."""
    (full / "old.st").write_bytes(b"precious")
    monkeypatch.setattr(f"efface.files.os.{call}", _no_space)
    said = ("cannot write", "No space left on device", "free some space")
    for command in WRITERS:
        refused(full, command.format("x.st"), "x.st", *said, code=1)
        refused(full, command.format("old.st") + " --force", "old.st", *said, code=1)
    refused(full, AUDIT.format("d"), *said, code=1)


def test_a_file_that_gets_too_large(full: Path) -> None:
    """The same from the system itself: the write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = snapshot(full)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        answers = [efface(command.format("x.st")) for command in (*WRITERS, AUDIT)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for answer in answers:
        check_sentence(answer, 1, "cannot write", "x.st", "File too large")
    assert snapshot(full) == before


def test_space_again(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full disk the same command does its work."""
    with monkeypatch.context() as patch:
        patch.setattr("efface.files.os.replace", _no_space)
        assert efface(TRAIN).code == 1
    answer = done(TRAIN, "--json")
    assert answer.json["weights_digest"] == done("show m.st --json").json["weights_digest"]


# -- while it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [("nan", "nan"), ("inf", "inf")])
def test_a_loss_that_is_not_finite(lab: Path, value: str, word: str) -> None:
    """Stops at once; says epoch and step: the twelfth of eight per epoch."""
    more = f"""
calls = 0
def loss(logits, labels):
    global calls
    calls += 1
    value = nn.functional.cross_entropy(logits, labels)
    return value * float("{value}") if calls == 12 else value
options["loss"] = loss
"""
    said = (f"the loss became {word}", "epoch 2, step 12", "learning rate")
    _other(lab, more, *said, code=1)


def test_a_rate_that_is_too_high(lab: Path) -> None:
    refused(lab, f"{TRAIN} --set lr=1e30", "the loss became", "epoch 1", code=1)
    refused(lab, f"{FORGET} --class 1 --set lr=1e30", "the loss became", "finetune", code=1)


def test_ctrl_c(lab: Path) -> None:
    """One sentence, exit code 1, no file; see test_kill.py for real signals."""
    write_task(lab, "options['loss'] = lambda logits, labels: stop()\n", "other")
    (lab / "other.py").write_text(
        "def stop():\n    raise KeyboardInterrupt\n" + (lab / "other.py").read_text()
    )
    before = snapshot(lab)
    answer = efface("train other:task --out x.st")
    assert (answer.code, answer.out) == (1, "")
    (line,) = answer.err.splitlines()
    assert line.startswith("interrupted")
    assert "same command" in line
    assert snapshot(lab) == before


STOPS = """
import pathlib
calls = 0
def loss(logits, labels):
    global calls
    calls += 1
    if calls == 20 and pathlib.Path("stop").exists():
        raise KeyboardInterrupt
    return nn.functional.cross_entropy(logits, labels)
options["loss"] = loss
"""


def _interrupted(lab: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Begin to train the other task, and stop after twenty steps, each of them committed."""
    write_task(lab, STOPS, "other")
    (lab / "stop").touch()
    with monkeypatch.context() as patch:
        patch.setattr("efface.journal.Journal.__init__.__defaults__", (0.0,))
        assert efface("train", "other:task", "--out", name).code == 1
    assert (lab / f"{name}.partial").is_dir()


def test_unfinished_work_survives_a_wrong_command(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted run left beside its output is not lost to a mistyped second try."""
    _interrupted(lab, monkeypatch, "x.st")
    refused(lab, "train other:task --out x.st --set lr=fast", "lr must be a number")
    refused(lab, "train other:task --out x.st --set lr=-1", "lr must be positive")
    refused(lab, "train other:tusk --out x.st", "did you mean 'task'?")
    refused(lab, "forget other:task --model m.st --method ft --class 9 --out x.st", "class 9")
    (lab / "stop").unlink()
    answer = done("train other:task --out x.st --json")
    assert "going on" in answer.err
    assert answer.json["weights_digest"] == done("show m.st --json").json["weights_digest"]
    assert not (lab / "x.st.partial").exists()


def test_a_changed_task_starts_anew(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished run is gone on with only while the task is what it was."""
    changes = {
        "fit": "options['fit'] = efface.Settings(epochs=4, batch_size=16, lr=0.05)\n",
        "data": "train = (train[0] * 1.5, train[1])\n",
        "labels": "train = (train[0], 2 - train[1])\n",
    }
    for name, change in changes.items():
        _interrupted(lab, monkeypatch, f"{name}.st")
        (lab / "stop").unlink()
        write_task(lab, STOPS + change, "other")
        answer = done(f"train other:task --out {name}.st --json")
        fresh = done(f"train other:task --out {name}-fresh.st --json")
        assert answer.json["weights_digest"] == fresh.json["weights_digest"], name


# -- an audit of what does not belong together ----------------------------------------------------


@pytest.fixture
def judged(full: Path) -> Path:
    """With references, good and bad."""
    done("retrain mine:task --class 1 --out r.st")
    done("retrain mine:task --class 1 --set lr=0.01 --out slow.st")
    done("retrain mine:task --class 2 --out wrong.st")
    done("prune mine:task --model f.st --sparsity 0.5 --out fp.st")
    return full


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--after f.st --class 2", ("records of the split", "lineage")),
        ("--after f.st --random 0.1", ("records of the split", "lineage")),
        ("--after m.st --reference m.st", ("differs by no request", "select")),
        ("--after f.st --reference wrong.st", ("a reference was not trained without",)),
        ("--after f.st --reference m.st", ("a reference was not trained without",)),
        ("--after f.st --reference slow.st", ("other settings", "lr")),
        ("--after fp.st --reference r.st", ("0.0%", "50.0%", "--like same-mask")),
        ("--after f.st --reference f.st", ("reference",)),
    ],
)
def test_what_does_not_belong_together(judged: Path, command: str, said: tuple[str, ...]) -> None:
    refused(judged, f"audit mine:task --before m.st --out d {command}", *said)


def test_before_and_after_exchanged(judged: Path) -> None:
    command = "audit mine:task --before f.st --after m.st --out d"
    refused(judged, command, "differs by no request")
    refused(judged, f"{command} --class 1")


def test_references_of_other_data(judged: Path) -> None:
    write_task(judged, "train = (train[0] * 1.01, train[1])\n", "other")
    done("retrain other:task --class 1 --out q.st")
    command = "audit mine:task --before m.st --after f.st --reference q.st --out d"
    refused(judged, command, "other data")


def test_another_key(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier requests cannot be told apart with another key: said, never guessed."""
    monkeypatch.setenv("EFFACE_KEY", "another key")
    said = ("hashed with another key", "EFFACE_KEY")
    refused(judged, "forget mine:task --model f.st --class 2 --method ft --out x.st", *said)
    refused(judged, "audit mine:task --before m.st --after f.st --out d", *said)
    monkeypatch.delenv("EFFACE_KEY")
    (judged / "empty").touch()
    for name in ("absent", "empty"):
        monkeypatch.setenv("EFFACE_KEY_FILE", name)
        refused(judged, f"{FORGET} --class 1", name, "key file")
