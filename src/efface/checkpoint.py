"""Model files: reading a TrainedModel back, every digest checked; what a file says of itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from efface.errors import CheckpointError, MismatchError, listed
from efface.files import digest
from efface.lineage import Forgotten, Step
from efface.mask import Mask, unpack
from efface.shapes import described, from_metadata
from efface.task import Task
from efface.trained import KEPT, SCHEMA, TrainedModel, blank_network, weights_digest


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a pickle is refused, never read.

    Raises:
        CheckpointError: If the file is absent, a pickle, truncated or damaged.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path.") from None
    try:
        tensors = load_bytes(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, struct.error, KeyError) as error:
        if data[:2] == b"PK" or data[:1] == b"\x80":  # a whole safetensors file may begin so, too
            raise CheckpointError(
                f"{path} is a pickle, which efface never opens; convert it where you trust it: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'm.safetensors')."
            ) from None
        raise CheckpointError(
            f"{path} is truncated, damaged or no safetensors file ({error}); restore it."
        ) from None
    return tensors, metadata


def load(path: str | Path, task: Task) -> TrainedModel:
    """Read a model that efface wrote; every digest is checked.

    Args:
        path: The ``.safetensors`` file.
        task: The task that it belongs to.

    Raises:
        CheckpointError: If the file is damaged, of another network, or not written by efface.
        MismatchError: If record IDs are positions and the data is not the data it was trained on.

    Example:
        >>> import tempfile, torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> trained = efface.train(task)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = trained.save(f"{folder}/model.safetensors")
        ...     efface.load(path, task).digest == trained.digest
        True
    """
    tensors, metadata = read_file(path)
    if metadata.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} was not written by efface (schema {metadata.get('schema')!r}); "
            "take in a model trained elsewhere with: efface adopt."
        )
    said = metadata.pop("metadata_digest", "")
    if digest(metadata) != said:
        raise CheckpointError(f"{path}: its metadata is damaged; restore the file from a copy.")
    prefix = metadata["prefix"]
    mask = _take_mask(path, tensors, metadata, prefix)
    kept = {kind: _take(tensors, f"{prefix}{kind}.") for kind in KEPT}
    _check_digest(path, "weights", weights_digest(tensors), metadata["weights_digest"])
    _check_digest(path, "mask", mask.digest if mask else "", metadata["mask_digest"])
    for kind, weights in kept.items():
        _check_digest(path, f"{kind} weights", *_digests(kind, weights, metadata))
    try:
        task = from_metadata(task, metadata)
        network = blank_network(task)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    load_weights(network, tensors, str(path))
    model = TrainedModel(
        task,
        network,
        mask=mask,
        initial=json.loads(metadata["initial"]),
        initial_weights=kept["initial"] or None,
        rewind=kept["rewind"] or None,
        dense=kept["dense"] or None,
        lineage=tuple(Step(**step) for step in json.loads(metadata["lineage"])),
        forgotten=_forgotten(json.loads(metadata["forgotten"])),
    )
    check_data(model)
    return model


def _forgotten(value: dict[str, Any]) -> Forgotten:
    return Forgotten(value["key"], tuple(value["tags"]), tuple(value["requests"]))


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name[len(prefix) :]: tensors.pop(name) for name in names}


def _digests(
    kind: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[str, str]:
    """The digest of some kept weights, and the one that was written with them."""
    return weights_digest(weights) if weights else "", metadata.get(f"{kind}_digest", "")


def _take_mask(
    path: str | Path, tensors: dict[str, Tensor], metadata: Mapping[str, str], prefix: str
) -> Mask | None:
    shapes = json.loads(metadata["mask_shapes"])
    if not shapes:
        return None
    packed = _take(tensors, f"{prefix}mask.")
    try:
        return Mask({name: unpack(packed[name], tuple(shape)) for name, shape in shapes.items()})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its mask is damaged ({error}); restore the file.") from None


def _check_digest(path: str | Path, what: str, found: str, said: str) -> None:
    if found != said:
        raise CheckpointError(
            f"{path}: its {what} do not match the digest written with them; the file is damaged, "
            "restore it from a copy."
        )


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load weights strictly, and say exactly what does not fit.

    Raises:
        CheckpointError: Naming missing, unexpected and mis-shaped tensors.
    """
    own = network.state_dict()
    shaped = [
        f"{n}: {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in tensors and tensors[n].shape != own[n].shape
    ]
    problems = {
        "missing": [n for n in own if n not in tensors],
        "unexpected": [n for n in tensors if n not in own],
        "mis-shaped": shaped,
    }
    said = [f"{kind}: {listed(names, 5)}" for kind, names in problems.items() if names]
    if said:
        raise CheckpointError(
            f"{where} is a checkpoint of another network than the task's ({'; '.join(said)})."
        )
    network.load_state_dict(dict(tensors))


def check_data(model: TrainedModel) -> None:
    """Where IDs are positions, refuse data other than the model's.

    Raises:
        MismatchError: If the fingerprint differs.
    """
    data = model.lineage[0].data if model.lineage else {}
    if not data.get("positional"):
        return
    task = model.task
    if data["fingerprint"] != task.data_fingerprint:
        raise MismatchError(
            f"record IDs are positions, but the training data is not the data of this model "
            f"({data['n']} records then, {len(task.records)} now, or reordered); give the task "
            "stable IDs with Task(ids=…), or the data as it was."
        )


ON_THE_LOG = ("log", "cohorts", "removed", "replayed")
"""What a step's detail says of the log of updates."""


def describe_file(path: str | Path) -> dict[str, Any]:
    """What a model file says of itself, without the task: lineage, sparsity, sizes, digests.

    Raises:
        CheckpointError: If it is no model file of efface.
    """
    tensors, metadata = read_file(path)
    if metadata.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} was not written by efface; take it in with: efface adopt.")
    if digest({k: v for k, v in metadata.items() if k != "metadata_digest"}) != metadata.get(
        "metadata_digest"
    ):
        raise CheckpointError(f"{path}: its metadata is damaged; restore the file from a copy.")
    prefix = metadata["prefix"]
    mask = _take_mask(path, tensors, metadata, prefix)
    kept = {kind: _take(tensors, f"{prefix}{kind}.") for kind in KEPT}
    lineage = json.loads(metadata["lineage"])
    forgotten = json.loads(metadata["forgotten"])
    intact = (
        weights_digest(tensors) == metadata["weights_digest"]
        and (mask.digest if mask else "") == metadata["mask_digest"]
        and all(len({*_digests(kind, weights, metadata)}) == 1 for kind, weights in kept.items())
    )
    return {
        "task": metadata["task"],
        "run_id": metadata["run_id"],
        "bytes": Path(path).stat().st_size,
        "parameters": sum(t.numel() for t in tensors.values()),
        "kept": [kind for kind, weights in kept.items() if weights],
        "weights_digest": metadata["weights_digest"],
        "mask_digest": metadata["mask_digest"],
        "intact": intact,
        "sparsity": mask.sparsity if mask else 0.0,
        "layers": mask.layers() if mask else [],
        "compacted": described(metadata, tensors),
        "forgotten": len(forgotten["tags"]),
        "requests": len(forgotten["requests"]),
        "lineage": [
            {
                "verb": step["verb"],
                "method": _named(step["method"] or {}),
                "settings": step["method"],
                "seed": step["seed"],
                "wall": step["cost"]["wall"],
                "parent": step["parent"],
                "versions": step["versions"],
                "log": {k: v for k in ON_THE_LOG if (v := step["detail"].get(k))},
            }
            for step in lineage
        ],
    }


def _named(method: Mapping[str, Any]) -> str:
    """The name of a step's method; of a patch, whether it was taken off."""
    return f"{method.get('method', '—')}{' --undo' if method.get('undo') is True else ''}"
