"""Weight and KV formats: one row each, and everything that differs between them is in the row.

A new weight format is a row here, with a codec of its own if it needs one, a row of traits in
native/formats.hpp, and a row in tests/engine/test_kernels.py. A model has a default format, and each of its
matrices its own (:class:`acttail.engine.shapes.Shape`): ask the matrix, not the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from acttail.base.dtypes import name_of, short_name
from acttail.engine.blocks import BLOCK
from acttail.engine.codecs import BF16, FP32, INT4, INT8, Codec
from acttail.engine.file_blocks import COLUMNS, FileBlocks
from acttail.errors import ActTailError

T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """A weight format.

    Attributes:
        name: the short one; torch's spelling of it is understood wherever a format is named.
        number: native/formats.hpp's.
        codec: to bytes and back.
        group: inputs that share a scale by default, 0 for one scale per output; None without scales.
        head_group: the same for the embedding and the output head.
        minimum: whether a minimum is kept beside each scale by default.
        gguf: kinds of GGUF blocks whose levels are taken as they are.
        compute: what a model whose default this is computes in outside of the kernels.
        prefill_tokens: shorter continuations of a prompt are decoded token by token.
        head: the default format of the embedding and the output head beside it.
        kv: the default format of the KV cache beside it.
        llama_cpp: llama.cpp's file type of the same width.
        columns: its matrices' columns come in blocks of this many.
        projections: the stored format that projections become where no group is asked for; None for this one.
        dense_from: the densities from which on the dense kernel is taken where `acttail tune` has measured nothing:
            of rows shorter than ``LONG_ROW``, and of others; 1 for never.
    """

    name: str
    number: int
    codec: Codec
    group: int | None
    head_group: int | None
    minimum: bool
    gguf: tuple[str, ...]
    compute: torch.dtype
    prefill_tokens: int
    head: str
    kv: str
    llama_cpp: str
    columns: int = BLOCK
    projections: str | None = None
    dense_from: tuple[float, float] = (1.0, 1.0)

    @property
    def bits(self) -> int:
        """Of one weight, scales apart."""
        return self.codec.bits

    @property
    def fixed_group(self) -> int | None:
        """Inputs that share a scale where the format leaves no choice; None where it does."""
        return self.codec.group if isinstance(self.codec, FileBlocks) else None

    @property
    def fitted(self) -> bool:
        """Whether native code fits floats to its blocks, of which the last one may then be short."""
        return isinstance(self.codec, FileBlocks) and self.codec.fitted

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype that reads the weights as they lie; None where they must be decoded."""
        return self.codec.dtype

    @property
    def transformers(self) -> str:
        """The dtype that transformers runs where this one was asked for."""
        return name_of(self.compute)

    @property
    def runs_in_transformers(self) -> bool:
        """Whether transformers has this very width."""
        return self.torch_dtype is not None


# group: a sweep over kept int8 rows may not cross from one scale to the next, so one per output decodes a
# tenth faster than groups do, for a KL to fp32 of 0.003 instead of 0.001 with groups of 32
# (benchmarks/quantisation.csv). int4 needs 32, and has them in super-blocks unless it is asked for a group.
# head: read whole for every token, and the loss is not measurable: KL 5e-5 with int8 groups of 32 where
# bf16 itself has 7e-5 (SmolLM2-135M, docs/performance.md).
# prefill_tokens: below this a pass of matrix products costs more, and the more so where weights must be
# unpacked for it (SmolLM2-135M at S = 0.5, one and two threads: equal at 10 tokens for bf16, at 22 for int8
# and int4).
# dense_from: time of sparse over dense at density 0.9, 0.8, 0.7, 0.6, Zen 4, by turns (`acttail tune`): int8 576 x 576 to 1,536
# x 576 1.1 to 1.2, 1.15 to 1.2, 1.03 to 1.08, 0.9 to 1.0; 576 x 3,072 1.0, 0.87; int4 in groups 1.6 to 2.0, 1.5 to 1.8, 1.2 to
# 1.4, 0.9 to 1.1; files' blocks of 640 to 1,536 columns 1.04 to 1.3, 1.0 to 1.2, 0.97 to 1.08, of 3,072 and more 1.0 to 1.2, 0.9 to
# 1.0; bf16 0.7 to 0.9 throughout.
FORMATS = {
    row.name: row
    for row in (
        Format(
            "fp32", 0, FP32, group=None, head_group=None, minimum=False, gguf=(),
            compute=torch.float32, prefill_tokens=8, head="fp32", kv="fp32", llama_cpp="ALL_F32",
        ),
        Format(
            "bf16", 1, BF16, group=None, head_group=None, minimum=False, gguf=(),
            compute=torch.bfloat16, prefill_tokens=10, head="int8", kv="bf16", llama_cpp="MOSTLY_BF16",
        ),
        Format(
            "int8", 2, INT8, group=0, head_group=32, minimum=False, gguf=("Q8_0", "IQ4_NL"),
            compute=torch.bfloat16, prefill_tokens=22, head="int8", kv="bf16", llama_cpp="MOSTLY_Q8_0",
            dense_from=(0.75, 0.9),
        ),
        Format(
            "int4", 3, INT4, group=32, head_group=32, minimum=True, gguf=("Q4_0", "Q4_1"),
            compute=torch.bfloat16, prefill_tokens=22, head="int8", kv="bf16", llama_cpp="MOSTLY_Q4_0",
            projections="q4_k", dense_from=(0.65, 0.65),
        ),
    )
}  # fmt: skip
DEFAULT = FORMATS["bf16"]
LONG_ROW = 2560  # columns


def _of_file(
    kind: str, number: int, plane: int, zero: int, group: int, sub: int, llama_cpp: str, *others: str, minimum: bool,
    fitted: bool = False,
) -> Format:  # fmt: skip
    codec = FileBlocks(number, plane, zero, group, sub, minimum, fitted=fitted)
    return Format(
        kind.lower(), number, codec, group, None, minimum, (kind, *others), torch.bfloat16,
        FORMATS["int4"].prefill_tokens, "int8", "bf16", llama_cpp, COLUMNS,
        dense_from=(0.75, 0.9),
    )  # fmt: skip


# The formats of a GGUF file's own blocks; see AUTO. Nobody asks for one by its name; int4 becomes Q4_K.
FILE_FORMATS = {
    row.name: row
    for row in (
        _of_file("Q4_K", 4, 0, 0, 256, 32, "MOSTLY_Q4_K_M", minimum=True, fitted=True),
        _of_file("Q5_K", 5, 1, 0, 256, 32, "MOSTLY_Q5_K_M", minimum=True),
        _of_file("Q6_K", 6, 2, 32, 256, 16, "MOSTLY_Q6_K", "Q3_K", minimum=False),
        _of_file("Q5_0", 7, 1, 16, 32, 0, "MOSTLY_Q5_0", minimum=False),
        _of_file("Q5_1", 8, 1, 0, 32, 0, "MOSTLY_Q5_1", minimum=True),
    )
}
# Asked for instead of a format: every matrix as wide as its file has it.
AUTO = "auto"


def stored_format(name: str) -> Format:
    """The format of a packed matrix, a GGUF file's own included.

    Raises:
        ActTailError: there is none.
    """
    return FILE_FORMATS.get(name) or weight_format(name)


def projection_format(form: Format, group: int | None) -> Format:
    """The format that projections are stored in where a format, and maybe a group, is asked for."""
    return (
        form if form.projections is None or group is not None else stored_format(form.projections)
    )


def format_of_kind(kind: str) -> Format | None:
    """The format that keeps every number of a kind of GGUF blocks; None if none does."""
    rows = (*FORMATS.values(), *FILE_FORMATS.values())
    return next((row for row in rows if kind in row.gguf), None)


@dataclass(frozen=True)
class KvFormat:
    """A format of the KV cache.

    Attributes:
        name: the short one, as of :class:`Format`.
        number: native/formats.hpp's.
        bytes: of one entry.
        scale_bytes: beside each key and each value of a head.
    """

    name: str
    number: int
    bytes: int
    scale_bytes: int = 0


KV_FORMATS = {
    row.name: row
    for row in (KvFormat("fp32", 0, 4), KvFormat("bf16", 1, 2), KvFormat("int8", 2, 1, 4))
}


def weight_format(name: str) -> Format:
    """The weight format of a name, in either spelling.

    Raises:
        ActTailError: there is none.
    """
    return _row(FORMATS, name, "engine dtype")


def kv_format(name: str) -> KvFormat:
    """The format of the KV cache of a name, in either spelling.

    Raises:
        ActTailError: there is none.
    """
    return _row(KV_FORMATS, name, "KV cache dtype")


def _row(rows: Mapping[str, T], name: str, what: str) -> T:
    found = rows.get(short_name(name))
    if found is None:
        raise ActTailError(f"unknown {what} {name!r}: use {', '.join(rows)}")
    return found
