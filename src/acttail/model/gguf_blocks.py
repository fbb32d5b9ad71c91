"""Matrices in blocks as a GGUF file stores them: which kinds some format of the engine holds number by number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from acttail.model.gguf_types import BLOCKS, GgmlType


@dataclass(frozen=True)
class BlockKind:
    """One of GGUF's block types.

    Attributes:
        type: ggml's.
        minimum: whether a minimum is kept beside the scale.
    """

    type: GgmlType
    minimum: bool

    @property
    def name(self) -> str:
        """GGML's own."""
        return self.type.name

    @property
    def entries(self) -> int:
        """Weights of a block; they share its scale."""
        return BLOCKS[self.type][0]

    @property
    def bytes(self) -> int:
        """Of a block."""
        return BLOCKS[self.type][1]


KINDS = {
    kind.name: kind
    for kind in (
        BlockKind(GgmlType.Q8_0, minimum=False),
        BlockKind(GgmlType.Q4_0, minimum=False),
        BlockKind(GgmlType.Q4_1, minimum=True),
        BlockKind(GgmlType.IQ4_NL, minimum=False),
        BlockKind(GgmlType.Q5_0, minimum=False),
        BlockKind(GgmlType.Q5_1, minimum=True),
        BlockKind(GgmlType.Q3_K, minimum=False),
        BlockKind(GgmlType.Q4_K, minimum=True),
        BlockKind(GgmlType.Q5_K, minimum=True),
        BlockKind(GgmlType.Q6_K, minimum=False),
    )
}
# Outputs that a part of a matrix must have a multiple of, so that the next part begins on a block of any format.
WHOLE_ROWS = 128


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix as it lies in a file.

    Attributes:
        type: of its blocks, or of its values.
        data: its bytes or values, [outputs, ...] contiguous, of the mapped file.
        inputs: weights of a row.
        order: [outputs] int64, which of them each output of the model is; None if they are in order.
        release: gives back the memory of the pages that were read, from one byte of the data to another.
    """

    type: GgmlType
    data: npt.NDArray[Any]
    inputs: int
    order: torch.Tensor | None
    release: Callable[[int, int], None]
