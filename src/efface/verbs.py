"""What one does with a model: train, adopt, prune, forget, retrain, audit.

Every verb leaves its inputs as they were and returns something new; each step is recorded in the
new model's lineage, with its cost.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from efface import auditing, predict
from efface.checkpoint import TrainedModel, blank_network, load_weights
from efface.errors import MethodError, NeedsError, SelectionError, nearest
from efface.fitting import Progress
from efface.journal import Journal
from efface.lineage import Forgotten
from efface.mask import Mask
from efface.placement import pick_device
from efface.report import AuditResult
from efface.signals import margin
from efface.sparsify import PRUNERS, OneShot, Pruner, build_pruner, rewind_epoch
from efface.task import Split, Task
from efface.unlearn import PruneFirst, Unlearner, build, check_needs, filled, to_json
from efface.work import How, Work, from_scratch

Like = Literal["dense", "same-mask", "rewound", "repruned"]


def train(
    task: Task,
    *,
    seed: int = 0,
    rewind: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Train a model on all of a task's training records.

    Args:
        task: What to train, on what, and how.
        seed: Every random choice derives from it; the same seed gives the same bytes on a CPU.
        rewind: Keep the weights after this many epochs, for rewinding later.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        progress: Called after every step.
        journal: Where to keep the state, so that a killed run goes on.

    Returns:
        A trained model with its lineage.

    Raises:
        DivergedError: If the loss becomes NaN or infinite.

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
    return from_scratch(task, everyone, "train", seed, how, rewind=rewind)


def adopt(task: Task, weights: Mapping[str, Tensor], *, name: str = "weights") -> TrainedModel:
    """Take in a model that was trained elsewhere.

    Masks of ``torch.nn.utils.prune`` (``…_orig`` and ``…_mask`` entries) become the model's mask.

    Args:
        task: The task that it belongs to.
        weights: Its state dict.
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
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Prune a copy of a model and recover by training on everything that it has not forgotten.

    Args:
        trained: Left as it is.
        pruner: A pruner, or its name; one shot at 90 % by default.
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
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Make a copy of a model forget the records of a split.

    What earlier requests removed stays out of D_r. The new model has no rewind weights: they were
    trained on the forgotten records, too.

    Args:
        trained: Left as it is.
        split: What to forget.
        method: An unlearner, or its name.
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
    check_needs(chosen, trained, split)
    forgotten = trained.forgotten.adding(split)
    model = trained.copy()
    work = Work(model, "forget", seed, How(device, progress, journal))
    chosen(model, split, work.fit)
    model.rewind = None  # early weights were trained on what is to be forgotten
    return work.close(to_json(chosen), forgotten, split=split.sizes())


def retrain(
    task: Task,
    split: Split,
    *,
    model: TrainedModel | None = None,
    like: Like = "dense",
    seed: int = 1,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Train a reference from fresh weights on D_r only.

    Args:
        task: The task.
        split: What it must never have seen.
        model: The model that the reference is for; what it had forgotten before stays out, and its
            mask, rewind weights or pruner are what ``like`` refers to.
        like: ``dense``; ``same-mask``: under the model's mask (which D_f has shaped); ``rewound``:
            the same from its rewind weights; ``repruned``: dense, then pruned as the model was.
        seed: Another than the model's, so that the two share no randomness.
        device: Where to compute.
        progress: Called after every step.
        journal: Where to keep the state, so that a killed run goes on.

    Raises:
        NeedsError: If ``like`` asks for what the model does not have.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> split = efface.Split.by_ids(task, [3, 5, 8])
        >>> reference = efface.retrain(task, split, seed=1)
        >>> len(reference.forgotten.tags)
        3
    """
    before = model.forgotten if model is not None else Forgotten()
    earlier = before.positions(task)
    split = split.without(earlier[~torch.isin(earlier, split.forget)])
    forgotten = before.adding(split)
    mask, start = _likeness(model, like)
    how = How(device, progress, journal)
    options: dict[str, Any] = {"forgotten": forgotten, "mask": mask, "start": start, "like": like}
    if like == "repruned" and model is not None and "rewind" in _pruner_of(model).requires:
        options["rewind"] = rewind_epoch(model)  # it goes back to early weights of its own
    fresh = from_scratch(task, split.retain, "retrain", seed, how, **options)
    if like != "repruned":
        return fresh
    work = Work(fresh, "prune", seed, replace(how, journal=_later(journal)))
    pruner = _pruner_of(model)
    pruner(fresh, split.retain, work.fit)
    return work.close(to_json(pruner), like=like)


def _later(journal: Journal | None) -> Journal | None:
    """A journal of its own for the second command in one."""
    return journal and Journal(journal.folder / "prune", {"key": journal.key}, journal.seconds)


def _likeness(
    model: TrainedModel | None, like: Like
) -> tuple[Mask | None, Mapping[str, Tensor] | None]:
    if like == "dense":
        return None, None
    if like not in typing.get_args(Like):
        raise MethodError(f"like {like!r} is unknown; {nearest(like, typing.get_args(Like))}")
    if model is None or model.mask is None:
        raise NeedsError(f"--like {like} needs a pruned model to be like; give it as --model.")
    if like == "same-mask":
        return model.mask, None
    if like == "repruned":
        _pruner_of(model)
        return None, None
    if model.rewind is None:
        raise NeedsError("--like rewound needs rewind weights; train with --rewind EPOCH.")
    return model.mask, model.rewind


def _pruner_of(model: TrainedModel | None) -> Pruner:
    """The pruner that made a model's mask, from its lineage."""
    done = [dict(s.method) for s in (model.lineage if model else ()) if s.method]
    steps = [m["pruner"] if m["method"] == PruneFirst.name else m for m in done]
    steps = [m for m in steps if m["method"] in PRUNERS]
    if not steps:
        raise NeedsError(
            "--like repruned needs a model that efface pruned; none is in its lineage."
        )
    options = dict(steps[-1])
    return build_pruner(options.pop("method"), options)


def split_of(before: TrainedModel, after: TrainedModel) -> Split:
    """The split of the requests between two models, from their lineage.

    Raises:
        SelectionError: If the two differ by no request.
    """
    task = after.task
    new = after.forgotten.positions(task)
    new = new[~torch.isin(new, before.forgotten.positions(task))]
    if len(new) == 0:
        raise SelectionError("the lineage of the two models differs by no request; select records.")
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
