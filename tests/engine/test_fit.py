"""Four bits in super-blocks: how near the fit is, that kernels multiply what unpacking says, and what holds it."""

import ctypes
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from instruction_sets import OTHERS, environment, passes

from acttail.engine.native import library
from acttail.engine.packing import pack, unpack
from acttail.engine.shapes import shape_for
from acttail.engine.transcode import matrix_struct, put_floats
from acttail.errors import ActTailError
from acttail.sparse.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")
# Whole super-blocks, a short last one of either half, groups that end short.
SHAPES = [(1, 1), (7, 5), (67, 130), (256, 128), (320, 300), (416, 64), (576, 200), (640, 1000)]


def empty(shape):
    """Tensors of a matrix whose bytes were something else before."""
    made = {}
    for name, (dtype, size) in shape.tensors().items():
        made[name] = torch.full((*size, dtype.itemsize), 0x55, dtype=torch.uint8).view(dtype)[..., 0].contiguous()  # fmt: skip
    return made


def fitted(weight):
    """(shape, tensors, what they stand for) of a matrix [d_out, d_in]."""
    shape = shape_for("q4_k", weight.shape[1], weight.shape[0])
    tensors = empty(shape)
    put_floats(weight, shape, tensors)
    return shape, tensors, unpack(tensors, shape)


def normal(d_in, d_out):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1000 * d_in + d_out))


def heavy(d_in, d_out):
    """Student's t of three degrees of freedom."""
    torch.manual_seed(d_in + d_out)
    return torch.distributions.StudentT(3.0).sample((d_out, d_in))


def error(got, weight):
    return float((got[: len(weight)] - weight).square().sum() / weight.square().sum())


def add_rows(shape, tensors, index, x, y):
    code = library().acttail_add_rows(
        ctypes.byref(matrix_struct(tensors, shape)), index.data_ptr() if index is not None else None,
        x.data_ptr(), x.shape[0], 0, shape.columns, y.data_ptr(), x.shape[1] if x.dim() == 2 else 1, y.shape[-1],
    )  # fmt: skip
    assert code == 0


@pytest.mark.parametrize(
    "weights", [normal, heavy, lambda i, o: normal(i, o) + 3, lambda i, o: normal(i, o) * 1e-3]
)
@pytest.mark.parametrize(("d_in", "d_out"), [(256, 128), (576, 192), (1536, 70)])
def test_the_error_is_smaller_than_that_of_groups_of_32(weights, d_in, d_out):
    """In fewer bytes: 0.83 of the squared error of normal weights, 0.79 of those of heavy tails."""
    weight = weights(d_in, d_out)
    groups = shape_for("int4", d_in, d_out)
    plain = unpack(pack(weight, groups), groups)
    shape, _, got = fitted(weight)
    assert error(got, weight) <= 0.9 * error(plain, weight)
    assert shape.bytes / shape.columns < groups.bytes / groups.columns


def test_levels_of_a_grid_are_found():
    """Weights on a grid that the format can hold come back but for the halves' rounding."""
    levels = torch.randint(0, 16, (128, 256), generator=torch.Generator().manual_seed(2))
    levels[:, ::32], levels[:, 1::32] = 0, 15
    weight = levels * 0.01 - 0.07
    assert error(fitted(weight)[2], weight) <= 1e-6


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_equal_weights_come_back(value):
    _, _, got = fitted(torch.full((5, 70), value))
    torch.testing.assert_close(got[:5], torch.full((5, 70), value), rtol=2e-3, atol=0)
    assert not got[5:].any()


def test_weights_that_a_half_just_holds_are_not_lost():
    weight = normal(256, 128) * 2e-7
    assert error(fitted(weight)[2], weight) < 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_not_hidden(value):
    weight = normal(256, 4)
    weight[2, 70] = value
    got = fitted(weight)[2]
    assert not torch.isfinite(got[2]).any()
    assert torch.isfinite(got[[0, 1, 3]]).all()


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_rows_are_what_unpacking_says_bit_for_bit(d_in, d_out):
    shape, tensors, values = fitted(normal(d_in, d_out))
    out = torch.full((d_in, shape.columns), float("nan"))
    code = library().acttail_decode_rows(
        ctypes.byref(matrix_struct(tensors, shape)), 0, d_in, 0, shape.columns, 1, out.data_ptr(), 2
    )
    assert code == 0
    assert np.array_equal(
        out.T.numpy().view(np.uint32)[:d_out], values.numpy().view(np.uint32)[:d_out]
    )
    assert not out[:, d_out:].any()


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("weights", [normal, heavy])
def test_products_are_those_of_the_unpacked_weights(weights, d_in, d_out):
    shape, tensors, values = fitted(weights(d_in, d_out))
    for kept in {0, 1, min(3, d_in), d_in // 3, d_in}:
        index = torch.randperm(d_in)[:kept].sort().values.to(torch.int32)
        x, y = torch.randn(kept), torch.randn(shape.columns)
        expected = y.double() + values[:, index.long()].double() @ x.double()
        add_rows(shape, tensors, index, x, y)
        # x goes in steps of 1/8191 of the largest of a super-block, levels count from a minimum.
        spread = tensors["scale"].float().max() * 127 * 15 + tensors["minimum"].float().max() * 127
        limit = kept * float(spread) * (float(x.abs().max()) if kept else 0) / 8191 + 1e-5
        assert float((y.double() - expected).abs().max()) <= limit, kept
        if kept > 2 and d_out >= 100:
            base = (expected - y.double()).norm()
            assert float(base) <= 1e-3 * float(
                (values[:, index.long()].double() @ x.double()).norm()
            )


@pytest.mark.parametrize("batch", [2, 8])
def test_vectors_together_get_what_each_gets_alone(batch):
    shape, tensors, _ = fitted(normal(576, 700))
    full = torch.randn(576, batch) * (torch.rand(576, batch) < 0.4)
    union = full.any(1).nonzero()[:, 0].to(torch.int32)
    x = full[union.long()].contiguous()
    y = torch.zeros(batch, shape.columns)
    add_rows(shape, tensors, union, x, y)
    alone = torch.zeros_like(y)
    for column, out in zip(x.T, alone, strict=True):
        add_rows(shape, tensors, union, column.contiguous(), out)
    assert torch.equal(y, alone)


def test_products_of_the_largest_levels_do_not_overflow():
    """One size of x, all levels, scales and minima at their ends: what 32 bits, and pairs of 16, must hold."""
    shape = shape_for("q4_k", 256, 128)
    tensors = empty(shape)
    for name, value in (("weight", 0xFF), ("sub_scale", 127), ("sub_minimum", 127)):
        tensors[name].fill_(value)
    tensors["scale"].fill_(1)
    for minimum in (0, 8):
        tensors["minimum"].fill_(minimum)
        for sign in (1.0, -1.0):
            y = torch.zeros(128)
            add_rows(shape, tensors, None, torch.full((256,), sign), y)
            expected = sign * 256 * 127 * (15 - minimum)
            assert float((y - expected).abs().max()) <= 256 * 127 * 15 / 4000


def test_outputs_beside_each_other_in_pieces(monkeypatch):
    monkeypatch.setattr("acttail.engine.transcode._FIT_ENTRIES", 1)  # 128 outputs at a time
    first, second = normal(96, 70), normal(96, 300)
    shape = shape_for("q4_k", 96, 128 + 300)
    tensors = empty(shape)
    put_floats(second.to(torch.bfloat16), shape, tensors, 128)
    put_floats(first, shape, tensors)
    values = unpack(tensors, shape)
    assert torch.equal(values[:70], fitted(first)[2][:70])
    assert torch.equal(values[128:428], fitted(second.to(torch.bfloat16).float())[2][:300])
    assert not values[70:128].any()
    assert not values[428:].any()


def test_other_formats_are_refused():
    shape = shape_for("q5_k", 256, 128)
    with pytest.raises(ActTailError, match="native code took no matrix of 128 by 256"):
        put_floats(normal(256, 128), shape, empty(shape))


def digest():
    """Of what a matrix with a short last super-block and heavy tails is fitted to."""
    tensors = fitted(heavy(600, 300))[1]
    return hashlib.sha256(
        b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values())
    ).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_other_instruction_sets_find_the_same_and_pass_the_same_tests(isa):
    other = subprocess.run(
        [sys.executable, "-c", "import test_fit; print(test_fit.digest())"],
        env=environment(isa), capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert other.stdout.strip() == digest(), other.stderr[-3000:]
    passes(isa, __file__)
