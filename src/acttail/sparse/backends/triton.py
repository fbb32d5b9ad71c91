"""The GPU backend: exact TopK and products with the kept rows, for CUDA and ROCm devices.

An exact k has static shapes, so nothing here waits for the device: every launch is known before it runs,
which is what CUDA graphs and `torch.compile(mode="max-autotune")` need. Kernels are in
:mod:`acttail.sparse.backends.triton_select` and :mod:`acttail.sparse.backends.triton_linear`; without a
GPU they run under Triton's interpreter (``TRITON_INTERPRET=1``), which is how they are tested.

Environment: ``ACTTAIL_BACKEND=triton`` forces this backend for every device that Triton serves (the
interpreter included), ``reference`` switches it off. ``ACTTAIL_ATOMIC=1`` adds partial sums up by atomics:
one launch less, and results that may differ in the last bit from run to run.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Up to so many rows of x the union of their kept inputs is read; above it one masked GEMM is faster.
ROWS = 8
# A row is held in the registers of one program: 64 entries for each of 1,024 threads.
WIDEST = 1 << 16
# (bits of the float, its +infinity)
_FLOATS = {
    torch.float32: (32, 0x7F800000),
    torch.bfloat16: (16, 0x7F80),
    torch.float16: (16, 0x7C00),
}
# Outputs and kept rows that one program takes at a time: 128 outputs are 256 bytes of a bf16 row.
_BLOCK_N, _BLOCK_K = 128, 32
# Programs asked for per multiprocessor, so that one hides another's wait for memory.
_WAVES = 4


@dataclass(frozen=True)
class TritonStatus:
    """Whether this backend can run, and if not, why."""

    available: bool
    interpreted: bool
    reason: str | None


@functools.cache
def status() -> TritonStatus:
    """Say whether Triton is installed and has a device (or its interpreter) to run on."""
    if importlib.util.find_spec("triton") is None:
        return TritonStatus(False, False, "Triton is not installed: pip install 'acttail[gpu]'")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return TritonStatus(False, False, "torch sees no CUDA or ROCm device")
    return TritonStatus(True, interpreted, None)


def supports(x: torch.Tensor) -> bool:
    """Whether these kernels take a tensor: float32, bfloat16 or float16, a row of up to 65,536 entries.

    Args:
        x: on a CUDA or ROCm device, or anywhere under the interpreter.
    """
    found = status()
    return (
        found.available
        and (x.device.type == "cuda" or found.interpreted)
        and x.dtype in _FLOATS
        and x.dim() > 0
        and x.shape[-1] <= WIDEST
    )


def topk_mask(x: torch.Tensor, k: int) -> torch.Tensor:
    """Counterpart of :func:`acttail.sparse.backends.reference.topk_mask`, bit for bit the same.

    Args:
        x: [..., d]; see :func:`supports`.
        k: entries of each row that stay, 1 <= k <= d.

    Returns:
        A new contiguous tensor of x's shape and dtype.
    """
    from acttail.sparse.backends import triton_select

    x = x.contiguous()
    y = torch.empty_like(x)
    d = x.shape[-1]
    rows = x.numel() // d if d else 0
    if rows:
        bits, infinity = _FLOATS[x.dtype]
        triton_select.mask_kernel[(rows,)](
            x, y, d, k, infinity=infinity, bits=bits, block=_block(d), num_warps=_warps(d)
        )
    return y


@dataclass(frozen=True)
class Selection:
    """Kept inputs of up to eight rows under up to three values of k, on the device.

    Attributes:
        index: [lists, capacity] int32, ascending; the first `count` are valid.
        value: [lists, rows, capacity] in x's dtype, zero where that row drops the input.
        count: [lists] int32.
    """

    index: torch.Tensor
    value: torch.Tensor
    count: torch.Tensor


def select(x: torch.Tensor, ks: Sequence[int]) -> Selection:
    """Select the kept inputs of x once for every k: one launch, no wait.

    Args:
        x: [rows, d], 1 <= rows <= 8, contiguous.
        ks: one to three values, 1 <= k <= d.
    """
    from acttail.sparse.backends import triton_select

    rows, d = x.shape
    batch = 1 if rows == 1 else 1 << (rows - 1).bit_length()
    capacity = min(d, rows * max(ks))
    bits, infinity = _FLOATS[x.dtype]
    index = torch.empty(len(ks), capacity, dtype=torch.int32, device=x.device)
    value = torch.empty(len(ks), batch, capacity, dtype=x.dtype, device=x.device)
    count = torch.empty(len(ks), dtype=torch.int32, device=x.device)
    padded = (*ks, *(ks[-1] for _ in range(3 - len(ks))))
    triton_select.select_kernel[(len(ks),)](
        x, index, value, count, rows, d, *padded, capacity,
        lists=len(ks), batch=batch, infinity=infinity, bits=bits, block=_block(d), num_warps=_warps(d),
    )  # fmt: skip
    return Selection(index, value, count)


def kept_product(
    chosen: Selection, weight: torch.Tensor, rows: int, *, scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, ends: Sequence[int] = (), dtype: torch.dtype | None = None,
    atomic: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """Outputs of an input-major weight from the kept inputs alone.

    Args:
        chosen: of :func:`select`.
        weight: [d_in, d_out], last dimension contiguous: x's dtype, or int8 with `scale`.
        rows: rows of x.
        scale: [d_out] floating point: what one level of an int8 weight's column stands for.
        bias: [d_out] or None.
        ends: where one list of kept inputs hands over to the next: the outputs before ends[0] use list 0,
            those before ends[1] list 1, the rest list 2. Multiples of 16.
        dtype: of the result; x's by default.
        atomic: add partial sums by atomics; by default as ACTTAIL_ATOMIC says.

    Returns:
        [rows, d_out].

    Raises:
        ValueError: the ends do not belong to the lists, or are no multiples of 16.
    """
    from acttail.sparse.backends import triton_linear

    lists, batch, capacity = chosen.value.shape
    d_out = weight.shape[1]
    if len(ends) != lists - 1 or any(e % 16 for e in ends):
        raise ValueError(f"{lists} lists of kept inputs need {lists - 1} ends, multiples of 16")
    block_n = _BLOCK_N
    while any(e % block_n for e in ends):
        block_n //= 2
    both = (*ends, *(d_out for _ in range(2 - len(ends))))
    tiles = -(-d_out // block_n)
    slices = _slices(weight.device, tiles, capacity)
    if atomic is None:
        atomic = os.environ.get("ACTTAIL_ATOMIC") == "1"
    atomic = atomic and slices > 1
    finish = slices == 1
    dtype = dtype or chosen.value.dtype
    device = weight.device
    if finish:
        out = torch.empty(batch, d_out, dtype=dtype, device=device)
    elif atomic:
        out = torch.zeros(batch, d_out, dtype=torch.float32, device=device)
    else:
        out = torch.empty(slices, batch, d_out, dtype=torch.float32, device=device)
    nothing = chosen.count  # a pointer that is never read
    triton_linear.product_kernel[(tiles, slices)](
        weight, nothing if scale is None else scale, chosen.index, chosen.value, chosen.count,
        nothing if bias is None else bias, out, d_out, *both, weight.stride(0), capacity, slices,
        batch=batch, padded=max(16, batch), scaled=scale is not None, biased=bias is not None,
        finish=finish, atomic=atomic, widen=status().interpreted, block_k=_BLOCK_K, block_n=block_n, num_warps=4,
    )  # fmt: skip
    if finish:
        return out[:rows]
    if atomic:
        y = out[:rows] if bias is None else out[:rows] + bias
        return y.to(dtype)
    y = torch.empty(batch, d_out, dtype=dtype, device=device)
    entries = batch * d_out
    triton_linear.reduce_kernel[(-(-entries // 1024),)](
        out, nothing if bias is None else bias, y, entries, d_out, slices,
        biased=bias is not None, block=1024, num_warps=4,
    )  # fmt: skip
    return y[:rows]


def input_major(weight: torch.Tensor) -> bool:
    """Whether a [d_out, d_in] weight is laid out so that the weights of one input follow one another."""
    return weight.dim() == 2 and weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0]


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """TopK(x) Wᵀ + b, reading the kept columns of W alone.

    Args:
        x: [..., d_in] with 1 to :data:`ROWS` rows.
        weight: [d_out, d_in] with :func:`input_major` layout; x's dtype, or int8 with `scale`.
        bias: [d_out] or None.
        k: entries of each row that stay.
        scale: [d_out], of an int8 weight.

    Returns:
        [..., d_out] in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = kept_product(select(flat, (k,)), weight.T, len(flat), scale=scale, bias=bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def fused_linear(
    x: torch.Tensor, weight: torch.Tensor, ks: Sequence[int], widths: Sequence[int],
    bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Projections that read one vector (q, k, v; gate, up): one selection, one product.

    Args:
        x: [..., d_in] with 1 to :data:`ROWS` rows.
        weight: [d_in, sum(widths)], the input-major weights side by side.
        ks: entries that each projection keeps; two or three.
        widths: outputs of each, multiples of 16.
        bias: [sum(widths)] or None.
        scale: [sum(widths)], of int8 weights.

    Returns:
        The outputs, [..., width] each.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    same = len(set(ks)) == 1
    chosen = select(flat, (ks[0],) if same else tuple(ks))
    y = kept_product(chosen, weight, len(flat), scale=scale, bias=bias, ends=() if same else ends)
    y = y.reshape(*x.shape[:-1], weight.shape[1])
    return list(torch.split(y, list(widths), dim=-1))


def _block(d: int) -> int:
    return max(16, 1 << (d - 1).bit_length())


def _warps(d: int) -> int:
    """Threads for a row: 32 entries each, within 1 to 32 warps."""
    return min(32, max(1, _block(d) // 1024))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: enough that slices are exercised
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


def _slices(device: torch.device, tiles: int, capacity: int) -> int:
    """Into how many slices the kept rows are split, so that all multiprocessors have work."""
    wanted = max(1, round(_WAVES * _processors(device) / tiles))
    return min(wanted, max(1, capacity // (2 * _BLOCK_K)), 64)
