"""``efface compact``: a model without its dead filters, as a model file and as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efface.checkpoint import describe_file, load
from efface.console import Run
from efface.datasets import BUILT_IN, load_task
from efface.errors import InputError
from efface.files import check_output, write_atomic
from efface.onnx_export import onnx_bytes
from efface.sparsify import compact
from efface.task import Task
from efface.trained import TrainedModel


def run_compact(
    run: Run, model: Path, out: Path | None, onnx: Path | None, task: str | None
) -> None:
    """Compact a model file; both outputs are made before either is written.

    Args:
        run: The common options.
        model: The file.
        out: Where the smaller model goes; None: the model stays as it is.
        onnx: Where the network goes as ONNX, or None.
        task: The model's task; None: the one that the file names.

    Raises:
        InputError: If there is nothing to write, or the file's task cannot be had by its name.
        MethodError: As :func:`efface.compact`.
    """
    if out is None and onnx is None:
        raise InputError("say what to write: --out MODEL, --onnx FILE, or both.")
    run.start()
    for path in (out, onnx):
        if path is not None:
            check_output(path, run.force)
    large = load(model, load_task(task) if task else named_task(model))
    small = large if out is None else compact(large)
    facts: dict[str, Any] = {"model": None, "onnx": None}
    lines = []
    if onnx is not None:
        data, exported = onnx_bytes(small)
    if out is not None:
        small.save(out, force=run.force)
        facts |= model_facts(small, out)
        lines.append(_model_line(facts))
    if onnx is not None:
        write_atomic(onnx, data)
        facts["onnx"] = {"path": str(onnx), **exported}
        lines.append(_onnx_line(facts["onnx"]))
    run.result(facts, "\n".join(lines))


def named_task(model: Path) -> Task:
    """The built-in task that a model file names; no file decides which module is imported.

    Raises:
        InputError: If it names none.
    """
    name = describe_file(model)["task"]
    spec = name.partition("-")[0]  # cifar10-20k is of cifar10
    if spec not in BUILT_IN:
        raise InputError(
            f"{model} is of a task called {name!r}, which is no built-in one; give yours with "
            "--task module:attribute."
        )
    return load_task(spec)


def model_facts(small: TrainedModel, out: Path) -> dict[str, Any]:
    """What is said of a compacted model that was written."""
    step = small.lineage[-1]
    return {
        "model": str(out),
        "weights_digest": small.digest,
        "sparsity": small.sparsity,
        "seconds": step.cost["wall"],
        **step.detail,
    }


def _model_line(facts: dict[str, Any]) -> str:
    (before, after), adds = facts["parameters"], facts["multiply_adds"]
    return (
        f"{facts['model']} written: {after:,} of {before:,} parameters, {adds[1] / adds[0]:.1%} of "
        f"the multiply-adds; on {facts['records']} records logits differ by at most "
        f"{facts['difference']:.7f} of the largest."
    )


def _onnx_line(facts: dict[str, Any]) -> str:
    return (
        f"{facts['path']} written: {facts['bytes'] / 2**20:.2f} MiB, batch {facts['batch']}; on "
        f"{facts['records']} records logits differ from torch's by at most "
        f"{facts['difference']:.6f}."
    )
