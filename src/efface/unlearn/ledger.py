"""The ledger of subtracted steps, and what a model and an update log must have in common.

Batches are shared: a step that one request has subtracted must never be subtracted for the next.
So the lineage remembers which steps are gone. Who was in which batch follows from the training's
seed, so that a plain list of steps would tell which records were forgotten; it is kept sealed under
the owner's key, as the IDs are.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from efface.errors import LogError, MismatchError, NeedsError, listed
from efface.fitting import Fit
from efface.keys import key_fingerprint, load_key, tags
from efface.lineage import Step
from efface.task import Split
from efface.trained import TrainedModel

if TYPE_CHECKING:
    from efface.updates.layout import Layout
    from efface.updates.log import UpdateLog

Steps = np.ndarray[Any, np.dtype[np.int64]]
FRESH = frozenset({"retrain", "replay"})
"""Methods after which a model no longer stands where its first training ended."""


# -- the ledger -----------------------------------------------------------------------------------


def entry(case: Case, steps: Steps, **facts: Any) -> dict[str, Any]:
    """What the ledger keeps of one subtraction: sealed steps, their number and share, and facts."""
    name = case.log.id
    share = len(steps) / case.total
    return {"log": name, "n": len(steps), "share": share, "steps": seal(steps, name), **facts}


def seal(steps: Steps, log_id: str) -> str:
    """Step numbers as text that only the owner's key opens: packed bits, zstd, a keyed stream.

    The same steps give the same text, which is its own seal: another key or a changed letter is
    noticed.

    >>> import os
    >>> os.environ["EFFACE_KEY"] = "mine"
    >>> unseal(seal(np.array([2, 9]), "log"), "log").tolist()
    [2, 9]
    """
    import zstandard

    bits = np.zeros(int(steps.max(initial=-1)) + 1, dtype=bool)
    bits[steps] = True
    plain = zstandard.ZstdCompressor(level=9).compress(np.packbits(bits).tobytes())
    key = load_key()
    tag = _tag(key, plain, log_id)
    return base64.b64encode(tag + _stream(key, tag, plain)).decode()


def unseal(text: str, log_id: str) -> Steps:
    """The step numbers of a sealed text, ascending.

    Raises:
        MismatchError: If it was sealed with another key, or has been changed.
    """
    import zstandard

    key = load_key()
    try:
        data = base64.b64decode(text, validate=True)
        tag, plain = data[:16], _stream(key, data[:16], data[16:])
        if not hmac.compare_digest(tag, _tag(key, plain, log_id)):
            raise ValueError
        packed = zstandard.ZstdDecompressor().decompress(plain)
    except (ValueError, binascii.Error, zstandard.ZstdError):
        raise MismatchError(
            "the model's ledger of subtracted steps does not open with this key "
            f"(fingerprint {key_fingerprint(key)}), or is damaged; set EFFACE_KEY or "
            "EFFACE_KEY_FILE to the key that the model was made to forget with."
        ) from None
    found = np.flatnonzero(np.unpackbits(np.frombuffer(packed, dtype=np.uint8)))
    return found.astype(np.int64)


def _tag(key: bytes, plain: bytes, log_id: str) -> bytes:
    message = b"efface ledger\0" + log_id.encode() + b"\0" + plain
    return hmac.new(key, message, hashlib.sha256).digest()[:16]


def _stream(key: bytes, tag: bytes, data: bytes) -> bytes:
    own = hmac.new(key, b"efface ledger stream\0" + tag, hashlib.sha256).digest()
    pad = np.frombuffer(hashlib.shake_256(own).digest(len(data)), dtype=np.uint8)
    return bytes(pad ^ np.frombuffer(data, dtype=np.uint8))


def note(fit: Fit, made: Mapping[str, Any]) -> None:
    """Put an entry into the running fit's ledger; it goes to the lineage with the fit's facts."""
    fit.meter.facts.setdefault("removed", []).append(dict(made))


def entries(trained: TrainedModel, fit: Fit | None, log_id: str) -> list[Mapping[str, Any]]:
    """Every entry of a log, from the lineage and from the running fit."""
    found = [made for step in trained.lineage for made in step.detail.get("removed", [])]
    if fit is not None:
        found += fit.meter.facts.get("removed", [])
    return [made for made in found if made.get("log") == log_id]


def removed_steps(trained: TrainedModel, fit: Fit | None, log_id: str) -> Steps:
    """The steps of a log that were subtracted from a model before, ascending.

    Args:
        trained: Its lineage is read.
        fit: The running fit, whose own entries count, too; or None.
        log_id: Of which log.

    Raises:
        MismatchError: If the ledger was sealed with another key.
    """
    parts = [unseal(made["steps"], log_id) for made in entries(trained, fit, log_id)]
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


# -- a log and a model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request, as a log sees it.

    Args:
        log: Open for reading.
        layout: Of the logged vectors.
        info: ``log.info()``.
        numbers: The numbers of D_f's records in the log ``[n]``.
        steps: The steps whose batch held any of them, ascending.
        removed: The steps that were subtracted before, ascending.
        total: Steps of the whole training.
    """

    log: UpdateLog
    layout: Layout
    info: Mapping[str, Any]
    numbers: Steps
    steps: Steps
    removed: Steps
    total: int

    @property
    def per_record(self) -> bool:
        """Whether the log holds the records' own shares instead of whole steps."""
        return bool(self.log.manifest["attribution"] == "record")

    @property
    def due(self) -> Steps:
        """The steps that this request is to subtract.

        Shares of single records are never subtracted twice: what was forgotten is in no D_f.
        """
        if self.per_record:
            return self.steps
        return np.setdiff1d(self.steps, self.removed, assume_unique=True)


def open_log(trained: TrainedModel) -> UpdateLog:
    """The log that was given with a model.

    Raises:
        NeedsError: If none was.
        LogError: If it is no log, or damaged.
    """
    from efface.updates.log import UpdateLog

    if trained.log is None:
        raise NeedsError(
            "no update log was given; say --log LOGDIR (efface.forget(…, log=…)), and record one "
            "with efface train --record LOGDIR."
        )
    return UpdateLog.open(trained.log)


def joined(log: UpdateLog, trained: TrainedModel, split: Split, fit: Fit | None = None) -> Case:
    """A log and a model that belong together, and what the log knows of D_f.

    Raises:
        MismatchError: If the log is of another network, run or key, or if the model was trained
            anew since.
        LogError: If the log is not whole, or knows nothing of some records.
    """
    from efface.updates.layout import Layout

    layout = Layout.from_json(log.manifest["layout"])
    here = Layout.of(trained.network, buffers=bool(layout.buffers)).fingerprint
    if layout.fingerprint != here:
        raise MismatchError(
            f"the log {log.folder} is of another network than the model (names or shapes of the "
            "parameters differ); give the log of this model's training."
        )
    recorded = same_run(log, trained)
    check_key(log)
    info = log.info()
    total = _whole(log, info, recorded)
    ids = [split.task.ids_[i] for i in split.forget.tolist()]
    numbers = numbers_of(log, ids)
    _check_seen(log, ids, numbers)
    steps = np.asarray(log.steps_of(numbers), dtype=np.int64)
    return Case(log, layout, info, numbers, steps, removed_steps(trained, fit, log.id), total)


def same_run(log: UpdateLog, trained: TrainedModel) -> Mapping[str, Any]:
    """What the lineage says of the log of a model's training.

    Raises:
        MismatchError: If the training was another one, or was not recorded.
    """
    step = training(trained)
    recorded: Mapping[str, Any] = (step.detail if step else {}).get("log") or {}
    if recorded.get("id") == log.id:
        return recorded
    was = f"was recorded as log {recorded['id']}" if recorded else "was not recorded"
    raise MismatchError(
        f"{log.folder} is log {log.id}, and this model's training {was}; give the log that was "
        "written when it was trained (efface train --record)."
    )


def training(trained: TrainedModel) -> Step | None:
    """The last step of a lineage that trained from fresh weights; a replay is no new training."""
    for step in reversed(trained.lineage):
        if step.verb in {"train", "retrain"} or "retrain" in names(step.method):
            return step
    return None


def names(method: Any) -> set[str]:
    """The names of a method and of everything inside it, from its JSON."""
    if not isinstance(method, Mapping):
        return set()
    return {str(method.get("method"))}.union(*(names(value) for value in method.values()))


def since(trained: TrainedModel) -> list[Step]:
    """The steps of a lineage after the training."""
    last = training(trained)
    where = [i for i, step in enumerate(trained.lineage) if step is last]
    return list(trained.lineage[where[-1] + 1 :]) if where else []


def check_trajectory(trained: TrainedModel, fit: Fit | None = None) -> None:
    """Check that a model stands where its recorded training ended, less what was subtracted.

    Raises:
        MismatchError: If it was replayed since: those weights are of another trajectory.
    """
    replayed = any("replay" in names(step.method) for step in since(trained))
    if replayed or (fit is not None and "replayed" in fit.meter.facts):
        raise MismatchError(
            "this model was replayed since its training was logged, and the log's updates are not "
            "those that led to its weights; take --method replay again."
        )


def trained_since(trained: TrainedModel, fit: Fit | None = None) -> list[str]:
    """What trained a model further after its log ended: verbs and methods, in order."""
    found = [
        str((step.method or {}).get("method", step.verb))
        for step in since(trained)
        if step.detail.get("fits")
    ]
    return found + (["this request"] if fit is not None and fit.meter.fits else [])


def check_weights(log: UpdateLog, trained: TrainedModel) -> None:
    """Check that the weights that the training ended with are the log's last ones.

    Only for a model that no method has touched yet.

    Raises:
        MismatchError: If the model is older or newer than the log.
    """
    finished = log.info()["finished"] or {}
    later = since(trained)
    ended = later[0].parent if later else trained.digest
    if "weights" in finished and ended != finished["weights"]:
        raise MismatchError(
            f"the model did not end its training with the weights that the log {log.folder} ends "
            "with (another file of the same run, or the log was written on since); give the model "
            "and the log of one training."
        )


def check_key(log: UpdateLog) -> None:
    """Raise a MismatchError where a log's IDs were hashed with another key than the owner's."""
    key = key_fingerprint(load_key())
    if log.manifest["key"] != key:
        raise MismatchError(
            f"the log's IDs were hashed with another key (fingerprint {log.manifest['key']}, not "
            f"{key}); set EFFACE_KEY or EFFACE_KEY_FILE to that key."
        )


def numbers_of(log: UpdateLog, ids: Sequence[str]) -> Steps:
    """The numbers of records in a log whose key was checked, in their order.

    Raises:
        LogError: If it does not know some of them.
    """
    known = np.asarray(log.numbers(tags(ids, load_key()), known_only=True), dtype=np.int64)
    if absent := len(ids) - len(known):
        raise LogError(
            f"{absent} of the {len(ids)} records {'is' if absent == 1 else 'are'} not in "
            f"{log.folder}: never seen in this training, or purged; leave them out."
        )
    return known


def _whole(log: UpdateLog, info: Mapping[str, Any], recorded: Mapping[str, Any]) -> int:
    """The number of steps of a training that was recorded to its end."""
    failed = info.get("failed_at")
    if failed is not None:
        raise LogError(
            f"recording into {log.folder} ended early, at step {failed}: what D_f did after that "
            "is not in the log; take another method (l1-sparse or finetune)."
        )
    finished = info.get("finished")
    if not finished:
        raise LogError(
            f"the log {log.folder} is not finished, so the model is not the one that it ends with; "
            "let the training end (run the same command again)."
        )
    total = int(info["steps"])  # those that were taken: batches without records are none
    if int(recorded.get("steps", total)) != total:
        raise MismatchError(
            f"the model was trained for {recorded['steps']} steps and the log {log.folder} holds "
            f"{total}: one is older than the other; give the model and the log of one training."
        )
    return total


def _check_seen(log: UpdateLog, ids: Sequence[str], numbers: Steps) -> None:
    """Every record must have been in a batch that the log knows of."""
    unseen = [i for i, seen in zip(ids, log.seen(numbers), strict=True) if not seen]
    if unseen:
        raise LogError(
            f"the log {log.folder} knows of no step with {listed(unseen)}: never seen in the "
            "recorded training, or not among the sensitive records; leave them out, or take "
            "another method."
        )


# -- the way back ----------------------------------------------------------------------------------


def way_back(log: UpdateLog, numbers: Steps) -> dict[str, Any]:
    """From where a replay without some records goes on, and what it costs.

    Args:
        log: Open for reading.
        numbers: Everything that is to be left out ``[n]``.

    Returns:
        ``first``: the first epoch that may have held one of them; ``start``: the last epoch up to
        it whose state was kept, 0 for the initial weights; ``epochs`` to train ``of`` those of the
        training; their ``share``.
    """
    first, of = first_epoch(log, numbers), int(log.manifest["settings"]["epochs"])
    start = max([0, *(epoch for epoch in kept_epochs(log) if epoch <= first)])
    return {
        "first": first,
        "start": start,
        "epochs": of - start,
        "of": of,
        "share": (of - start) / of,
    }


def first_epoch(log: UpdateLog, numbers: Steps) -> int:
    """The first epoch that may have held one of these records.

    Of a record without an entry (not sensitive, or purged) it is the first epoch of all, or that in
    which the cohorts begin, if it is in one.
    """
    known = log.seen(numbers)
    cohorts, begin = log.cohorts(), int(log.manifest.get("cohorts_since") or 0)
    firsts = [begin if n in cohorts else 0 for n in numbers[~known].tolist()]
    return min([*firsts, *log.epochs_of(numbers[known]).tolist()], default=0)


def kept_epochs(log: UpdateLog) -> list[int]:
    """The epochs at whose start the recorder kept a full state, ascending."""
    names = [path.stem for path in (log.folder / "checkpoints").glob("epoch-*.safetensors")]
    return sorted(int(name.removeprefix("epoch-")) for name in names)
