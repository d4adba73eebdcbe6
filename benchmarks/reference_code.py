"""Public reference code beside ours: imported from a checkout that the user gives, never copied.

The checkout is of OPTML-Group/Unlearn-Sparse, the code that Jia et al. (2023) released. It wants a
GPU and packages that a comparison never calls: in the process of a benchmark ``.cuda()`` becomes a
no-op on CPU tensors, and what is absent gets an empty stand-in.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import io
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from measure import Spent
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

T = TypeVar("T")

BATCH = 256
"""The released code's default."""

UNUSED = ("torchvision", "tqdm", "datasets", "einops", "lmdb", "cv2", "timm", "advertorch")
"""Packages that the released code imports and that may be absent (or broken) here."""


class _StandIn(ModuleType):
    """A module in which every name is an empty class; ``tqdm`` is the identity."""

    __path__: list[str] = []  # noqa: RUF012 — what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _as_it_is if name == "tqdm" else type(name, (), {})


def _as_it_is(items: Iterable[T], *_args: object, **_options: object) -> Iterable[T]:
    return items


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages named, and everything in them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def _absent(package: str) -> bool:
    if package == "tqdm":  # a bar redrawn at every step is no part of a method
        return True
    try:
        importlib.import_module(package)
    except Exception:
        return True
    return False


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The released code prints; a benchmark does not."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


class _Enough(Exception):  # noqa: N818 — nothing is wrong
    """So many samples are timed."""


@dataclass(frozen=True)
class Released:
    """The functions of the checkout, with the arguments that they take from a command line."""

    unlearn: ModuleType
    svc: ModuleType
    networks: ModuleType
    facts: dict[str, Any]

    @classmethod
    def load(cls, checkout: Path) -> Released:
        """Import from a checkout.

        Raises:
            SystemExit: If the folder is no such checkout.
        """
        if not (checkout / "unlearn" / "Wfisher.py").is_file():
            raise SystemExit(f"{checkout} is no checkout of OPTML-Group/Unlearn-Sparse.")
        _without_cuda()
        found = _StandIns([package for package in UNUSED if _absent(package)])
        sys.meta_path.append(found)
        for package in found.packages:
            sys.modules.pop(package, None)
        sys.path.insert(0, str(checkout))
        try:
            with silent():
                unlearn = importlib.import_module("unlearn")
                svc = importlib.import_module("evaluation.SVC_MIA")
                networks = importlib.import_module("models.ResNets")
        finally:
            sys.path.remove(str(checkout))
            sys.meta_path.remove(found)
        return cls(unlearn, svc, networks, _facts(checkout))

    def resnet20(self) -> nn.Module:
        """The checkout's ResNet-20 for 32×32 images (0.27 M parameters)."""
        with silent():
            network: nn.Module = self.networks.resnet20s()
        return network

    def epoch(self, name: str, network: nn.Module, loaders: dict[str, Any], **more: Any) -> None:
        """One epoch of an iterative method: ``FT``, ``GA`` or ``FT_l1``."""
        with silent():
            getattr(self.unlearn, name)(loaders, network, nn.CrossEntropyLoss(), _options(**more))

    def influence(self, network: nn.Module, loaders: dict[str, Any], alpha: float) -> None:
        """Influence unlearning (``Wfisher``), the whole call."""
        with silent():
            criterion = nn.CrossEntropyLoss()
            self.unlearn.Wfisher(loaders, network, criterion, _options(alpha=alpha))

    def influence_product(
        self, network: nn.Module, images: Tensor, labels: Tensor, v: Tensor
    ) -> Any:
        """The released inverse-Fisher product of a flat vector, one record at a time."""
        one_by_one = DataLoader(TensorDataset(images, labels), batch_size=1)
        module = sys.modules["unlearn.Wfisher"]
        with silent():
            return module.woodfisher(network, one_by_one, "cpu", nn.CrossEntropyLoss(), v)

    def fisher(self, network: nn.Module, loader: DataLoader[Any]) -> list[Tensor]:
        """The diagonal Fisher information of the function ``fisher``."""
        with silent():
            module = sys.modules["unlearn.fisher"]
            found: list[Tensor] = module.fisher_information_martix(network, loader, "cpu")
        return found

    def fisher_seconds(self, network: nn.Module, loader: DataLoader[Any], samples: int) -> Spent:
        """Seconds of the first samples, without the forward pass of their batch."""
        module = sys.modules["unlearn.fisher"]
        inner, started = module.grad, list[tuple[float, float]]()

        def counted(*args: Any, **options: Any) -> Any:
            started.append((time.perf_counter(), time.process_time()))
            if len(started) > samples:
                raise _Enough
            return inner(*args, **options)

        with patch.object(module, "grad", counted), contextlib.suppress(_Enough):
            self.fisher(network, loader)
        (wall, cpu), (wall_end, cpu_end) = started[0], started[-1]
        return Spent(wall_end - wall, cpu_end - cpu, 0.0)

    def fisher_new(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The sums of the function ``fisher_new``: squares of batch-averaged gradients.

        The function leaves attributes on the parameters; they are read and taken away.
        """
        with silent():
            module = sys.modules["unlearn.fisher"]
            module.hessian(TensorDataset(images, labels), network, None, _options())
        found = {}
        for name, p in network.named_parameters():
            found[name] = vars(p).pop("grad2_acc")
            del vars(p)["grad_acc"]
        network.zero_grad(set_to_none=True)
        return found

    def attacks(self, parts: dict[str, DataLoader[Any] | None], network: nn.Module) -> Any:
        """The membership attack, five support-vector machines: feature → share called outsiders."""
        with silent():
            return self.svc.SVC_MIA(**parts, model=network)


def loader(images: Tensor, labels: Tensor, *, batch: int = BATCH, shuffle: bool = True) -> Any:
    """The released code's own ``DataLoader``, over tensors in memory."""
    return DataLoader(TensorDataset(images, labels), batch_size=batch, shuffle=shuffle)


def _options(**more: Any) -> Namespace:
    """Its command line: defaults, one epoch, nothing of ImageNet."""
    values: dict[str, Any] = {
        "alpha": 5e-4,
        "arch": "resnet20s",
        "batch_size": BATCH,
        "class_to_replace": -1,
        "dataset": "cifar10",
        "decreasing_lr": "91,136",
        "gpu": 0,
        "imagenet_arch": False,
        "lr": 0.1,
        "momentum": 0.9,
        "no_l1_epochs": 0,
        "num_classes": 10,
        "num_indexes_to_replace": None,
        "print_freq": 50,
        "rewind_epoch": 0,
        "unlearn": "FT",
        "unlearn_epochs": 1,
        "unlearn_lr": 0.01,
        "warmup": 0,
        "weight_decay": 5e-4,
    }
    return Namespace(**(values | more))


def _without_cuda() -> None:
    """Let ``.cuda()`` do nothing, for the rest of this process."""

    def same(self: Any, *_args: object, **_options: object) -> Any:
        return self

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.Tensor, "cuda", same),
        (nn.Module, "cuda", same),
        (torch.cuda, "is_available", lambda: False),
    ]
    for owner, name, value in changes:
        setattr(owner, name, value)


def _facts(checkout: Path) -> dict[str, Any]:
    """Which version of the code was compared with."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    git = subprocess.run(command, check=False, capture_output=True, text=True)
    files = sorted([*checkout.glob("unlearn/*.py"), *checkout.glob("evaluation/*.py")])
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return {
        "repository": "OPTML-Group/Unlearn-Sparse",
        "commit": git.stdout.strip() or None,
        "sha256_of_compared_files": content.hexdigest(),
    }
