"""The command line: parse, call the library, print. Heavy imports wait until they are needed."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.console import Run, read_ids
from efface.errors import EffaceError, InputError, MethodError

if TYPE_CHECKING:
    from efface.checkpoint import TrainedModel
    from efface.journal import Journal
    from efface.task import Split, Task

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network forget named records, and show how well it forgot.",
)

COMMON = {
    "seed": (int, 0, ["--seed"], "Every random choice derives from it."),
    "force": (bool, False, ["--force"], "Replace outputs that exist."),
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
Class = Annotated[int | None, typer.Option("--class", metavar="K", help="Every record of a class.")]
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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose first argument is the :class:`Run` of the common options."""
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
        if common.debug:
            function(common, **values)
            return
        try:
            function(common, **values)
        except EffaceError as error:
            common.say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            common.say("interrupted; nothing is lost: the same command goes on where it stopped.")
            raise typer.Exit(1) from None

    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
    return app.command()(run)


@command
def demo(
    run: Run,
    task: Annotated[str, typer.Option("--task", help="digits or cifar10.")] = "digits",
    out: Annotated[Path, typer.Option("--out", metavar="DIR")] = Path("demo"),
    full: Annotated[bool, typer.Option("--full", help="All of CIFAR-10.")] = False,
) -> None:
    """The whole story on built-in data: train, prune, forget, retrain, audit, report."""
    from efface.recipes.demo import run_demo

    run.start()
    run_demo(run, task, out, full=full)


@command
def train(
    run: Run,
    task: TaskName,
    out: Out,
    rewind: Annotated[int | None, typer.Option(help="Keep the weights after this epoch.")] = None,
    sets: Sets = None,
) -> None:
    """Train a model on all of a task's training records."""
    from efface import verbs

    def work(common: dict[str, Any]) -> TrainedModel:
        return verbs.train(_task(task, sets), rewind=rewind, **common)

    _make(run, out, {"verb": "train", "task": task, "rewind": rewind, "sets": sets}, work)


@command
def adopt(
    run: Run,
    task: TaskName,
    weights: Annotated[Path, typer.Option("--weights", metavar="FILE.safetensors")],
    out: Out,
) -> None:
    """Take in a model that was trained elsewhere."""
    from efface import verbs
    from efface.checkpoint import read_file

    def work(common: dict[str, Any]) -> TrainedModel:
        return verbs.adopt(_task(task), read_file(weights)[0], name=str(weights))

    _make(run, out, None, work)


@command
def prune(
    run: Run,
    task: TaskName,
    model: Model,
    out: Out,
    sparsity: Annotated[float, typer.Option(help="Fraction of the weights to prune.")] = 0.9,
    method: Annotated[str, typer.Option(help="one-shot.")] = "one-shot",
    sets: Sets = None,
) -> None:
    """Prune a model and recover by training under the mask."""
    from efface import verbs
    from efface.checkpoint import load
    from efface.options import parse_sets
    from efface.sparsify import OneShot
    from efface.unlearn import build

    if method != OneShot.name:
        raise MethodError(f"pruning method {method!r} is unknown; known: {OneShot.name}.")
    pruner = build(method, {"sparsity": sparsity, **parse_sets(sets or [])})
    key = {"verb": "prune", "task": task, "model": _digest(model), "pruner": repr(pruner)}

    def work(common: dict[str, Any]) -> TrainedModel:
        return verbs.prune(load(model, _task(task)), pruner, **common)

    _make(run, out, key, work)


@command
def forget(
    run: Run,
    task: TaskName,
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option("--method", metavar="NAME|FILE.toml")],
    ids: Ids = None,
    label: Class = None,
    fraction: Random = None,
    where: Where = None,
    split_seed: SplitSeed = 0,
    sets: Sets = None,
) -> None:
    """Make a model forget records: by --ids, --class, --random or --where."""
    from efface import verbs
    from efface.checkpoint import load

    chosen = _method(method, sets)
    select = {"ids": ids, "label": label, "fraction": fraction, "where": where, "seed": split_seed}
    _check_selection(select)
    key: dict[str, Any] = {
        "verb": "forget",
        "task": task,
        "model": _digest(model),
        "method": repr(chosen),
    }
    key["select"] = {k: str(v) for k, v in select.items()} | {"file": _digest(ids)}

    def work(common: dict[str, Any]) -> TrainedModel:
        loaded = load(model, _task(task))
        return verbs.forget(loaded, _split(loaded.task, select), chosen, **common)

    _make(run, out, key, work)


@command
def retrain(
    run: Run,
    task: TaskName,
    out: Out,
    model: Annotated[Path | None, typer.Option("--model", metavar="MODEL")] = None,
    like: Annotated[str, typer.Option(help="dense, same-mask, rewound or repruned.")] = "dense",
    ids: Ids = None,
    label: Class = None,
    fraction: Random = None,
    where: Where = None,
    split_seed: SplitSeed = 0,
    sets: Sets = None,
) -> None:
    """Train a reference from fresh weights without the records: the gold standard."""
    from efface import verbs
    from efface.checkpoint import load

    select = {"ids": ids, "label": label, "fraction": fraction, "where": where, "seed": split_seed}
    _check_selection(select)
    if like not in ("dense", "same-mask", "rewound", "repruned"):
        raise InputError(f"--like {like!r}: must be dense, same-mask, rewound or repruned.")
    key: dict[str, Any] = {
        "verb": "retrain",
        "task": task,
        "model": _digest(model),
        "like": like,
        "sets": sets,
    }
    key["select"] = {k: str(v) for k, v in select.items()} | {"file": _digest(ids)}

    def work(common: dict[str, Any]) -> TrainedModel:
        loaded = load(model, _task(task, sets)) if model else None
        made = loaded.task if loaded else _task(task, sets)
        return verbs.retrain(made, _split(made, select), model=loaded, like=like, **common)  # type: ignore[arg-type]

    _make(run, out, key, work)


@command
def audit(
    run: Run,
    task: TaskName,
    before: Annotated[Path, typer.Option("--before", metavar="MODEL")],
    after: Annotated[Path, typer.Option("--after", metavar="MODEL")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR")],
    reference: Annotated[list[Path] | None, typer.Option("--reference", metavar="MODEL")] = None,
    ids: Ids = None,
    label: Class = None,
    fraction: Random = None,
    where: Where = None,
    split_seed: SplitSeed = 0,
    tier: Annotated[
        int | None, typer.Option(help="0: no references; 1: with retrained ones.")
    ] = None,
    fail_on: Annotated[list[str] | None, typer.Option("--fail-on", metavar="VERDICT")] = None,
    per_record: Annotated[bool, typer.Option("--per-record", help="Also per_record.csv.")] = False,
) -> None:
    """Show how well a model has forgotten; writes audit.json and report.html."""
    from efface import verbs
    from efface.checkpoint import load
    from efface.files import check_output
    from efface.report.result import VERDICTS

    run.start()
    check_output(out / "audit.json", run.force)
    unknown = set(fail_on or ()) - set(VERDICTS)
    if unknown:
        raise InputError(f"--fail-on {sorted(unknown)[0]!r}: must be one of {', '.join(VERDICTS)}.")
    if tier not in (None, 0, 1) or (tier == 1 and not reference):
        raise InputError("--tier must be 0, or 1 with at least one --reference.")
    made = _task(task)
    models = [load(path, made) for path in (before, after, *(reference or ()))]
    references = models[2:] if tier != 0 else []
    select = {"ids": ids, "label": label, "fraction": fraction, "where": where, "seed": split_seed}
    split = _split(made, select) if _chosen(select) else None
    with run.progress() as progress:
        result = verbs.audit(
            models[0],
            models[1],
            split,
            references,
            seed=run.seed,
            device=run.device,
            reproduce=[_command(made)],
            progress=progress,
        )
    rows = None
    if per_record:
        rows = verbs.per_record(models[1], split or verbs.split_of(models[0], models[1]))
    result.save(out, rows, force=run.force)
    run.result(result.to_dict(), _audit_text(run, result.to_dict(), out))
    if result.verdict in (fail_on or ()):
        raise typer.Exit(3)


@command
def show(
    run: Run, model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")]
) -> None:
    """Lineage, sparsity per layer, sizes and digests of a model file."""
    from efface.checkpoint import describe_file

    facts = describe_file(model)
    head = [
        f"{model}: {facts['bytes'] / 2**20:.2f} MiB, {facts['parameters']:,} values, "
        f"task {facts['task']}, run {facts['run_id']}",
        f"weights {facts['weights_digest'][:16]}  mask {facts['mask_digest'][:16] or '—'}  "
        f"intact: {'yes' if facts['intact'] else 'NO'}",
        f"forgotten: {facts['forgotten']} records in {facts['requests']} requests",
    ]
    steps = [
        [s["verb"], s["method"], str(s["seed"]), f"{s['wall']:.1f} s", (s["parent"] or "—")[:12]]
        for s in facts["lineage"]
    ]
    layers = [
        [x["name"], f"{x['kept']:,}", f"{x['total']:,}", f"{x['sparsity']:.1%}"]
        for x in facts["layers"]
    ]
    tables = [run.table("Lineage", ["step", "method", "seed", "took", "parent"], steps)]
    if layers:
        tables.append(run.table("Pruned", ["weight", "kept", "of", "sparsity"], layers))
    run.result(facts, "\n".join([*head, *tables]))


@command
def methods(
    run: Run, name: Annotated[str | None, typer.Argument(help="Show the options of one.")] = None
) -> None:
    """What each method needs and where it comes from; with a name, its options."""
    from efface.unlearn import catalogue

    facts = catalogue(name)
    if name is None:
        rows = [[m["name"], m["title"], ", ".join(m["needs"]) or "—", m["paper"]] for m in facts]
        text = run.table("", ["method", "what", "needs", "source"], rows)
    else:
        rows = [[o["name"], o["type"], o["default"]] for o in facts[0]["options"]]
        text = facts[0]["doc"] + "\n\n" + run.table("", ["option", "type", "default"], rows)
    run.result({"methods": facts}, text)


# -- helpers of the commands --------------------------------------------------------------------


def _task(spec: str, sets: list[str] | None = None) -> Task:
    from dataclasses import replace

    from efface.datasets import load_task
    from efface.options import changed, parse_sets

    task = load_task(spec)
    if sets:
        task = replace(task, fit=changed("the fit", task.fit, parse_sets(sets)))
    return task


def _method(name: str, sets: list[str] | None) -> Any:
    from efface.options import merged, parse_sets
    from efface.unlearn import build

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
    return build(name, merged(options, parse_sets(sets or [])))


def _chosen(select: dict[str, Any]) -> list[str]:
    return [name for name, value in select.items() if value is not None and name != "seed"]


def _check_selection(select: dict[str, Any]) -> None:
    if len(_chosen(select)) != 1:
        raise InputError(
            "say what to forget with exactly one of --ids, --class, --random, --where."
        )


def _split(task: Task, select: dict[str, Any]) -> Split:
    from efface.task import Split

    _check_selection(select)
    if select["ids"] is not None:
        return Split.by_ids(task, read_ids(select["ids"]))
    if select["label"] is not None:
        return Split.by_class(task, select["label"])
    if select["fraction"] is not None:
        return Split.random(task, select["fraction"], select["seed"])
    return Split.where(task, select["where"])


def _command(task: Task) -> str:
    """This command line as a shell takes it, without values that identify people."""
    from efface.where import redacted

    words = ["efface", *sys.argv[1:]]
    for i, word in enumerate(words[1:], 1):
        if words[i - 1] == "--where":
            words[i] = redacted(word, task.private)
        elif word.startswith("--where="):
            words[i] = "--where=" + redacted(word.removeprefix("--where="), task.private)
    return shlex.join(words)


def _digest(path: Path | None) -> str:
    from efface.files import digest

    try:
        return digest(path.read_bytes()) if path else ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from None


def _make(
    run: Run,
    out: Path,
    key: dict[str, Any] | None,
    work: Callable[[dict[str, Any]], TrainedModel],
) -> None:
    """Make a model and save it; with a key, a killed run goes on from its journal."""
    from efface.files import check_output

    run.start()
    check_output(out, run.force)
    journal = _journal(run, out, key)
    with run.progress() as progress:
        model = work(
            {"seed": run.seed, "device": run.device, "progress": progress, "journal": journal}
        )
    model.save(out, force=run.force)
    if journal:
        journal.clear()
    cost = model.lineage[-1].cost
    facts = {
        "model": str(out),
        "weights_digest": model.digest,
        "sparsity": model.sparsity,
        "forgotten": len(model.forgotten.tags),
        "seconds": cost["wall"],
    }
    run.result(facts, f"{out} written in {cost['wall']:.1f} s ({_summary(model)}).")


def _journal(run: Run, out: Path, key: dict[str, Any] | None) -> Journal | None:
    from efface.cost import versions
    from efface.journal import Journal

    if key is None:
        return None
    journal = Journal(out.with_name(out.name + ".partial"), key | {"seed": run.seed} | versions())
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


def _audit_text(run: Run, result: dict[str, Any], out: Path) -> str:
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


def main() -> None:
    """Entry point: one-sentence errors and the exit codes 0 to 3."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted.", file=sys.stderr)
        code = 1
    except Exception as error:
        # typer's usage errors, of the click that it brings along or the one that it depends on
        if not hasattr(error, "format_message"):
            raise
        bare = type(error).__name__ == "NoArgsIsHelpError"
        message = error.format_message()
        print(message if bare else f"error: {message}", file=None if bare else sys.stderr)
        code = 0 if bare else 2
    sys.exit(code if isinstance(code, int) else 0)
