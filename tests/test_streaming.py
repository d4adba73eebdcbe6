"""Sets that are decoded when asked for equal those read at once; and the tasks made of either."""

from __future__ import annotations

import io
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import efface
from efface import datasets, networks
from efface.data import LoadedRecords, TensorRecords
from efface.datasets import (
    Images,
    Streamed,
    image_task,
    open_folder,
    open_parquet,
    read_folder,
    read_npz,
    read_parquet,
    streaming,
)
from efface.datasets import images as source
from efface.datasets.parquet import ParquetRows
from efface.datasets.pixels import decode
from efface.errors import InputError, TaskError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

Array = np.ndarray[Any, Any]


def encoded(array: Array, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def pictures(n: int, size: int = 8, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(n)]


def write(path: Path, arrays: list[Array], group: int = 4, first: int = 0) -> Path:
    cells = [{"bytes": encoded(a), "path": f"{first + i}.png"} for i, a in enumerate(arrays)]
    labels = [(first + i) % 3 for i in range(len(arrays))]
    coarse = [label // 2 for label in labels]
    table = pa.table({"img": cells, "fine_label": labels, "coarse_label": coarse})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)
    return path


def write_shards(folder: Path, n: int = 3, each: int = 6) -> str:
    for k in range(n):
        name = f"train-{k:05}-of-{n:05}.parquet"
        write(folder / name, pictures(each, seed=k), first=k * each)
    return str(folder / "train-*.parquet")


def write_folder(root: Path, classes: int = 3, each: int = 5, size: int = 8) -> Path:
    for i, array in enumerate(pictures(classes * each, size)):
        path = root / f"n{i // each:04}" / f"{i % each}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(array))
    return root


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.delenv("EFFACE_DATA", raising=False)
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))


class Count:
    """How often a function is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        inner = getattr(where, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            self.calls.append(arguments)
            return inner(*arguments, **more)

        monkeypatch.setattr(where, name, counted)


# --- streamed = in memory -------------------------------------------------------------------------


def both(tmp_path: Path, kind: str) -> tuple[Streamed, Images]:
    if kind == "folder":
        root = write_folder(tmp_path / "f")
        return open_folder(root), read_folder(root)
    if kind == "shards":
        pattern = write_shards(tmp_path / "s")
        return open_parquet(pattern), read_parquet(pattern)
    path = write(tmp_path / "a.parquet", pictures(15))
    return open_parquet(path), read_parquet(path)


@pytest.mark.parametrize("kind", ["file", "shards", "folder"])
def test_streamed_equals_in_memory_record_by_record(tmp_path: Path, kind: str) -> None:
    lazy, eager = both(tmp_path, kind)
    assert len(lazy) == len(eager.labels)
    assert lazy.ids == eager.ids
    assert torch.equal(lazy.targets, eager.labels)
    mixed = torch.randperm(len(lazy), generator=torch.Generator().manual_seed(0)).tolist()
    for i in mixed:
        image, label = lazy[i]
        assert torch.equal(image, eager.images[i])
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert label == int(eager.labels[i])
    for (image, label), i in zip(
        lazy.__getitems__(mixed + mixed[:3]), mixed + mixed[:3], strict=True
    ):
        assert torch.equal(image, eager.images[i])
        assert label == int(eager.labels[i])
    assert torch.equal(lazy[-1][0], eager.images[-1])
    assert torch.equal(lazy.load().images, eager.images)
    for beyond in (len(lazy), -len(lazy) - 1):
        with pytest.raises(IndexError):
            lazy[beyond]


def test_a_part_of_a_set(tmp_path: Path) -> None:
    lazy, eager = both(tmp_path, "shards")
    where = torch.tensor([16, 2, 9])
    part = lazy.take(where)
    assert part.ids == [eager.ids[i] for i in where]
    assert torch.equal(part.load().images, eager.images[where])
    assert torch.equal(part.take(torch.tensor([2]))[0][0], eager.images[9])


def test_opening_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, root = write(tmp_path / "a.parquet", pictures(15)), write_folder(tmp_path / "f")
    decodes = Count(monkeypatch, streaming, "decode")
    groups = Count(monkeypatch, datasets.parquet, "read_group")
    for opened in (open_parquet(path), open_folder(root)):
        assert len(opened.targets) == len(opened.ids) == 15
    assert (decodes.calls, groups.calls) == ([], [])
    assert opened.nbytes == 15 * 3 * 8 * 8
    assert len(decodes.calls) == 1  # the first, for its size


# --- the cache ------------------------------------------------------------------------------------


def test_no_more_than_the_cache_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", pictures(20), group=2)
    opened = open_parquet(path, keep=3)
    rows = opened.source
    assert isinstance(rows, ParquetRows)
    decodes = Count(monkeypatch, streaming, "decode")
    groups = Count(monkeypatch, datasets.parquet, "read_group")
    draw = torch.Generator().manual_seed(0)
    asked = 0
    for _ in range(30):
        batch = torch.randint(0, 20, (4,), generator=draw).tolist()
        opened.__getitems__(batch)
        asked += 4
        assert len(rows.cache) <= 3
        assert all(len(cells) <= 2 for cells in rows.cache.values())
    assert asked <= len(decodes.calls) <= asked + 1  # nothing decoded is kept, nor decoded ahead
    before = len(groups.calls)
    rows.cache.clear()
    opened.__getitems__([19, 0, 18, 1, 19, 0])  # two row groups, each read once
    assert len(groups.calls) == before + 2


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    opened = open_parquet(write(tmp_path / "a.parquet", pictures(4), group=1), keep=2)
    assert isinstance(opened.source, ParquetRows)
    for i in (0, 1, 0, 2):
        opened[i]
    assert list(opened.source.cache) == [0, 2]


def test_a_batch_over_more_groups_than_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pictures(20), group=1)
    opened, eager = open_parquet(path, keep=2), read_parquet(path)
    order = list(range(0, 20, 2)) + list(range(19, 0, -2))
    found = torch.stack([image for image, _ in opened.__getitems__(order)])
    assert torch.equal(found, eager.images[order])


def test_a_set_is_handed_to_other_processes_without_its_cache(tmp_path: Path) -> None:
    opened = open_parquet(write(tmp_path / "a.parquet", pictures(9)))
    opened[0]
    assert isinstance(opened.source, ParquetRows)
    assert len(opened.source.cache) == 1
    again = pickle.loads(pickle.dumps(opened))
    assert len(again.source.cache) == 0
    assert torch.equal(again[8][0], opened[8][0])


# --- damage, modes, sizes -------------------------------------------------------------------------


def test_a_damaged_image_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    cells = [encoded(a) for a in pictures(4)]
    cells[2] = cells[2][:50]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": cells, "label": [0, 1, 0, 1]}), path)
    opened = open_parquet(path)
    assert opened[1][1] == 1
    with pytest.raises(InputError, match=r"row 2 of .*a\.parquet is no readable image"):
        opened[2]
    root = write_folder(tmp_path / "f")
    (root / "n0001" / "3.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"3\.png is no readable image"):
        open_folder(root)[8]
    (root / "n0002" / "0.png").rename(root / "gone")
    folder = open_folder(root)
    (root / "n0002" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png cannot be read"):
        folder[10]


def test_rows_of_shards_are_named_by_their_file(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", pictures(5))
    bad = [*map(encoded, pictures(2)), b"nothing"]
    table = pa.table({"img": [{"bytes": b, "path": None} for b in bad], "fine_label": [0, 1, 2]})
    parquet.write_table(table, tmp_path / "1.parquet")
    opened = open_parquet([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert opened.ids == [str(i) for i in range(8)]  # some have no path
    with pytest.raises(InputError, match=r"row 2 of .*1\.parquet is no readable image"):
        opened[7]


def test_a_file_that_went_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pictures(5))
    opened = open_parquet(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read as parquet"):
        opened[0]


@pytest.mark.parametrize("limit", [1, 5, 99])
def test_limit(tmp_path: Path, limit: int) -> None:
    opened = open_parquet(write(tmp_path / "a.parquet", pictures(9)), limit=limit)
    assert len(opened) == min(limit, 9)


def test_incomplete_and_absent_shards(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "s")
    (tmp_path / "s" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match="2 of 3 parquet files"):
        open_parquet(pattern)
    one = tmp_path / "s" / "train-00000-of-00003.parquet"
    assert len(open_parquet(one)) == 6  # who names a file means it
    for absent in (tmp_path / "x-*.parquet", [one, tmp_path / "no.parquet"], []):
        with pytest.raises(InputError, match="not a file"):
            open_parquet(absent)


def test_label_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pictures(6))
    assert open_parquet(path).targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert open_parquet(path, label="coarse_label").targets.tolist() == [0, 0, 1, 0, 0, 1]
    assert read_parquet(path, label="coarse_label").labels.tolist() == [0, 0, 1, 0, 0, 1]
    with pytest.raises(InputError, match="no column 'kind'; it has 'img', 'fine_label'"):
        open_parquet(path, label="kind")
    with pytest.raises(InputError, match="no column 'scan'"):
        open_parquet(path, image="scan")


def test_images_of_differing_size(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f")
    wide = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)
    (root / "n0001" / "x.jpeg").write_bytes(encoded(wide, "JPEG"))
    with pytest.raises(InputError, match=r"x\.jpeg is 12×20 where others are 8×8; .*size="):
        read_folder(root)
    opened = open_folder(root, size=6)
    assert opened.shape == (3, 6, 6)
    assert opened.load().images.shape == (16, 3, 6, 6)
    with pytest.raises(InputError, match="resized to 0 pixels"):
        open_folder(root, size=0)


@pytest.mark.parametrize(
    ("height", "width"), [(12, 20), (20, 12), (7, 3), (6, 6), (6, 9), (31, 30)]
)
def test_resizing_takes_the_centre(height: int, width: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    found = decode(encoded(array), "x", "L", 6)
    assert found.shape == (1, 6, 6)
    scale = 6 / min(height, width)
    shape = (max(6, round(width * scale)), max(6, round(height * scale)))
    whole = np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.BILINEAR))
    top, left = (len(whole) - 6) // 2, (whole.shape[1] - 6) // 2
    assert np.array_equal(found[0], whole[top : top + 6, left : left + 6])
    if (height, width) == (6, 6):
        assert np.array_equal(found[0], array)


def test_grey_transparent_and_cmyk_images() -> None:
    colour = pictures(1)[0]
    grey = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.array_equal(decode(encoded(colour), "x", "L")[0], grey)
    assert np.array_equal(decode(encoded(grey), "x"), np.stack([grey] * 3))
    alpha = np.concatenate([colour, np.full((8, 8, 1), 9, np.uint8)], 2)
    assert np.array_equal(decode(encoded(alpha), "x"), colour.transpose(2, 0, 1))
    ink = decode(encoded(colour, "JPEG", "CMYK"), "x")
    assert ink.shape == (3, 8, 8)
    assert abs(ink.astype(int).mean() - colour.mean()) < 20
    bilevel = decode(encoded(grey, mode="1"), "x", "L")
    assert set(np.unique(bilevel)) <= {0, 255}


def test_palettes_with_transparency_are_read_without_a_warning() -> None:
    image = Image.fromarray(pictures(1)[0]).convert("P")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(range(256)))
    found = decode(buffer.getvalue(), "x")
    assert np.array_equal(found, np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_deep_images_are_refused() -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    with pytest.raises(InputError, match=r"x (has more than 8 bits|is no readable image)"):
        decode(encoded(deep), "x")


# --- MedMNIST's npz -------------------------------------------------------------------------------


def npz(path: Path, n: int = 12, colour: bool = False, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part in ("train", "val", "test"):
        shape = (n, 28, 28, 3) if colour else (n, 28, 28)
        arrays[f"{part}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n, dtype=np.uint8) % 3)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(arrays | changes))
    return path


@pytest.mark.parametrize("colour", [False, True])
def test_an_npz_file(tmp_path: Path, colour: bool) -> None:
    path = npz(tmp_path / "a.npz", colour=colour)
    raw = np.load(path)["test_images"]
    found = read_npz(path, "test")
    assert found.images.shape == (12, 3 if colour else 1, 28, 28)
    for i in range(12):
        planes = raw[i].transpose(2, 0, 1) if colour else raw[i][None]
        assert np.array_equal(found.images[i].numpy(), planes)
    assert found.labels.tolist() == [0, 1, 2] * 4
    assert found.labels.dtype == torch.int64
    assert found.ids == [str(i) for i in range(12)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_labels": np.zeros((12, 14), np.uint8)}, "one label per image"),
        ({"train_labels": np.zeros((11, 1), np.uint8)}, "one label per image"),
        ({"train_labels": np.full((12, 1), 0.5)}, "no whole number"),
        ({"train_labels": np.full((12, 1), -1)}, "no whole number"),
        ({"train_images": np.zeros((12, 8, 8, 8), np.uint8)}, "only 8-bit 2-d images"),
        ({"train_images": np.zeros((12, 8, 8))}, "only 8-bit 2-d images"),
        ({"train_images": np.array([{}] * 12, dtype=object)}, "cannot be read as an npz"),
    ],
)
def test_unusable_npz_files(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_npz(npz(tmp_path / "a.npz", **changes))


def test_no_npz_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no extra_images"):
        read_npz(npz(tmp_path / "a.npz"), "extra")
    (tmp_path / "b.npz").write_bytes(b"nonsense")
    np.save(tmp_path / "c.npy", np.zeros(3))
    cut = tmp_path / "d.npz"
    cut.write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    for path in (tmp_path / "b.npz", tmp_path / "c.npy", cut, tmp_path / "absent.npz"):
        with pytest.raises(InputError, match="cannot be read as an npz"):
            read_npz(path)


# --- tasks ----------------------------------------------------------------------------------------

MAKE = partial(networks.ThreeConv, 3)
FIT = efface.Settings(epochs=2, batch_size=6, lr=0.05)


def test_a_streamed_task_trains_to_the_same_bytes(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "s", each=8)
    options: Any = {"network": MAKE, "fit": FIT, "augment": datasets.CropFlip(1)}
    eager = image_task(read_parquet(pattern), read_parquet(pattern), **options)
    opened = open_parquet(pattern, keep=2)
    lazy = image_task(opened, open_parquet(pattern), memory=0, **options)
    loaded = image_task(opened, open_parquet(pattern), **options)
    assert isinstance(eager.records, TensorRecords)
    assert isinstance(lazy.records, LoadedRecords)
    assert isinstance(loaded.records, TensorRecords)
    assert eager.ids_ == lazy.ids_ == loaded.ids_
    states = [efface.train(task, seed=1).network.state_dict() for task in (eager, lazy, loaded)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        assert torch.equal(value, states[2][key]), key


def test_forgetting_in_a_streamed_task(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", each=8)
    task = image_task(open_folder(root), read_folder(root), network=MAKE, fit=FIT, memory=0)
    trained = efface.train(task)
    split = efface.Split.by_ids(task, ["n0000/1.png", "n0002/5.png"])
    after = efface.forget(trained, split, efface.unlearn.FineTune(epochs=1, lr=0.01))
    assert after.lineage[-1].verb == "forget"
    poisoned, positions = datasets.with_trigger(task, 0.25, datasets.Patch(2))
    assert poisoned.records.targets[positions].tolist() == [0] * 6
    image, label = poisoned.train[int(positions[0])]
    assert bool((image[:, 4:6, 4:6] == 0).all())
    assert label == 0


def test_the_memory_limit_decides(tmp_path: Path) -> None:
    opened = open_folder(write_folder(tmp_path / "f"))
    assert opened.nbytes == 15 * 192
    for memory, kind in ((15 * 192, TensorRecords), (15 * 192 - 1, LoadedRecords)):
        task = image_task(opened, opened, network=MAKE, memory=memory)
        assert isinstance(task.records, kind)


def test_a_routine_of_the_owners_gets_a_streamed_data_set(tmp_path: Path) -> None:
    seen = []

    def train_fn(network: Any, dataset: Any, seed: int) -> None:
        seen.extend(dataset[i] for i in range(len(dataset)))

    opened = open_folder(write_folder(tmp_path / "f"))
    efface.train(image_task(opened, opened, network=MAKE, memory=0, train_fn=train_fn))
    assert len(seen) == 15
    assert torch.equal(seen[4][0], opened[4][0])


def test_held_out_records_are_balanced_and_disjoint(tmp_path: Path) -> None:
    opened = open_parquet(write_shards(tmp_path / "s", each=8))
    task = image_task(opened, opened, network=MAKE, validation=6, n=9)
    assert task.validation[1].bincount().tolist() == [2, 2, 2]
    assert task.records.targets.bincount().tolist() == [3, 3, 3]
    eager = image_task(opened.load(), opened, network=MAKE, validation=6, n=9)
    assert eager.ids_ == task.ids_
    assert torch.equal(eager.validation[0], task.validation[0])
    pool = {bytes(image.numpy()) for image in task.validation[0]}
    assert not pool & {bytes(image.numpy()) for image in task.train[0]}
    assert image_task(opened, opened, network=MAKE, validation=0).validation is None


@pytest.mark.slow
def test_streaming_with_workers(tmp_path: Path) -> None:
    opened = open_parquet(write_shards(tmp_path / "s", each=8))
    options: Any = {"network": MAKE, "fit": FIT, "memory": 0}
    tasks = [image_task(opened, opened, workers=w, **options) for w in (0, 2)]
    one, two = (efface.train(task).network.state_dict() for task in tasks)
    assert all(torch.equal(one[key], two[key]) for key in one)


# --- built-in tasks -------------------------------------------------------------------------------


def hub(name: str, part: str, n: int, classes: int, size: int, grey: bool = False) -> None:
    arrays = pictures(n, size)
    cells = [encoded(a[:, :, 0] if grey else a) for a in arrays]
    labels = [i % classes for i in range(n)]
    columns: dict[str, Any] = {"image": [{"bytes": c, "path": None} for c in cells]}
    if name == "cifar100":
        columns = {"img": columns["image"], "fine_label": labels}
        columns["coarse_label"] = [label % 20 for label in labels]
    else:
        columns["label"] = labels
    folder = {"svhn": "cropped_digits"}.get(name, name)
    path = Path("data") / folder / f"{part}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "classes", "shape"),
    [("cifar100", 100, (3, 32, 32)), ("svhn", 10, (3, 32, 32)), ("mnist", 10, (1, 28, 28))],
)
def test_built_in_tasks_from_the_hubs_files(name: str, classes: int, shape: Any) -> None:
    with pytest.raises(InputError, match=rf"{name}-train\.parquet.*EFFACE_DATA"):
        datasets.load_task(name)
    hub(name, "train", 3 * classes, classes, shape[1], grey=shape[0] == 1)
    with pytest.raises(InputError, match="test images are not at hand"):
        datasets.load_task(name)
    hub(name, "test", 2 * classes, classes, shape[1], grey=shape[0] == 1)
    task = getattr(datasets, name)(validation=classes)
    assert len(task.ids_) == 2 * classes
    assert task.classes == classes
    image, _ = task.records.raw(0)
    assert tuple(image.shape) == shape
    assert task.network()(image[None]).shape == (1, classes)
    assert task.name == name
    assert getattr(datasets, name)(validation=0, n=classes).name == f"{name}-{classes}"


def test_coarse_labels_of_cifar100() -> None:
    hub("cifar100", "train", 200, 100, 32)
    hub("cifar100", "test", 100, 100, 32)
    task = datasets.cifar100(validation=20, label="coarse_label")
    assert task.classes == 20
    assert task.name == "cifar100-coarse"
    assert task.network()(task.records.raw(0)[0][None]).shape == (1, 20)
    wrong: Any = "label"
    with pytest.raises(InputError, match="no 'label'; ask for 'fine_label'"):
        datasets.cifar100(label=wrong)


def test_built_in_tasks_from_image_folders() -> None:
    for part in ("train", "test"):
        write_folder(Path("data/cifar100") / part, classes=3, size=32)
    task = datasets.cifar100(validation=3)
    assert task.classes == 3
    assert len(task.ids_) == 12
    with pytest.raises(InputError, match="image folder and has no 'coarse_label'"):
        datasets.cifar100(label="coarse_label")


def test_another_sets_folder_is_not_taken() -> None:
    for part in ("train", "test"):
        write_folder(Path("data") / part, size=32)
    with pytest.raises(InputError, match="not at hand"):
        datasets.svhn()


@pytest.mark.parametrize(
    ("archive", "call"),
    [
        ("data/cifar-10-batches-py/data_batch_1", lambda: datasets.cifar10()),
        ("data/cifar-100-python/train", lambda: datasets.cifar100()),
        ("data/cifar-100-python.tar.gz", lambda: datasets.cifar100()),
        ("data/cifar-10-batches-py/data_batch_1", lambda: read_folder("data")),
        ("data/cifar-10-batches-py/data_batch_1", lambda: read_folder("data/cifar-10-batches-py")),
    ],
)
def test_pickled_archives_are_refused(archive: str, call: Any) -> None:
    Path(archive).parent.mkdir(parents=True, exist_ok=True)
    Path(archive).write_bytes(b"")
    with pytest.raises(InputError, match="pickled, which can run code and is never read"):
        call()


@pytest.mark.parametrize("colour", [False, True])
def test_medmnist(colour: bool) -> None:
    with pytest.raises(InputError, match=r"bloodmnist\.npz is not at hand"):
        datasets.medmnist("bloodmnist")
    npz(Path("data/medmnist/bloodmnist.npz"), colour=colour)
    task = datasets.medmnist("bloodmnist")
    assert (len(task.ids_), len(task.validation[1]), len(task.test_records)) == (12, 12, 12)
    image, _ = task.records.raw(0)
    assert task.network()(image[None]).shape == (1, 3)
    assert datasets.medmnist("bloodmnist", n=6).name == "bloodmnist-6"


def test_the_copy_of_decoded_pixels_keeps_its_name(tmp_path: Path) -> None:
    """Who has decoded CIFAR-10 once need not do so again after an update."""
    import hashlib

    path = write(tmp_path / "a.parquet", pictures(6))
    read_parquet(path, cache=True)
    key = [hashlib.sha256(path.read_bytes()).hexdigest(), None, None, None, 1]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"images-{name}.safetensors"]
    for options in ({"mode": "L"}, {"size": 4}, {"label": "coarse_label"}):
        read_parquet(path, cache=True, **options)  # type: ignore[arg-type]
    assert len(list((tmp_path / "cache").iterdir())) == 4
    pattern = write_shards(tmp_path / "s")
    first = read_parquet(pattern, cache=True)
    again = read_parquet(pattern, cache=True)
    assert torch.equal(first.images, again.images)
    assert first.ids == again.ids
    assert source.read_parquet is read_parquet


def test_an_unknown_task_is_still_named() -> None:
    with pytest.raises(TaskError, match="did you mean 'cifar100'"):
        datasets.load_task("cifar-100")
