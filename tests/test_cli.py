"""The command line, end to end, on a small task of a user's own.

Commands run in this process through :func:`efface` (PyTorch is imported once); only what needs a
fresh interpreter runs in one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from efface.cli import main
from efface.commandline import app

SOURCE = """
import torch
from torch import nn

import efface

N, TEST = 120, 60
draw = torch.Generator().manual_seed(0)
inputs = torch.randn(N + TEST, 4, generator=draw)
targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
options = dict(
    ids=[f"patient-{i:04d}" for i in range(N)],
    subjects=[f"anna-{i // 4:02d}" for i in range(N)],
    columns={"age": list(range(N)), "site": ["south", "north"] * (N // 2)},
    fit=efface.Settings(epochs=8, batch_size=16),
    name="mine",
)


def network():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


train, test = (inputs[:N], targets[:N]), (inputs[N:], targets[N:])
"""
"""A user's module; tests add lines, ``task`` comes last (:func:`write_task`)."""


def write_task(folder: Path, more: str = "", name: str = "mine") -> None:
    """A module with a task, with these lines before the task is made."""
    end = "\ntask = efface.Task(network, train, test, **options)\n"
    (folder / f"{name}.py").write_text(SOURCE + more + end)


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def efface(command: str = "", *words: object) -> Answer:
    """Run a command in this process, as a shell would have it; ``command`` is split, words not."""
    for name in [n for n in sys.modules if n in {"mine", "other"}]:
        del sys.modules[name]  # the module may have been written anew
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["efface", *command.split(), *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = argv
    return Answer(code, out.getvalue(), err.getvalue())


def done(command: str, *words: object) -> Answer:
    """Run a command that must succeed."""
    answer = efface(command, *words)
    assert answer.code == 0, answer.err
    return answer


MODEL: list[bytes] = []
"""The trained model's file: made by the first test that needs it, the same for all others."""


def provide_model(folder: Path) -> None:
    """Put ``m.st`` into a folder with a task."""
    if not MODEL:
        done("train mine:task --out m.st")
        MODEL.append((folder / "m.st").read_bytes())
    (folder / "m.st").write_bytes(MODEL[0])


def _digest(name: str) -> str:
    return str(done("show", name, "--json").json["weights_digest"])


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes (None for folders)."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


@contextlib.contextmanager
def workplace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a task of one's own, as working directory; globals are left as found."""
    monkeypatch.setenv("EFFACE_KEY", "a key for tests")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    write_task(folder)
    threads = torch.get_num_threads()
    try:
        yield folder
    finally:
        torch.set_num_threads(threads)
        for name in ("mine", "other"):
            sys.modules.pop(name, None)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a task and a trained model, ``m.st``."""
    with workplace(tmp_path, monkeypatch) as folder:
        provide_model(folder)
        yield folder


# -- help -----------------------------------------------------------------------------------------

COMMON = {"--seed", "--force", "--device", "--threads", "--json", "--debug"}
SELECT = {"--ids", "--class", "--random", "--where"}
OPTIONS = {
    "demo": {"--task", "--out"},
    "train": {"TASK", "--out", "--set"},
    "adopt": {"TASK", "--weights", "--out"},
    "prune": {"TASK", "--model", "--method", "--sparsity", "--out"},
    "forget": {"TASK", "--model", "--method", "--set", "--patch", "--out"} | SELECT,
    "patch": {"TASK", "--model", "--patch", "--undo", "--out"},
    "retrain": {"TASK", "--model", "--like", "--set", "--out"} | SELECT,
    "audit": {"TASK", "--before", "--after", "--reference", "--tier", "--fail-on", "--out"}
    | {"--per-record"}
    | SELECT,
    "show": {"MODEL"},
    "methods": set(),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_help_names_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    group: Any = typer.main.get_command(app)
    real = {o for param in group.commands[name].params for o in param.opts if o.startswith("--")}
    answer = efface(name, "--help")
    assert answer.code == 0
    assert real >= {o for o in OPTIONS[name] | COMMON if o.startswith("--")}
    missing = [o for o in real | OPTIONS[name] | COMMON if o not in answer.out]
    assert not missing


def test_help_lists_every_command() -> None:
    answer = efface("--help")
    assert answer.code == 0
    assert all(name in answer.out for name in OPTIONS)
    group: Any = typer.main.get_command(app)
    assert set(group.commands) >= set(OPTIONS)


def test_without_a_command_there_is_help() -> None:
    answer = efface()
    assert (answer.code, answer.err) == (0, "")
    assert "forget" in answer.out


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['efface', '--help']\n"
        "from efface.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_as_a_module(tmp_path: Path) -> None:
    """A real shell's view: exit code, stdout, stderr (test_demo.py has one that ends well)."""
    write_task(tmp_path)
    (tmp_path / "m.st").touch()
    command = [sys.executable, "-m", "efface", "train", "mine:task", "--out", "m.st"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: m.st exists already")
    assert "Traceback" not in answer.stderr


# -- the whole way --------------------------------------------------------------------------------


def test_the_whole_way_with_json(lab: Path) -> None:
    """Every command with ``--json``: one object on stdout, nothing on stderr."""
    ways = {
        "trained": "train mine:task --out t.st",
        "pruned": "prune mine:task --model m.st --sparsity 0.5 --out p.st",
        "forgot": "forget mine:task --model m.st --class 1 --method ft --out f.st",
        "first": "retrain mine:task --class 1 --seed 1 --out r1.st",
        "second": "retrain mine:task --class 1 --seed 2 --out r2.st",
        "audit": "audit mine:task --before m.st --after f.st --out a "
        "--reference r1.st --reference r2.st",
        "show": "show p.st",
        "methods": "methods",
        "method": "methods l1-sparse",
    }
    answers = {name: done(command, "--json") for name, command in ways.items()}
    assert all(answer.err == "" for answer in answers.values())
    facts = {name: answer.json for name, answer in answers.items()}
    assert facts["trained"]["weights_digest"] == _digest("m.st")
    assert facts["pruned"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert facts["show"]["intact"]
    assert facts["show"]["layers"][0]["name"] == "0.weight"
    assert [step["verb"] for step in facts["show"]["lineage"]] == ["train", "prune"]
    gone = sum(int(t) == 1 for t in _targets(lab))
    assert facts["forgot"]["forgotten"] == facts["first"]["forgotten"] == gone
    assert facts["first"]["weights_digest"] != facts["second"]["weights_digest"]
    names = {m["name"] for m in facts["methods"]["methods"]}
    assert names >= {"retrain", "finetune", "l1-sparse", "gradient-ascent", "neggrad-plus"}
    assert {o["name"] for o in facts["method"]["methods"][0]["options"]} >= {"alpha", "schedule"}
    _check_audit(lab, facts["audit"], gone)


def _targets(lab: Path) -> list[int]:
    space: dict[str, Any] = {}
    exec((lab / "mine.py").read_text(), space)
    return list(space["targets"][: space["N"]].tolist())


def _check_audit(lab: Path, printed: dict[str, Any], gone: int) -> None:
    written = json.loads((lab / "a/audit.json").read_text())
    assert written == printed
    assert written["schema"] == "efface.audit/1"
    assert written["split"] == {"forget": gone, "retain": 120 - gone, "test": 60}
    assert sorted(path.name for path in (lab / "a").iterdir()) == ["audit.json", "report.html"]
    found = {f["name"]: f for f in written["findings"]}
    assert found.keys() >= {"ua", "ra", "ta", "mia_efficacy", "mia_auc", "rte_seconds", "js_forget"}
    keys = {"name", "value", "low", "high", "n", "direction", "status", "sentence"}
    keys |= {"reference", "gap", "floor", "original", "series"}
    assert all(set(f) >= keys for f in written["findings"])
    assert found["ua"]["n"] == gone
    assert found["ua"]["floor"] is not None
    assert 0 <= found["ua"]["low"] <= found["ua"]["value"] <= found["ua"]["high"] <= 1
    assert written["not_shown"]


def test_text_for_people(lab: Path) -> None:
    """Without ``--json`` stdout says in words what was done."""
    forgot = done("forget mine:task --model m.st --class 1 --method ft --out f.st")
    assert forgot.out.startswith("f.st written in ")
    assert "records forgotten" in forgot.out
    audit = done("audit mine:task --before m.st --after f.st --out a")
    assert "verdict: not measurable." in audit.out
    assert "a/report.html" in audit.out
    shown = done("show f.st").out
    assert "finetune" in shown
    assert "intact: yes" in shown
    assert "Jia et al. 2023" in done("methods").out
    assert "alpha" in done("methods l1-sparse").out


def test_nothing_but_the_output_is_written(lab: Path) -> None:
    before = snapshot(lab)
    done("forget mine:task --model m.st --class 1 --method ft --out f.st")
    after = snapshot(lab)
    assert after.keys() - before.keys() == {"f.st"}
    assert all(after[name] == content for name, content in before.items())


def test_seeds_decide(lab: Path) -> None:
    def digest(*words: object) -> str:
        answer = done("train mine:task --out t.st --force --json", *words)
        return str(answer.json["weights_digest"])

    assert digest() == digest() == digest("--seed", 0)
    assert digest("--seed", 1) != digest()


def test_force_replaces(lab: Path) -> None:
    old = (lab / "m.st").read_bytes()
    done("train mine:task --out m.st --seed 3 --force")
    assert (lab / "m.st").read_bytes() != old


def test_threads(lab: Path) -> None:
    done("train mine:task --out t.st --threads 2")
    assert torch.get_num_threads() == 2
    done("train mine:task --out u.st --threads 1")
    assert torch.get_num_threads() == 1


def test_a_function_may_make_the_task(lab: Path) -> None:
    (lab / "other.py").write_text("def made():\n    import mine\n    return mine.task\n")
    done("train other:made --out t.st")
    assert _digest("m.st") == _digest("t.st")


# -- selections -----------------------------------------------------------------------------------


def _forgot(*select: object) -> dict[str, Any]:
    command = "forget mine:task --model m.st --method finetune --out f.st --force --json"
    return done(command, *select).json


def test_the_ways_to_select_agree(lab: Path) -> None:
    """Text, CSV with and without a header, JSON and ``--where`` that name the same records."""
    ids = ["patient-0003", "patient-0050", "patient-0117"]
    (lab / "a.txt").write_text("\ufeff" + "\r\n".join(ids) + "\r\n\r\n", encoding="utf-8")
    (lab / "b.csv").write_text("name,id\n" + "".join(f"x,{i}\n" for i in ids))
    (lab / "c.csv").write_text("".join(f"{i},x\n" for i in ids))
    (lab / "d.json").write_text(json.dumps(ids))
    where = " or ".join(f"id == '{i}'" for i in ids)
    answers = [_forgot("--ids", name) for name in ("a.txt", "b.csv", "c.csv", "d.json")]
    answers += [_forgot("--where", where), _forgot("--where", "age in (3, 50, 117)")]
    assert {a["forgotten"] for a in answers} == {3}
    assert len({a["weights_digest"] for a in answers}) == 1


def test_where_reaches_every_column(lab: Path) -> None:
    assert _forgot("--where", "subject == 'anna-07'")["forgotten"] == 4
    assert _forgot("--where", "20 <= age < 30 and site == 'north'")["forgotten"] == 5
    assert _forgot("--where", "not (age >= 3 or target == 7)")["forgotten"] == 3


def test_random_is_drawn_by_its_own_seed(lab: Path) -> None:
    first = _forgot("--random", 0.1)
    assert first["forgotten"] == 12
    assert _forgot("--random", 0.1)["weights_digest"] == first["weights_digest"]
    assert _forgot("--random", 0.1, "--split-seed", 1)["weights_digest"] != first["weights_digest"]


# -- methods and their options --------------------------------------------------------------------


def _last(name: str) -> dict[str, Any]:
    settings = done("show", name, "--json").json["lineage"][-1]["settings"]
    assert isinstance(settings, dict)
    return settings


def test_nested_set(lab: Path) -> None:
    sets = ["--set", "pruner.sparsity=0.5", "--set", "inner.method=l1-sparse"]
    sets += ["--set", "inner.alpha=1e-3", "--set", "inner.epochs=2", "--set", "pruner.recovery=1"]
    words = "forget mine:task --model m.st --class 1 --method prune-first"
    answer = done(words, *sets, "--out", "f.st", "--json").json
    assert answer["sparsity"] == pytest.approx(0.5, abs=0.02)
    said = _last("f.st")
    assert said["method"] == "prune-first"
    assert (said["pruner"]["sparsity"], said["pruner"]["recovery"]) == (0.5, 1)
    inner = {"method": "l1-sparse", "alpha": 1e-3, "epochs": 2, "schedule": "decay"}
    assert {key: said["inner"][key] for key in inner} == inner


def test_a_method_file_nests_and_set_lies_over_it(lab: Path) -> None:
    (lab / "plan.toml").write_text(
        'method = "prune-first"\n'
        'inner = {method = "l1-sparse", alpha = 2e-3, epochs = 1}\n'
        "[pruner]\nsparsity = 0.25\nrecovery = 1\n"
    )
    words = "forget mine:task --model m.st --class 1 --method plan.toml"
    done(words, "--set", "inner.epochs=3", "--out", "f.st")
    said = _last("f.st")
    assert (said["method"], said["pruner"]["sparsity"]) == ("prune-first", 0.25)
    assert (said["inner"]["method"], said["inner"]["alpha"]) == ("l1-sparse", 2e-3)
    assert said["inner"]["epochs"] == 3


def test_a_chain_inside_a_wrapper(lab: Path) -> None:
    (lab / "plan.toml").write_text(
        'method = "prune-first"\npruner = {sparsity = 0.5, recovery = 1}\n'
        "[inner]\n"
        'method = "chain"\nfirst = {method = "ga", epochs = 1}\nsecond = "ft"\n'
    )
    words = "forget mine:task --model m.st --class 1 --method plan.toml"
    done(words, "--out", "f.st")
    inner = _last("f.st")["inner"]
    assert (inner["first"]["method"], inner["second"]["method"]) == ("gradient-ascent", "finetune")


def test_aliases_and_options_as_text(lab: Path) -> None:
    words = "forget mine:task --model m.st --class 1 --set epochs=2"
    one = done(words, "--method", "ft", "--out", "f.st", "--json").json["weights_digest"]
    two = done(words, "--method", "finetune", "--out", "g.st", "--json").json["weights_digest"]
    assert one == two
    assert _last("f.st")["epochs"] == 2


def test_set_changes_how_a_task_trains(lab: Path) -> None:
    done("train mine:task --set epochs=1 --set lr=0.01 --out t.st")
    assert _digest("m.st") != _digest("t.st")


def test_every_like(lab: Path) -> None:
    """The four kinds of reference, and that the mask is what each says."""
    done("train mine:task --rewind 1 --out t.st")
    done("prune mine:task --model t.st --sparsity 0.5 --out p.st")
    mask = done("show p.st --json").json["mask_digest"]
    digests = {}
    for like in ("dense", "same-mask", "rewound", "repruned"):
        done(f"retrain mine:task --class 1 --model p.st --like {like} --out {like}.st")
        digests[like] = _digest(f"{like}.st")
    masks = {like: done(f"show {like}.st --json").json["mask_digest"] for like in digests}
    assert masks["dense"] == ""
    assert masks["same-mask"] == masks["rewound"] == mask
    assert masks["repruned"] not in ("", mask)
    assert len(set(digests.values())) == 4


# -- audits ---------------------------------------------------------------------------------------


@pytest.fixture
def judged(lab: Path) -> Path:
    """With a forgotten model and two references."""
    done("forget mine:task --model m.st --class 1 --method ft --out f.st")
    for seed in (1, 2):
        done("retrain", "mine:task", "--class", 1, "--seed", seed, "--out", f"r{seed}.st")
    return lab


AUDIT = "audit mine:task --before m.st --after f.st --reference r1.st --reference r2.st"


def test_fail_on_gives_three(judged: Path) -> None:
    verdict = done(AUDIT, "--out", "a", "--json").json["verdict"]
    answer = efface(AUDIT, "--fail-on", verdict, "--out", "b", "--json")
    assert answer.code == 3
    assert answer.json["verdict"] == verdict
    assert (judged / "b/audit.json").exists()  # it was audited; the code says what came out
    others = {"under-forgotten", "indistinguishable", "over-forgotten", "not measurable"}
    wrong = [word for other in sorted(others - {verdict}) for word in ("--fail-on", other)]
    assert efface(AUDIT, *wrong, "--out", "c").code == 0


def test_tier_0_reads_no_reference(judged: Path) -> None:
    result = done(AUDIT, "--tier", 0, "--out", "a", "--json").json
    assert result["verdict"] == "not measurable"
    assert result["average_gap"] is None
    assert {f["gap"] for f in result["findings"]} == {None}


def test_a_selection_that_agrees_with_the_lineage(judged: Path) -> None:
    implied = done(AUDIT, "--out", "a", "--json").json
    told = done(AUDIT, "--class", 1, "--out", "b", "--json").json
    assert implied["findings"] == told["findings"]


def test_the_report_names_the_command(judged: Path) -> None:
    done(AUDIT, "--out", "a folder")
    said = json.loads((judged / "a folder/audit.json").read_text())["subject"]["reproduce"]
    assert said == [f"efface {AUDIT} --out 'a folder'"]


def test_per_record_only_on_request(judged: Path) -> None:
    done(AUDIT, "--out", "a")
    assert not (judged / "a/per_record.csv").exists()
    done(AUDIT, "--out", "b", "--per-record")
    rows = list(csv.DictReader((judged / "b/per_record.csv").read_text().splitlines()))
    gone = [f"patient-{i:04d}" for i, t in enumerate(_targets(judged)) if t == 1]
    assert [row["id"] for row in rows] == gone
    assert {row["label"] for row in rows} == {"1"}
    # An audit written over it without --per-record leaves no IDs behind.
    done(AUDIT, "--out", "b", "--force")
    assert not (judged / "b/per_record.csv").exists()


PRIVATE = re.compile(rb"patient-\d|anna-\d")


@pytest.mark.parametrize(
    "select",
    [
        ("--ids", "who.txt"),
        ("--where", "id == 'patient-0007' or id in ('patient-0008', 'patient-0033')"),
        ("--where", "subject == 'anna-07' and age < 90"),
        ("--where=not (subject != 'anna-11')",),
        ("--where", "'anna-07' == subject"),
    ],
)
def test_no_plain_ids_in_any_file(lab: Path, select: tuple[str, ...]) -> None:
    """Neither IDs nor subjects, in no file that a command writes, unless asked for."""
    (lab / "who.txt").write_text("patient-0007\npatient-0008\n")
    given = set(snapshot(lab)) - {"m.st"}
    done("forget mine:task --model m.st", *select, "--method", "ft", "--out", "f.st")
    done("retrain mine:task", *select, "--out", "r.st")
    audit = "audit mine:task --before m.st --after f.st --reference r.st"
    printed = [done(audit, *select, "--out", "a", "--json"), done("show f.st --json")]
    written = {name: data for name, data in snapshot(lab).items() if name not in given and data}
    assert {"m.st", "f.st", "r.st", "a/audit.json", "a/report.html"} == set(written)
    assert not [name for name, data in written.items() if PRIVATE.search(data)]
    assert not [a for a in printed if PRIVATE.search((a.out + a.err).encode())]


# -- models of others, second requests ------------------------------------------------------------


def test_a_second_request(lab: Path) -> None:
    """What was forgotten before stays out of D_r, of the references and of the next D_f."""
    (lab / "one.txt").write_text("\n".join(f"patient-{i:04d}" for i in range(10)))
    (lab / "two.txt").write_text("\n".join(f"patient-{i:04d}" for i in range(5, 30)))
    method = ("--method", "ft")
    done("forget mine:task --model m.st --ids one.txt", *method, "--out", "f1.st")
    second = ("--model", "f1.st", "--ids", "two.txt")
    answer = done("forget mine:task", *second, *method, "--out", "f2.st", "--json").json
    assert answer["forgotten"] == 30
    fresh = done("retrain mine:task", *second, "--out", "r2.st", "--json").json
    assert fresh["forgotten"] == 30
    audit = "audit mine:task --before f1.st --after f2.st --reference r2.st"
    result = done(audit, "--out", "a", "--json").json
    assert result["split"] == {"forget": 20, "retain": 90, "test": 60}
    shown = done("show f2.st --json").json
    assert (shown["forgotten"], shown["requests"]) == (30, 2)
    assert [s["verb"] for s in shown["lineage"]] == ["train", "forget", "forget"]
    # The reference is the one that was trained on the 90 others in one go.
    (lab / "all.txt").write_text("\n".join(f"patient-{i:04d}" for i in range(30)))
    once = done("retrain mine:task --ids all.txt --out r.st --json").json
    assert once["weights_digest"] == fresh["weights_digest"]


def test_pruning_after_forgetting_leaves_the_forgotten_out(lab: Path) -> None:
    done("forget mine:task --model m.st --class 1 --method ft --out f.st")
    done("prune mine:task --model f.st --sparsity 0.5 --out p.st")
    from efface.checkpoint import read_file

    step = json.loads(read_file(lab / "p.st")[1]["lineage"])[-1]
    retained = sum(int(t) != 1 for t in _targets(lab))
    assert step["cost"]["images"] == 4 * retained  # half of eight epochs


def test_adopting_plain_safetensors(lab: Path) -> None:
    own = {n: t for n, t in load_file(lab / "m.st").items() if n in _network(lab).state_dict()}
    save_file(own, lab / "theirs.safetensors")
    theirs = (lab / "theirs.safetensors").read_bytes()
    words = "adopt mine:task --weights theirs.safetensors --out a.st --json"
    assert done(words).json["weights_digest"] == _digest("m.st")
    assert (lab / "theirs.safetensors").read_bytes() == theirs
    done("forget mine:task --model a.st --class 1 --method ft --out f.st")
    done("retrain mine:task --class 1 --out r.st")
    audit = "audit mine:task --before a.st --after f.st --reference r.st --out d"
    assert done(audit, "--json").json["subject"]


def _network(lab: Path) -> torch.nn.Module:
    space: dict[str, Any] = {}
    exec((lab / "mine.py").read_text(), space)
    network = space["network"]()
    assert isinstance(network, torch.nn.Module)
    return network


def test_adopting_a_pruned_network(lab: Path) -> None:
    """The entries of ``torch.nn.utils.prune`` become the model's mask."""
    from torch.nn.utils import prune

    network = _network(lab)
    prune.l1_unstructured(network[0], "weight", amount=0.5)  # type: ignore[index,no-untyped-call]
    save_file(network.state_dict(), lab / "pruned.safetensors")
    words = "adopt mine:task --weights pruned.safetensors --out a.st --json"
    assert done(words).json["sparsity"] == 0.5


def test_show_needs_no_task(lab: Path) -> None:
    done("prune mine:task --model m.st --sparsity 0.5 --out p.st")
    (lab / "mine.py").unlink()
    shown = done("show p.st --json").json
    assert shown["intact"]
    assert shown["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert shown["bytes"] == os.path.getsize(lab / "p.st")
    (layer,) = shown["layers"]
    assert 0 < layer.pop("filters_kept") <= layer.pop("filters")
    assert layer == {"name": "0.weight", "kept": 32, "total": 64, "sparsity": 0.5}


def test_the_built_in_digits(lab: Path) -> None:
    sets = ("--set", "epochs=1")
    done("train digits", *sets, "--out", "d.st")
    command = "forget digits --model d.st --class 3 --method ga --set epochs=1 --out f.st"
    assert done(command, "--json").json["forgotten"] > 100
    assert done("show f.st --json").json["task"] == "digits"
