"""Products with the kept rows of an input-major weight on a GPU, in Triton.

A kept input is one row of the weight, [d_in, d_out], so that neighbouring outputs are neighbouring bytes
and a load of kept rows is coalesced whatever the rows' numbers are. Programs are tiles of outputs times
slices of the kept rows (split-K: at batch 1 the outputs alone would fill too few processors); the slices
are added up in a fixed order by a second kernel, so that results do not depend on who came first.
Compiled by Triton; :mod:`acttail.sparse.backends.triton` launches them.
"""

# Triton compiles these functions; Python's types say nothing about them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    weight_ptr, scale_ptr, index_ptr, value_ptr, count_ptr, bias_ptr, out_ptr,
    d_out, end0, end1, row_stride, capacity, slices,
    batch: tl.constexpr, padded: tl.constexpr, scaled: tl.constexpr, biased: tl.constexpr,
    finish: tl.constexpr, atomic: tl.constexpr, widen: tl.constexpr, block_k: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """Partial (or, with `finish`, whole) products of one tile of outputs and one slice of the kept rows.

    Outputs [0, end0) use the first list of kept rows, [end0, end1) the second, the rest the third; the
    ends are multiples of block_n. out is [slices, batch, d_out] float32, or [batch, d_out] of its own
    dtype with `finish`, or [batch, d_out] float32 to add to with `atomic`. `widen` multiplies in float32:
    the interpreter takes the bits of bfloat16 for integers in a dot.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    column = tile * block_n + tl.arange(0, block_n)
    inside = column < d_out
    start = tile * block_n
    which = tl.where(start < end0, 0, tl.where(start < end1, 1, 2))
    count = tl.load(count_ptr + which)
    each = tl.cdiv(tl.cdiv(count, slices), block_k) * block_k
    first = part * each
    last = tl.minimum(first + each, count)
    index_ptr += which * capacity
    value_ptr += which * batch * capacity
    lane = tl.arange(0, block_k)
    if batch == 1:
        total = tl.zeros([block_n], dtype=tl.float32)
    else:
        member = tl.arange(0, padded)
        sums = tl.zeros([padded, block_n], dtype=tl.float32)
    for c in range(first, last, block_k):
        here = c + lane < last
        row = tl.load(index_ptr + c + lane, mask=here, other=0).to(tl.int64)
        weight = tl.load(
            weight_ptr + row[:, None] * row_stride + column[None, :],
            mask=here[:, None] & inside[None, :], other=0, eviction_policy="evict_first",
        )  # fmt: skip
        if batch == 1:
            x = tl.load(value_ptr + c + lane, mask=here, other=0.0)
            total += tl.sum(x.to(tl.float32)[:, None] * weight.to(tl.float32), axis=0)
        else:
            x = tl.load(
                value_ptr + member[:, None] * capacity + (c + lane)[None, :],
                mask=(member < batch)[:, None] & here[None, :], other=0.0,
            )  # fmt: skip
            if widen:
                wide = tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
                sums += wide
            else:
                sums = tl.dot(x, weight.to(x.dtype), sums, input_precision="ieee")
    if batch == 1:
        if scaled:
            total *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if atomic:
            tl.atomic_add(out_ptr + column, total, mask=inside)
        else:
            if finish and biased:
                total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                out_ptr + part * d_out + column, total.to(out_ptr.dtype.element_ty), mask=inside
            )
    else:
        if scaled:
            sums *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        both = (member < batch)[:, None] & inside[None, :]
        if atomic:
            tl.atomic_add(out_ptr + member[:, None] * d_out + column[None, :], sums, mask=both)
        else:
            if finish and biased:
                bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
                sums += bias[None, :]
            tl.store(
                out_ptr + (part * batch + member[:, None]) * d_out + column[None, :],
                sums.to(out_ptr.dtype.element_ty), mask=both,
            )  # fmt: skip


@triton.jit
def reduce_kernel(
    partial_ptr, bias_ptr, out_ptr, entries, d_out, slices,
    biased: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over slices of partial[slice, i] (+ bias), always in the same order."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    inside = i < entries
    total = tl.zeros([block], dtype=tl.float32)
    for s in range(slices):
        total += tl.load(partial_ptr + s * entries + i, mask=inside, other=0.0)
    if biased:
        total += tl.load(bias_ptr + i % d_out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=inside)
