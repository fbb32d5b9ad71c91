"""What native code packs: a GGUF file's own matrices, straight from the mapped file, and floats as blocks of four bits."""

import ctypes
from collections.abc import Mapping
from dataclasses import replace

import torch

from acttail.engine.codecs import INT8
from acttail.engine.file_blocks import COLUMNS
from acttail.engine.shapes import Shape
from acttail.errors import ActTailError
from acttail.model.gguf_blocks import KINDS, StoredMatrix
from acttail.model.gguf_types import BLOCKS, GgmlType
from acttail.sparse.backends import abi, cpu

# What native/refit.cpp makes a table of.
_TABLES = {GgmlType[name] for name in KINDS} | {
    GgmlType.Q2_K, GgmlType.IQ4_XS, GgmlType.F32, GgmlType.F16, GgmlType.BF16,
}  # fmt: skip
_GROUP = 32
# Of the file's tables are in memory at a time.
_TABLE_BYTES = 16 << 20
# Floats of another type become float32 this many at a time.
_FIT_ENTRIES = 1 << 24


def matrix_struct(tensors: Mapping[str, torch.Tensor], shape: Shape) -> abi.Matrix:
    """The struct of a packed matrix; the tensors must outlive it."""
    found = abi.Matrix(shape.format.number, shape.group, shape.rows, shape.columns)
    for name, tensor in tensors.items():
        setattr(found, "data" if name == "weight" else name, tensor.data_ptr())
    return found


def put_blocks(
    stored: StoredMatrix, shape: Shape, tensors: Mapping[str, torch.Tensor], begin: int = 0
) -> None:
    """Write a file's own numbers into some columns of a matrix: nothing is rounded.

    Args:
        stored: of a kind that the shape's format takes (:attr:`Format.gguf`).
        shape: input-major, with the blocks' group.
        tensors: of :meth:`Shape.tensors`, which are written to.
        begin: the first of its columns.

    Raises:
        ActTailError: native code refuses the blocks, or there is none.
    """
    order = stored.order.contiguous() if stored.order is not None else None
    code = _library().acttail_transcode(
        ctypes.byref(matrix_struct(tensors, shape)), begin, int(stored.type), stored.data.ctypes.data,
        len(stored.data), order.data_ptr() if order is not None else None, torch.get_num_threads(),
    )  # fmt: skip
    _check(code, f"{stored.type.name} matrix")
    stored.release(0, stored.data.nbytes)


def put_floats(
    weight: torch.Tensor, shape: Shape, tensors: Mapping[str, torch.Tensor], begin: int = 0
) -> None:
    """Fit floats to four bits in super-blocks, into some columns of a matrix.

    Args:
        weight: [d_out, d_in], any float dtype.
        shape: of format q4_k, with d_in rows.
        tensors: of :meth:`Shape.tensors`, which are written to.
        begin: the first of its columns.

    Raises:
        ActTailError: native code refuses the matrix, or there is none.
    """
    struct, (d_out, d_in) = matrix_struct(tensors, shape), weight.shape
    step = max(COLUMNS, _FIT_ENTRIES // d_in // COLUMNS * COLUMNS)
    for first in range(0, d_out, step):
        values = weight[first : first + step].float().contiguous()
        code = _library().acttail_fit(
            ctypes.byref(struct), begin + first, values.data_ptr(), len(values), torch.get_num_threads()
        )  # fmt: skip
        _check(code, f"matrix of {d_out} by {d_in}")


def takes_table(stored: StoredMatrix, shape: Shape) -> bool:
    """Whether :func:`put_table` makes this table of this matrix."""
    return (
        stored.type in _TABLES and shape.output_major and shape.format.codec is INT8 and shape.group == _GROUP
        and len(stored.data) == shape.rows and not stored.inputs % max(_GROUP, BLOCKS[stored.type][0])
    )  # fmt: skip


def put_table(stored: StoredMatrix, shape: Shape, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an embedding or output head as int8 rows with a scale for every 32 entries.

    Q8_0, Q5_0, Q4_0 and IQ4_NL keep their numbers; others are fitted as :func:`acttail.engine.packing.pack` does it.

    Args:
        stored: of :func:`takes_table`.
        shape: of the table.
        tensors: of :meth:`Shape.tensors`, which are written to.

    Raises:
        ActTailError: native code refuses it, or there is none.
    """
    row_bytes = stored.data.nbytes // shape.rows
    step = max(1, _TABLE_BYTES // row_bytes)
    for first in range(0, shape.rows, step):
        rows = min(step, shape.rows - first)
        part = {name: tensor[first : first + rows] for name, tensor in tensors.items()}
        code = _library().acttail_refit(
            ctypes.byref(matrix_struct(part, replace(shape, rows=rows))), stored.inputs, int(stored.type),
            stored.data[first:].ctypes.data, torch.get_num_threads(),
        )  # fmt: skip
        _check(code, f"{stored.type.name} matrix")
        stored.release(first * row_bytes, (first + rows) * row_bytes)


def _library() -> ctypes.CDLL:
    try:
        return cpu.library()
    except RuntimeError as error:
        raise ActTailError(f"blocks of four bits and more need native code: {error}") from error


def _check(code: int, what: str) -> None:
    if code:
        raise ActTailError(f"native code took no {what}: {abi.reason(code)}")
