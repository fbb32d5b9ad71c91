"""The TopK primitive: the native kernels equal the reference bit for bit, the reference is right."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acttail.sparse.backends import cpu, reference
from acttail.sparse.ops import topk_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def naive(row: list[float], k: int) -> list[float]:
    """The definition, on Python numbers: sort by (NaN first, magnitude descending, index)."""
    order = sorted(
        range(len(row)),
        key=lambda j: (row[j] == row[j], -abs(row[j]) if row[j] == row[j] else 0, j),
    )
    kept = set(order[:k])
    return [v if j in kept else 0.0 for j, v in enumerate(row)]


def same_bits(a, b):
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


special = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40, float("inf"), float("-inf"), float("nan")]
)


@given(st.lists(special | st.floats(width=32), min_size=1, max_size=40), st.data())
@settings(max_examples=300, deadline=None)
def test_reference_and_native_follow_the_definition(row, data):
    k = data.draw(st.integers(1, len(row)))
    x = torch.tensor([row])
    expected = np.array(naive(x[0].tolist(), k))
    for y in (reference.topk_mask(x, k), topk_mask(x, k)):
        np.testing.assert_array_equal(y[0].double().numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 7, 33, 64, 576, 1536, 4097, 40000])
def test_native_equals_reference(dtype, d):
    if not cpu.status().available:
        pytest.skip(f"no native library: {cpu.status().reason}")
    torch.manual_seed(d)
    x = torch.randn(9, d).to(dtype)
    x[0], x[1] = 0, -1
    x[2, ::2] = float("nan")
    x[3, -1] = float("inf")
    x[4] *= 1e-40
    for k in {1, d, max(1, d // 2), max(1, d // 7)}:
        assert same_bits(cpu.topk_mask(x, k), reference.topk_mask(x, k)), k


def test_signalling_nan_and_negative_nan_keep_their_bits():
    bits = torch.tensor([[0x3F800000, 0x7F800001, -0x7FFFFF, 0x40000000]], dtype=torch.int32)
    x = bits.view(torch.float32)
    assert topk_mask(x, 2).view(torch.int32).tolist() == [[0, 0x7F800001, -0x7FFFFF, 0]]


def test_many_rows_in_parallel_equal_one_by_one():
    x = torch.randn(300, 576)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = topk_mask(x, 100)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.stack([topk_mask(row, 100) for row in x]))
    assert ((together != 0).sum(1) == 100).all()


def test_ties_go_to_the_lower_index():
    assert topk_mask(torch.tensor([1.0, -1.0, 1.0, 0.5]), 2).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_shapes_views_and_empty_batches():
    x = torch.randn(4, 3, 10).transpose(0, 1)
    assert torch.equal(topk_mask(x, 4), topk_mask(x.contiguous(), 4))
    assert topk_mask(torch.empty(0, 10), 3).shape == (0, 10)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="1 <= k <= d"):
        topk_mask(torch.randn(5), k)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        topk_mask(torch.arange(5), 2)


def test_operator_contract():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(3, 17, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.acttail.topk_mask, (x, 5))


def test_gradient_passes_through_kept_entries():
    x = torch.tensor([3.0, 1.0, -2.0], requires_grad=True)
    topk_mask(x, 2).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512vnni", "nonsense"])
def test_every_instruction_set_agrees(isa):
    """A forced ISA is used or falls back to a lower one, and gives the same bits."""
    if not cpu.status().available:
        pytest.skip(f"no native library: {cpu.status().reason}")
    code = """
import torch
from acttail.sparse.backends import cpu, reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    x = (torch.randn(50, 577) * 4).round().to(dtype)
    for k in (1, 100, 576, 577):
        assert torch.equal(cpu.topk_mask(x, k), reference.topk_mask(x, k))
print(cpu.status().isa)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ACTTAIL_ISA": isa},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    order = ["portable", "avx2", "avx512", "avx512vnni"]
    best = cpu.status().isa
    if best not in order:  # another processor family: what it lacks is portable
        assert done.stdout.strip() in ("portable", best)
        return
    asked = order.index(isa) if isa in order else len(order)
    assert done.stdout.strip() == order[min(asked, order.index(best))]


def test_without_the_native_library_the_reference_runs():
    code = """
import torch
from acttail.sparse.backends import cpu
from acttail.sparse.ops import topk_mask
assert not cpu.status().available and "ACTTAIL_NATIVE" in cpu.status().reason
assert topk_mask(torch.tensor([1.0, 3.0, -2.0]), 1).tolist() == [0.0, 3.0, 0.0]
"""
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ACTTAIL_NATIVE": "0"}, check=True
    )
