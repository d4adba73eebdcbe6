"""Turning blocks down, and the patch that does and undoes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from efface.errors import InputError, MismatchError
from efface.files import canonical, check_output, digest, write_atomic
from efface.sparsify.blocks.finding import Blocks
from efface.trained import TrainedModel, sorted_header, weights_digest

SCHEMA = "efface.patch/1"


@dataclass(frozen=True, eq=False)
class Rescaling:
    """Factors for rows (or columns) of one parameter.

    Args:
        name: Of the parameter.
        dim: Along which dimension they lie.
        rows: Which, int32 ``[k]``.
        factors: float32 ``[k]``.
        old: What they held, where a division would not bring it back exactly: of vectors, and of
            what is switched off.
    """

    name: str
    dim: int
    rows: Tensor
    factors: Tensor
    old: Tensor | None = None

    def fits(self, param: Tensor | None) -> bool:
        """Whether a parameter has these rows."""
        if param is None or param.ndim <= self.dim:
            return False
        ends = (int(self.rows.min()), int(self.rows.max())) if len(self.rows) else (0, 0)
        if ends[0] < 0 or ends[1] >= param.shape[self.dim]:
            return False
        shape = [len(self.rows) if d == self.dim else n for d, n in enumerate(param.shape)]
        return self.old is None or list(self.old.shape) == shape

    def on(self, param: Tensor) -> None:
        """Multiply, in place."""
        rows = self.rows.long().to(param.device)
        shape = [-1 if d == self.dim else 1 for d in range(param.ndim)]
        part = param.index_select(self.dim, rows) * self.factors.to(param).reshape(shape)
        part[(part == 0).logical_and(torch.isfinite(part))] = 0.0  # no −0.0
        param.index_copy_(self.dim, rows, part)

    def off(self, param: Tensor) -> None:
        """Put back what was there: exactly where it was kept, else by division."""
        rows = self.rows.long().to(param.device)
        shape = [-1 if d == self.dim else 1 for d in range(param.ndim)]
        if self.old is not None:
            param.index_copy_(self.dim, rows, self.old.to(param))
            return
        part = param.index_select(self.dim, rows) / self.factors.to(param).reshape(shape)
        param.index_copy_(self.dim, rows, part)


def rescalings(network: nn.Module, blocks: Blocks, beta: Tensor) -> list[Rescaling]:
    """What to multiply by what, so that every block is turned down by its factor.

    A gate behind a batch norm takes the factor on scale *and* shift: on the weights before it,
    training mode would cancel the factor, and evaluation mode would shift the mean.

    Args:
        network: Supplies the values that a patch keeps.
        blocks: Of the network.
        beta: ``[blocks]``; blocks at 1 are left alone.
    """
    params, found = dict(network.named_parameters()), []
    for gate in blocks.gates:
        factor = torch.where(gate.owner >= 0, beta[gate.owner.clamp(min=0)], 1.0).float()
        rows = (factor != 1).nonzero().flatten()
        for name, dim in gate.scaled(network) if len(rows) else ():
            param = params[name].detach()
            for mine in (rows[factor[rows] != 0], rows[factor[rows] == 0]):
                if len(mine):
                    short = param.dtype not in (torch.float32, torch.float64)  # (w·f)/f·f ≠ w·f
                    exact = param.ndim == 1 or short or bool((factor[mine] == 0).all())
                    old = param.index_select(dim, mine.to(param.device)).cpu() if exact else None
                    found.append(Rescaling(name, dim, mine.int(), factor[mine], old))
    return found


def turn_down_(network: nn.Module, changes: list[Rescaling]) -> None:
    """Multiply, in place."""
    params = dict(network.named_parameters())
    with torch.no_grad():
        for change in changes:
            change.on(params[change.name])


@dataclass(frozen=True, eq=False)
class Patch:
    """Factors that make one model of another, and can be taken off again: a few kB.

    It hides, and does not erase: whoever has it and the model has the model from before. What comes
    after the factors (recalibration, recovery) is not in it.

    Args:
        changes: What is multiplied by what.
        base: Digest of the weights that it is for.
        facts: What it was made for.

    Example:
        >>> import efface
        >>> x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 4
        >>> fit = efface.Settings(epochs=1)
        >>> task = efface.Task(lambda: efface.networks.DigitsCNN(4), (x, y), (x, y), fit=fit)
        >>> trained = efface.train(task)
        >>> method = efface.unlearn.DFMU(fraction=1.0)
        >>> after = efface.forget(trained, efface.Split.by_class(task, 3), method)
        >>> patched = after.patch.apply(trained)
        >>> patched.digest == trained.digest, after.patch.undo(patched).digest == trained.digest
        (False, True)
    """

    changes: tuple[Rescaling, ...]
    base: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, trained: TrainedModel) -> TrainedModel:
        """A copy of a model with the factors on.

        Raises:
            MismatchError: If it is another model than the one that the patch was made for.
        """
        if trained.digest != self.base:
            raise MismatchError(
                f"the patch is for weights {self.base[:12]}…, and the model has "
                f"{trained.digest[:12]}…; apply it to the model that it was made from."
            )
        made = trained.copy()
        turn_down_(made.network, list(self.changes))
        return made

    def undo(self, patched: TrainedModel) -> TrainedModel:
        """A copy of a patched model with the factors off.

        Exact where a batch norm was scaled, and where something was switched off; elsewhere up to
        one rounding.

        Raises:
            MismatchError: If taking it off does not lead back to the model that it was made for.
        """
        made = patched.copy()
        params = dict(made.network.named_parameters())
        missing = [c.name for c in self.changes if not c.fits(params.get(c.name))]
        if missing:
            raise MismatchError(
                f"the model has no {missing[0]!r} of the patch's size; take the model it is for."
            )
        with torch.no_grad():
            for change in self.changes:
                change.off(params[change.name])
        again = made.copy()
        turn_down_(again.network, list(self.changes))
        exact = all(c.old is not None for c in self.changes)
        if weights_digest(again.network.state_dict()) != patched.digest or (
            exact and made.digest != self.base
        ):
            raise MismatchError(
                "the model does not carry this patch, or was trained since; restore the model from "
                "before."
            )
        return made

    def to_bytes(self) -> bytes:
        """The bytes of a patch file: safetensors."""
        tensors: dict[str, Tensor] = {}
        places = []
        for i, c in enumerate(self.changes):
            tensors |= {f"{i}.rows": c.rows.clone(), f"{i}.factors": c.factors.clone()}
            tensors |= {f"{i}.old": c.old.clone()} if c.old is not None else {}
            places.append([c.name, c.dim])
        meta = {"schema": SCHEMA, "base": self.base, "places": canonical(places)}
        meta |= {"facts": canonical(dict(self.facts))}
        meta["digest"] = digest([meta, weights_digest(tensors)])
        return sorted_header(save_bytes(tensors, meta))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write it, whole or not at all.

        Raises:
            OutputError: If the file exists and ``force`` is not given.
        """
        path = Path(path)
        check_output(path, force)
        write_atomic(path, self.to_bytes())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch file.

        Raises:
            InputError: If it is absent, damaged, or no patch.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; check the path.") from None
        try:
            tensors = load_bytes(data)
            meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            said = meta.pop("digest")
            whole = meta["schema"] == SCHEMA and digest([meta, weights_digest(tensors)]) == said
            places, facts = json.loads(meta["places"]), json.loads(meta["facts"])
            parts = [(tensors[f"{i}.rows"], tensors[f"{i}.factors"]) for i in range(len(places))]
        except (SafetensorError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise InputError(f"{path} is no patch of efface, or damaged; make it again.")
        changes = [
            Rescaling(name, dim, *parts[i], tensors.get(f"{i}.old"))
            for i, (name, dim) in enumerate(places)
        ]
        return cls(tuple(changes), meta["base"], facts)
