"""Compaction: dead filters are taken out, and the network becomes physically smaller.

A filter is dead when everything that it owns is exactly zero: its weights and bias, and its scale
and shift in the batch norm behind it. Its channel is then zero, whatever goes in, and can be left
out together with the weights that read it. ``torch-pruning`` (Fang et al. 2023) knows which those
are; what it takes out is read off a numbered copy and kept as a :class:`~efface.shapes.ShapePlan`.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efface.cost import Stopwatch, versions
from efface.errors import MethodError
from efface.lineage import Step, data_facts
from efface.mask import Mask
from efface.placement import preserved
from efface.predict import logits
from efface.shapes import ShapePlan, compare, number, plan_of, sizes_of, with_plan
from efface.sparsify.groups import Group, filter_groups, kept_filters
from efface.sparsify.tracing import examples
from efface.task import Task
from efface.trained import TrainedModel

TOLERANCE = 1e-5
"""Largest difference of a logit, as a fraction of the largest logit."""
CHECKED, TRACED = 256, 2
"""Records on which the two networks are compared, and with which a forward pass is traced."""


def compact(trained: TrainedModel) -> TrainedModel:
    """Take dead filters out of a copy of a model.

    The small network answers as the large one did, which is checked on real records. Its task is
    the model's own with a factory that makes the small network, so that it can be retrained and
    made to forget like any other. What of the mask remains on the smaller tensors goes on holding;
    where nothing of it remains, the new model is dense. Initial, rewind and dense weights are those
    of the large network and are not taken along.

    Args:
        trained: Left as it is.

    Returns:
        A new model; its last step of lineage has sizes before and after.

    Raises:
        MethodError: If no filter is dead, if the forward pass cannot be traced, or if the small
            network would answer differently.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: efface.networks.MLP((4, 8, 2)), (x, y), (x, y))
        >>> trained = efface.train(task)
        >>> with torch.no_grad():
        ...     for tensor in (trained.network[1].weight, trained.network[1].bias):
        ...         _ = tensor[2:].zero_()
        >>> compact(trained).network
        MLP(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=4, out_features=2, bias=True)
          (2): ReLU()
          (3): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    watch = Stopwatch()
    plan, filters = _planned(trained)
    network = plan.apply(copy.deepcopy(trained.network))
    earlier = plan_of(trained.task)
    whole = plan if earlier is None else plan.after(earlier)
    model = TrainedModel(
        with_plan(trained.task, whole),
        network,
        mask=_remaining(trained.mask, plan),
        forgotten=trained.forgotten,
    )
    sizes = {"parameters": _numbers(_parameters, trained, model), "filters": filters}
    checked = _check(trained, model)
    sizes["multiply_adds"] = _numbers(_multiply_adds, trained, model)
    cost = {**watch.read(), "images": 2 * checked["records"]}
    model.lineage = (*trained.lineage, _step(trained, cost, {**sizes, **checked}))
    return model


def _step(trained: TrainedModel, cost: dict[str, Any], detail: dict[str, Any]) -> Step:
    """What was done, for the lineage."""
    lineage = trained.lineage
    return Step(
        verb="compact",
        method=None,
        settings=lineage[-1].settings if lineage else trained.task.fit.to_dict(),
        seed=0,
        parent=trained.digest if lineage else None,
        cost=cost,
        data=data_facts(trained.task),
        versions=versions() | {"torch-pruning": _tp().__version__},
        detail=detail,
    )


# -- what is taken out -----------------------------------------------------------------------------


def dead_filters(groups: Sequence[Group], network: nn.Module) -> dict[str, Tensor]:
    """Which filters own nothing but zeros; of a group that is dead altogether the first is kept.

    Args:
        groups: From :func:`efface.sparsify.groups.filter_groups`.
        network: The network.

    Returns:
        Group name → bool ``[size]``; groups without dead filters are not named.
    """
    owned = {name for group in groups for name, _ in group.members}
    alive = {n: p.detach() != 0 for n, p in network.named_parameters() if n in owned}
    dead = {name: ~kept for name, kept in kept_filters(Mask(alive), groups).items()}
    for gone in dead.values():
        gone[0] &= not bool(gone.all())  # a layer without any channel cannot be
    return {name: gone for name, gone in dead.items() if bool(gone.any())}


def _planned(trained: TrainedModel) -> tuple[ShapePlan, dict[str, list[int]]]:
    """The plan for a model, and per group the number of filters before and after.

    Raises:
        MethodError: If nothing can be taken out.
    """
    network, task = trained.network, trained.task
    twin = copy.deepcopy(network).cpu()
    with preserved(twin):
        graph = _graph(task, twin)
        groups = filter_groups(task, network)
        dead = dead_filters(groups.prunable, network)
        if not dead:
            raise MethodError(_nothing(groups.prunable, groups.whole))
        sizes = sizes_of(twin)
        number(twin)
        for group in groups.prunable:
            if group.name in dead:
                _remove(graph, twin, group, dead[group.name])
    kept = {
        group.name: [group.size, group.size - int(dead[group.name].sum())]
        for group in groups.prunable
        if group.name in dead
    }
    try:
        return compare(network.state_dict(), sizes, twin), kept
    except ValueError as error:
        raise MethodError(
            f"the dead filters of {type(network).__name__} cannot be cut out ({error}); leave the "
            "model as it is: its mask holds all the same."
        ) from None


def _nothing(prunable: Sequence[Group], whole: Mapping[str, str]) -> str:
    if not prunable:
        layer, why = next(iter(whole.items()), ("the network", "it has no layer with filters"))
        return f"no filter of the network can be taken out (of {layer}, for one: {why})."
    return (
        "no filter is dead, so there is nothing to take out; prune whole filters: --method sfp, "
        "or --set granularity=filter."
    )


def _tp() -> Any:
    return importlib.import_module("torch_pruning")


def _graph(task: Task, twin: nn.Module) -> Any:
    """torch-pruning's graph of a copy of the network, which is traced on real records.

    Raises:
        MethodError: If the forward pass cannot be traced, with the cause.
    """
    inputs = examples(task, TRACED)
    for p in twin.parameters():
        p.requires_grad_(p.is_floating_point())
    graph = _tp().DependencyGraph()
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(twin, inputs, forward_fn=task.forward, verbose=False)
        except Exception as error:
            said = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
            raise MethodError(
                f"the forward pass of {type(twin).__name__} cannot be traced "
                f"({type(error).__name__}: {said}), so that nobody can tell what reads a filter; "
                "keep the model as it is."
            ) from error
    return graph


def _remove(graph: Any, twin: nn.Module, group: Group, gone: Tensor) -> None:
    """Take some filters of a group, and what reads them, out of the copy."""
    name, rows = group.weights[0]
    layer = twin.get_submodule(name.rpartition(".")[0])
    cut = graph.get_pruner_of_module(layer).prune_out_channels
    graph.get_pruning_group(layer, cut, rows[gone].tolist()).prune(record_history=False)


def _remaining(mask: Mask | None, plan: ShapePlan) -> Mask | None:
    """What of a mask holds on the smaller tensors; None where it drops nothing there."""
    if mask is None:
        return None
    left = Mask(
        {name: plan.cuts[name].of(t) if name in plan.cuts else t for name, t in mask.items()}
    )
    return None if left.kept == left.total else left


# -- what came out ---------------------------------------------------------------------------------


def _check(before: TrainedModel, after: TrainedModel) -> dict[str, Any]:
    """The difference between both networks on test records.

    Raises:
        MethodError: If they answer differently.
    """
    task = before.task
    where = torch.arange(min(CHECKED, len(task.test_records)))
    large = logits(before.network, task, task.test_records, where)
    try:
        small = logits(after.network, task, task.test_records, where)
        difference = float(np.abs(small - large).max() / max(np.abs(large).max(), 1e-12))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise MethodError(
            f"the forward pass of {type(after.network).__name__} does not work with fewer channels "
            f"({said}); write sizes from the tensors' own shapes, or keep the model as it is."
        ) from None
    if not difference <= TOLERANCE:  # NaN is no agreement either
        raise MethodError(
            f"without its dead filters {type(after.network).__name__} answers differently (by "
            f"{difference:.2g} of the largest logit): some part of it makes something of a zero "
            "channel; keep the model as it is."
        )
    return {"records": len(where), "difference": difference}


def _numbers(measure: Any, before: TrainedModel, after: TrainedModel) -> list[int]:
    return [measure(model) for model in (before, after)]


def _parameters(model: TrainedModel) -> int:
    return sum(p.numel() for p in model.network.parameters())


def _multiply_adds(model: TrainedModel) -> int:
    """Multiply-adds of convolutions and matrix products for one record."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with FlopCounterMode(display=False) as counter:
        logits(model.network, model.task, model.task.test_records, torch.arange(1))
    return int(counter.get_total_flops()) // 2
