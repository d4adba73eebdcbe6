"""A recorder at work: copies, differences, a thread that prunes and codes, commits, the budget."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from efface.data import Batch, Cohorts
from efface.errors import EffaceError, LogError, MethodError, WriteError
from efface.fitting import Fit
from efface.journal import Journal, State
from efface.mask import Mask
from efface.seeds import rng
from efface.updates.codec import encode
from efface.updates.layout import Layout
from efface.updates.log import UpdateLog
from efface.updates.pruning import prune
from efface.updates.segments import HEADER
from efface.updates.shares import shares

if TYPE_CHECKING:
    from efface.updates.recorder import Recorder

Flat = npt.NDArray[np.float32]

SECONDS = 5.0
"""Least time between two commits of the log, where the fit itself does not commit."""

ENOUGH = 3
"""Steps after which the size of the log is foretold."""

LEAST = 0.001
"""The keep fraction is not lowered below this; then the oldest epochs are thinned out."""


class Recording:
    """A recorder at work on one training (a :class:`efface.steps.StepRecorder`)."""

    def __init__(
        self,
        recorder: Recorder,
        log: UpdateLog,
        fit: Fit,
        layout: Layout,
        wanted: Tensor | None,
        cohorts: Cohorts | None,
    ) -> None:
        self.recorder, self.log, self.fit, self.layout = recorder, log, fit, layout
        self.wanted, self.cohorts = wanted, cohorts
        self.keep, self.budget = recorder.keep, log.manifest["budget"]
        self.since = cohorts.since if cohorts else 0
        self.states = Journal(log.folder / "checkpoints", {"log": log.id})
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="efface-log")
        self.flat: Flat = np.empty(layout.total, dtype=np.float32)
        self.views = {n: torch.from_numpy(v) for n, v in layout.parts(self.flat).items()}
        self.pending: Future[bytes] | None = None
        self.waiting: dict[str, Any] = {}
        self.own: list[tuple[int, bytes]] = []
        self.failed: str | None = None
        self.live, self.steps, self.step, self.at = False, 1, 0, 0
        self.recent: deque[int] = deque(maxlen=64)
        self.count = self.used = 0
        self.mask: Mask | None = None
        self.alive: list[int] | None = None
        self.committed = time.monotonic()

    # -- what the loop calls ------------------------------------------------------------------

    def resume(self, network: nn.Module, step: int, steps: int, recorded: int | None) -> None:
        """The training begins, or goes on, with this step.

        Raises:
            LogError: If the log is older than the state that the training goes on from.
        """
        self.network, self.steps, self.step = network, steps, step
        self.params = {n: p for n, p in network.named_parameters() if n in self.views}
        self.old = {n: b.clone() for n, b in network.named_buffers() if n in self.views}
        with self._guard():
            self.log.truncate(step)
        there, self.used = (int(self.log.info()[what]) for what in ("steps", "bytes"))
        if recorded is not None and there != recorded:
            raise LogError(
                f"{self.log.folder} holds {there} steps, and the training that goes on had "
                f"recorded {recorded}: the log is older; bring the newer one back, or delete the "
                "….partial folder of the training to begin from the start."
            )

    def epoch(self, epoch: int, state: Callable[[], State]) -> None:
        """Keep a full state where the cohorts begin, and at the start of every so many epochs."""
        every = self.recorder.checkpoints
        due = epoch == self.since or (every > 0 and epoch % every == 0)
        if epoch > 0 and due and not self.failed:
            with self._guard():
                self.states.write(f"epoch-{epoch:04d}", state())

    def before(
        self, batches: Mapping[str, Batch], step: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Copy the weights (or take the records' shares), unless no sensitive record is here."""
        self._settle()
        positions = torch.unique(torch.cat([b.positions for b in batches.values()]))
        if self.wanted is not None:
            positions = positions[self.wanted[positions]]
        self.live = len(positions) > 0 and not self.failed
        self.waiting, self.own = {"members": positions.numpy()}, []
        if not self.live:
            return
        if self.recorder.attribution == "record":
            self._own_shares(batches, positions, step, optimizer)
            return
        with torch.no_grad():
            for name, param in self.params.items():
                self.views[name].copy_(param)

    def after(self, epoch: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Take what has changed, and let it be pruned and coded while the training goes on."""
        self.step, self.at = step, epoch
        self.waiting |= {"step": step, "epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        changed = self.live and self.recorder.attribution == "batch"
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                if name in self.old:
                    if changed:
                        self.views[name].copy_(buffer - self.old[name])
                    self.old[name].copy_(buffer)
            for name, param in self.params.items() if changed else ():
                self.views[name].neg_().add_(param.to(self.views[name].device))
        if changed:
            self._notice_mask()
            self.pending = self.worker.submit(self._coded, self.flat, step)

    def commit(self) -> int:
        """Make durable what has been recorded, and stay within the budget; steps in the log."""
        self._settle()
        if not self.failed:
            with self._guard():
                self._durable()
        return self.count

    def _durable(self) -> None:
        self.log.commit()
        info = self.log.info()
        self.count, self.used = int(info["steps"]), int(info["bytes"])
        self.committed = time.monotonic()

    # -- around the training ------------------------------------------------------------------

    def finish(self, weights: str) -> dict[str, Any]:
        """The training has ended with these weights; returns what the lineage keeps of the log."""
        steps = self.commit()
        if not self.failed:
            with self._guard():
                self.log.finish(weights=weights, steps=self.steps)
        self.close()
        facts = {
            "id": self.log.id,
            "steps": steps,
            "keep": self.recorder.keep,
            "values": self.recorder.values,
            "attribution": self.recorder.attribution,
        }
        return facts | ({"failed": self.failed} if self.failed else {})

    def close(self) -> None:
        """Let go of the log: what was not committed is done again by the next run."""
        self.worker.shutdown()
        self.log.close()

    # -- inside -------------------------------------------------------------------------------

    def _coded(self, flat: Flat, step: int) -> bytes:
        draw = rng(self.fit.seed, "updates/pick", step) if self.recorder.pick == "random" else None
        update = prune(
            flat, self.layout, self.keep, self.recorder.pick, alive=self.alive, generator=draw
        )
        return encode(update, self.recorder.values, self.layout.bounds)

    def _own_shares(
        self,
        batches: Mapping[str, Batch],
        positions: Tensor,
        step: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if len(batches) != 1:
            raise MethodError("recording: attribution=record knows trainings on one stream only.")
        (batch,) = batches.values()
        rows = torch.isin(batch.positions, positions).nonzero().flatten()
        self._notice_mask()
        found = shares(self.fit.task, self.network, batch, rows, optimizer, self._flat)
        self.own = [(number, self._coded(flat, step)) for number, flat in found]

    def _flat(self, parts: Mapping[str, Tensor]) -> Flat:
        self.flat[:] = 0
        mask = self.mask.dropped(torch.device("cpu")) if self.mask else {}
        for name, value in parts.items():
            self.views[name].copy_(value)
            if name in mask:
                self.views[name].masked_fill_(mask[name], 0.0)
        return self.flat

    def _notice_mask(self) -> None:
        mask = self.fit.subject.mask if self.fit.subject else None
        if mask is not self.mask:
            self.mask = mask
            sizes = [(n, int(np.prod(shape))) for n, shape in self.layout.sparse]
            kept = {n: int(keep.sum()) for n, keep in (mask or {}).items()}
            self.alive = [kept.get(n, size) for n, size in sizes] if mask else None

    def _settle(self) -> None:
        """Append what the worker has coded; commit now and then."""
        if not self.waiting:
            return
        facts, self.waiting = self.waiting, {}
        if self.failed or "step" not in facts:
            return
        with self._guard():
            payload = self.pending.result() if self.pending else None
            self.pending = None
            for number, share in self.own:
                self.log.append(payload=share, record=number, **facts)
            if not self.own:
                self.log.append(payload=payload, **facts)
            stored = [share for _, share in self.own] or ([payload] if payload else [])
            self._within_budget(sum(HEADER.size + len(frame) for frame in stored))
            if time.monotonic() - self.committed > SECONDS:
                self._durable()

    def _within_budget(self, size: int) -> None:
        """Lower the keep fraction, then thin out old epochs, where the log would grow too large."""
        self.used += size
        self.recent.append(size)
        left = self.steps - self.step - 1
        if self.budget is None or len(self.recent) < min(ENOUGH, left):
            return
        room = self.budget - self.used
        ahead = left * sum(self.recent) / len(self.recent) if left else 0.0
        if ahead <= room:
            return
        if self.keep > LEAST and left and room > 0:
            lower = max(LEAST, 0.9 * self.keep * room / ahead)
            self.log.event("keep", step=self.step, old=self.keep, new=lower)
            self.keep = lower
            self.recent.clear()
            self._tell(f"from step {self.step} on {lower:.2%} of each layer are kept")
        else:
            self._thin(ahead - room)

    def _thin(self, excess: float) -> None:
        """Erase the oldest epochs, the present one excepted, until so many bytes are free."""
        self._durable()
        sizes = [(e, n) for e, n in sorted(self.log.sizes().items()) if n and e < self.at]
        if not sizes:
            return
        gone = [e for i, (e, _) in enumerate(sizes) if sum(n for _, n in sizes[:i]) < excess]
        self.log.erase(epochs=(gone[0], gone[-1]), why="thinned", force=True)
        self.used = int(self.log.info()["bytes"])
        self.log.event("thinned", step=self.step, first=gone[0], last=gone[-1])
        self._tell(f"the updates of epochs {gone[0]} to {gone[-1]} are erased")

    def _tell(self, what: str) -> None:
        sentence = f"the log would outgrow its budget of {self.budget} bytes: {what}."
        warnings.warn(sentence, UserWarning, stacklevel=2)

    @contextlib.contextmanager
    def _guard(self) -> Any:
        """What cannot be written stops the training, or ends the log, as chosen."""
        try:
            yield
        except (OSError, EffaceError) as error:
            if isinstance(error, EffaceError) and not isinstance(error, WriteError | LogError):
                raise
            why = str(error).partition(";")[0]
            self.pending, self.failed = None, f"step {self.step}: {why}"
            if self.recorder.on_failure == "stop":
                raise WriteError(
                    f"recording failed at step {self.step} ({why}); free some space and give the "
                    "same command again: it goes on where the log ends."
                ) from error
            with contextlib.suppress(Exception):
                self.log.fail(self.step, why)
            warnings.warn(
                f"recording ended at step {self.step} ({why}); the training goes on, but no "
                "record can be subtracted from this model by the log.",
                stacklevel=2,
            )
