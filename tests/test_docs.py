"""Documentation that lies fails: examples run, names are there, links lead somewhere.

A page is played from top to bottom in a folder of its own. A Python block that begins with
``# NAME.py`` is written to that file, one with ``>>>`` is a doctest, any other is run;
``$ efface …`` runs the command line in this process, and what stands under it must be what it
prints, numbers aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import functools
import importlib
import io
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from safetensors import safe_open

import efface
from efface import sparsify
from efface.auditing import membership, verdict
from efface.cli import app, main
from efface.options import in_words
from efface.report.result import VERDICTS
from efface.sparsify import CRITERIA, OneShot
from efface.unlearn import ALIASES, catalogue

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "docs" / "methods"
DOCS = sorted([*(ROOT / "docs").glob("*.md"), *METHODS.glob("*.md")])
EXAMPLES = ROOT / "examples" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", EXAMPLES, *DOCS]
PLAYED = [page for page in PAGES if page != EXAMPLES]  # that one: test_examples.py

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
SLOW = {"demo"}  # parsed, not run
SHELL = {"printf", "cat", "ls"}
ELSEWHERE = {"make", "pip"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    kind: str
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(found[1], found[2], text[: found.start()].count("\n") + 2)


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what it is said to print)."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


# -- playing a page -------------------------------------------------------------------------------


class Player:
    """Runs the blocks of a page in the working directory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.module = types.ModuleType("page")
        self.written: set[str] = set()
        patch.setitem(sys.modules, "page", self.module)

    def play(self, page: Path) -> int:
        """Run every block; the number of commands and Python blocks that were run."""
        run = 0
        for block in blocks(text_of(page)):
            where = f"{named(page)}:{block.line}"
            if block.kind == "python":
                self.python(block, where)
                run += 1
            elif block.kind == "toml":
                self.write(block)
            elif block.kind in {"console", "bash"}:
                for command, output in commands(block):
                    self.command(command, output, where)
                    run += 1
        return run

    def write(self, block: Block) -> bool:
        """Write a block that begins with its file's name."""
        name = re.match(r"# ([\w-]+\.(?:py|toml))\n", block.text)
        if name is None:
            return False
        Path(name[1]).write_text(block.text, encoding="utf-8")
        self.written.add(name[1].removesuffix(".py"))
        importlib.invalidate_caches()
        return True

    def python(self, block: Block, where: str) -> None:
        if self.write(block):
            return
        space = vars(self.module)
        if ">>>" not in block.text:
            exec(compile(block.text, where, "exec"), space)
            return
        test = doctest.DocTestParser().get_doctest(block.text, space, where, where, 0)
        said = io.StringIO()
        result = doctest.DocTestRunner().run(test, out=said.write, clear_globs=False)
        space.update(test.globs)
        assert result.attempted
        assert not result.failed, said.getvalue()

    def command(self, command: str, output: str, where: str) -> None:
        words = shlex.split(command)
        if words[0] == "efface":
            printed = self.efface(words[1:], where)
        elif words[0] == "python":
            with contextlib.redirect_stdout(io.StringIO()) as said:
                runpy.run_path(words[1], run_name="__main__")
            printed = said.getvalue()
        elif words[0] in SHELL:
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        else:
            assert words[0] in ELSEWHERE, f"{where}: {words[0]} is no command known here"
            return
        if output:
            checker = doctest.OutputChecker()
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = checker.check_output(blanked(output), blanked(printed), options)
            assert same, f"{where}: {command}\nprinted:\n{printed}\nnot:\n{output}"

    def efface(self, words: list[str], where: str) -> str:
        if words[0] in SLOW:
            COMMANDS[words[0]].make_context(words[0], words[1:])
            return ""
        self.patch.setattr(sys, "argv", ["efface", *words])
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            main()
        torch.set_num_threads(1)
        wanted = {0, 3} if "--fail-on" in words else {0}
        assert left.value.code in wanted, f"{where}: efface {shlex.join(words)}\n{err.getvalue()}"
        return out.getvalue()

    def close(self) -> None:
        for name in self.written:
            sys.modules.pop(name, None)


def blanked(text: str) -> str:
    """Numbers differ from machine to machine; words must not."""
    return re.sub(r"\d[\d,.]*", "#", text)


@contextlib.contextmanager
def playing(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Player]:
    patch.chdir(folder)
    patch.setattr(sys, "path", ["", *sys.path])
    patch.setattr(sys, "dont_write_bytecode", True)
    player = Player(patch)
    try:
        yield player
    finally:
        player.close()


@pytest.mark.parametrize("page", PLAYED, ids=named)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with playing(tmp_path, monkeypatch) as player:
        ran = player.play(page)
    there = [b for b in blocks(text_of(page)) if b.kind in {"python", "console", "bash"}]
    assert bool(ran) == bool(there)


def play_text(text: str, folder: Path, patch: pytest.MonkeyPatch) -> int:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    patch.setitem(globals(), "ROOT", folder)
    with playing(folder, patch) as player:
        return player.play(page)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert False\n```\n",
        "```python\n>>> 1 + 1\n3\n```\n",
        "```console\n$ efface nothing\n```\n",
        "```console\n$ efface methods --nothing\n```\n",
        "```console\n$ efface demo --nothing\n```\n",
        "```console\n$ efface methods ft\nsomething else\n```\n",
        "```console\n$ rm x\n```\n",
    ],
)
def test_a_lie_fails(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseException):  # noqa: B017, PT011 — whatever it is, it does not pass
        play_text(text, tmp_path, monkeypatch)


def test_blocks_of_a_page_share_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "```python\na = 1\n```\n```python\n>>> a\n1\n```\n```console\n$ printf 7\n8\n```\n"
    assert play_text(text, tmp_path, monkeypatch) == 3


# -- the command line -----------------------------------------------------------------------------


def sections(page: Path) -> dict[str, str]:
    """Heading → text under it, up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)$", without_code(text_of(page)), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def options(command: Any) -> set[str]:
    """Of a command, and of the commands inside it."""
    found = {flag for p in command.params for flag in p.opts if flag.startswith("-")}
    inside = [options(inner) for inner in getattr(command, "commands", {}).values()]
    return found.union({"--help", "-h"}, *inside)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    there = sections(ROOT / "docs" / "cli.md")
    common = there["Common options"]
    if name in {"forget", "retrain", "audit", "log"}:
        common += there["Saying which records"]
    written = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", common + there[f"efface {name}"]))
    assert options(COMMANDS[name]) - written == set()
    assert f"`{name}`" in text_of(ROOT / "README.md")


def test_no_command_is_documented_that_does_not_exist() -> None:
    headings = [h for h in sections(ROOT / "docs" / "cli.md") if h.startswith("efface ")]
    assert headings == [f"efface {name}" for name in COMMANDS]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_options_exist(page: Path) -> None:
    text = text_of(page)
    spans = re.findall(r"`([^`\n]+)`", without_code(text))
    lines = [c for b in blocks(text) if b.kind in {"console", "bash"} for c, _ in commands(b)]
    known = set().union(*(options(c) for c in COMMANDS.values()))
    for line in [*spans, *lines]:
        for name in re.findall(r"\befface ([a-z][a-z-]*)", line):
            assert name in COMMANDS, line
        for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)", line):
            assert re.search(rf"^{target}:", text_of(ROOT / "Makefile"), re.MULTILINE), line
        if not line.startswith("pip "):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line


# -- names, tables, schemas -----------------------------------------------------------------------


@pytest.mark.parametrize("name", efface.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert re.search(rf"`efface\.{name}\b", text_of(ROOT / "docs" / "python.md"))


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the first table whose header begins with ``first``, without the two header rows."""
    lines = text[text.index(f"| {first} |") :].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_names_in_rooms_exist() -> None:
    table = rows(sections(ROOT / "docs" / "python.md")["Rooms"], "name")
    assert {row[0] for row in table} == {f"`efface.{room}`" for room in efface._ROOMS}
    for room, what in table:
        module = importlib.import_module(room.strip("`"))
        for name in re.findall(r"`(\w+)(?:\(\))?`", what):
            assert hasattr(module, name), f"{room} has no {name}"


@pytest.mark.parametrize("cls", [efface.Settings, efface.Task])
def test_every_field_is_documented(cls: type[Any]) -> None:
    page = "python.md" if cls is efface.Settings else "getting-started.md"
    text = text_of(ROOT / "docs" / page)
    for field in dataclasses.fields(cls):
        assert re.search(rf"`{field.name}`|\b{field.name}=", text), field.name


def test_methods_table_is_what_the_command_prints() -> None:
    text = text_of(ROOT / "README.md")
    wanted = [
        [f"`{m['name']}`", m["title"], ", ".join(m["needs"]) or "—", m["paper"]]
        for m in catalogue()
    ]
    assert rows(text, "method") == wanted
    assert dict(re.findall(r"`([\w-]+)` for `([\w-]+)`", text)) == ALIASES


# -- a page per method ----------------------------------------------------------------------------

PARTS = ["Formula", "Cost", "When to use", "Options", "Citation", "Differences"]
MAY_BE = ["Example"]
NO_OPTIONS = "It has no options"


def method_problems(text: str, method: dict[str, Any]) -> list[str]:
    """What a method's page lacks or says wrongly."""
    parts = re.split(r"^(#+) (.+)$", without_code(text), flags=re.MULTILINE)
    headings = list(zip(parts[1::3], parts[2::3], strict=True))
    found = []
    if headings[:1] != [("#", method["name"])]:
        found.append(f"does not begin with # {method['name']}")
    if [h for _, h in headings[1:] if h not in MAY_BE] != PARTS:
        found.append(f"the parts are not {PARTS}, in this order")
        return found
    bodies = dict(zip(parts[2::3], parts[3::3], strict=True))
    found += [f"{name} is empty" for name in PARTS if not bodies[name].strip()]
    found += needs_and_papers(parts[3], bodies["Citation"], method)
    return found + option_problems(bodies["Options"], method["options"])


def needs_and_papers(what: str, citation: str, method: dict[str, Any]) -> list[str]:
    needs = [f"need `{n}` is not named" for n in method["needs"] if f"`{n}`" not in what]
    return needs + [f"{p} is not cited" for p in papers(method["paper"]) if p not in flat(citation)]


def papers(text: str) -> list[str]:
    return re.findall(r"[A-Z][\w'’-]+ (?:et al\.|and [A-Z][\w'’-]+) \d{4}", flat(text))


def flat(text: str) -> str:
    """On one line, two authors joined by "and"."""
    return " ".join(text.replace("&", "and").split())


def option_problems(text: str, options: list[dict[str, str]]) -> list[str]:
    wanted = [[f"`{o['name']}`", o["type"], o["default"]] for o in options]
    if not wanted:
        return [] if NO_OPTIONS in text and "| option |" not in text else ["has no options"]
    if "| option |" not in text:
        return ["has no table of options"]
    table = rows(text, "option")
    found = [f"{row[0]} is not explained" for row in table if len(row) < 4 or not row[3]]
    there = [row[:3] for row in table]
    return found if there == wanted else [f"options are {wanted}, not {there}"]


@pytest.mark.parametrize("method", catalogue(), ids=lambda m: m["name"])
def test_every_method_has_a_page(method: dict[str, Any]) -> None:
    page = METHODS / f"{method['name']}.md"
    assert page.exists(), f"docs/methods/{page.name} is missing"
    assert method_problems(text_of(page), method) == []


def test_the_overview_has_a_row_per_method() -> None:
    table = rows(sections(METHODS / "README.md")["Methods"], "method")
    there = {row[0]: row[1] for row in table}
    wanted = {f"[`{m['name']}`]({m['name']}.md)": ", ".join(m["needs"]) or "—" for m in catalogue()}
    assert there == wanted
    assert all(len(row) == 4 and all(row) for row in table)


def test_no_page_is_about_a_method_that_does_not_exist() -> None:
    pages = {page.stem for page in METHODS.glob("*.md")} - {"README", "pruning"}
    assert pages - {m["name"] for m in catalogue()} == set()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# finetune", "# fine-tune"),
        ("## Cost", "## Price"),
        ("## Citation", "## Formula"),
        ("`retain`", "`forget`"),
        ("(Warnecke et al. 2021)", ""),
        ("| `epochs` | a whole number or none | None |", "| `epochs` | a number | None |"),
        ("| `bn` | one of", "| `bm` | one of"),
        ("| None | peak rate η; else half of the training's peak |", "| 0.1 | peak rate |"),
        ("peak rate η; else half of the training's peak", ""),
    ],
)
def test_a_wrong_page_is_noticed(old: str, new: str) -> None:
    text = text_of(METHODS / "finetune.md")
    method = catalogue("finetune")[0]
    assert old in text
    assert method_problems(text, method) == []
    assert method_problems(text.replace(old, new), method) != []


# -- one page for pruning -------------------------------------------------------------------------

LABELS = ["Formula", "Cost", "When to use", "Citation", "Differences"]


def pruners() -> list[type[Any]]:
    """Every pruner in ``efface.sparsify``: the dataclasses that are given a sparsity."""
    found: dict[str, type[Any]] = {}
    for info in pkgutil.iter_modules(sparsify.__path__):
        module = importlib.import_module(f"{sparsify.__name__}.{info.name}")
        for value in vars(module).values():
            made = isinstance(value, type) and dataclasses.is_dataclass(value)
            if made and "sparsity" in [f.name for f in dataclasses.fields(value)]:
                found[value.name] = value
    return [found[name] for name in sorted(found)]


def fields_of(cls: type[Any]) -> list[dict[str, str]]:
    hints = typing.get_type_hints(cls)
    return [
        {"name": f.name, "type": in_words(hints[f.name]), "default": str(f.default)}
        for f in dataclasses.fields(cls)
    ]


def test_pruners_are_found() -> None:
    assert OneShot in pruners()


@pytest.mark.parametrize("cls", pruners(), ids=lambda c: c.name)
def test_every_pruner_has_a_section(cls: type[Any]) -> None:
    section = sections(METHODS / "pruning.md")[cls.name]
    for label in LABELS:
        assert re.search(rf"\*\*{label}\.\*\* \S", flat(section)), label
    assert [paper for paper in papers(cls.paper) if paper not in flat(section)] == []
    assert option_problems(section, fields_of(cls)) == []


def test_every_criterion_has_a_row() -> None:
    section = sections(METHODS / "pruning.md")["Criteria"]
    table = rows(section, "criterion")
    assert {row[0] for row in table} == {f"`{name}`" for name in CRITERIA}
    assert all(all(row) for row in table)
    for cls in CRITERIA.values():
        for field in dataclasses.fields(typing.cast("Any", cls)):
            assert f"`{field.name}`" in section, f"{cls.name}: {field.name}"


def test_every_name_of_a_pruner_is_documented() -> None:
    text = text_of(METHODS / "pruning.md")
    known = getattr(sparsify, "PRUNERS", {OneShot.name: OneShot})
    assert [name for name in known if f"`{name}`" not in text and f"## {name}" not in text] == []


@functools.cache
def small() -> tuple[efface.TrainedModel, dict[str, Any]]:
    """A pruned model with rewind weights, and an audit."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    settings = efface.Settings(epochs=2)
    task = efface.Task(lambda: efface.networks.MLP((4, 8, 2)), (x, y), (x, y), fit=settings)
    model = efface.prune(efface.train(task, rewind=1), OneShot(sparsity=0.5, recovery=1))
    split = efface.Split.by_ids(task, range(12))
    after = efface.forget(model, split, "finetune")
    return after, json.loads(efface.audit(model, after, split).to_json())


def test_every_finding_is_documented() -> None:
    _, document = small()
    text = text_of(ROOT / "docs" / "audit.md")
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    names = [name for heading in headings for name in re.findall(r"`(\w+)`", heading)]
    assert sorted(names) == sorted(finding["name"] for finding in document["findings"])


def test_schemas_are_documented(tmp_path: Path) -> None:
    model, document = small()
    text = text_of(ROOT / "docs" / "files.md")
    path = model.save(tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        keys = set(file.metadata())
    for key in {*keys, *document, *document["findings"][0]}:
        assert f"`{key}`" in text, key
    for value in (keys and "efface.model/1", document["schema"], *VERDICTS):
        assert value in text


def test_exit_codes_are_documented() -> None:
    written = {row[0] for row in rows(text_of(ROOT / "docs" / "files.md"), "code")}
    codes = {efface.EffaceError.exit_code, efface.errors.InputError.exit_code}
    assert written == {"0", "3", *map(str, codes)}


def test_numbers_of_the_verdict() -> None:
    text = " ".join(text_of(ROOT / "docs" / "audit.md").split())
    assert f"at least ± {verdict.LEAST_MARGIN} nats" in text
    least = 2 * membership.LEAST
    assert f"Needs {least} forgotten and {least} matching test records" in text
    assert f"Needs {membership.LEAST} records on both sides" in text
    assert f"Needs {int(2 / membership.LowFPR().fpr)} matched test records" in text
    for word in VERDICTS:
        assert f"**{word}**" in text


def test_changelog_knows_this_version() -> None:
    assert f"## [{efface.__version__}]" in text_of(ROOT / "CHANGELOG.md")


# -- links and words ------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(text_of(page))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


def test_every_page_can_be_reached() -> None:
    text = text_of(ROOT / "README.md")
    for page in [*DOCS, EXAMPLES]:
        if page.parent != METHODS or page.name == "README.md":
            assert f"({named(page)})" in text, named(page)
        else:
            assert f"({page.name})" in text_of(METHODS / "README.md"), named(page)


FORBIDDEN = re.compile(
    r"/work\b|/tmp\b|/home/|/root\b|/Users/|\.\./shared|\bagents?\b|pypi\.|pythonhosted|"
    r"download\.pytorch|artifactory|registry|\bsessions?\b(?!`)",
    re.IGNORECASE,
)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples" / "breast_cancer.py"], ids=named)
def test_no_forbidden_words(page: Path) -> None:
    text = text_of(page)
    rooms = re.search(r"```text\n.*?```", text, re.DOTALL)  # one of them is called session
    assert FORBIDDEN.findall(text.replace(rooms[0], "") if rooms else text) == []


def test_pictures_are_small() -> None:
    for picture in [*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.svg")]:
        assert picture.stat().st_size <= 100_000
