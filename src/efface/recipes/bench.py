"""``efface bench``: run a recipe over training seeds, resume after a kill, write what was found."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from efface.console import Run
from efface.cost import versions
from efface.errors import InputError, OutputError, nearest
from efface.files import canonical, check_output, write_atomic
from efface.placement import pick_device
from efface.recipes import recipe as recipes
from efface.recipes.frugality import frugality
from efface.recipes.models import Bench
from efface.recipes.plan import Size
from efface.recipes.probe import Spent
from efface.recipes.stability import stability
from efface.recipes.stages import Stages
from efface.recipes.summary import Table, curves, judge, summarise
from efface.recipes.tables import tables
from efface.recipes.undoing import curves_over_keep, storage
from efface.report import bench_page

SCHEMA = "efface.bench/1"
MOST = 1000
"""Training seeds, at most."""


def run_bench(
    console: Run,
    name: str,
    out: Path,
    *,
    size: str | None = None,
    seeds: int | None = None,
    store: Path | None = None,
    jobs: int = 0,
) -> None:
    """Run a recipe, print its tables, write ``results.json`` and ``report.html``.

    Args:
        console: Options, messages and progress.
        name: A recipe that comes along, or a TOML file.
        out: The output folder; run again with the same recipe, what is done is not done again.
        size: Which size of the recipe; the first by default.
        seeds: Training seeds instead of the recipe's.
        store: Where models are kept; ``out/models`` by default. Share it between recipes to train
            the originals once.
        jobs: Processes; 0 takes one per core, two at most without a larger machine.

    Raises:
        InputError: If the recipe or the size is unknown, or a key of it is wrong.
        OutputError: If ``out`` holds something else, or finished results without ``--force``.
    """
    text, recipe = recipes.source(name)
    size = size or next(iter(recipe.size))
    if size not in recipe.size:
        raise InputError(f"recipe {recipe.name} has no size {size!r}; {nearest(size, recipe.size)}")
    if seeds is not None and not 1 <= seeds <= MOST:
        raise InputError(f"--seeds must be 1 to {MOST}, not {seeds}.")
    workers = _workers(jobs, console.device)
    bench = Bench(
        *(text, recipe.name, size, out, store or out / "models", console.device, console.seed),
        seeds=seeds,
    )
    plan = with_seeds(bench.plan, seeds)
    check_plan(bench, plan)
    _prepare(console, bench, seeds)
    spent = Spent(out / "seconds.json")
    stages = Stages(console, bench, plan, workers, spent)
    with console.progress() as progress:
        rows, search = stages.all(progress)
    document = _document(bench, plan, stages, rows, search)
    document |= {
        "command": _command(name, size, seeds, console.seed),
        "environment": environment(workers),
        "cost": spent.read(),
    }
    write_atomic(out / "report.html", bench_page(document).encode())
    whole = canonical(document) + "\n"  # thousands of rows: white space would be half of it
    write_atomic(out / "results.json", whole.encode())
    seconds = document["cost"]["wall"]
    console.result(
        document, f"{tables(console, document)}\n{seconds:.0f} s. Report: {out / 'report.html'}"
    )


def _document(
    bench: Bench, plan: Size, stages: Stages, rows: list[dict[str, Any]], search: list[Any]
) -> dict[str, Any]:
    """What was run and what was found, as ``results.json`` holds it."""
    recipe = bench.recipe
    summary = summarise(recipe, rows)
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "size": bench.size,
        "title": recipe.title,
        "source": recipe.source,
        "about": recipe.about,
        "seed": bench.seed,
        "seeds": plan.seeds,
        "code": bench.code,
        "plan": plan.model_dump(mode="json", by_alias=True),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "search": search,
        "influence": stages.influence,
        "rows": rows,
        "summary": summary,
        "claims": judge(recipe.claims, rows),
        "curves": curves(recipe, rows),
        "stability": stability(plan, rows),
        "storage": storage(rows),
        "over_keep": curves_over_keep(plan, summary),
        "frugality": frugality(plan, Table(rows)),
    }


def with_seeds(plan: Size, seeds: int | None) -> Size:
    """The plan with another number of training seeds, for every method."""
    if seeds is None:
        return plan
    methods = {n: m.model_copy(update={"seeds": None}) for n, m in plan.methods.items()}
    return plan.model_copy(update={"seeds": seeds, "methods": methods})


def environment(workers: int) -> dict[str, Any]:
    """Versions, processes and threads."""
    return {**versions(), "processes": workers, "threads": 1, "cores": os.cpu_count()}


def _workers(jobs: int, device: str) -> int:
    if jobs < 0:
        raise InputError(f"--jobs must be 0 or more, not {jobs}.")
    on_gpu = pick_device(device).type != "cpu"
    return jobs or (1 if on_gpu else min(2, os.cpu_count() or 1))


def _command(name: str, size: str, seeds: int | None, seed: int) -> str:
    """The command that does this again; without the paths of the machine where it was run."""
    words = [f"efface bench {Path(name).name} --size {size}"]
    words += [f"--seeds {seeds}"] if seeds is not None else []
    words += [f"--seed {seed}"] if seed else []
    return " ".join([*words, f"--out {Path(name).stem}-{size}"])


def check_plan(bench: Bench, plan: Size) -> None:
    """Check what can be known before anything is trained: data, rewinding, proxy, cache.

    Raises:
        InputError: Naming what does not fit together.
    """
    task, _ = bench.data()
    if plan.rewind is not None and not 0 < plan.rewind <= task.fit.epochs:
        raise InputError(f"rewind = {plan.rewind} is none of the {task.fit.epochs} epochs.")
    for model in plan.models:
        needs = model.make_pruner().requires if model.pruner is not None else ()
        if plan.rewind is None and "rewind" in needs:
            raise InputError(f"model {model.name!r} rewinds; say rewind = EPOCH for this size.")
    for name in plan.cases:
        for model in plan.models_in(name):
            bench.data("forget", name, model.name)
    for name, case in plan.cases.items():
        split = bench.data("forget", name)[1]
        if case.proxy and bench.data("proxy", name)[1].forget.equal(split.forget):
            raise InputError("the proxy is the forget set that is reported; choose another.")
    check_output(bench.store / "model", force=True)


def _prepare(console: Run, bench: Bench, seeds: int | None) -> None:
    """Check the output folder: new, empty, or of the same recipe and size."""
    out, mark = bench.out, bench.out / "bench.json"
    check_output(out / "results.json", console.force)
    foreign = [p for p in out.glob("*") if not p.name.startswith(".")] if out.is_dir() else []
    if foreign and not mark.exists():
        raise OutputError(f"{out} holds other files than a bench's; give a new or empty folder.")
    mine = {"recipe": bench.name, "size": bench.size}
    if mark.exists():
        try:
            theirs = json.loads(mark.read_text())
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict):
            raise OutputError(f"{mark} is damaged; delete it to go on, or give another folder.")
        if {k: theirs.get(k) for k in mine} != mine:
            raise OutputError(
                f"{out} holds a bench of {theirs.get('recipe')}, size {theirs.get('size')}; give "
                "another folder."
            )
        console.say(f"going on where an earlier run stopped ({out}).")
    write_atomic(mark, canonical({**mine, "seeds": seeds}).encode())
