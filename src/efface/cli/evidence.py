"""Commands that look: audit a model, show a file, list the methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from efface.commandline import (
    Class,
    Ids,
    Random,
    SplitSeed,
    TaskName,
    Where,
    audit_text,
    chosen,
    command,
    get_split,
    get_task,
    this_command,
)
from efface.console import Run
from efface.errors import InputError


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
def show(
    run: Run, model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")]
) -> None:
    """Lineage, sparsity per layer, sizes and digests of a model file."""
    from efface.checkpoint import describe_file
    from efface.logs.words import many, told

    facts = describe_file(model)
    head = [
        f"{model}: {facts['bytes'] / 2**20:.2f} MiB, {facts['parameters']:,} values, "
        f"task {facts['task']}, run {facts['run_id']}",
        f"weights {facts['weights_digest'][:16]}  mask {facts['mask_digest'][:16] or '—'}  "
        f"intact: {'yes' if facts['intact'] else 'NO'}",
        f"forgotten: {many(facts['forgotten'], 'record')} in {many(facts['requests'], 'request')}",
        *(sentence for step in facts["lineage"] for sentence in told(step["log"])),
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
