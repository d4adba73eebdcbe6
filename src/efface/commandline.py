"""What the commands of the command line share: options, inputs, outputs."""

from __future__ import annotations

import inspect
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from efface.console import Run, read_ids
from efface.errors import EffaceError, InputError, MethodError, SelectionError

if TYPE_CHECKING:
    from efface.journal import Journal
    from efface.task import Split, Task
    from efface.trained import TrainedModel

MAKING = ("train", "adopt", "prune", "forget", "patch", "retrain")
COMMANDS = ("demo", "bench", *MAKING, "audit", "compact", "log", "show", "methods")


class InOrder(TyperGroup):
    """The commands in the order of :data:`COMMANDS`, wherever they are defined."""

    def __init__(self, *, commands: Any = None, **rest: Any) -> None:
        there = dict(commands or {})
        super().__init__(commands={n: there[n] for n in COMMANDS if n in there}, **rest)


app = typer.Typer(
    cls=InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network forget named records, and show how well it forgot.",
)

COMMON = {
    "seed": (int, 0, ["--seed"], "Every random choice derives from it."),
    "force": (bool, False, ["--force"], "Replace outputs that exist, and override refusals."),
    "device": (str, "auto", ["--device"], "auto, cpu, cuda or mps."),
    "threads": (int, 0, ["--threads"], "Torch threads; 0: one on small machines."),
    "as_json": (bool, False, ["--json"], "Print one JSON object on stdout."),
    "debug": (bool, False, ["--debug"], "Show tracebacks."),
}

TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help="digits, cifar10 or module:attribute.")
]
Model = Annotated[Path, typer.Option("--model", metavar="MODEL", help="The model to start from.")]
Out = Annotated[Path, typer.Option("--out", metavar="MODEL", help="Where the new model goes.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="Change an option.")]
Ids = Annotated[
    Path | None, typer.Option("--ids", metavar="FILE", help="Text (an ID a line), CSV or JSON.")
]
Class = Annotated[str | None, typer.Option("--class", metavar="K", help="Every record of a class.")]
Random = Annotated[
    float | None, typer.Option("--random", metavar="F", help="A random fraction, by --split-seed.")
]
SplitSeed = Annotated[
    int, typer.Option("--split-seed", help="Which random fraction --random draws.")
]
Where = Annotated[
    str | None,
    typer.Option("--where", metavar="EXPR", help="E.g. \"age < 30 and subject == 'p7'\"."),
]


def command(function: Callable[..., None], group: typer.Typer = app) -> Callable[..., None]:
    """Register a command whose first argument is the :class:`Run` of the common options.

    Args:
        function: Called with the run and the values of its own options.
        group: What it is a command of.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option(*flags, help=text)],
        )
        for name, (kind, default, flags, text) in COMMON.items()
    ]

    @wraps(function)
    def run(**values: Any) -> None:
        common = Run(**{name: values.pop(name) for name in COMMON})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.filterwarnings("ignore", message=".*performance drop.*")  # of torch.func
                warnings.showwarning = lambda message, *_, **__: common.say(f"note: {message}")
                function(common, **values)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            common.say("interrupted; nothing is lost: the same command goes on where it stopped.")
            raise typer.Exit(1) from None
        except Exception as error:
            if common.debug:
                traceback.print_exc()
            common.say(f"error: {_sentence(error)}")
            raise typer.Exit(getattr(error, "exit_code", 1)) from None

    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
    return group.command()(run)


def _sentence(error: Exception) -> str:
    """What an error says; one that efface did not foresee also says how to learn more."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, EffaceError):
        return str(error)
    return f"{type(error).__name__}: {first or 'no message'}; run again with --debug to see where."


def get_task(spec: str, sets: list[str] | None = None) -> Task:
    """The task that an argument names, its fit settings changed by ``--set``."""
    from dataclasses import replace

    from efface.datasets import load_task
    from efface.options import changed, parse_sets

    task = load_task(spec)
    if sets:
        task = replace(task, fit=changed("the fit", task.fit, parse_sets(sets)))
    return task


def get_method(name: str, sets: list[str] | None, force: bool = False) -> Any:
    """The method that ``--method`` and ``--set`` describe; a ``.toml`` file nests the same way.

    Args:
        name: The method's name, or its file.
        sets: Options on top of the file's.
        force: Have a method go on where it would refuse and can be forced.

    Raises:
        MethodError: If the file cannot be read or names no method.
    """
    from efface.options import merged, parse_sets
    from efface.unlearn import Unlearner, build

    options: dict[str, Any] = {}
    if name.endswith(".toml"):
        import tomllib

        try:
            options = tomllib.loads(Path(name).read_text())
        except (OSError, ValueError) as error:
            raise MethodError(f"the method file {name} cannot be read ({error}).") from None
        if "method" not in options:
            raise MethodError(f'the method file {name} must name one: method = "finetune".')
        name = options.pop("method")
        if not isinstance(name, str):
            raise MethodError(f"the method file must name a method, not {name!r}.")
    built = build(name, merged(options, parse_sets(sets or [])))
    if not isinstance(built, Unlearner):
        raise MethodError(f"{name} is a pruner; use efface prune, or --method prune-first.")
    if force:
        from efface.unlearn.base import forced

        built = forced(built)
    return built


def chosen(select: dict[str, Any]) -> list[str]:
    """Which of the selections were given."""
    return [name for name, value in select.items() if value is not None and name != "seed"]


def check_selection(select: dict[str, Any]) -> None:
    """Check that there is exactly one.

    Raises:
        InputError: If there is none, or more than one.
    """
    if len(chosen(select)) != 1:
        raise InputError(
            "say what to forget with exactly one of --ids, --class, --random, --where."
        )


def get_split(task: Task, select: dict[str, Any]) -> Split:
    """The split that the selection describes."""
    from efface.task import Split

    check_selection(select)
    if select["ids"] is not None:
        return Split.by_ids(task, read_ids(select["ids"]))
    if select["label"] is not None:
        return Split.by_class(task, _label(task, select["label"]))
    if select["fraction"] is not None:
        return Split.random(task, select["fraction"], select["seed"])
    return Split.where(task, select["where"])


def _label(task: Task, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SelectionError(
            f"--class {text!r} is not a class; classes are whole numbers, 0 to {task.classes - 1}."
        ) from None


def this_command(task: Task) -> str:
    """This command line as a shell takes it, without values that identify people."""
    from efface.where import redacted

    words = ["efface", *sys.argv[1:]]
    for i, word in enumerate(words[1:], 1):
        if words[i - 1] == "--where":
            words[i] = redacted(word, task.private)
        elif word.startswith("--where="):
            words[i] = "--where=" + redacted(word.removeprefix("--where="), task.private)
    return shlex.join(words)


def digest_of(path: Path | None) -> str:
    """Digest of a file, or nothing for none.

    Raises:
        InputError: If it cannot be read.
    """
    from efface.files import digest

    try:
        return digest(path.read_bytes()) if path else ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from None


def make(
    run: Run,
    out: Path,
    spec: tuple[str, list[str] | None],
    key: dict[str, Any],
    work: Callable[[Task, dict[str, Any]], TrainedModel],
    patch: Path | None = None,
) -> None:
    """Make a model and save it; a killed run of the same command goes on from its journal.

    Args:
        run: The common options.
        out: Where the model goes.
        spec: The task argument, and changes to its fit settings.
        key: What the command is, apart from its task.
        work: Makes the model.
        patch: Where its patch goes, if anywhere.
    """
    from efface.files import check_output

    run.start()
    for path in (out, patch):
        if path is not None:
            check_output(path, run.force)
    made = get_task(*spec)
    journal = _journal(run, out, key, made)
    with run.progress() as progress:
        common = {"device": run.device, "progress": progress, "journal": journal}
        model = work(made, {"seed": run.seed, **common})
    _written(model, out, patch, run.force)
    journal.clear()
    cost = model.lineage[-1].cost
    detail = model.lineage[-1].detail
    assumptions = list(detail.get("assumptions", ()))
    whole = [
        f"{layer} is kept whole: {why}." for layer, why in detail.get("kept_whole", {}).items()
    ]
    facts = {
        "model": str(out),
        "weights_digest": model.digest,
        "sparsity": model.sparsity,
        "forgotten": len(model.forgotten.tags),
        "seconds": cost["wall"],
    }
    if assumptions:
        facts["assumptions"] = assumptions
    done = f"{out} written in {cost['wall']:.1f} s ({_summary(model)})."
    if whole:
        facts["kept_whole"] = detail["kept_whole"]
    if logged := detail.get("log"):
        facts["log"] = {"folder": str(model.log), **logged}
        whole.append(f"{model.log} holds the updates of {logged['steps']:,} steps.")
    if patch is not None:
        facts["patch"], size = _patch_facts(patch, model)
        whole.append(size)
    run.result(facts, "\n".join([done, *assumptions, *whole]))


def _written(model: TrainedModel, out: Path, patch: Path | None, force: bool) -> None:
    """Write a model and its patch: both, or neither, so that the command can be given again."""
    there = patch is not None and patch.exists()
    if patch is not None:
        model.patch.save(patch, force=force)
    try:
        model.save(out, force=force)
    except BaseException:
        if patch is not None and not there:
            patch.unlink(missing_ok=True)
        raise


def _patch_facts(path: Path, model: TrainedModel) -> tuple[dict[str, Any], str]:
    """What is said of a patch that was written: as JSON, and as a sentence."""
    size = path.stat().st_size
    factors = sum(len(change.rows) for change in model.patch.changes)
    facts = {"path": str(path), "bytes": size, "factors": factors, "for": model.patch.base}
    said = f"{size / 1000:.1f} kB, {factors:,} factors for weights {model.patch.base[:12]}…"
    return facts, f"{path} written: {said}; it hides, and does not erase."


def _journal(run: Run, out: Path, key: dict[str, Any], task: Task) -> Journal:
    """The journal beside an output; its key holds everything that the result depends on."""
    from efface.cost import versions
    from efface.journal import Journal

    shapes = {n: list(t.shape) for n, t in task.network().state_dict().items()}
    facts = {
        "seed": run.seed,
        "fit": task.fit.to_dict(),
        "data": task.data_fingerprint,
        "defaults": repr(task.defaults),
        "network": shapes,
        "versions": versions(),
    }
    journal = Journal(out.with_name(out.name + ".partial"), key | facts)
    if journal.start():
        run.say(f"going on where an earlier run stopped ({journal.folder}).")
    return journal


def _summary(model: TrainedModel) -> str:
    parts = [f"{sum(p.numel() for p in model.network.parameters()):,} parameters"]
    if model.mask is not None:
        parts.append(f"{model.sparsity:.1%} pruned")
    if model.forgotten.tags:
        parts.append(f"{len(model.forgotten.tags)} records forgotten")
    return ", ".join(parts)


def audit_text(run: Run, result: dict[str, Any], out: Path) -> str:
    """An audit as a table, the gaps and the verdict."""

    def number(value: float | None) -> str:
        return "—" if value is None else f"{value:.3f}"

    rows = [
        [
            f["name"],
            number(f["value"]),
            "" if f["low"] is None else f"[{f['low']:.3f}, {f['high']:.3f}]",
            *(number(f[k]) for k in ("original", "reference", "gap", "floor")),
        ]
        for f in result["findings"]
    ]
    columns = ["finding", "after", "95 %", "original", "retrained", "gap", "floor"]
    return "\n".join(
        [
            run.table("", columns, rows),
            f"average gap {number(result['average_gap'])}, gap-A {number(result['gap_a'])}",
            f"verdict: {result['verdict']}. {result['subject']['verdict_sentence']}",
            f"report: {out / 'report.html'}",
        ]
    )
