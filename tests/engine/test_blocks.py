"""Kernels of the formats of GGUF files, against gguf's dequantisation of the same blocks.

Blocks are random bytes under finite scales: every level, every scale and every minimum occurs.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from instruction_sets import OTHERS, passes

from acttail.engine.native import library
from acttail.model.gguf_types import GgmlType
from acttail.sparse.backends import abi, cpu

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")


@dataclass(frozen=True)
class Kind:
    """A format as native/formats.hpp has it, and where a block of the file keeps its halves."""

    number: int
    block: int
    halves: tuple[int, ...]
    group: int
    sub: int = 0
    plane: int = 0
    minimum: bool = False
    # Largest |level * scale within a block|, of K formats.
    reach: int = 0


KINDS = {
    "Q4_K": Kind(4, 144, (0, 2), 256, 32, 0, True, 15 * 127),  # int4 uses all of it
    "Q5_K": Kind(5, 176, (0, 2), 256, 32, 1, True, 31 * 63),
    "Q6_K": Kind(6, 210, (208,), 256, 16, 2, False, 32 * 128),
    "Q5_0": Kind(7, 22, (0,), 32, 0, 1),
    "Q5_1": Kind(8, 24, (0, 2), 32, 0, 1, True),
}
SHAPES = [(256, 1), (256, 130), (512, 576), (1024, 128), (768, 1000), (256, 17000)]


@dataclass
class Made:
    """A transcoded matrix and what it stands for: weights [d_out, d_in], float32."""

    kind: Kind
    struct: abi.Matrix
    weights: np.ndarray
    columns: int
    tensors: dict = field(repr=False)


def blocks_of(name, d_in, d_out, seed=0):
    """Random blocks [d_out, d_in / group * bytes] with scales of either sign and of many sizes."""
    kind, random = KINDS[name], np.random.default_rng([seed, d_in, d_out])
    count = d_out * d_in // kind.group
    blocks = random.integers(0, 256, (count, kind.block), dtype=np.uint8)
    for at in kind.halves:
        values = (random.standard_normal(count) * 2.0 ** random.integers(-9, -5, count)).astype(
            np.float16
        )
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(count, 2)
    return blocks.reshape(d_out, -1)


def dequantised(name, blocks):
    return gguf.dequantize(blocks, getattr(gguf.GGMLQuantizationType, name))


def empty(name, d_in, columns):
    """A matrix of zero weights, all bytes of its arrays set to something else."""
    kind = KINDS[name]
    sizes = {"weight": d_in * columns // 2, "scale": d_in // kind.group * columns * 2}
    if kind.minimum:
        sizes["minimum"] = sizes["scale"]
    if kind.plane:
        sizes["plane"] = d_in * columns * kind.plane // 8
    if kind.sub:
        sizes["sub_scale"] = d_in // kind.sub * columns
        if kind.minimum:
            sizes["sub_minimum"] = d_in // 32 * columns
    tensors = {key: torch.full((size,), 0x55, dtype=torch.uint8) for key, size in sizes.items()}
    struct = abi.Matrix(kind.number, kind.group, d_in, columns)
    for key, tensor in tensors.items():
        setattr(struct, "data" if key == "weight" else key, tensor.data_ptr())
    return struct, tensors


def transcode(struct, column, blocks, order=None, threads=2):
    kind = {kind.number: name for name, kind in KINDS.items()}[struct.format]
    return library().acttail_transcode(
        ctypes.byref(struct), column, GgmlType[kind], blocks.ctypes.data, len(blocks),
        order.ctypes.data if order is not None else None, threads,
    )  # fmt: skip


def made(name, d_in, d_out, seed=0):
    columns = -(-d_out // 128) * 128
    struct, tensors = empty(name, d_in, columns)
    blocks = blocks_of(name, d_in, d_out, seed)
    assert transcode(struct, 0, blocks) == 0
    return Made(KINDS[name], struct, dequantised(name, blocks), columns, tensors)


def decoded(m, threads=2):
    out = np.full((m.struct.rows, m.columns), np.nan, np.float32)
    code = library().acttail_decode_rows(
        ctypes.byref(m.struct), 0, m.struct.rows, 0, m.columns, 1, out.ctypes.data, threads
    )
    assert code == 0
    return out


def add_rows(m, index, x, y, begin=0, end=None):
    return library().acttail_add_rows(
        ctypes.byref(m.struct), index.ctypes.data if index is not None else None, x.ctypes.data, len(x),
        begin, m.columns if end is None else end, y.ctypes.data, x.shape[1] if x.ndim == 2 else 1,
        y.shape[-1],
    )  # fmt: skip


def bound(m, index, x):
    """How far each output may be off: half a step of x for every weight it meets, and float32 sums.

    The steps are counted as native/blocks.inc counts them; the minima's sums have 16,383 of their own.
    """
    levels = (
        np.abs(m.weights[:, index]).astype(np.float64) @ np.abs(x.astype(np.float64)) * 2e-6 + 1e-6
    )
    halves = m.tensors["scale"].numpy().view(np.float16).reshape(-1, m.columns).astype(np.float64)
    minima = None
    if m.kind.minimum and m.kind.sub:
        minima = (
            m.tensors["minimum"].numpy().view(np.float16).reshape(-1, m.columns).astype(np.float64)
        )
    d_out = len(m.weights)
    most = m.kind.reach or {"Q5_0": 16, "Q5_1": 31}["Q5_1" if m.kind.minimum else "Q5_0"]
    for block in np.unique(index // m.kind.group):
        mine = np.abs(x[index // m.kind.group == block].astype(np.float64))
        if not mine.any():
            continue
        steps = 8191.0
        if m.kind.sub:
            steps = min(steps, 0.998 * (2**31 / most - 128) * mine.max() / mine.sum())
        scale = np.abs(halves[block, :d_out])
        # The float32 sums start from numbers of the size of the parts, which may cancel.
        levels += scale * most * (0.5 * len(mine) * mine.max() / steps + 2e-6 * mine.sum())
        if minima is not None:
            levels += np.abs(minima[block, :d_out]) * 63 * mine.sum() * (4.0 / 16383 + 2e-6)
    return levels


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_rows_are_the_files_own_bit_for_bit(name, d_in, d_out):
    m = made(name, d_in, d_out)
    out = decoded(m)
    assert np.array_equal(out[:, :d_out].T.view(np.uint32), m.weights.view(np.uint32))
    assert not out[:, d_out:].any()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_products_of_kept_rows(name, d_in, d_out):
    m = made(name, d_in, d_out)
    random = np.random.default_rng(1)
    for kept in (0, 1, 2, 3, 7, d_in // 10, d_in // 2, d_in - 1, d_in):
        index = np.sort(random.permutation(d_in)[:kept]).astype(np.int32)
        x = random.standard_normal(kept).astype(np.float32)
        y = random.standard_normal(m.columns).astype(np.float32)
        before = y.copy()
        assert add_rows(m, index, x, y) == 0
        expected = before[:d_out] + m.weights[:, index].astype(np.float64) @ x.astype(np.float64)
        assert (np.abs(y[:d_out] - expected) <= bound(m, index, x)).all(), kept
        assert np.array_equal(y[d_out:], before[d_out:])
        if kept > 2 and d_out >= 100:
            # 1.2e-4 is what steps of 1/8191 of the largest of 256 entries make on the average.
            error = np.linalg.norm(y[:d_out] - expected)
            assert error <= 1e-3 * np.linalg.norm(expected - before[:d_out]), kept


@pytest.mark.parametrize("name", KINDS)
def test_all_rows_without_a_list_are_the_same_rows(name):
    m = made(name, 512, 300)
    x = np.random.default_rng(2).standard_normal(512).astype(np.float32)
    listed, run = np.zeros((2, m.columns), np.float32)
    assert add_rows(m, np.arange(512, dtype=np.int32), x, listed) == 0
    assert add_rows(m, None, x, run) == 0
    assert np.array_equal(listed, run)


@pytest.mark.parametrize("name", KINDS)
def test_some_columns_of_a_matrix(name):
    m = made(name, 256, 640)
    x = np.random.default_rng(3).standard_normal(256).astype(np.float32)
    whole, some = np.zeros((2, 640), np.float32)
    assert add_rows(m, None, x, whole) == 0
    assert add_rows(m, None, x, some, 128, 384) == 0
    assert np.array_equal(some[128:384], whole[128:384])
    assert not some[:128].any()
    assert not some[384:].any()


@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if kind.sub])
@pytest.mark.parametrize("sign", [1, -1])
def test_integer_sums_of_the_largest_levels_do_not_overflow(name, sign):
    """All inputs of one size, every level and every scale at its end: the sums that 32 bits must hold."""
    kind = KINDS[name]
    blocks = np.full((1, kind.block), 0xFF, np.uint8)
    if name == "Q6_K":
        blocks[:, :192] = 0  # levels of -32
        blocks[:, 192:208] = 0x80
    for at in kind.halves:
        blocks[:, at : at + 2] = np.array([1.0], np.float16).view(np.uint8)
    struct, tensors = empty(name, 256, 128)
    assert transcode(struct, 0, blocks) == 0
    m = Made(kind, struct, dequantised(name, blocks), 128, tensors)
    x = np.full(256, sign, np.float32)
    y = np.zeros(128, np.float32)
    assert add_rows(m, None, x, y) == 0
    assert abs(y[0] - m.weights.astype(np.float64).sum() * sign) <= bound(m, np.arange(256), x)[0]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("batch", [2, 5, 8])
def test_batches_share_rows_and_mask_each_row(name, batch):
    m = made(name, 512, 700)
    random = np.random.default_rng(4)
    full = (random.standard_normal((512, batch)) * (random.random((512, batch)) < 0.4)).astype(
        np.float32
    )
    union = np.flatnonzero(full.any(1)).astype(np.int32)
    y = np.zeros((batch, m.columns), np.float32)
    x = np.ascontiguousarray(full[union])
    assert add_rows(m, union, x, y) == 0
    alone = np.zeros_like(y)
    for b in range(batch):
        assert add_rows(m, union, x[:, b].copy(), alone[b]) == 0
    assert np.array_equal(y, alone)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_the_output(name, batch, value):
    m = made(name, 256, 256)
    x = np.ones((2, batch), np.float32)
    x[1] = value
    y = np.zeros((batch, 256), np.float32)
    assert add_rows(m, np.array([3, 250], np.int32), x if batch > 1 else x[:, 0].copy(), y) == 0
    assert not np.isfinite(y).any()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30])
def test_very_small_and_very_large_inputs(name, size):
    m = made(name, 256, 200)
    index = np.array([0, 40, 41, 255], np.int32)
    x = np.array([1, -0.5, 0.25, 3], np.float32) * np.float32(size)
    y = np.zeros(m.columns, np.float32)
    assert add_rows(m, index, x, y) == 0
    expected = m.weights[:, index].astype(np.float64) @ x.astype(np.float64)
    assert (np.abs(y[:200] - expected) <= np.abs(m.weights).max() * size * 1e-2 + 1e-32).all()


def test_outputs_are_taken_in_the_order_asked_for_and_beside_each_other():
    struct, tensors = empty("Q4_K", 512, 128 + 256)
    first, second = blocks_of("Q4_K", 512, 128), blocks_of("Q4_K", 512, 200, seed=1)
    order = np.random.default_rng(5).permutation(200)
    assert transcode(struct, 128, second, order, threads=1) == 0
    assert transcode(struct, 0, first) == 0
    out = decoded(Made(KINDS["Q4_K"], struct, first, 384, tensors))
    assert np.array_equal(out[:, :128].T, dequantised("Q4_K", first))
    assert np.array_equal(out[:, 128:328].T, dequantised("Q4_K", second)[order])
    assert not out[:, 328:].any()


def test_bad_arguments_are_refused():
    m = made("Q4_K", 256, 256)
    blocks = blocks_of("Q4_K", 256, 256)
    x, y = np.ones(2, np.float32), np.zeros(256, np.float32)
    index = np.arange(2, dtype=np.int32)
    assert add_rows(m, index, x, y, 64, 256) == 1
    assert add_rows(m, index, x, y, 0, 192) == 1
    assert transcode(m.struct, 64, blocks[:128]) == 1
    assert transcode(m.struct, 128, blocks) == 1
    assert transcode(m.struct, 0, blocks, np.full(256, 256)) == 1
    assert transcode(m.struct, 0, blocks, threads=0) == 1
    dot = library().acttail_dot_rows(ctypes.byref(m.struct), x.ctypes.data, y.ctypes.data)
    assert dot == 1, "no output-major matrix has such a format"
    for lacking in ("scale", "minimum", "sub_scale", "sub_minimum"):
        struct = abi.Matrix.from_buffer_copy(m.struct)
        setattr(struct, lacking, None)
        assert transcode(struct, 0, blocks) == 1
    struct = abi.Matrix.from_buffer_copy(m.struct)
    struct.rows = 255
    assert transcode(struct, 0, blocks) == 1


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_other_instruction_sets(isa):
    """The same tests in a process that was told to use another instruction set."""
    passes(isa, __file__)
