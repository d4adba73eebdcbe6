from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from efface.data import Augment
from efface.datasets import images as source
from efface.datasets.augment import CropFlip
from efface.datasets.digits import digits
from efface.datasets.images import CIFAR10, balanced, cifar10, read_folder, read_parquet
from efface.errors import InputError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

Fill = Literal["reflect", "zeros"]


def png(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n: int, size: int = 4, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(n)]


def write(path: Path, arrays: list[np.ndarray[Any, Any]], **columns: Any) -> Path:
    cells = [{"bytes": png(a), "path": f"x/{i}.png"} for i, a in enumerate(arrays)]
    columns = columns or {"img": cells, "label": [i % 10 for i in range(len(arrays))]}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.delenv("EFFACE_DATA", raising=False)
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))


# --- parquet --------------------------------------------------------------------------------------


def test_parquet_in_the_hubs_layout(tmp_path: Path) -> None:
    arrays = pictures(12)
    found = read_parquet(write(tmp_path / "a.parquet", arrays))
    assert found.images.dtype == torch.uint8
    assert found.images.is_contiguous()
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), np.stack(arrays))
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [i % 10 for i in range(12)]
    assert found.ids == [f"x/{i}.png" for i in range(12)]


def test_limit_reads_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pictures(5))
    assert read_parquet(path, limit=2).ids == ["x/0.png", "x/1.png"]


@pytest.mark.parametrize(
    "cells",
    [
        [{"bytes": png(a), "path": "same.png"} for a in pictures(3)],
        [{"bytes": png(a), "path": None} for a in pictures(3)],
        [png(a) for a in pictures(3)],
    ],
    ids=["repeated paths", "no paths", "plain bytes"],
)
def test_row_numbers_serve_as_ids(tmp_path: Path, cells: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", [], image=cells, fine_label=[0, 1, 2])
    found = read_parquet(path)
    assert found.ids == ["0", "1", "2"]
    assert found.labels.tolist() == [0, 1, 2]


def test_columns_can_be_named_and_grey_becomes_rgb(tmp_path: Path) -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    path = write(tmp_path / "a.parquet", [], scan=[png(grey)], kind=[7])
    found = read_parquet(path, image="scan", label="kind")
    assert all(np.array_equal(plane, grey) for plane in found.images[0].numpy())
    assert found.labels.tolist() == [7]
    with pytest.raises(InputError, match="no column 'img' or 'image'; it has 'scan', 'kind'"):
        read_parquet(path)


@pytest.mark.parametrize(
    ("cells", "labels", "sentence"),
    [
        ([b"not an image"], [0], "row 0 of .* no readable image"),
        ([png(pictures(1)[0])[:60]], [0], "row 0 of .* no readable image"),
        ([png(pictures(1, 4)[0]), png(pictures(1, 6)[0])], [0, 1], "6×6 where others are 4×4"),
        ([{"bytes": None, "path": "a.png"}], [0], "no image bytes"),
        ([png(pictures(1)[0])], [None], "no whole number"),
        ([png(pictures(1)[0])], ["cat"], "no whole number"),
        ([png(pictures(1)[0])], [-1], "no whole number"),
    ],
)
def test_unusable_rows_are_named(
    tmp_path: Path, cells: list[Any], labels: list[Any], sentence: str
) -> None:
    path = write(tmp_path / "a.parquet", [], img=cells, label=labels)
    with pytest.raises(InputError, match=sentence):
        read_parquet(path)


def test_no_rows_and_no_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pictures(1))
    with pytest.raises(InputError, match="no images to read"):
        read_parquet(path, limit=0)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_parquet(path)
    with pytest.raises(InputError, match="not a file"):
        read_parquet(tmp_path / "b.parquet")


@pytest.mark.parametrize("library", ["pyarrow", "PIL"])
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    path = write(tmp_path / "a.parquet", pictures(1))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=r"pip install efface\[parquet\]"):
        read_parquet(path)


# --- the cache ------------------------------------------------------------------------------------


def the_copy(tmp_path: Path) -> Path:
    (only,) = (tmp_path / "cache").iterdir()
    return only


def same(a: source.Images, b: source.Images) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.ids == b.ids


def test_a_cache_hit_equals_the_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", pictures(6))
    plain = read_parquet(path)
    assert not (tmp_path / "cache").exists()
    miss = read_parquet(path, cache=True)
    assert same(plain, miss)
    monkeypatch.setattr(source, "_decode_parquet", None)  # a second decoding would fail
    hit = read_parquet(path, cache=True)
    assert same(hit, miss)
    hit.images.zero_()  # what a caller does to its tensors stays its own business
    assert same(read_parquet(path, cache=True), miss)


def test_the_cache_is_keyed_by_content_and_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pictures(6))
    first = read_parquet(path, cache=True)
    assert len(read_parquet(path, cache=True, limit=2).ids) == 2
    write(path, pictures(6, seed=1))
    assert not same(read_parquet(path, cache=True), first)
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "pixel", "header"])
def test_a_damaged_cache_is_ignored_and_replaced(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.parquet", pictures(6))
    good = read_parquet(path, cache=True)
    copy = the_copy(tmp_path)
    intact = copy.read_bytes()
    broken = bytearray(intact)
    if damage == "pixel":
        broken[-200] ^= 1
    elif damage == "header":
        broken[:8] = b"\xff" * 8
    copy.write_bytes({"empty": b"", "cut": intact[:-1]}.get(damage, bytes(broken)))
    assert same(read_parquet(path, cache=True), good)
    assert copy.read_bytes() == intact


def test_a_cache_that_cannot_be_written_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "file"))
    path = write(tmp_path / "a.parquet", pictures(3))
    assert same(read_parquet(path, cache=True), read_parquet(path))


# --- folders and CIFAR-10 -------------------------------------------------------------------------


def write_folder(root: Path, classes: tuple[str, ...], n: int = 2) -> list[np.ndarray[Any, Any]]:
    arrays = pictures(n * len(classes))
    for i, array in enumerate(arrays):
        path = root / classes[i // n] / f"{i % n:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(array))
    return arrays


def test_an_image_folder(tmp_path: Path) -> None:
    arrays = write_folder(tmp_path / "f", ("ant", "bee", "cow"))
    (tmp_path / "f" / "bee" / "notes.txt").write_text("not an image")
    found = read_folder(tmp_path / "f")
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), np.stack(arrays))
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.ids[:3] == ["ant/000.png", "ant/001.png", "bee/000.png"]


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "f" / "ant").mkdir(parents=True)
    for root in (tmp_path / "f", tmp_path / "absent"):
        with pytest.raises(InputError, match="holds no class/image files"):
            read_folder(root)


@pytest.mark.parametrize(
    "name",
    [
        "data/cifar10-test.parquet",
        "data/plain_text/test-00000-of-00001.parquet",
        "data/cifar10/plain_text/test-00000-of-00001.parquet",
        "given/cifar10-test.parquet",
    ],
)
def test_cifar10_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("given"):
        write(Path("data/cifar10-test.parquet"), pictures(10, seed=1))  # the variable goes first
        monkeypatch.setenv("EFFACE_DATA", "given")
    arrays = pictures(20)
    write(Path(name), arrays)
    found = cifar10(train=False)
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), np.stack(arrays))
    with pytest.raises(InputError, match="train images are not in"):
        cifar10(train=True)


def test_cifar10_from_folders() -> None:
    write_folder(Path("data/train"), tuple(reversed(CIFAR10)))
    write_folder(Path("data/test"), ("ant", "bee"))  # somebody else's folder
    assert cifar10(train=True).labels.bincount().tolist() == [2] * 10
    with pytest.raises(InputError, match=r"not in data.*EFFACE_DATA"):
        cifar10(train=False)


def test_a_limit_is_balanced_and_fixed_by_the_seed() -> None:
    write(Path("data/cifar10-train.parquet"), pictures(60))
    everything = cifar10(train=True)
    some = cifar10(train=True, limit=20, seed=3)
    assert some.labels.bincount().tolist() == [2] * 10
    assert same(some, cifar10(train=True, limit=20, seed=3))
    assert some.ids != cifar10(train=True, limit=20, seed=4).ids
    for image, label, key in zip(*some, strict=True):
        row = everything.ids.index(key)
        assert torch.equal(image, everything.images[row])
        assert label == everything.labels[row]


@given(st.lists(st.integers(0, 3), min_size=4, max_size=40), st.data())
def test_balanced_subsets(values: list[int], data: st.DataObject) -> None:
    labels = torch.tensor(values)
    counts = np.unique(values, return_counts=True)[1]
    limit = data.draw(st.integers(0, len(values) + 3))
    quotas = [limit // len(counts) + (i < limit % len(counts)) for i in range(len(counts))]
    if limit < len(counts) or any(q > c for q, c in zip(quotas, counts, strict=True)):
        with pytest.raises(InputError, match="balanced subset"):
            balanced(labels, limit)
        return
    found = balanced(labels, limit)
    assert found.tolist() == sorted(set(found.tolist()))
    assert np.unique(labels[found].numpy(), return_counts=True)[1].tolist() == quotas
    if limit > len(counts):
        assert set(balanced(labels, limit - 1).tolist()) <= set(found.tolist())


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_split_once() -> None:
    train, test = digits()
    assert train.images.shape == (1297, 1, 8, 8)
    assert test.images.shape == (500, 1, 8, 8)
    assert train.images.dtype == torch.float32
    assert (float(train.images.min()), float(train.images.max())) == (0.0, 1.0)
    assert not set(train.ids) & set(test.ids)
    assert len(set(train.ids + test.ids)) == 1797
    assert same(train, digits()[0])
    assert train.ids != digits(seed=1)[0].ids


def test_digits_are_scikit_learns_and_stratified() -> None:
    pixels, labels = load_digits(return_X_y=True)
    for part in digits():
        rows = [int(i) for i in part.ids]
        assert np.array_equal(part.images.flatten(1).numpy() * 16, pixels[rows])
        assert part.labels.tolist() == labels[rows].tolist()
        expected = np.bincount(labels) / len(labels) * len(rows)
        assert abs(part.labels.bincount().numpy() - expected).max() <= 1


@pytest.mark.parametrize("test", [-1, 0, 9, 1788, 5000])
def test_digits_refuses_an_empty_part(test: int) -> None:
    with pytest.raises(InputError, match="ask for 10 to 1787"):
        digits(test=test)


# --- augmentation ---------------------------------------------------------------------------------


def cropped_and_flipped(images: Tensor, uniform: Tensor, p: int, flip: bool, fill: Fill) -> Tensor:
    """The slow twin: pad, cut and mirror one image after the other."""
    found = []
    for image, (u, v, w) in zip(images.numpy(), uniform.tolist(), strict=True):
        height, width = image.shape[1:]
        border = ((0, 0), (p, p), (p, p))
        padded = np.pad(image, border, "reflect") if fill == "reflect" else np.pad(image, border)
        top, left = int(u * (2 * p + 1)), int(v * (2 * p + 1))
        cut = padded[:, top : top + height, left : left + width]
        found.append(cut[:, :, ::-1] if flip and w < 0.5 else cut)
    return torch.from_numpy(np.stack(found).copy())


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from(["reflect", "zeros"]),
    st.sampled_from([torch.uint8, torch.float32, torch.int64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_crop_flip_against_its_slow_twin(
    shape: tuple[int, ...], p: int, flip: bool, fill: Fill, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    images, uniform = torch.randint(0, 200, shape), torch.rand(shape[0], 3)
    augment = CropFlip(p, flip, fill)
    if fill == "reflect" and p >= min(shape[2:]):
        with pytest.raises(InputError, match="cannot reflect"):
            augment(images, uniform)
        return
    found = augment(images.to(dtype), uniform)
    assert found.dtype == dtype
    assert torch.equal(found.long(), cropped_and_flipped(images, uniform, p, flip, fill))


def test_crop_flip_draws_from_its_own_row_only() -> None:
    augment = CropFlip()
    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    uniform = torch.rand(9, augment.draws)
    together = augment(images, uniform)
    for i in range(9):
        assert torch.equal(together[i : i + 1], augment(images[i : i + 1], uniform[i : i + 1]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_flip_keeps_the_layout(layout: torch.memory_format, dtype: torch.dtype) -> None:
    images = torch.randint(0, 200, (4, 3, 8, 8)).to(dtype)
    uniform = torch.rand(4, 3)
    found = CropFlip(2)(images.contiguous(memory_format=layout), uniform)
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(found, CropFlip(2)(images, uniform))
    before = images.clone()
    CropFlip(2)(images, uniform)[:] = 0
    assert torch.equal(images, before)


def test_crop_flip_reaches_every_shift_and_flip() -> None:
    torch.manual_seed(0)
    images = torch.arange(81.0).view(1, 1, 9, 9).expand(2000, 1, 9, 9)
    found = CropFlip(1)(images, torch.rand(2000, 3))
    kinds, counts = torch.unique(found[:, 0, 4, [3, 5]], dim=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    assert counts.min() > 2000 / 18 / 2


def test_crop_flip_refuses_a_negative_padding() -> None:
    with pytest.raises(InputError, match="0 or more"):
        CropFlip(-1)


def test_crop_flip_is_an_augmentation() -> None:
    assert isinstance(CropFlip(), Augment)
    assert CropFlip.draws == CropFlip().draws == 3
    assert CropFlip(2) == CropFlip(2, True, "reflect")
