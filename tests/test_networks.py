from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from efface import networks
from efface.datasets.digits import digits

MAKERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "mlp": (lambda: networks.MLP([64, 128, 64, 10]), 17_226, (1, 8, 8)),
    "digits-cnn": (networks.DigitsCNN, 12_762, (1, 8, 8)),
    "three-conv": (networks.ThreeConv, 94_762, (3, 32, 32)),
    "air-net": (networks.AirNet, 295_130, (3, 32, 32)),
    "resnet20": (networks.ResNet20, 272_474, (3, 32, 32)),
    "resnet18": (networks.ResNet18, 11_173_962, (3, 32, 32)),
}
COLOUR = ["three-conv", "air-net", "resnet20"]
SMALL = [name for name in MAKERS if name != "resnet18"]


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MAKERS[name][0]()


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_and_shapes(name: str) -> None:
    _, parameters, shape = MAKERS[name]
    network = made(name)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert all(p.requires_grad for p in network.parameters())
    logits = network(torch.rand(3, *shape))
    assert logits.shape == (3, 10)
    torch.autograd.backward(logits.sum())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_seed_fixes_the_weights(name: str) -> None:
    first, again, other = (made(name, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("name", ["DigitsCNN", "ThreeConv", "AirNet", "ResNet20"])
def test_number_of_classes(name: str, classes: int) -> None:
    shape = (2, 1, 8, 8) if name == "DigitsCNN" else (2, 3, 32, 32)
    assert getattr(networks, name)(classes)(torch.rand(shape)).shape == (2, classes)


@pytest.mark.parametrize("name", COLOUR)
def test_bytes_are_read_like_floats_in_unit_range(name: str) -> None:
    network = made(name).double().eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(network(pixels), network(pixels.double() / 255))


def test_normalize_from_its_definition() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    found = networks.Normalize()(pixels)
    for b, c, i, j in np.ndindex(2, 3, 4, 5):
        expected = (int(pixels[b, c, i, j]) / 255 - networks.CIFAR_MEAN[c]) / networks.CIFAR_STD[c]
        assert float(found[b, c, i, j]) == pytest.approx(expected, abs=1e-5)


def test_normalize_keeps_the_layout() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    found = networks.Normalize()(pixels.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SMALL)
def test_per_sample_gradients_by_vmap(name: str) -> None:
    network = made(name).double().eval()
    parameters = {key: p.detach() for key, p in network.named_parameters()}
    inputs, targets = torch.rand(2, *MAKERS[name][2]).double(), torch.tensor([1, 7])

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, values, x[None]), y[None])

    found = vmap(grad(loss), (None, 0, 0))(parameters, inputs, targets)
    for i in range(2):
        network.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(inputs[i : i + 1]), targets[i : i + 1]))
        for key, p in network.named_parameters():
            torch.testing.assert_close(found[key][i], p.grad, rtol=1e-8, atol=1e-10)


def test_air_net_starts_like_the_identity() -> None:
    block = made("air-net").get_submodule("block1")
    for conv in (block.get_submodule("conv1"), block.get_submodule("conv2")):
        assert isinstance(conv, nn.Conv2d)
        images = torch.rand(1, conv.in_channels, 6, 6)
        torch.testing.assert_close(conv(images)[:, : conv.in_channels], images)


def test_air_net_stem_is_an_orthonormal_basis_and_its_negative() -> None:
    stem = made("air-net").get_submodule("stem")
    assert isinstance(stem, nn.Conv2d)
    filters = stem.weight.detach().flatten(1)
    torch.testing.assert_close(filters[:12] @ filters[:12].T, torch.eye(12), atol=1e-6, rtol=0)
    assert torch.equal(filters[12:], -filters[:12])


def test_residual_names_are_torchvisions() -> None:
    names = set(made("resnet20").state_dict())
    assert {"conv1.weight", "layer1.0.bn2.weight", "layer2.0.downsample.1.bias", "fc.bias"} <= names


def test_basic_block_adds_its_shortcut() -> None:
    torch.manual_seed(0)
    block = networks.BasicBlock(4, 4).eval()
    images = torch.randn(2, 4, 5, 5)
    inner = F.relu(block.bn1(block.conv1(images)))
    torch.testing.assert_close(block(images), F.relu(block.bn2(block.conv2(inner)) + images))


def test_digits_cnn_learns_the_digits() -> None:
    train, test = digits()
    network = made("digits-cnn")
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    order = torch.Generator().manual_seed(0)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / 6)
        for batch in torch.split(torch.randperm(len(train.labels), generator=order), 64):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(train.images[batch]), train.labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
    right = network.eval()(test.images).argmax(1) == test.labels
    assert right.float().mean() >= 0.97
