"""``forget --patch`` and ``patch``, end to end on the digits, with bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import efface as library
from efface.checkpoint import load
from efface.datasets import load_task
from efface.errors import MismatchError, WriteError
from efface.journal import Journal
from efface.sparsify.blocks import Patch
from efface.trained import TrainedModel

from .test_bad_input import check_sentence, refused
from .test_cli import done, efface, snapshot, workplace

FILES: dict[str, bytes] = {}
"""A model and what it was made to forget: made by the first test that needs them."""

DFMU = "forget digits --class 3 --method dfmu --set strength=0.3 --model m.st"
"""Spelled out, so that it damps whatever the defaults are."""


PLAIN = "--method dfmu --set strength=0.3"


def forget(more: str = "", out: str = "x.st", patch: str = "x.patch") -> str:
    return f"{DFMU} --out {out} --patch {patch} {more}".strip()


def provide() -> None:
    """``m.st``, ``f.st`` without the threes, ``t.patch``, and ``p.st``, which has the patch on."""
    if not FILES:
        done("train digits --set epochs=3 --out m.st")
        done(forget(out="f.st", patch="t.patch"))
        done("patch digits --model m.st --patch t.patch --out p.st")
        FILES.update({n: Path(n).read_bytes() for n in ("m.st", "f.st", "t.patch", "p.st")})
    for name, data in FILES.items():
        Path(name).write_bytes(data)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with workplace(tmp_path, monkeypatch) as folder:
        provide()
        yield folder


def shown(name: str) -> dict[str, Any]:
    return done(f"show {name} --json").json


def right(name: str) -> list[float]:
    """Accuracy on the threes of the training data, and on the rest of them."""
    task = load_task("digits")
    model = load(name, task).network.eval()
    with torch.no_grad():
        hit = model(task.records.inputs).argmax(1) == task.records.targets
    three = task.records.targets == 3
    return [float(hit[where].float().mean()) for where in (three, ~three)]


# --- forget --patch -------------------------------------------------------------------------------


def test_a_patch_is_written_beside_the_model(lab: Path) -> None:
    answer = done(forget("--json"))
    assert answer.json["forgotten"] > 100
    said = answer.json["patch"]
    patch = Patch.load("x.patch")
    assert said == {
        "path": "x.patch",
        "bytes": (lab / "x.patch").stat().st_size,
        "factors": sum(len(change.rows) for change in patch.changes),
        "for": shown("m.st")["weights_digest"],
    }
    assert said["factors"] > 0
    assert said["bytes"] < 10_000
    assert patch.base == said["for"]
    assert (lab / "x.patch").read_bytes() == FILES["t.patch"]
    assert shown("x.st")["weights_digest"] == shown("f.st")["weights_digest"]
    text = done(forget(out="y.st", patch="y.patch")).out
    assert f"y.patch written: {said['bytes'] / 1000:.1f} kB, {said['factors']} factors" in text
    assert "it hides, and does not erase" in text
    assert sorted(p.name for p in lab.iterdir() if p.name.endswith(".partial")) == []


def test_without_the_option_there_is_no_patch(lab: Path) -> None:
    answer = done(f"{DFMU} --out x.st --json")
    assert "patch" not in answer.json
    assert {p.name for p in lab.glob("*.patch")} == {"t.patch"}
    assert shown("x.st")["weights_digest"] == shown("f.st")["weights_digest"]


@pytest.mark.parametrize(
    "more", ["--set action=prune", "--set strength=0", "--set inner.epochs=0", "--seed 7"]
)
def test_options_of_the_method_reach_the_patch(lab: Path, more: str) -> None:
    done(forget(more))
    patch = Patch.load("x.patch")
    off = all(bool((change.factors == 0).all()) for change in patch.changes)
    assert off == ("prune" in more or "strength=0" in more)
    done("patch digits --model m.st --patch x.patch --out on.st")
    done("patch digits --model on.st --patch x.patch --undo --out off.st")
    assert shown("off.st")["weights_digest"] == shown("m.st")["weights_digest"]


def test_inside_a_wrapper(lab: Path) -> None:
    (lab / "wrapped.toml").write_text(
        'method = "frugal"\nfraction = 0.2\ninner = {method = "dfmu", fraction = 1.0}\n'
    )
    answer = done(forget("--json").replace(PLAIN, "--method wrapped.toml"))
    assert answer.json["patch"]["for"] == shown("m.st")["weights_digest"]
    assert answer.err == ""


def test_a_patch_for_weights_in_between_is_said(lab: Path) -> None:
    (lab / "chain.toml").write_text(
        'method = "chain"\nfirst = {method = "finetune", epochs = 1}\nsecond = {method = "dfmu"}\n'
    )
    answer = done(forget().replace(PLAIN, "--method chain.toml"))
    assert "note: chain changed the model before its blocks were turned down" in answer.err
    assert "x.patch is for weights in between" in answer.err
    assert (lab / "x.patch").exists()
    refused(lab, "patch digits --model m.st --patch x.patch --out y.st", "the patch is for weights")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            forget().replace(PLAIN, "--method finetune"),
            "--patch: finetune makes no patch; take --method",
        ),
        (forget("--set action=reinit"), "action=reinit puts new weights in"),
        (forget(patch="t.patch"), "t.patch exists already; give --force"),
        (forget(patch="x.st"), "--patch and --out name the same file, x.st"),
        (forget("--force", patch="m.st"), "--patch and --model name the same file, m.st"),
        (forget(patch="./f.st", out="f.st"), "--patch and --out name the same file"),
        (forget(patch="."), "is a folder"),
        (forget(patch="m.st/x.patch"), "is not a folder you may write to"),
        (forget("--set strength=-1"), "strength must be 0 or more"),
    ],
)
def test_refused_before_anything_runs(
    lab: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr("efface.verbs.forget", never)
    refused(lab, command, said)


def test_random_records_make_no_patch(lab: Path) -> None:
    refused(lab, forget().replace("--class 3", "--random 0.1"), "random records")


def test_force_replaces_both(lab: Path) -> None:
    (lab / "t.patch").write_bytes(b"old")
    done(forget("--force", out="f.st", patch="t.patch"))
    assert (lab / "t.patch").read_bytes() == FILES["t.patch"]


def test_a_run_that_was_cut_short_still_writes_it(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fits are in the journal and are not done again; scoring is, and gives the same patch."""
    monkeypatch.setattr(Journal.__init__, "__defaults__", (0.0,))  # commits at every step
    with monkeypatch.context() as cut:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        cut.setattr(TrainedModel, "save", stop)
        assert efface(forget()).code == 1
    assert not (lab / "x.patch").exists()
    assert (lab / "x.st.partial").is_dir()
    answer = done(forget())
    assert "going on where an earlier run stopped" in answer.err
    assert (lab / "x.patch").read_bytes() == FILES["t.patch"]
    assert shown("x.st")["weights_digest"] == shown("f.st")["weights_digest"]
    assert not (lab / "x.st.partial").exists()


def test_a_patch_that_cannot_be_written_is_made_up_for(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:

        def stop(*_: Any, **__: Any) -> None:
            raise WriteError("cannot write x.patch: disk full; free some space.")

        full.setattr(Patch, "save", stop)
        check_sentence(efface(forget("--json")), 1, "cannot write x.patch")
    assert not (lab / "x.st").exists()
    done(forget())
    assert (lab / "x.patch").read_bytes() == FILES["t.patch"]
    assert not (lab / "x.st.partial").exists()


# --- patch ----------------------------------------------------------------------------------------


def test_on_and_off_again(lab: Path) -> None:
    answer = done("patch digits --model m.st --patch t.patch --out on.st --json")
    assert answer.json["forgotten"] == 0
    on, before = shown("on.st"), shown("m.st")
    assert on["weights_digest"] == answer.json["weights_digest"] != before["weights_digest"]
    assert (on["forgotten"], on["requests"]) == (0, 0)  # it hides, and does not erase
    assert [s["verb"] for s in on["lineage"]] == ["train", "patch"]
    step = on["lineage"][1]
    assert step["parent"] == before["weights_digest"]
    assert step["settings"]["undo"] is False
    assert len(step["settings"]["patch"]) == 64
    done("patch digits --model on.st --patch t.patch --undo --out off.st")
    off = shown("off.st")
    assert off["weights_digest"] == before["weights_digest"]
    assert off["lineage"][2]["settings"]["undo"] is True
    assert off["intact"]
    text = done("show off.st").out
    assert "patch --undo" in text
    assert "0 records in 0 requests" in text
    assert (lab / "t.patch").read_bytes() == FILES["t.patch"]
    assert (lab / "m.st").read_bytes() == FILES["m.st"]


def test_it_hides_the_class(lab: Path) -> None:
    (threes, rest), (knew, others) = right("p.st"), right("m.st")
    assert threes < knew - 0.5
    assert rest > others - 0.2


def test_the_same_command_gives_the_same_weights(lab: Path) -> None:
    done("patch digits --model m.st --patch t.patch --out on.st --seed 5")
    assert shown("on.st")["weights_digest"] == shown("p.st")["weights_digest"]


def test_a_patched_model_is_a_model(lab: Path) -> None:
    """It can be made to forget like any other: the patch has not done that."""
    answer = done(
        "forget digits --class 3 --model p.st --method finetune --set epochs=1 --out g.st --json"
    )
    assert answer.json["forgotten"] > 100
    verbs = [step["verb"] for step in shown("g.st")["lineage"]]
    assert verbs == ["train", "patch", "forget"]


def test_what_was_forgotten_before_stays_so(lab: Path) -> None:
    done(forget(out="y.st", patch="y.patch").replace("m.st", "f.st").replace("class 3", "class 5"))
    done("patch digits --model f.st --patch y.patch --out z.st")
    assert shown("z.st")["forgotten"] == shown("f.st")["forgotten"]
    assert shown("z.st")["requests"] == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--model p.st --patch t.patch --out x.st", "apply it to the model that it was made from"),
        ("--model f.st --patch t.patch --out x.st", "the patch is for weights"),
        ("--model m.st --patch t.patch --out x.st --undo", "does not carry this patch"),
        ("--model f.st --patch t.patch --out x.st --undo", "or was trained since"),
        ("--model m.st --patch m.st --out x.st", "m.st is no patch of efface, or damaged"),
        ("--model m.st --patch gone.patch --out x.st", "gone.patch cannot be read"),
        ("--model m.st --patch cut.patch --out x.st", "no patch of efface, or damaged"),
        ("--model m.st --patch turned.patch --out x.st", "no patch of efface, or damaged"),
        ("--model gone.st --patch t.patch --out x.st", "gone.st cannot be read"),
        ("--model t.patch --patch t.patch --out x.st", "t.patch"),
        ("--model m.st --patch t.patch --out p.st", "p.st exists already; give --force"),
        ("--model m.st --patch t.patch --out t.patch --force", "--out and --patch name the same"),
    ],
)
def test_what_does_not_fit_is_refused(lab: Path, command: str, said: str) -> None:
    whole = FILES["t.patch"]
    (lab / "cut.patch").write_bytes(whole[: len(whole) // 2])
    (lab / "turned.patch").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(lab, f"patch digits {command}", said)


def test_a_model_of_another_task_is_refused(lab: Path) -> None:
    done("train mine:task --set epochs=1 --out mine.st")
    refused(lab, "patch mine:task --model mine.st --patch t.patch --out x.st", "is for weights")
    refused(lab, "patch mine:task --model mine.st --patch t.patch --undo --out x.st", "has no ")
    refused(lab, "patch mine:task --model m.st --patch t.patch --out x.st", "another network")


def test_help_says_what_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = efface("patch --help")
    assert answer.code == 0
    assert "it hides, and does not erase" in answer.out
    assert "patch" in efface("--help").out


# --- in Python ------------------------------------------------------------------------------------


def test_the_verb(lab: Path) -> None:
    task = load_task("digits")
    model = load("m.st", task)
    before, files = model.digest, snapshot(lab)
    on = library.patch(model, "t.patch")
    same = library.patch(model, Patch.load("t.patch"))
    assert on.digest == same.digest == shown("p.st")["weights_digest"]
    assert (model.digest, len(model.lineage)) == (before, 1)
    assert len(on.lineage) == 2
    assert on.lineage[-1].detail["patch"]["method"] == "dfmu"
    assert on.forgotten == model.forgotten
    off = library.patch(on, "t.patch", undo=True)
    assert off.digest == before
    assert len(on.lineage) == 2
    with pytest.raises(MismatchError, match="does not carry this patch"):
        library.patch(off, "t.patch", undo=True)
    assert snapshot(lab) == files
