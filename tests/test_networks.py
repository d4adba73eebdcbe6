from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import efface
from efface import networks
from efface.datasets import CropFlip
from efface.datasets.digits import digits
from efface.errors import TaskError
from efface.mask import classifier_name, scope_names
from efface.networks.vit import Attention
from efface.sparsify import OneShot

MAKERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "mlp": (lambda: networks.MLP([64, 128, 64, 10]), 17_226, (1, 8, 8)),
    "digits-cnn": (networks.DigitsCNN, 12_762, (1, 8, 8)),
    "three-conv": (networks.ThreeConv, 94_762, (3, 32, 32)),
    "air-net": (networks.AirNet, 295_130, (3, 32, 32)),
    "resnet20": (networks.ResNet20, 272_474, (3, 32, 32)),
    "resnet18": (networks.ResNet18, 11_173_962, (3, 32, 32)),
    "resnet18-imagenet": (partial(networks.ResNet18, stem="imagenet"), 11_181_642, (3, 64, 64)),
    "vgg16-bn": (networks.VGG16BN, 14_724_042, (3, 32, 32)),
    "vgg16-bn-thin": (partial(networks.VGG16BN, width=4), 58_422, (3, 32, 32)),
    "vit": (networks.ViT, 258_058, (3, 32, 32)),
    "vit-mean-8": (
        partial(networks.ViT, patch=8, width=16, depth=2, heads=2, pool="mean"),
        10_106,
        (3, 32, 32),
    ),
    "three-conv-grey": (partial(networks.ThreeConv, channels=1), 94_186, (1, 28, 28)),
    "air-net-grey": (partial(networks.AirNet, channels=1), 290_234, (1, 28, 28)),
}
COLOUR = ["three-conv", "air-net", "resnet20", "vgg16-bn-thin", "vit"]
LARGE = {"resnet18", "resnet18-imagenet", "vgg16-bn"}
SMALL = [name for name in MAKERS if name not in LARGE]


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
@pytest.mark.parametrize("name", ["DigitsCNN", "ThreeConv", "AirNet", "ResNet20", "ViT"])
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


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        networks.ThreeConv,
        networks.AirNet,
        networks.ResNet20,
        partial(networks.VGG16BN, width=4),
        partial(networks.ViT, depth=1),
    ],
)
def test_grey_images_and_statistics_of_ones_own(make: Any) -> None:
    torch.manual_seed(0)
    network = make(5, channels=1, mean=[0.25], std=[0.5]).eval()
    pixels = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    assert network(pixels).shape == (2, 5)
    normalize = network.get_submodule("normalize")
    torch.testing.assert_close(normalize(pixels), (pixels / 255 - 0.25) / 0.5)
    usual = make(channels=1).get_submodule("normalize")
    assert (usual.mean.flatten().tolist(), usual.std.flatten().tolist()) == ([0.5], [0.5])
    assert make().get_submodule("normalize").mean.flatten().tolist() == pytest.approx(
        networks.CIFAR_MEAN
    )
    with pytest.raises(TaskError, match="2 and 3 values for images of 3 channels"):
        make(mean=[0.5, 0.5])


@pytest.mark.parametrize(
    "make",
    [
        partial(networks.AirNet, channels=2),
        partial(networks.ResNet18, stem="tall"),
        partial(networks.ViT, patch=5),
        partial(networks.ViT, heads=5),
        partial(networks.ViT, pool="max"),
    ],
)
def test_options_out_of_range(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TaskError):
        make()


def test_the_imagenet_stem_is_torchvisions() -> None:
    network = networks.ResNet((1, 1, 1, 1), (4, 8, 8, 8), 7, stem="imagenet")
    assert network.conv1.weight.shape == (4, 3, 7, 7)
    assert network(torch.rand(2, 3, 224, 224)).shape == (2, 7)
    hidden = network.maxpool(network.conv1(torch.rand(1, 3, 224, 224)))
    assert hidden.shape == (1, 4, 56, 56)
    # torchvision's resnet18 has 11,689,512 parameters with its thousand classes.
    whole = networks.ResNet18(1000, stem="imagenet")
    assert sum(p.numel() for p in whole.parameters()) == 11_689_512


def test_resnet20s_is_resnet20() -> None:
    assert networks.ResNet20s is networks.ResNet20
    padded = 272_474 - (16 * 32 + 2 * 32) - (32 * 64 + 2 * 64)
    assert padded == 269_722  # with shortcuts padded by zeros, as in He et al.


def test_vgg_is_thirteen_convolutions_and_a_head() -> None:
    network = networks.VGG16BN(width=2)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels // 2 for c in convolutions] == [1, 1, 2, 2, 4, 4, 4, *[8] * 6]
    assert all(c.bias is None and c.kernel_size == (3, 3) for c in convolutions)
    assert network.features(torch.rand(1, 3, 32, 32)).shape == (1, 16, 1, 1)
    assert classifier_name(network) == "classifier.weight"


# --- the transformer ------------------------------------------------------------------------------


def test_attention_against_loops() -> None:
    torch.manual_seed(0)
    module = Attention(6, 2).double()
    tokens = torch.randn(2, 4, 6, dtype=torch.float64)
    found = module(tokens)
    for b in range(2):
        rows = tokens[b] @ module.qkv.weight.T + module.qkv.bias
        parts = []
        for head in range(2):
            cut = slice(3 * head, 3 * head + 3)
            q, k, v = rows[:, 0:6][:, cut], rows[:, 6:12][:, cut], rows[:, 12:18][:, cut]
            mixed = torch.zeros(4, 3, dtype=torch.float64)
            for i in range(4):
                weights = torch.stack([q[i] @ k[j] / 3**0.5 for j in range(4)]).softmax(0)
                mixed[i] = sum(weights[j] * v[j] for j in range(4))
            parts.append(mixed)
        expected = torch.cat(parts, 1) @ module.out.weight.T + module.out.bias
        torch.testing.assert_close(found[b], expected)


def test_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    own, theirs = Attention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        own.qkv.weight.copy_(theirs.in_proj_weight)
        own.qkv.bias.copy_(theirs.in_proj_bias)
        own.out.weight.copy_(theirs.out_proj.weight)
        own.out.bias.copy_(theirs.out_proj.bias)
    tokens = torch.randn(3, 5, 8)
    torch.testing.assert_close(own(tokens), theirs(tokens, tokens, tokens)[0])


def test_vit_sees_where_a_patch_lies() -> None:
    torch.manual_seed(0)
    network = networks.ViT(depth=1).double().eval()
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    patches = images.view(1, 3, 8, 4, 32)[:, :, torch.tensor([1, 0, *range(2, 8)])]
    moved = patches.reshape(1, 3, 32, 32)
    assert not torch.allclose(network(images), network(moved))
    with torch.no_grad():
        network.positions.zero_()
    torch.testing.assert_close(network(images), network(moved))


def test_only_weights_of_vit_are_in_the_scope_of_pruning() -> None:
    network = networks.ViT(depth=2)
    scope = scope_names(network)
    assert "head.weight" not in scope
    assert all(name.endswith("weight") for name in scope)
    assert len(scope) == 1 + 2 * 4
    assert scope_names(network, "conv") == ["patches.weight"]


# --- every network through the whole story --------------------------------------------------------

STORY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: networks.MLP([64, 16, 3]), (1, 8, 8)),
    "digits-cnn": (partial(networks.DigitsCNN, 3), (1, 8, 8)),
    "three-conv": (partial(networks.ThreeConv, 3), (3, 16, 16)),
    "three-conv-grey": (partial(networks.ThreeConv, 3, channels=1), (1, 28, 28)),
    "air-net": (partial(networks.AirNet, 3, widths=(8, 8, 8)), (3, 16, 16)),
    "air-net-grey": (partial(networks.AirNet, 3, widths=(8, 8, 8), channels=1), (1, 28, 28)),
    "resnet20": (partial(networks.ResNet20, 3), (3, 16, 16)),
    "resnet-small": (lambda: networks.ResNet((1, 1), (4, 8), 3), (3, 16, 16)),
    "resnet-imagenet": (
        lambda: networks.ResNet((1, 1), (4, 8), 3, stem="imagenet"),
        (3, 32, 32),
    ),
    "vgg16-bn": (partial(networks.VGG16BN, 3, width=4), (3, 32, 32)),
    "vit": (partial(networks.ViT, 3, width=16, depth=2, image=16), (3, 16, 16)),
    "vit-mean": (
        partial(networks.ViT, 3, width=16, depth=2, image=16, patch=8, pool="mean"),
        (3, 16, 16),
    ),
}


def pictures(shape: tuple[int, ...], n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    noise = torch.randint(0, 100, (n, *shape), generator=draw)
    return (noise + 70 * targets.view(-1, 1, 1, 1)).to(torch.uint8), targets


def whole_story(
    make: Callable[[], nn.Module], shape: tuple[int, ...], path: Path, **more: Any
) -> None:
    """Train, prune, forget, save and load a network, twice where it has to come out the same."""
    train = pictures(shape, 36, 0)
    if more.pop("floats", False):
        train = (train[0] / 255, train[1])
    settings = efface.Settings(epochs=1, batch_size=12, lr=0.01)
    task = efface.Task(make, train, train, fit=settings, augment=CropFlip(1), **more)
    trained, again = (efface.train(task, seed=2) for _ in range(2))
    assert trained.digest == again.digest
    assert trained.digest != efface.train(task, seed=3).digest
    sparse = efface.prune(trained, OneShot(sparsity=0.5, recovery=1))
    assert sparse.sparsity == pytest.approx(0.5, abs=0.01)
    split = efface.Split.by_ids(task, range(6))
    method = efface.unlearn.L1Sparse(alpha=1e-3, epochs=1, lr=0.01)
    after = efface.forget(sparse, split, method, seed=1)
    assert after.digest != sparse.digest
    assert after.digest == efface.forget(sparse, split, method, seed=1).digest
    weights = dict(after.network.named_parameters())
    assert after.mask is not None
    assert all(bool((weights[name][~keep] == 0).all()) for name, keep in after.mask.items())
    after.save(path)
    loaded = efface.load(path, task)
    assert loaded.digest == after.digest
    assert loaded.mask == after.mask
    inputs = train[0][:3]
    with torch.no_grad():
        expected = task.forward(after.network.eval(), inputs)
        assert torch.equal(task.forward(loaded.network.eval(), inputs), expected)


@pytest.mark.parametrize("name", STORY)
def test_every_network_trains_is_pruned_forgets_and_is_saved(name: str, tmp_path: Path) -> None:
    make, shape = STORY[name]
    floats = shape == (1, 8, 8)  # the two for the digits do not normalise
    whole_story(make, shape, tmp_path / "model.safetensors", floats=floats)


# --- modules of other packages --------------------------------------------------------------------


def of_torchvision(module: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return partial(module.models.shufflenet_v2_x0_5, num_classes=3), {}


def of_timm(module: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return partial(module.create_model, "resnet10t", num_classes=3), {}


def of_transformers(module: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    config = module.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    make = partial(module.ViTForImageClassification, config)
    return make, {"forward": lambda network, inputs: network(inputs).logits}


@pytest.mark.filterwarnings("ignore")  # of these packages' own
@pytest.mark.parametrize(
    ("package", "example"),
    [("torchvision", of_torchvision), ("timm", of_timm), ("transformers", of_transformers)],
)
def test_modules_of_other_packages_serve_as_they_are(
    package: str, example: Any, tmp_path: Path
) -> None:
    try:
        make, more = example(importlib.import_module(package))
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"{package} is not usable here ({type(error).__name__})")
    whole_story(make, (3, 32, 32), tmp_path / "model.safetensors", floats=True, **more)
