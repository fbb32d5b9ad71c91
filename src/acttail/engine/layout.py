"""Weight layouts of the native engine: how a matrix becomes bytes, and back.

Input-major: row i holds the weights that input i meets, one per output, so that a kept input is one long
run of memory. Output-major: row j holds the weights of output j; only the embedding and the output head,
which are dense, are kept so. native/kernels.hpp reads both.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from acttail.errors import ActTailError

DTYPES = ("fp32", "bf16", "int8", "int4")
FORMATS = {name: number for number, name in enumerate(DTYPES)}
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
# Columns come in blocks of this many; rows are padded to whole blocks.
BLOCK = 64
# Inputs that share a scale; 0 for one per output. A sweep over kept int8 rows may not cross from one scale
# to the next, so one per output decodes a tenth faster than groups do, for a KL to fp32 of 0.003 instead of
# 0.001 with groups of 32 (benchmarks/quantisation.csv). int4 needs 32.
GROUPS = {"fp32": 0, "bf16": 0, "int8": 0, "int4": 32}
HEAD_GROUPS = {"fp32": 0, "bf16": 0, "int8": 32, "int4": 32}


def padded(n: int) -> int:
    """The number rounded up to whole blocks."""
    return -(-n // BLOCK) * BLOCK


@dataclass(frozen=True)
class Shape:
    """What a packed matrix looks like, before there is one.

    Attributes:
        dtype: ``fp32``, ``bf16``, ``int8`` or ``int4``.
        rows: d_in of an input-major matrix, outputs of an output-major one.
        columns: padded to blocks.
        group: entries that share a scale: rows of an input-major matrix, columns of an output-major
            one; 0 for fp32 and bf16.
        asymmetric: whether a minimum is kept beside each scale.
        output_major: which of the two.
    """

    dtype: str
    rows: int
    columns: int
    group: int
    asymmetric: bool = False
    output_major: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * BITS[self.dtype] // 8

    @property
    def scale_shape(self) -> tuple[int, int] | None:
        """Shape of the scales, None without them."""
        if not self.group:
            return None
        if self.output_major:
            return self.rows, -(-self.columns // self.group)
        return -(-self.rows // self.group), self.columns

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """Suffix -> (dtype, shape) of what is stored."""
        found: dict[str, tuple[torch.dtype, tuple[int, int]]] = {
            "weight": (torch.uint8, (self.rows, self.row_bytes))
        }
        if self.scale_shape:
            found["scale"] = (torch.float16, self.scale_shape)
            if self.asymmetric:
                found["minimum"] = (torch.float16, self.scale_shape)
        return found


def shape_for(
    dtype: str, d_in: int, d_out: int, *, group: int | None = None, output_major: bool = False,
    asymmetric: bool | None = None,
) -> Shape:  # fmt: skip
    """The shape of a packed [d_out, d_in] matrix.

    Args:
        dtype: one of :data:`DTYPES`.
        d_in: input features.
        d_out: output features; each fused part already padded to blocks.
        group: inputs per scale; None for the default, 0 for one scale per output.
        output_major: layout.
        asymmetric: keep minima; by default int4 does.

    Raises:
        ActTailError: an unknown dtype, or a group that is not a multiple of 32.
    """
    if dtype not in DTYPES:
        raise ActTailError(f"unknown engine dtype {dtype!r}: use {', '.join(DTYPES)}")
    rows, columns = (d_out, padded(d_in)) if output_major else (d_in, padded(d_out))
    if dtype in ("fp32", "bf16"):
        return Shape(dtype, rows, columns, 0, False, output_major)
    group = GROUPS[dtype] if group is None else group
    if group % 32:
        raise ActTailError(f"a scale group holds a multiple of 32 inputs, not {group}")
    whole = columns if output_major else rows
    asymmetric = dtype == "int4" if asymmetric is None else asymmetric
    return Shape(dtype, rows, columns, min(group, whole) or whole, asymmetric, output_major)


def pack(weight: torch.Tensor, shape: Shape) -> dict[str, torch.Tensor]:
    """Pack a matrix.

    Args:
        weight: [d_out, d_in], any float dtype.
        shape: from :func:`shape_for`.

    Returns:
        The tensors of :meth:`Shape.tensors`.
    """
    step = max(BLOCK, _PACK_ENTRIES // max(1, weight.shape[1]) // BLOCK * BLOCK)
    if weight.shape[0] <= step:
        return _pack(weight, shape)
    pieces = []
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step]
        own = (
            replace(shape, rows=len(part))
            if shape.output_major
            else replace(shape, columns=padded(len(part)))
        )
        pieces.append(_pack(part, own))
    axis = 0 if shape.output_major else 1
    return {name: torch.cat([p[name] for p in pieces], axis) for name in pieces[0]}


# Outputs are packed this many weights at a time, which bounds the float32 copies to a few 64 MB.
_PACK_ENTRIES = 1 << 24


def _pack(weight: torch.Tensor, shape: Shape) -> dict[str, torch.Tensor]:
    weight = weight if shape.output_major else weight.T  # [rows, columns]
    full = torch.zeros(shape.rows, shape.columns, dtype=torch.float32)
    full[: weight.shape[0], : weight.shape[1]] = weight
    if shape.dtype == "fp32":
        return {"weight": full.view(torch.uint8)}
    if shape.dtype == "bf16":
        return {"weight": full.to(torch.bfloat16).view(torch.uint8)}
    axis = 1 if shape.output_major else 0
    quantised, scale, minimum = _quantise(full, shape, axis)
    packed = {
        "weight": quantised.to(torch.int8).view(torch.uint8)
        if shape.dtype == "int8"
        else pack_nibbles(quantised),
        "scale": scale,
    }
    if minimum is not None:
        packed["minimum"] = minimum
    return packed


def unpack(tensors: dict[str, torch.Tensor], shape: Shape) -> torch.Tensor:
    """The float32 values of a packed matrix, [columns, rows] ([d_out padded, d_in]) if input-major.

    The truth that native kernels are tested against, and how dequantised models are made.
    """
    raw = tensors["weight"]
    if shape.dtype == "fp32":
        values = raw.view(torch.float32)
    elif shape.dtype == "bf16":
        values = raw.view(torch.bfloat16).float()
    else:
        if shape.dtype == "int8":
            levels = raw.view(torch.int8).float()
        else:
            levels = unpack_nibbles(raw, shape.columns).float() - (0 if shape.asymmetric else 8)
        axis = 1 if shape.output_major else 0
        length = shape.columns if shape.output_major else shape.rows
        index = torch.arange(length) // shape.group
        values = levels * tensors["scale"].float().index_select(axis, index)
        if shape.asymmetric:
            values = values + tensors["minimum"].float().index_select(axis, index)
    return values if shape.output_major else values.T


def _quantise(
    full: torch.Tensor, shape: Shape, axis: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Levels (int8 values, or nibbles 0..15), scales and minima of [rows, columns]."""
    along = full.movedim(axis, 0)  # [length, other]
    length = along.shape[0]
    groups = -(-length // shape.group)
    if groups * shape.group != length:
        along = torch.cat([along, along.new_zeros(groups * shape.group - length, along.shape[1])])
    grouped = along.reshape(groups, shape.group, -1)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    minimum: torch.Tensor | None = None
    if shape.dtype == "int8":
        scale = _half(torch.maximum(high, -low) / 127)
        levels = (grouped / scale.clamp_min(1e-30)).round().clamp(-127, 127)
    elif shape.asymmetric:
        levels, scale, minimum = _fit_asymmetric(grouped, low, high)
    else:
        levels, scale = _fit_symmetric(grouped, low, high)
    # C reads rows one after the other, so nothing may stay a transposed view.
    flat = levels.reshape(groups * shape.group, -1)[:length].movedim(0, axis).contiguous()
    squeeze = [
        t.squeeze(1).movedim(0, axis).contiguous().half() for t in (scale, minimum) if t is not None
    ]
    return flat, squeeze[0], squeeze[1] if minimum is not None else None


def _half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to what a half-precision scale can hold, so that levels fit the stored scale."""
    return values.half().float()


# The range is shrunk by these factors and the best in squared error kept: clipping the rarest entries
# pays where the rest then falls on finer levels.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


def _fit_asymmetric(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    best: Any = None
    low, high = low.clamp(max=0), high.clamp(min=0)
    for shrink in _SHRINK:
        scale = _half((high - low) * shrink / 15)
        minimum = _half(low * shrink)
        levels = ((grouped - minimum) / scale.clamp_min(1e-30)).round().clamp(0, 15)
        error = (levels * scale + minimum - grouped).square().sum(1, keepdim=True)
        found = (error, levels, scale, minimum)
        if best is None:
            best = found
            continue
        better = error < best[0]
        best = tuple(torch.where(better, n, o) for n, o in zip(found, best, strict=True))
    return best[1], best[2], best[3]


def _fit_symmetric(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels -8..7: the sign of the scale puts the larger side on the eighth level (as Q4_0 does)."""
    extreme = torch.where(-low > high, low, high)
    best: Any = None
    for shrink in _SHRINK:
        scale = _half(extreme * shrink / -8)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        levels = (grouped / safe).round().clamp(-8, 7)
        error = (levels * scale - grouped).square().sum(1, keepdim=True)
        found = (error, levels, scale)
        if best is None:
            best = found
            continue
        better = error < best[0]
        best = tuple(torch.where(better, n, o) for n, o in zip(found, best, strict=True))
    return best[1] + 8, best[2]


def pack_nibbles(levels: torch.Tensor) -> torch.Tensor:
    """[rows, columns] levels 0..15 -> [rows, columns / 2] uint8.

    In a block of 64 entries, byte i holds entry i in its low bits and entry 32 + i in its high ones.
    """
    rows, columns = levels.shape
    halves = levels.reshape(rows, columns // BLOCK, 2, BLOCK // 2).to(torch.uint8)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, columns // 2)


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Inverse of :func:`pack_nibbles`: [rows, columns] uint8."""
    halves = packed.reshape(packed.shape[0], columns // BLOCK, BLOCK // 2)
    return torch.stack([halves & 15, halves >> 4], dim=2).reshape(packed.shape[0], columns)
