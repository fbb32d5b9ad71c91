"""The header of one GGUF file, read from the mapped file: every length and offset is held to the file's size.

The layout is ggml's (ggml/docs/gguf.md). Numbers of an array are read at once and strings in one pass, each when
first asked for: the ``gguf`` package makes several numpy arrays of every token (3.5 s for 150,000), this takes 0.1 s.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from acttail.errors import ModelError
from acttail.model.gguf_types import BLOCKS, NUMPY, GgmlType

_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
# Numbers of the types of values.
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
# The types of a list of strings.
STRINGS = (_ARRAY, _STRING)
# ggml's most dimensions, and the most entries of a tensor.
_DIMENSIONS, _MOST = 4, 1 << 62


@dataclass(frozen=True)
class Field:
    """A value of the header.

    Attributes:
        name: its key.
        types: number of its type; for an array, of that and of what it holds.
    """

    name: str
    types: tuple[int, ...]
    _length: int
    _read: Callable[[], Any]

    def __len__(self) -> int:
        """Entries of a list; 1 for anything else."""
        return self._length

    def contents(self) -> Any:
        """The value: a number, a bool, a string, or a list of them.

        Raises:
            ModelError: a string is not UTF-8.
        """
        return self._read()


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        tensor_type: how it is stored.
        shape: GGUF counts the fastest axis first.
        n_bytes: of its data.
        data_offset: of its data in its file.
        source: of its data.
    """

    name: str
    tensor_type: GgmlType
    shape: tuple[int, ...]
    n_bytes: int
    data_offset: int
    source: mmap.mmap

    @cached_property
    def data(self) -> npt.NDArray[Any]:
        """Its values or, of those that are blocks, its bytes [..., bytes of a row]; the slowest axis first."""
        kind = NUMPY.get(self.tensor_type)
        weights, size = BLOCKS[self.tensor_type]
        shape = tuple(reversed(self.shape))
        if kind is None:
            shape = (*shape[:-1], shape[-1] // weights * size)
        dtype = np.dtype(kind or np.uint8)
        count = self.n_bytes // dtype.itemsize
        return np.frombuffer(self.source, dtype, count, self.data_offset).reshape(shape)

    def release(self, first: int = 0, last: int | None = None) -> None:
        """Give back the memory of pages that were read; they are read again when asked for.

        Args:
            first: byte of the data.
            last: one past the last, None for the end.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            end = self.data_offset + (self.n_bytes if last is None else last)
            begin = (self.data_offset + first) // mmap.PAGESIZE * mmap.PAGESIZE
            self.source.madvise(mmap.MADV_DONTNEED, begin, end - begin)


@dataclass(frozen=True)
class Header:
    """What stands before the data of a GGUF file.

    Attributes:
        path: of the file.
        fields: key -> value.
        tensors: in the file's order.
    """

    path: Path
    fields: dict[str, Field]
    tensors: tuple[Tensor, ...]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or a default."""
        field = self.fields.get(key)
        return default if field is None else field.contents()


def read_header(path: Path) -> Header:
    """Read the header of one file.

    Raises:
        ModelError: no GGUF file, of another version or byte order, truncated, or with a header that no file of this
            size can have; says what.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Parser(path, mapped).header()


class _Parser:
    """Reads on from a position, which never leaves the file."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.mapped, self.size, self.at = path, mapped, len(mapped), 4

    def refuse(self, what: str) -> ModelError:
        return ModelError(f"cannot read {self.path}: {what}; fetch it again")

    def take(self, form: struct.Struct) -> Any:
        if form.size > self.size - self.at:
            raise self.refuse("it is truncated or damaged")
        (found,) = form.unpack_from(self.mapped, self.at)
        self.at += form.size
        return found

    def skip(self, length: int) -> int:
        """Go on by so many bytes; returns where they begin."""
        begin = self.at
        if length > self.size - begin:
            raise self.refuse("it is truncated or damaged")
        self.at = begin + length
        return begin

    def text(self) -> str:
        length = self.take(_U64)
        begin = self.skip(length)
        return self.decoded(self.mapped[begin : begin + length], "a name")

    def decoded(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} of its header is not UTF-8") from error

    def header(self) -> Header:
        version = self.take(_U32)
        if version & 0xFFFF == 0:
            raise ModelError(
                f"{self.path} is a GGUF file for big-endian machines, which acttail does not read; fetch the "
                "little-endian one"
            )
        if version not in _VERSIONS:
            raise ModelError(
                f"{self.path} is a GGUF file of version {version}; acttail reads 2 and 3: convert it with "
                "llama.cpp's gguf_new_metadata, or fetch a newer one"
            )
        tensors, values = self.take(_U64), self.take(_U64)
        fields: dict[str, Field] = {}
        for _ in range(values):
            field = self.field()
            if field.name in fields:
                raise self.refuse(f"its header has {field.name!r} twice")
            fields[field.name] = field
        told = [self.told() for _ in range(tensors)]
        return Header(self.path, fields, self.placed(told, self.alignment(fields)))

    def field(self) -> Field:
        name, kind = self.text(), self.take(_U32)
        if kind in _SCALARS:
            return Field(name, (kind,), 1, self.numbers(kind, 1, alone=True))
        if kind == _STRING:
            return Field(name, (kind,), 1, self.strings(name, 1, alone=True))
        if kind != _ARRAY:
            raise self.refuse(f"{name!r} of its header has the unknown type {kind}")
        inner, count = self.take(_U32), self.take(_U64)
        if inner in _SCALARS:
            return Field(name, (kind, inner), count, self.numbers(inner, count, alone=False))
        if inner == _STRING:
            return Field(name, (kind, inner), count, self.strings(name, count, alone=False))
        raise self.refuse(
            f"{name!r} of its header is a list of the type {inner}, which is not known"
        )

    def numbers(self, kind: int, count: int, *, alone: bool) -> Callable[[], Any]:
        dtype = np.dtype(_SCALARS[kind])
        begin = self.skip(count * dtype.itemsize)

        def read() -> Any:
            found = np.frombuffer(self.mapped, dtype, count, begin)
            return found[0].item() if alone else found.tolist()

        return read

    def strings(self, name: str, count: int, *, alone: bool) -> Callable[[], Any]:
        begin, size, unpack = self.at, self.size, _U64.unpack_from
        if count > (size - begin) // 8:
            raise self.refuse("it is truncated or damaged")
        at = begin
        for _ in range(count):
            if at > size - 8:
                raise self.refuse("it is truncated or damaged")
            at += 8 + unpack(self.mapped, at)[0]
        if at > size:
            raise self.refuse("it is truncated or damaged")
        self.at = at

        def read() -> Any:
            raw, at = [], begin
            for _ in range(count):
                end = at + 8 + unpack(self.mapped, at)[0]
                raw.append(self.mapped[at + 8 : end])
                at = end
            found = [self.decoded(r, repr(name)) for r in raw]
            return found[0] if alone else found

        return read

    def told(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        """(name, type, shape, offset) of a tensor."""
        name, dimensions = self.text(), self.take(_U32)
        if not 1 <= dimensions <= _DIMENSIONS:
            raise self.refuse(f"its tensor {name} has {dimensions} dimensions")
        shape = tuple(self.take(_U64) for _ in range(dimensions))
        kind, offset = self.take(_U32), self.take(_U64)
        if kind not in _KNOWN:
            raise ModelError(
                f"{self.path} has {name} in a format of GGML that acttail does not know (number {kind}); take a file "
                "of another quantisation, such as Q4_K_M"
            )
        if min(shape) < 1 or prod(shape) > _MOST:
            raise self.refuse(f"its tensor {name} has the shape {list(reversed(shape))}")
        if shape[0] % BLOCKS[GgmlType(kind)][0]:
            raise self.refuse(
                f"rows of its tensor {name} are no whole blocks of {GgmlType(kind).name}"
            )
        return name, GgmlType(kind), shape, offset

    def alignment(self, fields: dict[str, Field]) -> int:
        field = fields.get(_ALIGNMENT)
        found = 32 if field is None else field.contents()
        if not isinstance(found, int) or found < 1 or found & (found - 1):
            raise self.refuse(f"{_ALIGNMENT} of its header is {found!r}")
        return found

    def placed(
        self, told: list[tuple[str, GgmlType, tuple[int, ...], int]], alignment: int
    ) -> tuple[Tensor, ...]:
        start = -(-self.at // alignment) * alignment
        found: dict[str, Tensor] = {}
        for name, kind, shape, offset in told:
            if name in found:
                raise self.refuse(f"it has the tensor {name} twice")
            if offset % alignment:
                raise self.refuse(f"its tensor {name} is not where tensors begin")
            weights, size = BLOCKS[kind]
            length = prod(shape) // weights * size
            if start + offset + length > self.size:
                raise self.refuse(f"it is truncated at tensor {name}")
            found[name] = Tensor(name, kind, shape, length, start + offset, self.mapped)
        return tuple(found.values())


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_KNOWN = frozenset(int(kind) for kind in GgmlType)
