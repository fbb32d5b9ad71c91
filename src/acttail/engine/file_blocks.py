"""Codec of the formats that a GGUF file's own blocks have, in the engine's order.

Native code puts blocks in order (native/transcode.cpp) and fits floats to Q4_K (native/fit.cpp); nothing becomes one
of these formats in any other way. native/engine.h describes the arrays.
"""

from dataclasses import dataclass

import torch

from acttail.engine.codecs import Sharing, Stored, Tensors

# Columns of these formats come in blocks of this many (native/formats.hpp).
COLUMNS = 128
_MINIMA = 128  # rows whose four minima of one column lie together


@dataclass(frozen=True)
class FileBlocks:
    """Four bits and a plane of more, under scales of 256 or 32 inputs.

    Attributes:
        number: native/formats.hpp's.
        plane: bits of a weight above four.
        zero: the level that stands for zero where there is no minimum.
        group: inputs under one half-precision scale.
        sub: inputs under one scale of a byte within it; 0 without those.
        minimum: whether minima are kept beside scales.
        fitted: whether native code fits floats to it, of any number of inputs; else it holds whole blocks of files.
    """

    number: int
    plane: int
    zero: int
    group: int
    sub: int
    minimum: bool
    fitted: bool = False
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """See :class:`acttail.engine.codecs.Codec`."""
        return 4 + self.plane

    def stored(self, rows: int, columns: int, sharing: Sharing) -> Stored:
        """See :class:`acttail.engine.codecs.Codec`; what is shared is the format's own.

        The last of the rows that share something may be fewer.
        """
        found: Stored = {
            "weight": (torch.uint8, (rows, columns // 2)),
            "scale": (torch.float16, (-(-rows // self.group), columns)),
        }
        if self.minimum:
            found["minimum"] = found["scale"]
        if self.plane:
            found["plane"] = torch.uint8, (rows, columns * self.plane // 8)
        if self.sub:
            found["sub_scale"] = torch.uint8, (-(-rows // self.sub), columns)
            if self.minimum:
                found["sub_minimum"] = torch.uint8, (-(-rows // _MINIMA), columns * 4)
        return found

    def pack(self, values: torch.Tensor, sharing: Sharing) -> Tensors:
        """See :class:`acttail.engine.codecs.Codec`: native code alone writes these formats."""
        raise TypeError("native code writes the formats of blocks: see acttail.engine.transcode")

    def unpack(self, tensors: Tensors, sharing: Sharing) -> torch.Tensor:
        """See :class:`acttail.engine.codecs.Codec`."""
        packed = tensors["weight"]
        rows, columns = len(packed), 2 * packed.shape[1]
        # [rows, blocks, half, lane, unit, entry]: byte 16 lane + 4 unit + entry is column 16 unit + 4 lane + entry.
        split = packed.reshape(rows, -1, 1, 4, 4, 4)
        levels = torch.cat([split & 15, split >> 4], dim=2)
        if self.plane:
            halves = torch.arange(2).reshape(2, 1, 1, 1)
            lanes = torch.arange(4).reshape(4, 1, 1)
            stored = tensors["plane"].reshape(rows, levels.shape[1], 1, -1, 4, 4)
            stored = stored.repeat(
                1, 1, 1, 4 // stored.shape[3], 1, 1
            )  # lane L reads L % lanes stored
            shift = 2 * lanes + halves if self.plane == 1 else 4 * (lanes // 2) + 2 * halves
            levels = levels + ((stored.int() >> shift & (2**self.plane - 1)) << 4)
        levels = levels.transpose(3, 4).reshape(rows, columns).float() - self.zero

        def spread(name: str, inputs: int) -> torch.Tensor:
            return tensors[name].float().repeat_interleave(inputs, 0)[:rows]

        scale = spread("scale", self.group)
        if self.sub:
            kept = tensors["sub_scale"] if self.minimum else tensors["sub_scale"].view(torch.int8)
            scale = scale * kept.float().repeat_interleave(self.sub, 0)[:rows]
        values = scale * levels
        if not self.minimum:
            return values
        minimum = spread("minimum", self.group)
        if not self.sub:
            return values + minimum
        four = tensors["sub_minimum"].reshape(-1, columns, 4).transpose(1, 2).reshape(-1, columns)
        return values - minimum * four.float().repeat_interleave(_MINIMA // 4, 0)[:rows]
