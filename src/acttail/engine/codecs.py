"""Codecs: how a matrix of floats becomes bytes, and back. They know nothing of models and of files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from acttail.engine.blocks import pack_nibbles, unpack_nibbles
from acttail.engine.quantise import Fit, fit_eight_bits, fit_four_bits

Tensors = dict[str, torch.Tensor]
Stored = dict[str, tuple[torch.dtype, tuple[int, int]]]


@dataclass(frozen=True)
class Sharing:
    """Which entries of a [rows, columns] matrix share a scale.

    Attributes:
        axis: 0 for entries of one column, 1 for entries of one row.
        group: how many of them, one after the other.
        minimum: whether a minimum is kept beside each scale.
    """

    axis: int
    group: int
    minimum: bool


class Codec(Protocol):
    """What a weight format needs to be packed; :class:`acttail.engine.formats.Format` names them."""

    @property
    def bits(self) -> int:
        """Of one entry, scales apart."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype that reads the bytes as they lie, None where they must be decoded."""
        ...

    def stored(self, rows: int, columns: int, sharing: Sharing) -> Stored:
        """Suffix -> (dtype, shape) of the tensors of a [rows, columns] matrix; ``weight`` is first."""
        ...

    def pack(self, values: torch.Tensor, sharing: Sharing) -> Tensors:
        """The tensors of :meth:`stored`, contiguous, of [rows, columns] float32 values."""
        ...

    def unpack(self, tensors: Tensors, sharing: Sharing) -> torch.Tensor:
        """[rows, columns] float32 values of packed tensors: what kernels are tested against."""
        ...


@dataclass(frozen=True)
class Floats:
    """Floating-point entries as they are.

    Attributes:
        dtype: of the entries.
    """

    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """See :class:`Codec`."""
        return 8 * self.dtype.itemsize

    def stored(self, rows: int, columns: int, sharing: Sharing) -> Stored:
        """See :class:`Codec`; nothing is shared."""
        return {"weight": (torch.uint8, (rows, columns * self.dtype.itemsize))}

    def pack(self, values: torch.Tensor, sharing: Sharing) -> Tensors:
        """See :class:`Codec`."""
        return {"weight": values.to(self.dtype).view(torch.uint8)}

    def unpack(self, tensors: Tensors, sharing: Sharing) -> torch.Tensor:
        """See :class:`Codec`."""
        return tensors["weight"].view(self.dtype).float()


@dataclass(frozen=True)
class Levels:
    """Integer levels, with half-precision scales and, where they are shared so, minima.

    Attributes:
        bits: of a level.
        fit: levels, scales and minima of [groups, entries, other] weights.
        encode: [rows, columns] levels -> [rows, columns * bits / 8] uint8.
        decode: the inverse.
        zero: the level that stands for zero where there is no minimum.
    """

    bits: int
    fit: Callable[[torch.Tensor, bool], Fit]
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    zero: int = 0
    dtype: torch.dtype | None = None

    def stored(self, rows: int, columns: int, sharing: Sharing) -> Stored:
        """See :class:`Codec`."""
        shape = (
            (-(-rows // sharing.group), columns)
            if sharing.axis == 0
            else (rows, -(-columns // sharing.group))
        )
        found = {"weight": (torch.uint8, (rows, columns * self.bits // 8))}
        found["scale"] = torch.float16, shape
        if sharing.minimum:
            found["minimum"] = torch.float16, shape
        return found

    def pack(self, values: torch.Tensor, sharing: Sharing) -> Tensors:
        """See :class:`Codec`."""
        along = values.movedim(sharing.axis, 0)  # [length, other]
        length = along.shape[0]
        groups = -(-length // sharing.group)
        short = groups * sharing.group - length
        if short:
            along = torch.cat([along, along.new_zeros(short, along.shape[1])])
        fit = self.fit(along.reshape(groups, sharing.group, -1), sharing.minimum)
        levels = fit.levels.reshape(groups * sharing.group, -1)[:length].movedim(0, sharing.axis)
        # C reads rows one after the other, so nothing may stay a transposed view.
        packed = {"weight": self.encode(levels.contiguous())}
        for name, found in (("scale", fit.scale), ("minimum", fit.minimum)):
            if found is not None:
                packed[name] = found.squeeze(1).movedim(0, sharing.axis).contiguous().half()
        return packed

    def unpack(self, tensors: Tensors, sharing: Sharing) -> torch.Tensor:
        """See :class:`Codec`."""
        levels = self.decode(tensors["weight"]).float()
        if not sharing.minimum:
            levels = levels - self.zero
        index = torch.arange(levels.shape[sharing.axis]) // sharing.group
        values = levels * tensors["scale"].float().index_select(sharing.axis, index)
        if sharing.minimum:
            values = values + tensors["minimum"].float().index_select(sharing.axis, index)
        return values


FP32, BF16 = Floats(torch.float32), Floats(torch.bfloat16)
INT8 = Levels(
    8, fit_eight_bits,
    encode=lambda levels: levels.to(torch.int8).view(torch.uint8),
    decode=lambda packed: packed.view(torch.int8),
)  # fmt: skip
INT4 = Levels(4, fit_four_bits, encode=pack_nibbles, decode=unpack_nibbles, zero=8)
