"""``efface log show|verify|purge``: what an update log holds, whether it is whole, erasing it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from efface.commandline import (
    Class,
    Ids,
    Random,
    SplitSeed,
    Where,
    app,
    check_selection,
    chosen,
    command,
    get_split,
    get_task,
)
from efface.console import Run, read_ids
from efface.errors import InputError

log = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The log of a training's updates: look into it, check it, erase from it.",
)
app.add_typer(log, name="log")
log_command = partial(command, group=log)

LogDir = Annotated[Path, typer.Argument(metavar="LOGDIR", help="What train --record wrote.")]


@log_command
def show(
    run: Run,
    folder: LogDir,
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="With a selection: what it would cost.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Whose subtracted steps count as done.")
    ] = None,
    ids: Ids = None,
    label: Class = None,
    fraction: Random = None,
    where: Where = None,
    split_seed: SplitSeed = 0,
) -> None:
    """What a log holds; with TASK and a selection, what forgetting it would cost each way."""
    from efface.logs import run_show

    select = {"ids": ids, "label": label, "fraction": fraction, "where": where, "seed": split_seed}
    wanted, data = None, None
    if task is not None or chosen(select) or model is not None:
        check_selection(select)
        made = get_task(task) if task is not None else None
        data = made.data_fingerprint if made is not None else None
        if ids is not None:
            wanted = read_ids(ids)
        elif made is not None:
            wanted = [made.ids_[i] for i in get_split(made, select).forget.tolist()]
        else:
            raise InputError(
                "this selection needs a task; say efface log show LOGDIR TASK and the selection."
            )
    run_show(run, folder, wanted, model, data)


@log_command
def verify(run: Run, folder: LogDir) -> None:
    """Read every segment and check every digest; exits with 1 if something is damaged."""
    from efface.logs import run_verify

    if not run_verify(run, folder):
        raise typer.Exit(1)


@log_command
def purge(
    run: Run,
    folder: LogDir,
    ids: Ids = None,
    forgotten_by: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="What this model was made to forget.")
    ] = None,
    expired: Annotated[
        bool, typer.Option("--expired", help="Steps that are past the log's retention.")
    ] = False,
) -> None:
    """Erase the updates of given records, for good."""
    from efface.logs import run_purge

    run_purge(run, folder, ids=ids, forgotten_by=forgotten_by, expired=expired)
