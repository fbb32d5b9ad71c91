"""A whole matrix to bytes and back: transposed, padded, a bounded piece at a time."""

from dataclasses import replace

import torch

from acttail.engine.blocks import BLOCK, padded
from acttail.engine.shapes import Shape

# Outputs are packed this many weights at a time, which bounds the float32 copies to a few 64 MB.
_PACK_ENTRIES = 1 << 24


def pack(weight: torch.Tensor, shape: Shape) -> dict[str, torch.Tensor]:
    """Pack a matrix.

    Args:
        weight: [d_out, d_in], any float dtype.
        shape: from :func:`acttail.engine.shapes.shape_for`.

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


def _pack(weight: torch.Tensor, shape: Shape) -> dict[str, torch.Tensor]:
    weight = weight if shape.output_major else weight.T  # [rows, columns]
    full = torch.zeros(shape.rows, shape.columns, dtype=torch.float32)
    full[: weight.shape[0], : weight.shape[1]] = weight
    return shape.format.codec.pack(full, shape.sharing)


def unpack(tensors: dict[str, torch.Tensor], shape: Shape) -> torch.Tensor:
    """The float32 values of a packed matrix, [columns, rows] ([d_out padded, d_in]) if input-major.

    The truth that native kernels are tested against, and how dequantised models are made.
    """
    values = shape.format.codec.unpack(tensors, shape.sharing)
    return values if shape.output_major else values.T
