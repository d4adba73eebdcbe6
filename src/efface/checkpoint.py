"""TrainedModel ⇄ one safetensors file: weights, mask, lineage, and what was forgotten."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from efface.errors import CheckpointError, MismatchError, listed
from efface.files import canonical, check_output, digest, write_atomic
from efface.lineage import Forgotten, Step
from efface.mask import Mask, pack, unpack
from efface.task import Task

SCHEMA = "efface.model/1"


class TrainedModel:
    """A network and what training left behind that an unlearner may need.

    Args:
        task: The task that it was trained on.
        network: The network; its pruned weights are zeroed at once.
        mask: Which weights are kept, or None for a dense model.
        initial: How its initial weights can be had again: ``{"seed", "digest"}``.
        rewind: Early weights (state dict), where training kept them.
        lineage: What was done to it, oldest first.
        forgotten: What it was made to forget.
    """

    def __init__(
        self,
        task: Task,
        network: nn.Module,
        *,
        mask: Mask | None = None,
        initial: Mapping[str, Any] | None = None,
        rewind: Mapping[str, Tensor] | None = None,
        lineage: tuple[Step, ...] = (),
        forgotten: Forgotten | None = None,
    ) -> None:
        self.task = task
        self.network = network
        self.initial = initial
        self.rewind = rewind
        self.lineage = lineage
        self.forgotten = forgotten or Forgotten()
        self._mask: Mask | None = None
        self.set_mask(mask)

    @property
    def mask(self) -> Mask | None:
        """Which weights are kept; change it with :meth:`set_mask`."""
        return self._mask

    def set_mask(self, mask: Mask | None) -> None:
        """Install a mask: weights that it drops become exactly zero.

        A running fit sees the change at its next step, and clears the optimiser's state there.

        Raises:
            MismatchError: If the mask is of another network.
        """
        if mask is not None:
            mask.check(self.network)
            mask.apply_(dict(self.network.named_parameters()))
        self._mask = mask

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and buffers."""
        return weights_digest(self.network.state_dict())

    @property
    def sparsity(self) -> float:
        """Of the mask; 0 for a dense model."""
        return self._mask.sparsity if self._mask else 0.0

    def trained_by(self) -> Step | None:
        """The step that trained it from scratch, or None for an adopted model."""
        return next((s for s in self.lineage if s.verb in {"train", "retrain"}), None)

    def copy(self) -> TrainedModel:
        """A deep copy of the network; the rest is immutable and shared."""
        return TrainedModel(
            self.task,
            copy.deepcopy(self.network),
            mask=self._mask,
            initial=self.initial,
            rewind=self.rewind,
            lineage=self.lineage,
            forgotten=self.forgotten,
        )

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one ``.safetensors`` file, whole or not at all.

        Raises:
            OutputError: If the file exists and ``force`` is not given.
            WriteError: If it cannot be written.
        """
        path = Path(path)
        check_output(path, force)
        write_atomic(path, self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """The bytes of the model file."""
        network = {n: t.detach().cpu().contiguous() for n, t in self.network.state_dict().items()}
        prefix = _prefix(network)
        extra = {f"{prefix}mask.{n}": pack(t) for n, t in (self._mask or {}).items()}
        extra |= {f"{prefix}rewind.{n}": t.contiguous() for n, t in (self.rewind or {}).items()}
        # clone: tied weights share memory, which the format does not allow
        tensors = {name: t.clone() for name, t in (network | extra).items()}
        return sorted_header(save_bytes(tensors, self._metadata(prefix)))

    def _metadata(self, prefix: str) -> dict[str, str]:
        last = self.lineage[-1] if self.lineage else None
        shapes = {n: list(t.shape) for n, t in (self._mask or {}).items()}
        metadata = {
            "schema": SCHEMA,
            "prefix": prefix,
            "task": self.task.name,
            "run_id": digest([asdict(step) for step in self.lineage])[:12],
            "weights_digest": self.digest,
            "mask_digest": self._mask.digest if self._mask else "",
            "mask_shapes": canonical(shapes),
            "rewind_digest": weights_digest(self.rewind) if self.rewind else "",
            "parent_digest": (last.parent or "") if last else "",
            "method": canonical(last.method if last else None),
            "settings": canonical(last.settings if last else None),
            "seeds": canonical({f"{i}:{s.verb}": s.seed for i, s in enumerate(self.lineage)}),
            "versions": canonical(last.versions if last else {}),
            "cost": canonical(last.cost if last else {}),
            "initial": canonical(self.initial),
            "lineage": canonical([asdict(step) for step in self.lineage]),
            "forgotten": canonical(asdict(self.forgotten)),
        }
        return metadata | {"metadata_digest": digest(metadata)}


def sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header in the order of names: equal models, equal bytes.

    The format's own writer puts metadata in an order that changes from run to run.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _prefix(network: Mapping[str, Tensor]) -> str:
    """Nothing, or a dot where the user's network has a part called mask or rewind.

    No name in a state dict begins with a dot, so the dotted name space cannot collide.
    """
    owned = {name.split(".")[0] for name in network}
    return "." if owned & {"mask", "initial", "rewind"} else ""


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and contiguous bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return total.hexdigest()


def blank_network(task: Task) -> nn.Module:
    """A network of the task to load weights into; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        return task.network()


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
    rewind = _take(tensors, f"{prefix}rewind.")
    _check_digest(path, "weights", weights_digest(tensors), metadata["weights_digest"])
    _check_digest(path, "mask", mask.digest if mask else "", metadata["mask_digest"])
    _check_digest(
        path, "rewind", weights_digest(rewind) if rewind else "", metadata["rewind_digest"]
    )
    network = blank_network(task)
    load_weights(network, tensors, str(path))
    model = TrainedModel(
        task,
        network,
        mask=mask,
        initial=json.loads(metadata["initial"]),
        rewind=rewind or None,
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
    rewind = _take(tensors, f"{prefix}rewind.")
    lineage = json.loads(metadata["lineage"])
    forgotten = json.loads(metadata["forgotten"])
    intact = (
        weights_digest(tensors) == metadata["weights_digest"]
        and (weights_digest(rewind) if rewind else "") == metadata["rewind_digest"]
        and (mask.digest if mask else "") == metadata["mask_digest"]
    )
    return {
        "task": metadata["task"],
        "run_id": metadata["run_id"],
        "bytes": Path(path).stat().st_size,
        "parameters": sum(t.numel() for t in tensors.values()),
        "weights_digest": metadata["weights_digest"],
        "mask_digest": metadata["mask_digest"],
        "intact": intact,
        "sparsity": mask.sparsity if mask else 0.0,
        "layers": mask.layers() if mask else [],
        "forgotten": len(forgotten["tags"]),
        "requests": len(forgotten["requests"]),
        "lineage": [
            {
                "verb": step["verb"],
                "method": (step["method"] or {}).get("method", "—"),
                "settings": step["method"],
                "seed": step["seed"],
                "wall": step["cost"]["wall"],
                "parent": step["parent"],
                "versions": step["versions"],
            }
            for step in lineage
        ],
    }
