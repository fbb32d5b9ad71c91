"""Exact TopK selection on a GPU, in Triton: one program a row, the whole row in registers.

The k-th largest magnitude is found by bisection on the bits of the keys that order like magnitudes
(:func:`acttail.sparse.backends.reference.magnitude_keys`): 16 or 32 counts over registers, no sort, no
memory but the row itself, no number that the host would have to wait for. Ties go to the lower index by a
running count. These functions are compiled by Triton; :mod:`acttail.sparse.backends.triton` launches them.
"""

# Triton compiles these functions; Python's types say nothing about them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

import triton
import triton.language as tl


@triton.jit
def row_keys(x, inside, infinity: tl.constexpr, bits: tl.constexpr):
    """Keys of a row as int32: the float's bits without the sign, all NaNs one above infinity.

    Lanes outside of the row get -1, below every key.
    """
    if bits == 32:
        raw = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        raw = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    keys = tl.minimum(raw, infinity + 1)
    return tl.where(inside, keys, -1)


@triton.jit
def kept(keys, k, bits: tl.constexpr):
    """Which lanes are among the k largest keys of the row; ties go to the lower index."""
    # The largest threshold with at least k keys at or above it, bit by bit from the top. A key has one
    # bit less than its float; one above infinity still fits.
    threshold = 0
    for bit in tl.static_range(bits - 1):
        higher = threshold | (1 << (bits - 2 - bit))
        count = tl.sum((keys >= higher).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, higher, threshold)
    above = keys > threshold
    tied = keys == threshold
    room = k - tl.sum(above.to(tl.int32), axis=0)
    order = tl.cumsum(tied.to(tl.int32), axis=0)
    return above | (tied & (order <= room))


@triton.jit
def mask_kernel(
    x_ptr, y_ptr, columns, k, infinity: tl.constexpr, bits: tl.constexpr, block: tl.constexpr
):
    """Y = TopK(x), one row a program: the kept entries, zeros elsewhere."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    inside = lane < columns
    x = tl.load(x_ptr + row * columns + lane, mask=inside, other=0.0)
    keep = kept(row_keys(x, inside, infinity, bits), k, bits)
    tl.store(y_ptr + row * columns + lane, tl.where(keep, x, 0.0), mask=inside)


@triton.jit
def select_kernel(
    x_ptr, index_ptr, value_ptr, count_ptr, rows, columns, k0, k1, k2, capacity,
    lists: tl.constexpr, batch: tl.constexpr, infinity: tl.constexpr, bits: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The kept entries of all rows, packed in ascending order: one program for each of `lists` values of k.

    index [lists, capacity] int32: input numbers that any row keeps (their union); value
    [lists, batch, capacity]: the row's entry there, zero where that row drops it; count [lists] int32.
    Rows beyond `rows` are not read and have zeros.
    """
    which = tl.program_id(0)
    k = tl.where(which == 0, k0, tl.where(which == 1, k1, k2))
    lane = tl.arange(0, block)
    inside = lane < columns
    union = lane < 0
    for row in range(rows):
        x = tl.load(x_ptr + row * columns + lane, mask=inside, other=0.0)
        union = union | kept(row_keys(x, inside, infinity, bits), k, bits)
    place = tl.cumsum(union.to(tl.int32), axis=0) - 1
    total = tl.sum(union.to(tl.int32), axis=0)
    tl.store(count_ptr + which, total)
    tl.store(index_ptr + which * capacity + place, lane, mask=union)
    for row in range(batch):
        at = value_ptr + (which * batch + row) * capacity
        if row < rows:
            x = tl.load(x_ptr + row * columns + lane, mask=inside, other=0.0)
            keep = kept(row_keys(x, inside, infinity, bits), k, bits)
            tl.store(at + place, tl.where(keep, x, 0.0), mask=union)
        else:
            tl.store(at + place, tl.zeros([block], dtype=value_ptr.dtype.element_ty), mask=union)
