"""The engine's kernels against float64 products with the unpacked weights.

Tolerance: every kernel sums in float32, so an output may be off by a few units of 2^-24 of the sum of
|x_i w_ij|; 4e-6 of that sum covers 14,336 inputs in any order.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from instruction_sets import OTHERS, passes

from acttail.engine.blocks import BLOCK, pack_nibbles, padded, unpack_nibbles
from acttail.engine.formats import FORMATS
from acttail.engine.native import library
from acttail.engine.packing import pack, unpack
from acttail.engine.shapes import shape_for
from acttail.engine.transcode import matrix_struct
from acttail.errors import ActTailError
from acttail.sparse.backends import cpu
from acttail.sparse.backends.abi import NEVER

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")
SHAPES = [(1, 1), (7, 5), (64, 64), (67, 130), (576, 192), (200, 1000), (70, 2300)]
CASES = [(d, None) for d in FORMATS] + [("int8", 0), ("int8", 32), ("int8", 128), ("int4", 128)]


def packed(d_in, d_out, dtype, group=None, **kind):
    torch.manual_seed(d_in * 1000 + d_out)
    shape = shape_for(dtype, d_in, d_out, group=group, **kind)
    tensors = pack(torch.randn(d_out, d_in), shape)
    return shape, tensors, unpack(tensors, shape).double()


def add_rows(tensors, shape, index, x, begin, end, y):
    struct = matrix_struct(tensors, shape)
    batch = x.shape[1] if x.dim() == 2 else 1
    count = x.shape[0]
    return library().acttail_add_rows(
        ctypes.byref(struct), index.data_ptr() if index is not None else None, x.data_ptr(), count,
        begin, end, y.data_ptr(), batch, y.shape[-1],
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "group"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_rows(dtype, group, shape):
    d_in, d_out = shape
    form, tensors, w = packed(d_in, d_out, dtype, group)
    for density in (0.0, 1 / d_in, 0.1, 0.5, 1.0):
        count = round(density * d_in)
        index = torch.randperm(d_in)[:count].sort().values.to(torch.int32)
        x = torch.randn(count)
        y = torch.randn(form.columns)
        expected = y.double() + w[:, index.long()] @ x.double()
        assert add_rows(tensors, form, index, x, 0, form.columns, y) == 0
        used = w[:, index.long()].abs()
        bound = 4e-6 * (used @ x.double().abs() + 1) * (3 if form.asymmetric else 1) + 1e-6
        if dtype in ("int8", "int4") and count:
            # VNNI takes x in units of 1/16383 of its largest entry; levels may be offset by a minimum.
            reach = used.sum(1) + (
                15 * tensors["scale"].float().max() * count if dtype == "int4" else 0
            )
            bound = bound + x.abs().max() / 30000 * reach
        assert bool(((y.double() - expected).abs() <= bound).all())


def test_the_library_cuts_rows_into_the_blocks_that_are_packed():
    form, tensors, _ = packed(3, 4 * BLOCK, "fp32")
    x, y = torch.ones(3), torch.zeros(form.columns)
    ends = range(1, form.columns + 1)
    taken = [end for end in ends if add_rows(tensors, form, None, x, 0, end, y) == 0]
    assert taken == [BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK]


@pytest.mark.parametrize(("dtype", "group"), CASES)
@pytest.mark.parametrize(("d_out", "end"), [(200, 192), (700, 640), (2300, 2240)])
def test_dense_rows_and_a_prefix_of_columns(dtype, group, d_out, end):
    form, tensors, w = packed(67, d_out, dtype, group)
    x, y = torch.randn(67), torch.zeros(form.columns)
    assert add_rows(tensors, form, None, x, 64, end, y) == 0
    expected = w @ x.double()
    # int4: half a unit of 1/16383 of the largest x, times 67 levels of up to 15; more outputs, a worse worst.
    atol = 4e-3 if dtype == "int4" and d_out > 200 else 2e-3
    torch.testing.assert_close(y[64:end].double(), expected[64:end], atol=atol, rtol=1e-5)
    assert not y[:64].any()
    assert not y[end:].any()


@pytest.mark.parametrize(("dtype", "group"), CASES)
@pytest.mark.parametrize("batch", [2, 5, 8])
def test_vectors_that_share_rows_get_what_each_gets_alone(dtype, group, batch):
    form, tensors, w = packed(67, 130, dtype, group)
    full = torch.randn(67, batch) * (torch.rand(67, batch) < 0.4)
    union = full.any(1).nonzero()[:, 0].to(torch.int32)
    x = full[union.long()].contiguous()
    y = torch.zeros(batch, form.columns)
    assert add_rows(tensors, form, union, x, 0, form.columns, y) == 0
    alone = torch.zeros_like(y)
    for column, out in zip(x.T, alone, strict=True):
        assert add_rows(tensors, form, union, column.contiguous(), 0, form.columns, out) == 0
    assert torch.equal(y, alone)
    # As far from the truth as 15 bits of x leave it (test_sparse_rows has the bounds).
    torch.testing.assert_close(y.double(), (w @ full.double()).T, atol=4e-3, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "group"), CASES)
@pytest.mark.parametrize("shape", [(67, 130), (600, 700), (300, 4200)])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_lists_that_differ_give_the_same_read_once_or_for_each(dtype, group, shape, density):
    d_in, d_out = shape
    form, tensors, w = packed(d_in, d_out, dtype, group)
    count, batch = max(1, round(density * d_in)), 7
    index = torch.stack([torch.randperm(d_in)[:count].sort().values for _ in range(batch)])
    x, start = torch.randn(batch, count), torch.randn(batch, form.columns)
    x[3, : count // 2] = 0  # a vector whose first windows have nothing to add
    found = []
    for together in (1, NEVER, 0):
        struct, y = matrix_struct(tensors, form), start.clone()
        struct.together = together
        lists = index.to(torch.int32)
        code = library().acttail_add_lists(
            ctypes.byref(struct), lists.data_ptr(), x.data_ptr(), count, 0, form.columns, y.data_ptr(), batch,
            form.columns,
        )  # fmt: skip
        assert code == 0
        found.append(y)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for one, kept, values, before in zip(found[0], index, x, start, strict=True):
        expected = before.double() + w[:, kept] @ values.double()
        bound = 1e-3 * (w[:, kept].abs() @ values.double().abs() + values.abs().max() * count + 1)
        assert bool(((one.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FORMATS)
def test_nan_and_infinity_reach_the_output(dtype):
    form, tensors, _ = packed(64, 64, dtype)
    for value in (float("nan"), float("inf")):
        y = torch.zeros(64)
        x = torch.tensor([1.0, value])
        add_rows(tensors, form, torch.tensor([3, 5], dtype=torch.int32), x, 0, 64, y)
        assert not bool(torch.isfinite(y).any()) or dtype == "int4"
        assert not bool(torch.isfinite(y).all())


@pytest.mark.parametrize("group", [0, 32, 64])
def test_nan_and_infinity_reach_the_logits(group):
    form, tensors, _ = packed(576, 50, "int8", group, output_major=True)
    for value in (float("nan"), float("inf"), -float("inf")):
        x, y = torch.randn(form.columns), torch.zeros(50)
        x[17] = value
        struct = matrix_struct(tensors, form)
        assert library().acttail_dot_rows(ctypes.byref(struct), x.data_ptr(), y.data_ptr()) == 0
        assert not bool(torch.isfinite(y).any())


def test_bad_arguments_are_refused():
    form, tensors, _ = packed(64, 128, "fp32")
    x, y = torch.randn(4), torch.zeros(128)
    index = torch.arange(4, dtype=torch.int32)
    assert add_rows(tensors, form, index, x, 3, 128, y) == 1
    assert add_rows(tensors, form, index, x, 0, 256, y) == 1
    assert add_rows(tensors, form, index, torch.randn(4, 9), 0, 128, torch.zeros(9, 128)) == 1


@pytest.mark.parametrize(("dtype", "group"), [(d, None) for d in FORMATS] + [("int8", 64)])
@pytest.mark.parametrize("shape", [(1, 3), (67, 130), (576, 50)])
def test_output_major_products(dtype, group, shape):
    d_in, d_out = shape
    group = 0 if group is None and dtype == "int8" else group
    form, tensors, w = packed(d_in, d_out, dtype, group, output_major=True)
    x = torch.zeros(padded(d_in))
    x[:d_in] = torch.randn(d_in)
    y = torch.zeros(d_out)
    struct = matrix_struct(tensors, form)
    assert library().acttail_dot_rows(ctypes.byref(struct), x.data_ptr(), y.data_ptr()) == 0
    expected = w @ x.double()
    bound = 1e-5 * (w.abs() @ x.double().abs()) + 1e-5
    if dtype == "int8":  # VNNI takes x in 16 bits
        bound = bound + x.abs().max() / 60000 * w.abs().sum(1)
    if dtype == "int4":  # levels from zero and a minimum are summed apart
        bound = bound * 3
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize(("dtype", "group"), CASES)
def test_decoded_rows(dtype, group):
    form, tensors, w = packed(67, 130, dtype, group)
    struct = matrix_struct(tensors, form)
    out = torch.empty(20, 130)
    code = library().acttail_decode_rows(ctypes.byref(struct), 30, 50, 0, 130, 1, out.data_ptr(), 2)
    assert code == 0
    torch.testing.assert_close(out, w[:130, 30:50].T.float(), atol=1e-6, rtol=1e-6)
    half = torch.empty(20, 100, dtype=torch.bfloat16)
    library().acttail_decode_rows(ctypes.byref(struct), 30, 50, 10, 110, 0, half.data_ptr(), 1)
    torch.testing.assert_close(half, w[10:110, 30:50].T.bfloat16(), atol=1e-3, rtol=1e-2)


def test_nibbles_round_trip():
    levels = torch.randint(0, 16, (5, 192))
    assert torch.equal(unpack_nibbles(pack_nibbles(levels)).long(), levels)


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 0.008), ("int4", 0.08)])
def test_quantisation_error_is_what_the_width_allows(dtype, limit):
    weight = torch.randn(200, 300)
    shape = shape_for(dtype, 300, 200)
    back = unpack(pack(weight, shape), shape)[:200]
    assert float((back - weight).norm() / weight.norm()) < limit


def test_packing_in_pieces_changes_nothing(monkeypatch):
    weight = torch.randn(300, 100)
    for output_major in (False, True):
        for dtype in FORMATS:
            shape = shape_for(dtype, 100, 300, output_major=output_major)
            whole = pack(weight, shape)
            with monkeypatch.context() as patch:
                patch.setattr("acttail.engine.packing._PACK_ENTRIES", 6400)
                pieces = pack(weight, shape)
            assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_groups_and_dtypes_are_checked():
    with pytest.raises(ActTailError, match="unknown engine dtype"):
        shape_for("fp8", 64, 64)
    with pytest.raises(ActTailError, match="multiple of 32"):
        shape_for("int4", 64, 64, group=20)


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_other_instruction_sets(isa):
    """The same tests, and the engine's, in a process that was told to use another instruction set."""
    here = Path(__file__).parent
    passes(isa, here / "test_kernels.py", here / "test_engine.py")


def test_numpy_is_not_needed_at_the_border():
    """Tensors handed to C must be contiguous; the layout keeps them so."""
    form, tensors, _ = packed(67, 130, "int4")
    assert all(t.is_contiguous() for t in tensors.values())
    assert tensors["weight"].numel() == form.rows * form.row_bytes
    assert np.prod(form.scale_shape) == tensors["scale"].numel()
