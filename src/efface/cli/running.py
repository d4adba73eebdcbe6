"""Commands that run something whole: the demo, a benchmark, compaction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efface.commandline import (
    command,
)
from efface.console import Run


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
