"""The bytes of an update: layout, pruning, rounding and coding, each against a slow twin."""

from __future__ import annotations

import math
import random
import struct
import threading
import tracemalloc
import zlib
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from efface.errors import LogError, MethodError
from efface.networks import ResNet20
from efface.updates import codec, payload
from efface.updates.codec import KINDS, Kind, add_all, add_to, decode, encode
from efface.updates.layout import Layout
from efface.updates.pruning import Update, prune, prune_update

Floats = np.ndarray[Any, np.dtype[np.float32]]
NONE = np.empty(0, np.float32)
LARGEST = float(np.finfo(np.float32).max)
DENORMAL = 2.0**-149


def plain(*sizes: int, dense: int = 0) -> Layout:
    """A layout of vectors."""
    return Layout(
        tuple((f"w{i}", (n,)) for i, n in enumerate(sizes)), (("b", (dense,)),) if dense else (), ()
    )


def update_of(
    values: Any, size: int | None = None, indices: Any = None, dense: Any = NONE
) -> Update:
    values = np.asarray(values, np.float32)
    indices = np.arange(len(values)) if indices is None else np.asarray(indices, np.int64)
    return Update(
        len(values) if size is None else size, indices, values, np.asarray(dense, np.float32)
    )


def bits(values: Floats) -> list[int]:
    return [int(b) for b in values.view(np.uint32)]


# ---------------------------------------------------------------------------------------- twins


def slow_prune(
    delta: Floats, layout: Layout, keep: float, alive: list[int] | None = None
) -> list[int]:
    """Indices by sorting every layer, in pure Python."""
    found = []
    for layer, (a, b) in enumerate(pairwise(layout.bounds.tolist())):
        n = alive[layer] if alive else b - a
        k = min(n, max(1, round(keep * n)))
        order = sorted(range(a, b), key=lambda i: (-abs(float(delta[i])), i))
        found += [i for i in order[:k] if delta[i] != 0]
    return sorted(found)


def slow_bf16(value: float) -> float:
    """The nearest number with 8 bits of precision, ties to even, by exact arithmetic."""
    if value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 8, -133)
    return math.ldexp(round(math.ldexp(value, -exponent)), exponent)


def slow_fp16(value: float, largest: float) -> float:
    """Of a stretch scaled by a power of two so that its largest lies in [2¹⁴, 2¹⁵)."""
    power = math.frexp(largest)[1]
    half = struct.unpack("<e", struct.pack("<e", math.ldexp(value, 15 - power)))[0]
    return math.ldexp(half, power - 15)


def slow_gaps(indices: list[int], last: int = -1) -> bytes:
    """Distances, a byte each; what is beyond 255 of the far ones follows behind."""
    out, more = [], []
    for i in indices:
        gap = i - last - 1
        out.append(min(gap, 255))
        if gap >= 255:
            left = gap - 255
            while left >= 255:
                more.append(255)
                left -= 255
            more.append(left)
        last = i
    return bytes(out + more)


def slow_bitmask(indices: list[int]) -> bytes:
    out = bytearray(indices[-1] // 8 + 1)
    for i in indices:
        out[i // 8] |= 1 << (i % 8)
    return bytes(out)


def slow_stretches(update: Update, bounds: list[int]) -> list[range]:
    """Positions among the values that share a scale: of one layer in one block."""
    return [
        range(len(run))[:0] if not run else range(run[0], run[-1] + 1)
        for a in range(0, len(update.values), payload.BLOCK)
        for low, high in pairwise(bounds)
        if (
            run := [
                p
                for p in range(a, min(a + payload.BLOCK, len(update.values)))
                if low <= update.indices[p] < high
            ]
        )
    ]


# --------------------------------------------------------------------------------------- layout


def test_layout_of_a_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Linear(64, 10))
    layout = Layout.of(network)
    assert [name for name, _ in layout.sparse] == ["0.weight"]
    assert [name for name, _ in layout.dense] == [
        "0.bias", "1.weight", "1.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    assert [name for name, _ in layout.buffers] == ["1.running_mean", "1.running_var"]
    assert layout.size == 3 * 64 * 9
    assert layout.total == layout.size + 64 * 3 + 650 + 128
    assert Layout.of(network, buffers=False).buffers == ()
    assert [name for name, _ in Layout.of(network, small=640).sparse] == ["0.weight", "2.weight"]


def test_layout_leaves_out_frozen_and_counts_shared_once() -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    network[1].weight = network[0].weight
    network[1].bias.requires_grad_(False)
    layout = Layout.of(network)
    assert [name for name, _ in layout] == ["0.weight", "0.bias"]


def test_parts_are_views_in_index_order() -> None:
    network = ResNet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layout = Layout.of(network)
    state = dict(network.named_parameters()) | dict(network.named_buffers())
    flat = np.concatenate([state[name].detach().numpy().ravel() for name, _ in layout])
    parts = layout.parts(flat)
    assert flat.shape == (layout.total,)
    for name, part in parts.items():
        assert np.shares_memory(part, flat)
        assert np.array_equal(part, state[name].detach().numpy())
    with pytest.raises(LogError, match="none of this layout"):
        layout.parts(flat[1:])


def test_layout_round_trips_and_has_a_fingerprint() -> None:
    layout = Layout.of(ResNet20())
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.fingerprint == layout.fingerprint
    other = Layout(layout.sparse[::-1], layout.dense, layout.buffers)
    assert other.fingerprint != layout.fingerprint
    with pytest.raises(LogError, match="damaged"):
        Layout.from_json({"sparse": [["w"]], "dense": [], "buffers": []})


# -------------------------------------------------------------------------------------- pruning


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    st.floats(0.001, 1),
    st.integers(0, 60),
)
def test_prune_equals_sorting(numbers: list[int], keep: float, cut: int) -> None:
    delta = np.array(numbers, np.float32) / 8
    layout = plain(min(cut, len(delta)), max(0, len(delta) - cut))
    found = prune(delta, layout, keep)
    assert found.indices.tolist() == slow_prune(delta, layout, keep)
    assert bits(found.values) == bits(delta[found.indices])
    assert found.indices.dtype == np.int64
    assert found.values.dtype == np.float32


def test_prune_counts_exactly_and_keeps_the_dense_part() -> None:
    draw = np.random.default_rng(0)
    layout = plain(1000, 15, 3, dense=7)
    delta = draw.normal(size=layout.total).astype(np.float32)
    found = prune(delta, layout, 0.1)
    per_layer = np.diff(np.searchsorted(found.indices, layout.bounds)).tolist()
    assert per_layer == [100, 2, 1]
    assert np.array_equal(found.dense, delta[-7:])
    found.dense[:] = 0
    assert (delta[-7:] != 0).all()


def test_prune_counts_what_a_mask_keeps() -> None:
    draw = np.random.default_rng(1)
    delta = draw.normal(size=2000).astype(np.float32)
    delta[draw.random(2000) < 0.9] = 0
    layout = plain(1200, 800)
    alive = [int(np.count_nonzero(delta[:1200])), int(np.count_nonzero(delta[1200:]))]
    found = prune(delta, layout, 0.5, alive=alive)
    assert len(found.values) == sum(round(0.5 * n) for n in alive)
    assert found.indices.tolist() == slow_prune(delta, layout, 0.5, alive)
    assert len(prune(delta, layout, 0.5).values) == sum(alive)  # 0 is never stored
    assert len(prune(delta, layout, 0.5, alive=[0, 1]).values) == 1


def test_prune_at_random() -> None:
    draw = np.random.default_rng(2)
    layout = plain(500, 300)
    delta = draw.normal(size=800).astype(np.float32)
    delta[::3] = 0
    first, second, other = (
        prune(delta, layout, 0.2, "random", generator=np.random.default_rng(seed))
        for seed in (5, 5, 6)
    )
    assert np.array_equal(first.indices, second.indices)
    assert not np.array_equal(first.indices, other.indices)
    assert np.diff(np.searchsorted(first.indices, layout.bounds)).tolist() == [100, 60]
    assert (first.values != 0).all()
    share = np.zeros(800)
    for _ in range(300):
        share[prune(delta, layout, 0.2, "random", generator=draw).indices] += 1 / 300
    assert abs(share[1:500:3].mean() - share[2:500:3].mean()) < 0.03  # no place is favoured


@pytest.mark.parametrize("pick", ["magnitude", "random"])
def test_prune_again_is_prune(pick: Any) -> None:
    draw = np.random.default_rng(3)
    layout = plain(400, 90, 0, 30, dense=5)
    delta = draw.integers(-9, 10, layout.total).astype(np.float32)
    wide = prune(delta, layout, 0.5)
    again = prune_update(wide, layout, 0.1, pick, generator=draw)
    assert again.size == wide.size
    assert np.array_equal(again.dense, wide.dense)
    assert np.diff(np.searchsorted(again.indices, layout.bounds)).tolist() == [40, 9, 0, 3]
    assert bits(again.values) == bits(delta[again.indices])
    if pick == "magnitude":
        assert np.array_equal(again.indices, prune(delta, layout, 0.1).indices)


def test_prune_refuses() -> None:
    delta, layout = np.ones(4, np.float32), plain(4)
    for keep in (0, -1, 1.01, math.nan):
        with pytest.raises(MethodError, match="keep must lie in"):
            prune(delta, layout, keep)
    with pytest.raises(MethodError, match="pick must be"):
        prune(delta, layout, 0.5, "first")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="needs a generator"):
        prune(delta, layout, 0.5, "random")
    for alive in ([], [5], [-1]):
        with pytest.raises(MethodError, match="alive must hold"):
            prune(delta, layout, 0.5, alive=alive)
    with pytest.raises(LogError, match="none of this layout"):
        prune(delta[1:], layout, 0.5)
    with pytest.raises(LogError, match="none of this layout"):
        prune_update(update_of([1]), layout, 0.5)


def test_prune_does_not_lose_nan() -> None:
    delta = np.array([1, np.nan, 2, -np.inf], np.float32)
    assert prune(delta, plain(4), 0.5).indices.tolist() == [1, 3]


# ---------------------------------------------------------------------------------------- codec

anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
tiny = st.integers(-40, 40).map(lambda n: n * DENORMAL)
clustered = st.floats(width=32, min_value=0.5, max_value=4)
numbers = st.one_of(anything, tiny, clustered, st.sampled_from([0.0, -0.0, 1.0, -1.0]))


@st.composite
def updates(draw: st.DrawFn, value: st.SearchStrategy[float]) -> tuple[Update, list[int]]:
    """An update and the bounds of its layers, some of them empty."""
    steps = draw(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 70_000)), max_size=40))
    indices = [i - 1 for i in np.cumsum(steps, dtype=np.int64).tolist()]
    size = (indices[-1] + 1 if indices else 0) + draw(st.integers(0, 9))
    values = draw(st.lists(value, min_size=len(indices), max_size=len(indices)))
    dense = draw(st.lists(value, max_size=150))
    cuts = draw(st.lists(st.integers(0, size), max_size=4))
    return update_of(values, size, indices, dense), [0, *sorted(cuts), size]


@hypothesis_settings(deadline=None)
@given(updates(numbers))
def test_fp32_is_exact_to_the_bit(drawn: tuple[Update, list[int]]) -> None:
    update, bounds = drawn
    again = decode(encode(update, "fp32", np.array(bounds)))
    assert again.size == update.size
    assert again.indices.tolist() == update.indices.tolist()
    assert again.indices.dtype == np.int64
    assert bits(again.values) == bits(update.values)
    assert bits(again.dense) == bits(update.dense)


@hypothesis_settings(deadline=None)
@given(updates(numbers.filter(lambda x: abs(x) < 3.3e38)))
def test_bf16_rounds_as_torch_and_as_arithmetic(drawn: tuple[Update, list[int]]) -> None:
    update, bounds = drawn
    again = decode(encode(update, "bf16", np.array(bounds)))
    assert again.indices.tolist() == update.indices.tolist()
    for before, after in ((update.values, again.values), (update.dense, again.dense)):
        assert bits(after) == bits(torch.from_numpy(before).bfloat16().float().numpy())
        assert after.tolist() == [slow_bf16(v) for v in before.tolist()]


@hypothesis_settings(deadline=None)
@given(updates(numbers.filter(lambda x: abs(x) < 3.3e38)))
def test_fp16_is_scaled_by_layer(drawn: tuple[Update, list[int]]) -> None:
    update, bounds = drawn
    again = decode(encode(update, "fp16", np.array(bounds)))
    assert again.indices.tolist() == update.indices.tolist()
    for run in slow_stretches(update, bounds):
        own, found = update.values[run].tolist(), again.values[run].tolist()
        largest = max(map(abs, own))
        assert found == [slow_fp16(v, largest) for v in own]
        far = [abs(v) >= largest / 2**28 and abs(v) >= 2.0**-126 for v in own]
        errors = [abs(a - b) for a, b in zip(own, found, strict=True)]
        assert all(
            e <= 2**-11 * abs(v) for e, v, is_far in zip(errors, own, far, strict=True) if is_far
        )


@hypothesis_settings(deadline=None)
@given(updates(numbers))
def test_int8_is_within_half_a_step(drawn: tuple[Update, list[int]]) -> None:
    update, bounds = drawn
    again = decode(encode(update, "int8", np.array(bounds)))
    assert again.indices.tolist() == update.indices.tolist()
    assert np.isfinite(again.values).all()
    runs = [(update.values[run], again.values[run]) for run in slow_stretches(update, bounds)]
    runs += [(update.dense[a : a + 64], again.dense[a : a + 64]) for a in range(0, 150, 64)]
    for own, found in runs:
        if len(own):
            step = float(np.abs(own).max()) / 127
            error = np.abs(own.astype(np.float64) - found).max()
            assert error <= 0.5 * step * (1 + 1e-6) + DENORMAL / 2
            assert (np.signbit(own) == np.signbit(found)).all()


@given(updates(clustered))
def test_equal_updates_have_equal_bytes(drawn: tuple[Update, list[int]]) -> None:
    update, bounds = drawn
    for kind in KINDS:
        data = encode(update, kind, np.array(bounds))
        assert data == encode(update, kind, np.array(bounds))
        if kind in ("fp32", "bf16"):  # the other two have scales, which rounding can move
            assert data == encode(decode(data), kind, np.array(bounds))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "update",
    [
        update_of([]),
        update_of([], size=9),
        update_of([], dense=[1.5]),
        update_of([2.5]),
        update_of([-2.5], size=10**7, indices=[10**7 - 1]),
        update_of([1, 2], size=10**7, indices=[65_535, 10**7 - 7], dense=np.zeros(200)),
        update_of([0.0, -0.0, 0.0]),
        update_of(np.ones(300_000), dense=np.ones(140_000)),
        update_of(np.arange(1, 400), size=400 * 66_000, indices=np.arange(1, 400) * 66_000),
    ],
    ids=["empty", "no values", "dense", "one", "last", "far", "zeros", "blocks", "wide"],
)
def test_corner_cases(update: Update, kind: Kind) -> None:
    data = encode(update, kind)
    again = decode(data)
    assert again.size == update.size
    assert np.array_equal(again.indices, update.indices)
    tolerance = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 0.5}[kind]
    assert np.allclose(
        again.values, update.values, rtol=tolerance, atol=tolerance * (kind == "int8")
    )
    assert np.allclose(again.dense, update.dense, rtol=tolerance, atol=0)
    flat = np.zeros(update.size + len(update.dense), np.float32)
    add_to(data, flat, 2.0)
    assert np.array_equal(flat[update.indices], 2 * again.values)
    assert np.array_equal(flat[update.size :], 2 * again.dense)


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.05, 0.005])
def test_places_are_coded_the_shorter_way(density: float) -> None:
    draw = np.random.default_rng(4)
    indices = np.flatnonzero(draw.random(60_000) < density)
    update = update_of(np.ones(len(indices)), 60_000, indices)
    read = payload.Payload(encode(update, "bf16"))
    [entry] = read.entries
    small = {
        kind: len(zstandard.ZstdCompressor(level=1).compress(twin(indices.tolist())))
        for kind, twin in ((0, slow_gaps), (1, slow_bitmask))
    }
    assert entry.places == min(small.values())
    assert entry.coding == min(small, key=lambda kind: small[kind])
    raw = read._frame(read.start, entry.places, entry.symbols)
    assert raw == (slow_gaps, slow_bitmask)[entry.coding](indices.tolist())


def test_kind_is_known() -> None:
    assert get_args(Kind) == KINDS
    with pytest.raises(MethodError, match="values must be bf16, fp16, int8 or fp32"):
        encode(update_of([1]), "fp64")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dense", [False, True])
def test_nan_and_infinity_are_refused(kind: Kind, bad: float, dense: bool) -> None:
    update = update_of([1, 1 if dense else bad], dense=[bad if dense else 1])
    with pytest.raises(LogError, match="NaN or infinite"):
        encode(update, kind)


def test_overflow_is_refused_where_it_happens() -> None:
    update = update_of([1, LARGEST])
    for kind in ("bf16", "fp16"):
        with pytest.raises(LogError, match=f"too large for {kind}"):
            encode(update, kind)
    below = float(np.uint32(0x7F7F0000).view(np.float32))  # the largest that bf16 has
    assert decode(encode(update_of([below]), "bf16")).values.tolist() == [below]
    assert decode(encode(update_of([LARGEST / 2]), "fp16")).values.tolist() == [2.0**127]
    assert decode(encode(update, "fp32")).values.tolist() == [1, LARGEST]
    assert decode(encode(update, "int8")).values[1] == pytest.approx(LARGEST, rel=1e-6)


def test_wrong_updates_are_refused() -> None:
    for indices in ([1, 0], [0, 0], [-1, 0], [0, 5]):
        with pytest.raises(LogError, match="ascending indices"):
            encode(update_of([1, 2], 5, indices), "bf16")
    with pytest.raises(LogError, match="a value for each"):
        encode(update_of([1, 2], 5, [1]), "bf16")
    for bounds in ([0, 1], [1, 5]):
        with pytest.raises(LogError, match="outside of all layers"):
            encode(update_of([1, 2]), "bf16", np.array(bounds))


# --------------------------------------------------------------------------------- adding, undoing


def random_update(seed: int, size: int = 300_000, keep: float = 0.1, dense: int = 500) -> Update:
    draw = np.random.default_rng(seed)
    delta = draw.normal(size=size + dense).astype(np.float32)
    return prune(delta, plain(size // 2, size - size // 2, dense=dense), keep)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.01, 0.2, 1.0])
def test_add_to_is_decode_and_add(kind: Kind, keep: float) -> None:
    data = encode(random_update(0, keep=keep), kind)
    update = decode(data)
    flat = np.random.default_rng(1).normal(size=300_500).astype(np.float32)
    expected = flat.copy()
    for i, value in zip(update.indices.tolist(), update.values, strict=True):
        expected[i] += np.float32(-0.7) * value
    expected[300_000:] += np.float32(-0.7) * update.dense
    add_to(data, flat, -0.7)
    assert bits(flat) == bits(expected)


def test_add_all_is_adding_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    datas = [encode(random_update(seed, 900_000, 0.05 * seed), "bf16") for seed in range(1, 8)]
    monkeypatch.setattr(codec, "TOGETHER", 3 * len(datas[2]))
    one, all_ = np.zeros((2, 900_500), np.float32)
    for i, data in enumerate(datas):
        add_to(data, one, 1 / (i + 1))
    assert add_all(((data, 1 / (i + 1)) for i, data in enumerate(datas)), all_) == len(datas)
    assert np.allclose(one, all_, atol=1e-5)
    assert add_all([], all_) == 0
    again = np.zeros_like(all_)
    add_all([(data, 1 / (i + 1)) for i, data in enumerate(datas)], again)
    assert bits(again) == bits(all_)


def test_bytes_that_are_known_to_be_whole_are_not_checked_again() -> None:
    data = encode(random_update(0), "bf16")
    broken = data[:-1] + bytes([data[-1] ^ 1])  # only the checksum itself is wrong
    one, other = np.zeros((2, 300_500), np.float32)
    add_to(data, one)
    add_all([(broken, 1.0)], other, checked=True)
    assert bits(one) == bits(other)
    with pytest.raises(LogError, match="checksum"):
        add_all([(broken, 1.0)], other)


def test_add_refuses_another_vector() -> None:
    data = encode(random_update(0), "bf16")
    for flat in (
        np.zeros(300_499, np.float32),
        np.zeros(300_500),
        np.zeros((2, 150_250), np.float32),
    ):
        with pytest.raises(LogError, match="cannot be added"):
            add_to(data, flat)  # type: ignore[arg-type]


def test_adding_takes_little_memory() -> None:
    update = random_update(0, 3_000_000, 1.0)
    data = encode(update, "bf16")
    flat = np.zeros(3_000_500, np.float32)
    add_to(data, flat)
    tracemalloc.start()
    add_to(data, flat)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    encode(update, "bf16")
    packing = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20
    assert packing < len(data) * 2 + (12 << 20)


def test_threads_do_not_disturb_each_other() -> None:
    found: dict[int, list[bytes]] = {n: [] for n in range(3)}
    given_ = [random_update(seed, 100_000) for seed in range(3)]

    def work(n: int) -> None:
        found[n] += [encode(given_[n], "bf16") for _ in range(5)]

    threads = [threading.Thread(target=work, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(set(datas) == {encode(given_[n], "bf16")} for n, datas in found.items())


# ---------------------------------------------------------------------------------------- damage


def damaged(data: bytes) -> bool:
    """Whether the bytes are refused, in one sentence, by decode and add_to alike."""
    with pytest.raises(LogError) as refused:
        decode(data)
    assert str(refused.value).startswith("a stored update is damaged (")
    flat = np.ones(2050, np.float32)
    with pytest.raises(LogError):
        add_to(data, flat)
    return bool((flat == 1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_byte_is_found(kind: Kind) -> None:
    data = encode(random_update(1, 2000, 0.1, 50), kind)
    for at in range(len(data)):
        for flip in (1, 128, 255):
            broken = bytearray(data)
            broken[at] ^= flip
            assert damaged(bytes(broken))


def test_every_truncation_is_found() -> None:
    data = encode(random_update(1, 2000, 0.1, 50), "bf16")
    assert all(damaged(data[:n]) for n in range(len(data)))
    assert damaged(data + b"\0")
    assert damaged(b"")
    assert damaged(bytes(500))


def test_lengths_are_not_believed() -> None:
    """A head that tells wrong lengths makes no huge vector, even where the checksum is right."""
    draw = random.Random(0)
    good = encode(random_update(2, 2000, 0.3, 50), "fp32")
    end = payload._HEAD.size + 2 * payload._ENTRY.size
    refused = 0
    tracemalloc.start()
    for _ in range(1500):
        broken = bytearray(good)
        broken[draw.randrange(7, end)] = draw.randrange(256)
        broken[-4:] = struct.pack("<I", zlib.crc32(broken[:-4]))
        try:
            decode(bytes(broken))
        except LogError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 1000
    assert peak < 8 << 20


# ----------------------------------------------------------------------------------------- sizes


def heavy_tailed(layout: Layout, seed: int) -> Floats:
    """A change whose layers differ in scale, as those of real steps do."""
    draw = np.random.default_rng(seed)
    delta = draw.standard_t(4, layout.total).astype(np.float32)
    for a, b in pairwise(layout.bounds.tolist()):
        delta[a:b] *= np.float32(10 ** draw.uniform(-5, -2))
    return delta


@pytest.mark.parametrize(("keep", "times"), [(0.1, 22), (0.05, 42), (0.01, 170)])
def test_size_against_the_whole_change(keep: float, times: float) -> None:
    """Even of independent entries, where nothing repeats, the bytes are few."""
    layout = plain(*[150_000] * 5, dense=1000)
    update = prune(heavy_tailed(layout, 0), layout, keep)
    assert 4 * layout.total / len(encode(update, "bf16", layout.bounds)) > times


def test_size_is_near_the_entropy() -> None:
    """Places of independent entries cost within 3 % of what they can cost at the least."""
    draw = np.random.default_rng(5)
    for density in (0.3, 0.1, 0.01):
        n = 1_000_000
        indices = np.flatnonzero(draw.random(n) < density)
        read = payload.Payload(encode(update_of(np.ones(len(indices)), n, indices), "bf16"))
        p = len(indices) / n
        floor = -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
        assert sum(entry.places for entry in read.entries) < 1.03 * floor
