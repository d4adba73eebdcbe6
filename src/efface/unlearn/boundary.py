"""Boundary unlearning: records of D_f move across the nearest boundary, or to a class of their own.

Both read D_f only, relabel it once and fine-tune on the new labels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.data import Batch, Stream, chunks
from efface.errors import MethodError
from efface.fitting import Clock, Fit
from efface.mask import classifier_name
from efface.placement import preserved
from efface.task import Settings, Split, Task
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings, streams

EPOCHS = 10
"""Passes over D_f where nothing else is said, as in the paper."""


# -- inputs that one can go along the slope of ----------------------------------------------------


def pixel_scale(name: str, network: nn.Module, task: Task, position: Tensor) -> float:
    """What inputs are divided by to become real numbers that the network answers alike.

    Real inputs stay as they are. Bytes are read as pixels: over 255, or as they are, whichever the
    network answers as it does the bytes themselves.

    Args:
        name: The method that asks, for the message.
        network: In any mode, which is left as found.
        task: Supplies records and batch adapter.
        position: Of one record, ``[1]``: it is looked at.

    Raises:
        MethodError: If inputs are neither, or not a single tensor.

    >>> x, y = torch.full((2, 3), 51, dtype=torch.uint8), torch.arange(2)
    >>> class Net(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x / 255 if x.dtype == torch.uint8 else x)
    >>> task = Task(lambda: Net(3, 2), (x, y), (x, y))
    >>> pixel_scale("unsir", task.network(), task, torch.tensor([0]))
    255.0
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    inputs = next(iter(task.records.batches([position], device))).inputs
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return 1.0
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
        with preserved(network), torch.no_grad():
            network.eval()
            wanted = task.forward(network, inputs)
            for scale in (255.0, 1.0):
                with contextlib.suppress(RuntimeError, TypeError):  # whatever wants bytes only
                    got = task.forward(network, inputs.float() / scale)
                    if torch.allclose(got, wanted, rtol=1e-4, atol=1e-4):
                        return scale
    raise MethodError(
        f"{name} takes slopes with respect to the inputs, which must be a single tensor of real "
        "numbers or pixels, and this task's are not; take a method that does without, such as "
        "finetune or ssd."
    )


def as_real(inputs: Tensor, scale: float) -> Tensor:
    """Inputs as real numbers, see :func:`pixel_scale`.

    >>> as_real(torch.tensor([255], dtype=torch.uint8), 255.0)
    tensor([1.])
    """
    return inputs if inputs.is_floating_point() else inputs.float() / scale


# -- shrink ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoundaryShrink:
    """Boundary shrink: fine-tune on D_f under each record's nearest incorrect class.

    Chen et al. 2023. A step on the inputs that raises the loss of the true class, x′ = x + bound ·
    range · sign(∇ₓ CE), kept within the range of D_f's inputs; the nearest incorrect class is the
    one that the trained model prefers on x′, the true one left out. Labels are found once, on
    un-augmented records. Reads D_f only: nothing holds the rest in place but a small rate.

    Args:
        bound: Length of the step, as a share of the range (largest minus smallest) of D_f's inputs.
        epochs: Passes over D_f; ``None``: the task's default, else 10 as in the paper.
        lr: Peak rate; ``None``: the task's default, else a hundredth of the training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "boundary-shrink"
    title: ClassVar[str] = "Boundary shrink"
    paper: ClassVar[str] = "Chen et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})

    bound: float = 0.1
    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen"] = "train"

    def __post_init__(self) -> None:
        check_ranges(self, bound=("0 or more", 0 <= self.bound < math.inf))

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for inputs that one cannot go along the slope of."""
        pixel_scale(self.name, trained.network, trained.task, split.forget[:1])

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        labels = nearest_labels(trained, split.forget, fit, self.bound)
        settings = _settings(fit, self)
        stream = {"forget": Stream(split.forget, targets=labels)}
        fit(trained.network, fit.descend, stream, settings, label=self.name)


def nearest_labels(trained: TrainedModel, forget: Tensor, fit: Fit, bound: float) -> Tensor:
    """All labels ``[N]``, those at ``forget`` replaced by the nearest incorrect class.

    Args:
        trained: Says what is near.
        forget: Positions of D_f ``[n]``.
        fit: Supplies task and device.
        bound: Length of the step, as a share of the range of D_f's inputs.
    """
    teacher, records = fit.teacher(trained), fit.task.records
    scale = pixel_scale(BoundaryShrink.name, teacher, fit.task, forget[:1])
    plan = chunks(forget, fit.task.fit.batch_size)
    ends = [
        torch.stack(torch.aminmax(as_real(batch.inputs, scale)))
        for batch in records.batches(plan, fit.device)
    ]
    low, high = torch.stack(ends)[:, 0].min(), torch.stack(ends)[:, 1].max()
    labels, crossed = records.targets.clone(), 0
    for batch in records.batches(plan, fit.device):
        real = batch._replace(inputs=as_real(batch.inputs, scale))
        moved = _uphill(fit, teacher, real, bound * (high - low)).clamp(low, high)
        with torch.no_grad():
            answers = fit.logits(teacher, real._replace(inputs=moved)).float()
        own = batch.targets[:, None]
        crossed += int((answers.argmax(1, keepdim=True) != own).sum())
        labels[batch.positions] = answers.scatter(1, own, -math.inf).argmax(1).cpu()
    fit.meter.facts["crossed"] = crossed
    return labels


def _uphill(fit: Fit, network: nn.Module, batch: Batch, step: Tensor) -> Tensor:
    """Inputs one step along the sign of the slope of the true class's cross-entropy."""
    inputs = batch.inputs.detach().requires_grad_()
    logits, own = fit.logits(network, batch._replace(inputs=inputs)).float(), batch.targets[:, None]
    # CE = softplus(rivals − own): the same sign, and it does not vanish where CE rounds to zero
    rivals = logits.scatter(1, own, -math.inf).logsumexp(1)
    rise = (rivals - logits.gather(1, own)[:, 0]).sum()
    if not rise.requires_grad:
        raise MethodError(
            "boundary-shrink finds no slope of the loss with respect to the inputs: the task's "
            "forward or its network cuts it; take another method, such as boundary-expand."
        )
    (slope,) = torch.autograd.grad(rise, inputs)
    fit.meter.images["forget"] = fit.meter.images.get("forget", 0) + len(inputs)
    moved: Tensor = inputs.detach() + step * slope.sign()
    return moved


# -- expand ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoundaryExpand:
    """Boundary expand: fine-tune D_f towards a further class, which is then cut off.

    Chen et al. 2023. The classifier gets one more output, a shadow class, with freshly drawn
    weights; the widened network is fine-tuned on D_f under that label, by cross-entropy (the task's
    own loss knows nothing of a further class), and the shadow is thrown away: records of D_f go to
    whatever comes second. Reads D_f only.

    Args:
        epochs: Passes over D_f; ``None``: the task's default, else 10 as in the paper.
        lr: Peak rate; ``None``: the task's default, else a hundredth of the training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "boundary-expand"
    title: ClassVar[str] = "Boundary expand"
    paper: ClassVar[str] = "Chen et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})

    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen"] = "train"

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for a network whose output layer cannot be widened."""
        output_layer(trained.network, trained.task.classifier)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        widened = Widened(trained.network, fit.task.classifier, fit.generator("shadow"))

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            logits = fit.logits(trained.network, batches["forget"]).float()
            return widened.loss(logits)

        with widened.joined():
            stream = streams(split, "forget")
            fit(widened, objective, stream, _settings(fit, self), label=self.name)


class Widened(nn.Module):
    """A network and the shadow class of its output layer, to be trained together.

    The network's parameters keep their names, so that its mask holds; those of the shadow begin
    with a dot, as no parameter's name does.

    Args:
        network: Stays the module that it is; while :meth:`joined` its answers have one more column.
        classifier: Name of the output layer's weight; found by itself when None.
        draw: Draws the shadow's weights, as PyTorch would.

    >>> net = torch.nn.Linear(4, 3)
    >>> wide = Widened(net, None, torch.Generator().manual_seed(0))
    >>> with wide.joined():
    ...     net(torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    >>> [name for name, _ in wide.named_parameters()]
    ['weight', 'bias', '.shadow.weight', '.shadow.bias']
    """

    def __init__(self, network: nn.Module, classifier: str | None, draw: torch.Generator) -> None:
        super().__init__()
        self.network = network
        self.classifier = classifier
        layer = output_layer(network, classifier)
        with torch.random.fork_rng(devices=[]):
            self.shadow = nn.Linear(layer.in_features, 1, bias=layer.bias is not None)
        self.shadow.to(layer.weight.dtype)
        reach = 1 / math.sqrt(layer.in_features)
        with torch.no_grad():
            for weight in self.shadow.parameters():
                weight.uniform_(-reach, reach, generator=draw)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's own names, and the shadow's behind a dot."""
        yield from self.network.named_parameters(prefix, recurse, remove_duplicate)
        yield from self.shadow.named_parameters(f"{prefix}.shadow", recurse, remove_duplicate)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Within it the network's output layer has the shadow as its last output."""

        def widen(layer: nn.Module, inputs: tuple[Any, ...], outputs: Tensor) -> Tensor:
            return torch.cat([outputs, self.shadow(inputs[0])], dim=-1)

        layer = output_layer(self.network, self.classifier)
        handle = layer.register_forward_hook(widen)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of the shadow class, of logits ``[B, C + 1]``.

        Raises:
            MethodError: If the shadow is not there: the network's answers do not come from calling
                its output layer.
        """
        last = output_layer(self.network, self.classifier).out_features
        if logits.shape[1:] != (last + 1,):
            raise MethodError(
                f"boundary-expand widens the output layer to {last + 1} outputs, but the network "
                f"gave {tuple(logits.shape[1:])}; name the right layer with Task(classifier=…), or "
                "take boundary-shrink."
            )
        return F.cross_entropy(logits, logits.new_full((len(logits),), last, dtype=torch.long))


def output_layer(network: nn.Module, classifier: str | None = None) -> nn.Linear:
    """The layer that gives the logits.

    Args:
        network: The network.
        classifier: Name of the layer's weight; found by itself when None.

    Raises:
        MethodError: If that layer is no linear one.
    """
    name = classifier_name(network, classifier)
    owner, _, leaf = name.rpartition(".")
    layer = network.get_submodule(owner)
    if not isinstance(layer, nn.Linear) or leaf != "weight":
        raise MethodError(
            f"boundary-expand needs a linear output layer, but {name!r} belongs to "
            f"{type(layer).__name__}; name the right one with Task(classifier=…), or take "
            "boundary-shrink."
        )
    return layer


def _settings(fit: Fit, method: BoundaryShrink | BoundaryExpand) -> Settings:
    """Settings of either: 10 epochs at a hundredth of the training's peak where left open."""
    epochs = EPOCHS if method.epochs is None else method.epochs
    lr = fit.task.fit.lr / 100 if method.lr is None else method.lr
    return fit_settings(fit, method, epochs=epochs, lr=lr, bn=method.bn)
