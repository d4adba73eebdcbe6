"""What one does with a model: train, adopt, prune, forget, patch, retrain, audit.

Every verb leaves its inputs as they were and returns something new; each step is recorded in the
new model's lineage, with its cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from efface import auditing, predict
from efface.checkpoint import load_weights
from efface.errors import MethodError, SelectionError
from efface.files import digest
from efface.fitting import Fit, Progress
from efface.journal import Journal
from efface.mask import Mask
from efface.placement import pick_device
from efface.replay import initial_weights
from efface.report import AuditResult
from efface.retraining import retrain as retrain
from efface.signals import margin
from efface.sparsify import OneShot, Pruner, build_pruner
from efface.sparsify.blocks import Patch
from efface.task import Split, Task
from efface.trained import TrainedModel, blank_network, weights_digest
from efface.unlearn import Unlearner, build, check_needs, filled, to_json
from efface.updates.cohorts import Members, cohorts_of
from efface.work import How, Work, from_scratch

if TYPE_CHECKING:
    from efface.updates.recorder import Recorder


def train(
    task: Task,
    *,
    seed: int = 0,
    rewind: int | None = None,
    keep_initial: bool = False,
    initial: TrainedModel | None = None,
    recorder: Recorder | None = None,
    cohorts: Members | None = None,
    cohort_epochs: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Train a model on all of a task's training records.

    Args:
        task: What to train, on what, and how.
        seed: Every random choice derives from it; the same seed gives the same bytes on a CPU.
        rewind: Keep the weights after this many epochs, for rewinding later.
        keep_initial: Keep the initial weights themselves; otherwise their seed and digest are kept,
            which cost nothing but need the same network and version of PyTorch.
        initial: Begin with the initial weights of this model instead of own ones.
        recorder: Log what every step changes, so that it can be subtracted or replayed later.
        cohorts: Deletable records that share batches: ID → name of its cohort, or the IDs of one.
            A request for all of a cohort then touches few steps.
        cohort_epochs: The cohorts take part in the last so many epochs only: exact replay without
            them then costs about as many.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        progress: Called after every step.
        journal: Where to keep the state, so that a killed run goes on.

    Returns:
        A trained model with its lineage.

    Raises:
        DivergedError: If the loss becomes NaN or infinite.
        LogError: If the recorder's folder holds another log.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> trained = efface.train(task, seed=0)
        >>> trained.lineage[0].verb
        'train'
    """
    everyone = torch.arange(len(task.records))
    how = How(device, progress, journal)
    model = from_scratch(
        task,
        everyone,
        "train",
        seed,
        how,
        rewind=rewind,
        origin=initial,
        recorder=recorder,
        cohorts=None if cohorts is None else cohorts_of(task, cohorts, cohort_epochs),
    )
    if keep_initial:
        model.initial_weights = initial_weights(model, Fit(task))
    return model


def adopt(
    task: Task,
    weights: Mapping[str, Tensor],
    *,
    initial: Mapping[str, Tensor] | None = None,
    name: str = "weights",
) -> TrainedModel:
    """Take in a model that was trained elsewhere.

    Masks of ``torch.nn.utils.prune`` (``…_orig`` and ``…_mask`` entries) become the model's mask.

    Args:
        task: The task that it belongs to.
        weights: Its state dict.
        initial: The state dict that its training began with, where it is known.
        name: What errors call it.

    Raises:
        CheckpointError: If the weights are of another network.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> efface.adopt(task, torch.nn.Linear(4, 2).state_dict()).lineage[0].verb
        'adopt'
    """
    plain, mask = _fold_pruned(dict(weights))
    network = blank_network(task)
    load_weights(network, plain, name)
    model = TrainedModel(task, network, mask=mask)
    if initial is not None:
        first = blank_network(task)
        load_weights(first, initial, "the file of initial weights")
        model.initial_weights = first.state_dict()
        model.initial = {"digest": weights_digest(model.initial_weights)}
    return Work(model, "adopt", 0, How("cpu")).close()


def _fold_pruned(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mask | None]:
    keep = {}
    for name in [n.removesuffix("_orig") for n in weights if n.endswith("_orig")]:
        if f"{name}_mask" in weights:
            keep[name] = weights.pop(f"{name}_mask").bool()
            weights[name] = weights.pop(f"{name}_orig")
    return weights, Mask(keep) if keep else None


def prune(
    trained: TrainedModel,
    pruner: Pruner | str | None = None,
    *,
    keep_dense: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Prune a copy of a model and recover by training on everything that it has not forgotten.

    Args:
        trained: Left as it is.
        pruner: A pruner, or its name; one shot at 90 % by default.
        keep_dense: Keep the weights from before with the sparse model: methods that move the mask
            can use them. The file becomes that much larger.
        seed: For the recovery.
        device: Where to compute.
        progress: Called after every step.
        journal: Where to keep the state, so that a killed run goes on.

    Raises:
        MethodError: If a layer would lose all of its weights.
        NeedsError: If the pruner goes back to weights that the model does not have.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> pruner = efface.sparsify.OneShot(sparsity=0.5, scope="all", recovery=1)
        >>> efface.prune(efface.train(task), pruner).sparsity
        0.5
    """
    pruner = build_pruner(pruner) if isinstance(pruner, str) else pruner or OneShot()
    model = trained.copy()
    if keep_dense and model.mask is None:
        model.dense = {n: t.detach().cpu().clone() for n, t in model.network.state_dict().items()}
    work = Work(model, "prune", seed, How(device, progress, journal))
    pruner(model, _remaining(model), work.fit)
    return work.close(to_json(pruner))


def _remaining(model: TrainedModel) -> Tensor:
    """Positions of all records that the model has not been made to forget."""
    everyone = torch.arange(len(model.task.records))
    return everyone[~torch.isin(everyone, model.forgotten.positions(model.task))]


def forget(
    trained: TrainedModel,
    split: Split,
    method: Unlearner | str,
    *,
    log: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Make a copy of a model forget the records of a split.

    What earlier requests removed stays out of D_r. The new model has no rewind and no dense
    weights (they were trained on the forgotten records, too), unless the method made new ones.

    Args:
        trained: Left as it is.
        split: What to forget.
        method: An unlearner, or its name.
        log: The log of the model's training, for methods that need it.
        seed: Every random choice derives from it.
        device: Where to compute.
        progress: Called after every step.
        journal: Where to keep the state, so that a killed run goes on.

    Returns:
        A new model, with the request in its lineage.

    Raises:
        NeedsError: If the method lacks something that it needs.
        SelectionError: If nothing is left to forget.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> trained = efface.train(task)
        >>> split = efface.Split.by_ids(task, [3, 5, 8])
        >>> after = efface.forget(trained, split, efface.unlearn.FineTune(epochs=1))
        >>> len(after.forgotten.tags), len(trained.forgotten.tags)
        (3, 0)
    """
    chosen: Unlearner = filled(build(method) if isinstance(method, str) else method, trained.task)
    split = split.without(trained.forgotten.positions(trained.task))
    if not isinstance(chosen, Unlearner):
        raise MethodError(f"{chosen!r} is no method that forgets; see: efface methods.")
    model = trained.copy()
    model.log = trained.log if log is None else Path(log)
    check_needs(chosen, model, split)
    forgotten = trained.forgotten.adding(split)
    work = Work(model, "forget", seed, How(device, progress, journal))
    chosen(model, split, work.fit)
    model.maker = None  # the lineage has it now
    for kind in ("rewind", "dense"):  # they were trained on what is to be forgotten
        if getattr(model, kind) is getattr(trained, kind):
            setattr(model, kind, None)
    return work.close(to_json(chosen), forgotten, split=split.sizes())


def patch(trained: TrainedModel, change: Patch | str | Path, *, undo: bool = False) -> TrainedModel:
    """Put a patch on a copy of the model that it was made from, or take it off again.

    It hides and does not erase: what the model was made to forget stays what it was.

    Args:
        trained: Left as it is.
        change: The patch (``.patch`` of what :func:`forget` gave with ``DFMU``), or its file.
        undo: Take it off.

    Raises:
        MismatchError: If the patch is for another model, or is not on it.

    Example:
        >>> import torch, efface
        >>> y = torch.arange(96) % 3
        >>> x = torch.eye(4)[y] + 0.1 * torch.randn(96, 4)
        >>> task = efface.Task(lambda: efface.networks.MLP((4, 16, 3)), (x, y), (x, y))
        >>> trained, split = efface.train(task), efface.Split.by_class(task, 2)
        >>> method = efface.unlearn.DFMU(fraction=1.0)
        >>> change = efface.forget(trained, split, method).patch
        >>> patched = efface.patch(trained, change)
        >>> len(patched.forgotten.tags), patched.lineage[-1].verb
        (0, 'patch')
    """
    change = change if isinstance(change, Patch) else Patch.load(change)
    work = Work(trained, "patch", 0, How("cpu"))
    work.model = change.undo(trained) if undo else change.apply(trained)
    method = {"method": "patch", "undo": undo, "patch": digest(change.to_bytes())}
    factors = sum(len(c.rows) for c in change.changes)
    return work.close(method, patch={"factors": factors, "for": change.base, **change.facts})


def split_of(before: TrainedModel, after: TrainedModel) -> Split:
    """The split of the requests between two models, from their lineage.

    Raises:
        SelectionError: If the two differ by no request.
    """
    task = after.task
    new = after.forgotten.positions(task)
    new = new[~torch.isin(new, before.forgotten.positions(task))]
    if len(new) == 0:
        raise SelectionError(
            "the lineage of the two models differs by no request (a patch hides, and forgets "
            "nothing); select records."
        )
    chosen = torch.zeros(len(task.records), dtype=torch.bool)
    chosen[new] = True
    requests = after.forgotten.requests[len(before.forgotten.requests) :]
    selector = requests[0]["selector"] if len(requests) == 1 else {"kind": "ids", "n": len(new)}
    return Split.of(task, chosen, selector).without(before.forgotten.positions(task))


def audit(
    before: TrainedModel,
    after: TrainedModel,
    split: Split | None = None,
    references: Sequence[TrainedModel] = (),
    *,
    originals: Sequence[TrainedModel] = (),
    seed: int = 0,
    device: str = "auto",
    reproduce: Sequence[str] = (),
    note: str | None = None,
    cache: auditing.Cache | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Show how well a model has forgotten, beside the untouched original and retrained models.

    Args:
        before: The model before the request.
        after: The model after it.
        split: What was to be forgotten; by default what the lineages say.
        references: Models retrained without D_f; two or more show the noise between retrains.
        originals: Further models trained with D_f; the test whether a pruned topology gives D_f
            away compares the two kinds.
        seed: For resampling.
        device: Where to compute.
        reproduce: Commands to print in the report.
        note: A sentence to print with the result.
        cache: Logits and measures to share between audits of one task.
        progress: Called after every finding.

    Returns:
        Findings with intervals, and a verdict; ``.save(folder)`` writes ``audit.json`` and
        ``report.html``.

    Raises:
        MismatchError: If the split is not what the model was made to forget, or a reference
            differs in settings, data or mask from what it should match.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> trained = efface.train(task)
        >>> split = efface.Split.random(task, 0.25)
        >>> after = efface.forget(trained, split, "finetune")
        >>> result = efface.audit(trained, after, split, [efface.retrain(task, split)])
        >>> result.verdict, result["ra"]["n"]
        ('not measurable', 48)
    """
    if split is None:
        split = split_of(before, after)
    earlier = before.forgotten.positions(before.task)
    subject = auditing.Subject(
        before,
        after,
        split.without(earlier),
        tuple(references),
        tuple(originals),
        device=pick_device(device),
        cache=cache or auditing.Cache(),
    )
    auditing.check_subject(subject)
    document = auditing.examine(subject, seed=seed, progress=progress)
    document["subject"]["reproduce"] = list(reproduce)
    document["subject"]["note"] = note
    findings, not_shown = tuple(document.pop("findings")), tuple(document.pop("not_shown"))
    return AuditResult(findings=findings, not_shown=not_shown, **document)


def per_record(model: TrainedModel, split: Split, *, device: str = "auto") -> dict[str, list[Any]]:
    """A row per record of D_f for those who ask for it: ID, label, answer, margin."""
    task, where = split.task, pick_device(device)
    values = predict.logits(model.network, task, task.records, split.forget, device=where)
    labels = task.records.targets[split.forget].numpy()
    return {
        "id": [task.ids_[i] for i in split.forget.tolist()],
        "label": labels.tolist(),
        "answer": values.argmax(1).tolist(),
        "margin": [round(float(m), 4) for m in margin(values, labels)],
    }
