"""Model files: they come back as they were written, or say what is wrong with them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import efface
from efface.checkpoint import describe_file
from efface.errors import CheckpointError, MismatchError, OutputError, WriteError
from efface.mask import Mask, unpack
from efface.sparsify import OneShot
from efface.trained import TrainedModel, weights_digest
from efface.unlearn import FineTune

NewTask = Callable[..., efface.Task]


@pytest.fixture(scope="module")
def rich(task: efface.Task, split: efface.Split) -> TrainedModel:
    """A model with everything: mask, rewind weights, four steps, two requests."""
    model = efface.prune(efface.train(task, seed=0, rewind=2), OneShot(0.5, recovery=1))
    first = efface.forget(model, split, FineTune(epochs=1))
    last = efface.forget(first, efface.Split.where(task, "subject == 'person-01'"), "finetune")
    last.rewind = model.rewind  # which no model keeps that was made to forget; the file can
    return last


def same(a: TrainedModel, b: TrainedModel) -> None:
    assert b.digest == a.digest
    assert b.network.state_dict().keys() == a.network.state_dict().keys()
    for name, tensor in a.network.state_dict().items():
        assert torch.equal(b.network.state_dict()[name], tensor)
    assert b.mask == a.mask
    assert (a.rewind is None) == (b.rewind is None)
    if a.rewind is not None and b.rewind is not None:
        assert weights_digest(a.rewind) == weights_digest(b.rewind)
    assert json.dumps([dataclasses.asdict(s) for s in b.lineage], sort_keys=True) == json.dumps(
        [dataclasses.asdict(s) for s in a.lineage], sort_keys=True
    )
    assert (b.forgotten, b.initial) == (a.forgotten, a.initial)


@pytest.mark.parametrize("which", ["trained", "pruned", "conv_trained", "rich"])
def test_round_trip(request: pytest.FixtureRequest, tmp_path: Path, which: str) -> None:
    model = request.getfixturevalue(which)
    before = model.digest
    path = model.save(tmp_path / "m.safetensors")
    back = efface.load(path, model.task)
    same(model, back)
    assert model.digest == before
    # the same bytes every time, and once more from what was read
    assert model.to_bytes() == path.read_bytes() == back.to_bytes()


def test_a_loaded_model_goes_on_as_the_saved_one(rich: TrainedModel, tmp_path: Path) -> None:
    back = efface.load(rich.save(tmp_path / "m.safetensors"), rich.task)
    split = efface.Split.where(rich.task, "age > 60")
    results = [efface.forget(m, split, FineTune(epochs=1), seed=3) for m in (rich, back)]
    assert results[0].digest == results[1].digest
    assert results[0].forgotten == results[1].forgotten


def test_ordinary_names_and_packed_bits(rich: TrainedModel, tmp_path: Path) -> None:
    tensors = load_file(rich.save(tmp_path / "m.safetensors"))
    assert set(rich.network.state_dict()) <= set(tensors)
    assert rich.mask is not None
    for name, keep in rich.mask.items():
        packed = tensors[f"mask.{name}"]
        assert packed.dtype == torch.uint8
        for i, bit in enumerate(keep.flatten().tolist()):
            assert bool(packed[i // 8] >> (i % 8) & 1) == bit
    assert {n for n in tensors if n.startswith("rewind.")} == {f"rewind.{n}" for n in rich.rewind}


def header(data: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    (length,) = struct.unpack("<Q", data[:8])
    whole = json.loads(data[8 : 8 + length])
    return whole.pop("__metadata__"), whole


def test_metadata_says_what_the_design_asks(rich: TrainedModel) -> None:
    metadata, _ = header(rich.to_bytes())
    assert metadata["schema"] == "efface.model/1"
    assert metadata["task"] == "blobs"
    assert metadata["weights_digest"] == rich.digest
    assert metadata["mask_digest"] == rich.mask.digest  # type: ignore[union-attr]
    assert metadata["parent_digest"] == rich.lineage[-1].parent
    assert json.loads(metadata["method"])["method"] == "finetune"
    assert [s["verb"] for s in json.loads(metadata["lineage"])] == [
        "train",
        "prune",
        "forget",
        "forget",
    ]
    assert {"wall", "cpu", "images", "threads", "foreign_load"} <= set(json.loads(metadata["cost"]))
    assert {"efface", "torch", "numpy", "python"} == set(json.loads(metadata["versions"]))
    forgotten = json.loads(metadata["forgotten"])
    assert len(forgotten["requests"]) == 2
    assert forgotten["tags"] == sorted(forgotten["tags"])


def test_no_plain_id_is_written(rich: TrainedModel, task: efface.Task) -> None:
    data = rich.to_bytes()
    assert all(record.encode() not in data for record in task.ids_)
    assert task.subjects_ is not None
    assert all(subject.encode() not in data for subject in task.subjects_)
    assert b"test key" not in data
    assert len(rich.forgotten.tags) > 24


@pytest.mark.parametrize("column", ["person", "record"])
def test_values_of_columns_that_identify_are_not_written(new_task: NewTask, column: str) -> None:
    names = {"person": [f"secret-{i // 4:02d}" for i in range(120)]}
    names["record"] = [f"secret-{i:03d}" for i in range(120)]
    task = new_task(columns=names, ids="record", subjects="person")
    model = TrainedModel(task, task.network())
    expression = {
        "person": "person == 'secret-03' or 'secret-04' == person or not person != 'secret-05'",
        "record": "record in ('secret-001', 'secret-002') or id == 'secret-004'",
    }[column]
    after = efface.forget(model, efface.Split.where(task, expression), FineTune(epochs=0))
    assert b"secret-" not in after.to_bytes()


def test_a_header_may_begin_like_a_pickle(new_task: NewTask, tmp_path: Path) -> None:
    """The first byte is the header's length modulo 256, and 0x80 opens every pickle."""
    for length in range(1, 257, 8):
        task = new_task(name="n" * length)
        model = TrainedModel(task, task.network())
        if model.to_bytes()[0] == 0x80:
            break
    path = model.save(tmp_path / "m.safetensors")
    assert path.read_bytes()[0] == 0x80
    same(model, efface.load(path, task))


# --- damage ---------------------------------------------------------------------------------------


def little(new_task: NewTask) -> efface.Task:
    return new_task(
        network=lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)),
        fit=efface.Settings(epochs=1, batch_size=60, lr=0.01),
    )


@pytest.fixture(scope="module")
def small(new_task: NewTask) -> TrainedModel:
    task = little(new_task)
    model = efface.prune(efface.train(task, rewind=1), OneShot(0.5, recovery=0))
    after = efface.forget(model, efface.Split.by_class(task, 0), FineTune(epochs=0))
    after.rewind = model.rewind
    return after


def test_no_flipped_bit_goes_unnoticed(small: TrainedModel, tmp_path: Path) -> None:
    """Refused with the right error, or the same model all the same (padding)."""
    data = small.to_bytes()
    draw = np.random.default_rng(0)
    (length,) = struct.unpack("<Q", data[:8])
    edges = [*range(10), 8 + length - 1, 8 + length, 8 + length + 1, len(data) - 1]
    inside = draw.integers(0, len(data), 150).tolist()
    refused = 0
    for position in [*edges, *inside]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(draw.integers(8))
        path = tmp_path / "m.safetensors"
        path.write_bytes(bytes(damaged))
        try:
            back = efface.load(path, small.task)
        except CheckpointError:
            refused += 1
        else:
            same(small, back)
    assert refused > 120


def test_every_truncation_is_refused(small: TrainedModel, tmp_path: Path) -> None:
    data = small.to_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    draw = np.random.default_rng(1)
    cuts = {0, 1, 7, 8, 9, 8 + length - 1, 8 + length, len(data) - 1}
    cuts |= set(draw.integers(0, len(data), 60).tolist())
    for cut in sorted(cuts):
        path = tmp_path / "m.safetensors"
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            efface.load(path, small.task)
        with pytest.raises(CheckpointError):
            describe_file(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        efface.load(path, small.task)


def rewritten(
    model: TrainedModel,
    path: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> Path:
    """The model's file with things changed by someone else."""
    path.write_bytes(model.to_bytes())
    there = load_file(path)
    tensors(there)
    own, _ = header(model.to_bytes())
    changed = {k: v for k, v in (own | dict(metadata or {})).items() if v is not None}
    save_file(there, path, changed)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["0.weight"].add_(1e-6),
        lambda t: t["mask.0.weight"].bitwise_xor_(1),
        lambda t: t["rewind.0.bias"].add_(1),
        lambda t: t.pop("mask.0.weight"),
        lambda t: t.pop("rewind.0.bias"),
        lambda t: t.pop("0.weight"),
        lambda t: t.update(extra=torch.zeros(2)),
        lambda t: t.update({"mask.0.weight": t["mask.0.weight"][:1]}),
        lambda t: t.update({"0.weight": t["0.weight"].double()}),
    ],
)
def test_changed_tensors_are_refused(
    small: TrainedModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]
) -> None:
    path = rewritten(small, tmp_path / "m.safetensors", tensors=change)
    with pytest.raises(CheckpointError):
        efface.load(path, small.task)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "other"},
        {"parent_digest": "0" * 64},
        {"forgotten": '{"key":null,"requests":[],"tags":[]}'},
        {"metadata_digest": None},
        {"schema": None},
        {"schema": "efface.model/99"},
        {"lineage": "[]"},
        {"extra": "x"},
    ],
    ids=str,
)
def test_changed_metadata_is_refused(
    small: TrainedModel, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError):
        efface.load(rewritten(small, tmp_path / "m.safetensors", metadata=change), small.task)


def test_a_description_says_whether_the_file_is_intact(small: TrainedModel, tmp_path: Path) -> None:
    path = small.save(tmp_path / "m.safetensors")
    found = describe_file(path)
    assert found["intact"]
    assert found["sparsity"] == 0.5
    assert (found["forgotten"], found["requests"]) == (40, 1)
    assert [step["verb"] for step in found["lineage"]] == ["train", "prune", "forget"]
    assert found["parameters"] == 6 * 4 + 4 + 4 * 3 + 3
    changed = rewritten(small, path, tensors=lambda t: t["0.weight"].add_(1))
    assert not describe_file(changed)["intact"]
    changed = rewritten(small, path, tensors=lambda t: t["rewind.0.weight"].add_(1))
    assert not describe_file(changed)["intact"]


# --- other networks, other files ------------------------------------------------------------------


def test_tied_weights(new_task: NewTask, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.second(self.first(x).relu()))
            return out

    task = new_task(network=Tied)
    model = efface.prune(efface.train(task), OneShot(0.5, recovery=1))
    back = efface.load(model.save(tmp_path / "m.safetensors"), task)
    same(model, back)
    assert back.network.first.weight is back.network.second.weight


class Awkward(nn.Module):
    """A network whose parts carry the names of the file's own name spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.initial, self.rewind = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rewind(self.initial(self.mask(x).relu()).relu())
        return out


def test_parts_named_like_the_name_spaces(new_task: NewTask, tmp_path: Path) -> None:
    task = new_task(network=Awkward)
    model = efface.prune(efface.train(task, rewind=1), OneShot(0.5, recovery=1))
    path = model.save(tmp_path / "m.safetensors")
    same(model, efface.load(path, task))
    assert set(model.network.state_dict()) <= set(load_file(path))
    assert describe_file(path)["intact"]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_are_refused_and_never_opened(
    small: TrainedModel, tmp_path: Path, protocol: int
) -> None:
    flag = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (flag,))

    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(Trap(), protocol=protocol))
    with pytest.raises(CheckpointError, match="pickle" if protocol > 1 else "safetensors"):
        efface.load(path, small.task)
    assert not flag.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_saves_are_refused_with_a_way_out(
    small: TrainedModel, tmp_path: Path, legacy: bool
) -> None:
    path = tmp_path / "m.pt"
    torch.save(small.network.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pickle.*save_file"):
        efface.load(path, small.task)


def test_foreign_safetensors_point_to_adopt(small: TrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(small.network.state_dict(), path)
    with pytest.raises(CheckpointError, match="adopt"):
        efface.load(path, small.task)
    with pytest.raises(CheckpointError, match="cannot be read"):
        efface.load(tmp_path / "absent.safetensors", small.task)
    with pytest.raises(CheckpointError, match="cannot be read"):
        efface.load(tmp_path, small.task)


def test_what_does_not_fit_is_named(small: TrainedModel, new_task: NewTask, tmp_path: Path) -> None:
    path = small.save(tmp_path / "m.safetensors")
    other = new_task(
        network=lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 3))
    )
    with pytest.raises(CheckpointError) as caught:
        efface.load(path, other)
    said = str(caught.value)
    assert "missing: '2.weight', '2.bias'" in said
    assert "0.weight: (4, 6) instead of (5, 6)" in said
    fewer = new_task(network=lambda: nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(CheckpointError, match=r"unexpected: '1\.(weight|bias)'"):
        efface.load(path, fewer)


def test_outputs_are_not_replaced_unasked(small: TrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force"):
        small.save(path)
    assert path.read_bytes() == b"mine"
    small.save(path, force=True)
    same(small, efface.load(path, small.task))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises((OutputError, WriteError)):
        small.save(path / "below.safetensors")


def test_a_failing_write_leaves_the_old_file(
    small: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.save(tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        small.copy().save(path, force=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# --- IDs, keys and data ---------------------------------------------------------------------------


def test_another_key_is_noticed(
    small: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = efface.load(small.save(tmp_path / "m.safetensors"), small.task)
    monkeypatch.setenv("EFFACE_KEY", "another")
    with pytest.raises(MismatchError, match="another key"):
        efface.forget(back, efface.Split.by_class(small.task, 1), "finetune")
    monkeypatch.delenv("EFFACE_KEY")
    (tmp_path / "key").write_text("another\n")
    monkeypatch.setenv("EFFACE_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(MismatchError, match="another key"):
        efface.audit(small, back, efface.Split.by_class(small.task, 1))


def test_tags_differ_by_key(small: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = TrainedModel(small.task, copy.deepcopy(small.network))
    split = efface.Split.by_class(small.task, 0)
    monkeypatch.setenv("EFFACE_KEY", "another")
    other = efface.forget(dense, split, FineTune(epochs=0)).forgotten
    assert not set(other.tags) & set(small.forgotten.tags)
    assert len(other.tags) == len(small.forgotten.tags) == 40
    assert other.key != small.forgotten.key


def test_reordered_data_under_positional_ids_is_refused(new_task: NewTask, tmp_path: Path) -> None:
    plain = new_task(ids=None)
    path = efface.train(plain).save(tmp_path / "m.safetensors")
    efface.load(path, new_task(ids=None))
    x, y = plain.train
    back = torch.arange(119, -1, -1)
    for train in ((x[back], y[back]), (x[:100], y[:100]), (x + 1e-3, y)):
        other = new_task(ids=None, train=train, subjects=None, columns={})
        with pytest.raises(MismatchError, match="positions"):
            efface.load(path, other)


def test_reordered_data_under_stable_ids_is_the_same_data(
    new_task: NewTask, trained: TrainedModel, split: efface.Split, tmp_path: Path
) -> None:
    after = efface.forget(trained, split, FineTune(epochs=0))
    path = after.save(tmp_path / "m.safetensors")
    x, y = trained.task.train
    back = torch.arange(119, -1, -1)
    ids = [trained.task.ids_[i] for i in back.tolist()]
    task = new_task(train=(x[back], y[back]), ids=ids, subjects=None, columns={})
    again = efface.load(path, task)
    gone = again.forgotten.positions(task).tolist()
    assert sorted(task.ids_[i] for i in gone) == sorted(
        trained.task.ids_[i] for i in split.forget.tolist()
    )


def test_set_mask_refuses_masks_of_other_networks(trained: TrainedModel) -> None:
    model = trained.copy()
    for keep in (torch.ones(3, 3), torch.ones(16, 5)):
        with pytest.raises(MismatchError, match="another network"):
            model.set_mask(Mask({"0.weight": keep.bool()}))
    assert model.mask is None
    assert model.digest == trained.digest


def test_copies_share_no_weights(rich: TrainedModel) -> None:
    copied = rich.copy()
    same(rich, copied)
    with torch.no_grad():
        for p in copied.network.parameters():
            p.zero_()
    assert copied.digest != rich.digest
    assert unpack(torch.tensor([5], dtype=torch.uint8), (3,)).tolist() == [True, False, True]
