"""The command line: parse, call the library, print. Heavy imports wait until they are needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.commandline import (
    Class,
    Ids,
    Model,
    Out,
    Random,
    Sets,
    SplitSeed,
    TaskName,
    Where,
    app,
    audit_text,
    check_selection,
    chosen,
    command,
    digest_of,
    get_method,
    get_split,
    get_task,
    make,
    this_command,
)
from efface.console import Run
from efface.errors import InputError

if TYPE_CHECKING:
    from efface.task import Task
    from efface.trained import TrainedModel


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
def bench(
    run: Run,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or FILE.toml.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR")],
    size: Annotated[str | None, typer.Option(help="digits, cifar10-small, cifar10-full.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Training seeds; else the recipe's.")] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where models are kept; else in --out.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; 0: two, or one on a GPU.")] = 0,
) -> None:
    """Run a paper's experiment over training seeds; writes results.json and report.html."""
    from efface.recipes.bench import run_bench

    run.start()
    run_bench(run, recipe, out, size=size, seeds=seeds, store=cache, jobs=jobs)


@command
def train(
    run: Run,
    task: TaskName,
    out: Out,
    rewind: Annotated[int | None, typer.Option(help="Keep the weights after this epoch.")] = None,
    keep_initial: Annotated[
        bool, typer.Option("--keep-initial", help="Keep the initial weights, not only their seed.")
    ] = False,
    initial: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Begin with this model's initial weights.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Train a model on all of a task's training records."""
    from efface import verbs
    from efface.checkpoint import load

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        first = load(initial, made) if initial else None
        return verbs.train(made, rewind=rewind, keep_initial=keep_initial, initial=first, **common)

    key = {"verb": "train", "task": task, "rewind": rewind, "initial": digest_of(initial)}
    make(run, out, (task, sets), key, work)


@command
def adopt(
    run: Run,
    task: TaskName,
    weights: Annotated[Path, typer.Option("--weights", metavar="FILE.safetensors")],
    out: Out,
    initial: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="The weights that its training began with."),
    ] = None,
) -> None:
    """Take in a model that was trained elsewhere."""
    from efface import verbs
    from efface.checkpoint import read_file

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        first = read_file(initial)[0] if initial else None
        return verbs.adopt(made, read_file(weights)[0], initial=first, name=str(weights))

    make(run, out, (task, None), {"verb": "adopt"}, work)


@command
def prune(
    run: Run,
    task: TaskName,
    model: Model,
    out: Out,
    sparsity: Annotated[float, typer.Option(help="Fraction of the weights to prune.")] = 0.9,
    method: Annotated[
        str, typer.Option(help="one-shot, omp, imp, gradual, at-init or a criterion's name.")
    ] = "one-shot",
    allow_dead_layers: Annotated[
        bool, typer.Option("--allow-dead-layers", help="Only warn of layers without weights.")
    ] = False,
    keep_dense: Annotated[
        bool, typer.Option("--keep-dense", help="Keep the weights from before with the model.")
    ] = False,
    sets: Sets = None,
) -> None:
    """Prune a model and train it under the mask."""
    from efface import verbs
    from efface.checkpoint import load
    from efface.options import parse_sets
    from efface.sparsify import build_pruner

    options = {"sparsity": sparsity, **parse_sets(sets or [])}
    if allow_dead_layers:
        options["allow_dead_layers"] = True
    pruner = build_pruner(method, options)
    key = {"verb": "prune", "task": task, "model": digest_of(model), "pruner": repr(pruner)}

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        return verbs.prune(load(model, made), pruner, keep_dense=keep_dense, **common)

    make(run, out, (task, None), key, work)


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

    unlearner = get_method(method, sets)
    select = {"ids": ids, "label": label, "fraction": fraction, "where": where, "seed": split_seed}
    check_selection(select)
    key: dict[str, Any] = {
        "verb": "forget",
        "task": task,
        "model": digest_of(model),
        "method": repr(unlearner),
    }
    key["select"] = {k: str(v) for k, v in select.items()} | {"file": digest_of(ids)}

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        return verbs.forget(load(model, made), get_split(made, select), unlearner, **common)

    make(run, out, (task, None), key, work)


@command
def retrain(
    run: Run,
    task: TaskName,
    out: Out,
    model: Annotated[Path | None, typer.Option("--model", metavar="MODEL")] = None,
    like: Annotated[str, typer.Option(help="dense, same-mask, rewound or repruned.")] = "dense",
    initial: Annotated[
        str, typer.Option(help="Begin with weights of its own, or with those of the model.")
    ] = "own",
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
    check_selection(select)
    if like not in ("dense", "same-mask", "rewound", "repruned"):
        raise InputError(f"--like {like!r}: must be dense, same-mask, rewound or repruned.")
    if initial not in ("own", "model"):
        raise InputError(f"--initial {initial!r}: must be own or model.")
    key: dict[str, Any] = {"verb": "retrain", "task": task, "model": digest_of(model), "like": like}
    key["initial"] = initial
    key["select"] = {k: str(v) for k, v in select.items()} | {"file": digest_of(ids)}

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        loaded = load(model, made) if model else None
        split = get_split(made, select)
        options: dict[str, Any] = {"model": loaded, "like": like, "initial": initial, **common}
        return verbs.retrain(made, split, **options)

    make(run, out, (task, sets), key, work)


@command
def audit(
    run: Run,
    task: TaskName,
    before: Annotated[Path, typer.Option("--before", metavar="MODEL")],
    after: Annotated[Path, typer.Option("--after", metavar="MODEL")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR")],
    reference: Annotated[list[Path] | None, typer.Option("--reference", metavar="MODEL")] = None,
    original: Annotated[list[Path] | None, typer.Option("--original", metavar="MODEL")] = None,
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

    run.start()
    check_output(out / "audit.json", run.force)
    _check_audit(tier, reference, fail_on)
    made = get_task(task)
    models = [load(path, made) for path in (before, after, *(reference or ()))]
    select = {"ids": ids, "label": label, "fraction": fraction, "where": where, "seed": split_seed}
    split = get_split(made, select) if chosen(select) else verbs.split_of(models[0], models[1])
    split = split.without(models[0].forgotten.positions(made))
    options: dict[str, Any] = {"seed": run.seed, "device": run.device}
    with run.progress() as progress:
        result = verbs.audit(
            models[0],
            models[1],
            split,
            models[2:] if tier != 0 else [],
            originals=[load(path, made) for path in original or ()],
            reproduce=[this_command(made)],
            progress=progress,
            **options,
        )
    rows = verbs.per_record(models[1], split, device=run.device) if per_record else None
    result.save(out, rows, force=run.force)
    run.result(result.to_dict(), audit_text(run, result.to_dict(), out))
    if result.verdict in (fail_on or ()):
        raise typer.Exit(3)


def _check_audit(tier: int | None, reference: list[Path] | None, fail_on: list[str] | None) -> None:
    from efface.report.result import VERDICTS

    unknown = set(fail_on or ()) - set(VERDICTS)
    if unknown:
        raise InputError(f"--fail-on {sorted(unknown)[0]!r}: must be one of {', '.join(VERDICTS)}.")
    if tier not in (None, 0, 1) or (tier == 1 and not reference):
        raise InputError("--tier must be 0, or 1 with at least one --reference.")


@command
def compact(
    run: Run,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model with dead filters.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="MODEL")] = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", metavar="FILE", help="Also as ONNX, verified.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="Else the one that MODEL names.")
    ] = None,
) -> None:
    """Take dead filters out: a smaller network. With --onnx alone, MODEL as it is, as ONNX."""
    from efface.compacting import run_compact

    run_compact(run, model, out, onnx, task)


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
        [x["name"], f"{x['kept']:,}", f"{x['total']:,}", f"{x['sparsity']:.1%}", filters]
        for x in facts["layers"]
        for filters in [f"{x['filters_kept']} of {x['filters']}" if x["filters"] else "—"]
    ]
    tables = [run.table("Lineage", ["step", "method", "seed", "took", "parent"], steps)]
    if layers:
        tables.append(run.table("Pruned", ["weight", "kept", "of", "sparsity", "filters"], layers))
    if cut := facts["compacted"]:
        head.append(f"compacted: {cut['after']:,} of {cut['before']:,} values are left")
        shapes = [[" × ".join(map(str, t[k])) for k in ("before", "after")] for t in cut["tensors"]]
        cuts = [[t["name"], *both] for t, both in zip(cut["tensors"], shapes, strict=True)]
        tables.append(run.table("Compacted", ["weight", "was", "is"], cuts))
    run.result(facts, "\n".join([*head, *tables]))


@command
def methods(
    run: Run, name: Annotated[str | None, typer.Argument(help="Show the options of one.")] = None
) -> None:
    """What each method and pruner needs and where it comes from; with a name, its options."""
    from efface.unlearn import catalogue, pruners

    facts = {"methods": catalogue(name)}
    if name is None:
        facts["pruners"] = pruners()
        columns = ["what", "needs", "source"]
        parts = [
            run.table(
                "",
                [kind, *columns],
                [[m["name"], m["title"], ", ".join(m["needs"]) or "—", m["paper"]] for m in found],
            )
            for kind, found in (("method", facts["methods"]), ("pruner", facts["pruners"]))
        ]
        text = "\n".join(parts)
    else:
        one = facts["methods"][0]
        rows = [[o["name"], o["type"], o["default"]] for o in one["options"]]
        text = one["doc"] + "\n\n" + run.table("", ["option", "type", "default"], rows)
    run.result(facts, text)


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
