"""What a packed matrix looks like before there is one.

Input-major: row i holds the weights that input i meets, one per output, so that a kept input is one long
run of memory. Output-major: row j holds the weights of output j; only the embedding and the output head,
which are dense, are kept so. native/gemv.inc reads both.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le

from acttail.base.schema import STRICT, Name, Size
from acttail.engine.blocks import padded
from acttail.engine.codecs import Sharing
from acttail.engine.formats import LONG_ROW, Format, stored_format
from acttail.errors import ActTailError


@dataclass(frozen=True)
class Shape:
    """What a packed matrix looks like, before there is one.

    Attributes:
        dtype: name of its :class:`Format`, which need not be its neighbour's.
        rows: d_in of an input-major matrix, outputs of an output-major one.
        columns: padded to blocks.
        group: entries that share a scale: rows of an input-major matrix, columns of an output-major
            one; 0 for fp32 and bf16.
        asymmetric: whether a minimum is kept beside each scale.
        output_major: which of the two.
    """

    __pydantic_config__ = STRICT

    dtype: Name
    rows: Size
    columns: Size
    group: Annotated[int, Ge(0), Le(1 << 30)]
    asymmetric: bool = False
    output_major: bool = False

    @property
    def format(self) -> Format:
        """Its weight format."""
        return stored_format(self.dtype)

    @property
    def dense_from(self) -> float:
        """The density from which on the dense kernel is taken where nothing has been measured; 1 if it never is."""
        return self.format.dense_from[self.columns >= LONG_ROW]

    @property
    def sharing(self) -> Sharing:
        """Which entries share a scale."""
        return Sharing(1 if self.output_major else 0, self.group, self.asymmetric)

    @property
    def entries(self) -> int:
        """Weights and padding."""
        return self.rows * self.columns

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * self.format.bits // 8

    @property
    def scale_shape(self) -> tuple[int, int] | None:
        """Shape of the scales, None without them."""
        stored = self.tensors()
        return stored["scale"][1] if "scale" in stored else None

    @property
    def scale_bytes(self) -> int:
        """Bytes of all that is kept beside the weights: scales and minima."""
        beside = [
            entry for suffix, entry in self.tensors().items() if suffix not in ("weight", "plane")
        ]
        return sum(dtype.itemsize * shape[0] * shape[1] for dtype, shape in beside)

    @property
    def bytes(self) -> int:
        """Bytes of the whole matrix, scales and minima included."""
        return self.rows * self.row_bytes + self.scale_bytes

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """Suffix -> (dtype, shape) of what is stored."""
        return self.format.codec.stored(self.rows, self.columns, self.sharing)


def shape_for(
    dtype: str, d_in: int, d_out: int, *, group: int | None = None, output_major: bool = False,
    asymmetric: bool | None = None,
) -> Shape:  # fmt: skip
    """The shape of a packed [d_out, d_in] matrix.

    Args:
        dtype: name of a weight format.
        d_in: input features.
        d_out: output features; each fused part already padded to blocks.
        group: inputs per scale; None for the format's default, 0 for one scale per output. A format of blocks has
            its own.
        output_major: layout.
        asymmetric: keep minima; None for the format's default. A format of blocks has its own.

    Raises:
        ActTailError: an unknown format, or a group that is not a multiple of 32.
    """
    form = stored_format(dtype)
    rows, columns = (d_out, d_in) if output_major else (d_in, d_out)
    columns = padded(columns, form.columns)
    if form.group is None:
        return Shape(form.name, rows, columns, 0, False, output_major)
    group = form.group if group is None else group
    check_group(group)
    if form.fixed_group is not None:
        return Shape(form.name, rows, columns, form.fixed_group, form.minimum, output_major)
    whole = columns if output_major else rows
    asymmetric = form.minimum if asymmetric is None else asymmetric
    return Shape(form.name, rows, columns, min(group, whole) or whole, asymmetric, output_major)


def check_group(group: int) -> None:
    """Refuse a number of inputs that no scale is shared by.

    Raises:
        ActTailError: it is negative or not a multiple of 32.
    """
    if group % 32 or group < 0:
        raise ActTailError(f"a scale group holds a multiple of 32 inputs, not {group}")
