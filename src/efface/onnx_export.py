"""A network as ONNX, compared with what torch answers before anything is written.

The file is made by ``torch.onnx`` (which folds batch norm into convolutions), run by
``onnxruntime`` on real test records, one at a time and many at once, and kept only if both agree.
Traces of the source code, with the paths of this machine in them, are taken out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from efface.data import Batch
from efface.errors import EffaceError, MethodError, NeedsError
from efface.files import check_output, write_atomic
from efface.placement import preserved
from efface.predict import logits
from efface.task import Task
from efface.trained import TrainedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest absolute difference of a logit."""
CHECKED, TOGETHER = 256, 64
"""Test records that are compared, and how many are given at once."""


def check_packages() -> None:
    """Check that the packages that export and run ONNX are there.

    Raises:
        NeedsError: Naming those that are not.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise NeedsError(
            f"ONNX needs {', '.join(absent)}, not installed here; pip install 'efface[onnx]'."
        )


def save_onnx(trained: TrainedModel, path: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Write a model's network as an ONNX file, whole or not at all.

    Args:
        trained: The model; what its mask drops is zero in the file.
        path: Where it goes.
        force: Replace a file that exists.

    Returns:
        ``{"path", "bytes", "batch", "inputs", "records", "difference"}``: ``batch`` is
        ``"dynamic"``, or 1 where the forward pass has no other size; ``difference`` the largest of
        any logit.

    Raises:
        NeedsError: If a package is missing.
        MethodError: If the forward pass cannot be exported.
        EffaceError: If onnxruntime does not answer as torch does.
        OutputError: If the file exists and ``force`` is not given.

    Example:
        >>> import tempfile, torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> trained = efface.train(task)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_onnx(trained, f"{folder}/model.onnx")["batch"]
        'dynamic'
    """
    check_output(Path(path), force)
    data, facts = onnx_bytes(trained)
    write_atomic(Path(path), data)
    return {"path": str(path), **facts}


def onnx_bytes(trained: TrainedModel) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the ONNX file, and what :func:`save_onnx` says of it.

    Raises:
        NeedsError: As :func:`save_onnx`.
        MethodError: As :func:`save_onnx`.
        EffaceError: As :func:`save_onnx`.
    """
    check_packages()
    task = trained.task
    network = copy.deepcopy(trained.network).cpu().eval()
    with preserved(network), _quiet():
        data, batch, names = _exported(network, task, trained.digest)
        session = _session(data)
    positions = torch.arange(min(CHECKED, len(task.test_records)))
    expected = logits(network, task, task.test_records, positions)
    difference = max(
        _difference(session, names, task, positions, expected, at_once)
        for at_once in ((1, TOGETHER) if batch == "dynamic" else (1,))
    )
    if not difference <= TOLERANCE:  # NaN is no agreement either
        raise EffaceError(
            f"the exported network answers otherwise than torch does: logits differ by up to "
            f"{difference:.2g} on {len(positions)} test records, more than {TOLERANCE:g}; nothing "
            "was written."
        )
    facts = {"bytes": len(data), "batch": batch, "inputs": names, "records": len(positions)}
    return data, facts | {"difference": difference}


# -- export ----------------------------------------------------------------------------------------


class _Answer(nn.Module):
    """A network behind the task's adapter: leaves of the inputs → float logits."""

    def __init__(self, network: nn.Module, task: Task, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.network, self.task, self.spec = network, task, spec

    def forward(self, *leaves: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        inputs = pytree.tree_unflatten(list(leaves), self.spec)
        return self.task.forward(self.network, inputs).float()


def _exported(network: nn.Module, task: Task, digest: str) -> tuple[bytes, str | int, list[str]]:
    """The file, its batch size and the names of its inputs."""
    leaves, spec = pytree.tree_flatten(_inputs(task, torch.arange(2)))
    names = ["input"] if len(leaves) == 1 else [f"input_{i}" for i in range(len(leaves))]
    model = _Answer(network, task, spec)
    try:
        proto = _program(model, leaves, names, dynamic=True)
    except Exception:  # some forward passes can be exported for one size only
        proto = None
    if proto is not None and all(_axis(i).dim_param for i in proto.graph.input):
        return _bare(proto, digest), "dynamic", names
    try:
        proto = _program(model, [leaf[:1] for leaf in leaves], names, dynamic=False)
        return _bare(proto, digest), 1, names
    except Exception as error:
        raise MethodError(
            f"the forward pass of {type(network).__name__} cannot be exported to ONNX "
            f"({_cause(error)}); write it with tensor operations only."
        ) from None


def _program(model: nn.Module, leaves: list[Tensor], names: list[str], dynamic: bool) -> Any:
    """The protocol buffer that torch makes of a module."""
    axes = tuple({0: torch.export.Dim("batch")} for _ in leaves)
    program: Any = torch.onnx.export(
        model,
        tuple(leaves),
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=(axes,) if dynamic else None,
        dynamo=True,
        verbose=False,
    )
    return program.model_proto


def _axis(value: Any) -> Any:
    return value.type.tensor_type.shape.dim[0]


def _bare(proto: Any, digest: str) -> bytes:
    """The file without traces of the source code, and with the digest of the weights."""
    _strip(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "efface.weights_digest", digest
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _strip(message: Any) -> None:
    """Clear comments and notes of a protocol buffer, and of all that it holds."""
    for field in ("doc_string", "metadata_props"):
        if field in message.DESCRIPTOR.fields_by_name:
            message.ClearField(field)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                _strip(part)


def _cause(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes, warnings and log from the terminal: it says much when it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- verification ----------------------------------------------------------------------------------


def _inputs(task: Task, positions: Tensor) -> Any:
    """Inputs of these test records, as the task's adapter is given them."""
    batch: Batch = next(iter(task.test_records.batches([positions], torch.device("cpu"))))
    return batch.inputs


def _session(data: bytes) -> Any:
    """The file, loaded by onnxruntime with as many threads as torch has."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _difference(
    session: Any,
    names: list[str],
    task: Task,
    positions: Tensor,
    expected: np.ndarray[Any, np.dtype[np.float32]],
    at_once: int,
) -> float:
    """The largest difference between logits, with so many records at once."""
    found = []
    for part in torch.split(positions, at_once):
        leaves = pytree.tree_leaves(_inputs(task, part))
        feed = {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}
        found.append(session.run(None, feed)[0])
    return float(np.abs(np.concatenate(found) - expected).max())
