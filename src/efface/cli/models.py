"""Commands that make a model: train, adopt, prune, forget, patch, retrain."""

from __future__ import annotations

import warnings
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
    check_selection,
    command,
    digest_of,
    get_method,
    get_split,
    make,
)
from efface.console import Run
from efface.errors import InputError, MethodError

if TYPE_CHECKING:
    from efface.task import Task
    from efface.trained import TrainedModel


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
    record: Annotated[
        Path | None, typer.Option(metavar="LOGDIR", help="Log the update of every step.")
    ] = None,
    record_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What the log may take, e.g. 2GiB.")
    ] = None,
    record_set: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="keep, pick, values, sensitive …: see docs/log.md."),
    ] = None,
    cohort: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records that share batches.")
    ] = None,
    cohort_epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Cohorts come in the last N epochs only.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Train a model on all of a task's training records; with --record, log its updates."""
    from efface import verbs
    from efface.checkpoint import load
    from efface.logs import recording

    if record is not None and record.resolve() == out.resolve():
        raise InputError(f"--record and --out name the same place, {out}; give the log another.")
    asked = recording(record, record_budget, record_set, cohort, cohort_epochs, run.force)
    options = {"rewind": rewind, "keep_initial": keep_initial, **asked.options}

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        first = load(initial, made) if initial else None
        return verbs.train(made, initial=first, **options, **common)

    key = {"verb": "train", "task": task, "rewind": rewind, "initial": digest_of(initial)}
    make(run, out, (task, sets), key | asked.key, work)


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
    log: Annotated[
        Path | None, typer.Option(metavar="LOGDIR", help="The log that its training recorded.")
    ] = None,
    patch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also what dfmu multiplied, a few kB.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Make a model forget records: by --ids, --class, --random or --where."""
    from efface import verbs
    from efface.checkpoint import load

    unlearner = get_method(method, sets, force=run.force)
    if patch is not None:
        _check_patch(patch, unlearner, {"--out": out, "--model": model, "--ids": ids})
    select = {"ids": ids, "label": label, "fraction": fraction, "where": where, "seed": split_seed}
    check_selection(select)
    key: dict[str, Any] = {
        "verb": "forget",
        "task": task,
        "model": digest_of(model),
        "method": repr(unlearner),
    }
    key["select"] = {k: str(v) for k, v in select.items()} | {"file": digest_of(ids)}
    options: dict[str, Any] = {}
    if log is not None:
        from efface.updates.folder import read_manifest

        read_manifest(log)
        options, key["log"] = {"log": log}, digest_of(log / "manifest.json")

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        split = get_split(made, select)
        loaded = load(model, made)
        after = verbs.forget(loaded, split, unlearner, **options, **common)
        if patch is not None and after.patch.base != loaded.digest:
            _say_between(unlearner.name, patch, model)
        return after

    make(run, out, (task, None), key, work, patch)


def _check_patch(patch: Path, method: Any, others: dict[str, Path | None]) -> None:
    """Check, before anything runs, that there will be a patch, and a place for it.

    Raises:
        MethodError: If the method makes none.
        InputError: If another file has this name.
    """
    from efface.unlearn import DFMU, LayerwisePartial
    from efface.unlearn.base import inside

    made = [m for m in inside(method) if isinstance(m, DFMU)]
    if not made:
        raise MethodError(
            f"--patch: {method.name} makes no patch; take --method dfmu, or leave --patch out."
        )
    if all(m.action == "reinit" for m in made):
        raise MethodError(
            "--patch: action=reinit puts new weights in, which no factors do; take action=dampen "
            "or action=prune, or leave --patch out."
        )
    partial = [m for m in inside(method) if isinstance(m, LayerwisePartial)]
    if any(isinstance(m, DFMU) for p in partial for m in inside(p)):
        raise MethodError(
            "--patch: layerwise-partial puts most factors of dfmu back, so that no patch would "
            "describe the model; take dfmu by itself, or leave --patch out."
        )
    _check_apart("--patch", patch, others)


def _say_between(method: str, patch: Path, model: Path) -> None:
    """Say that a patch is not for the model that the command was given."""
    warnings.warn(
        f"{method} changed the model before its blocks were turned down, so that {patch} is for "
        f"weights in between, which are in no file; to have one for {model}, let dfmu come first.",
        stacklevel=3,
    )


def _check_apart(option: str, path: Path, others: dict[str, Path | None]) -> None:
    for other, place in others.items():
        if place is not None and place.resolve() == path.resolve():
            raise InputError(f"{option} and {other} name the same file, {path}; give it another.")


@command
def patch(
    run: Run,
    task: TaskName,
    model: Model,
    file: Annotated[Path, typer.Option("--patch", metavar="FILE", help="Of forget --patch.")],
    out: Out,
    undo: Annotated[bool, typer.Option("--undo", help="Take it off again.")] = False,
) -> None:
    """Put a patch on the model it was made from, or take it off: it hides, and does not erase."""
    from efface import verbs
    from efface.checkpoint import load
    from efface.sparsify.blocks import Patch

    _check_apart("--out", out, {"--patch": file})
    change = Patch.load(file)
    key = {"verb": "patch", "task": task, "model": digest_of(model), "patch": digest_of(file)}

    def work(made: Task, common: dict[str, Any]) -> TrainedModel:
        return verbs.patch(load(model, made), change, undo=undo)

    make(run, out, (task, None), key | {"undo": undo}, work)


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
