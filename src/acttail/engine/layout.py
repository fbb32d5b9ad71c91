"""What a packed model consists of, without the bytes: its matrices, what lies in them, and every tensor's size.

The annotations are the schema of an .acttail folder's engine.json; :mod:`acttail.engine.description` reads it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Ge, Len

from acttail.base.schema import STRICT, Name, Size
from acttail.engine.blocks import padded
from acttail.engine.formats import Format, stored_format
from acttail.engine.shapes import Shape
from acttail.engine.spec import DecoderSpec

# 2: the output head may be input-major, a projection like the others. Folders of version 1 have none such.
# 3: blocks of Q4_K may end short and have scales of seven bits, as int4 does. Folders of before have int4 in groups.
# 4: blocks may have experts. Folders of before have none.
# 5: norms may have ReLU after them. Folders of before have none.
# 6: an embedding tied to an input-major head has no table beside it. Folders of before have both.
VERSION = 6
READ = (1, 2, 3, 4, 5, VERSION)
# The output head's matrix, and the embedding's table. Where they are tied there is one of them: the table, read by outputs as
# the head, or an input-major head, of which an embedding is one column.
HEAD_MATRIX = "head"
EMBEDDING = "embedding"
# float32 tables that a few families have: of learned positions, and of the head.
POSITIONS, HEAD_BIAS = "positions", "head_bias"
# Which projections are put side by side, the stages of a block: those that read one vector.
FUSED = (
    ("qkv", ("q", "k", "v", "qkv")), ("o", ("o",)),
    ("gate_up", ("gate", "up", "gate_up", "fc1")), ("down", ("down", "fc2")),
)  # fmt: skip

# Of a block with experts: float32, its rows padded to blocks, that of the shared MLP's gate after the experts'.
ROUTER = "router"

Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Stage:
    """Projections of a block that read one vector.

    Attributes:
        name: ``blocks.3.qkv``, ``blocks.3.experts.7.down``.
        block: index of its block.
        members: kind -> name of each projection.
        d_in: features of the vector.
        inner: features inside of the MLP that it is of; 0 for none.
        share: of all tokens, those that read it: all, or as many as an expert has if each has as many.
        expert: index of the expert that it is of, None for none.
    """

    name: str
    block: int
    members: Mapping[str, str]
    d_in: int
    inner: int
    share: Fraction
    expert: int | None = None

    @property
    def part(self) -> str:
        """Its name in :data:`FUSED`."""
        return self.name.rpartition(".")[2]


def stages(spec: DecoderSpec) -> Iterator[Stage]:
    """Every stage of every block, the experts' after the block's own; those without a projection are left out."""
    attention = ("qkv", spec.hidden), ("o", spec.heads * spec.head_dim)
    kinds = dict(FUSED)

    def found(
        prefix: str, block: int, own: Mapping[str, str], parts: tuple[tuple[str, int], ...], inner: int = 0,
        share: Fraction = Fraction(1), expert: int | None = None,
    ) -> Iterator[Stage]:  # fmt: skip
        for part, d_in in parts:
            members = {kind: own[kind] for kind in kinds[part] if kind in own}
            if members:
                yield Stage(f"{prefix}.{part}", block, members, d_in, inner, share, expert)

    for i, block in enumerate(spec.blocks):
        yield from found(f"blocks.{i}", i, block.projections, attention)
        inner = spec.inner(i)
        mlp = ("gate_up", spec.hidden), ("down", inner)
        yield from found(f"blocks.{i}", i, block.projections, mlp, inner)
        experts = block.experts
        if experts is None:
            continue
        mlp = ("gate_up", spec.hidden), ("down", experts.inner)
        share = Fraction(experts.active, len(experts.projections))
        for e, own in enumerate(experts.projections):
            yield from found(f"blocks.{i}.experts.{e}", i, own, mlp, experts.inner, share, e)


@dataclass(frozen=True)
class Segment:
    """One projection's columns in a fused matrix.

    Attributes:
        name: the projection's.
        kind: its kind.
        begin: first column.
        end: one past its last, padded to blocks.
        d_out: outputs, without the padding.
    """

    __pydantic_config__ = STRICT

    name: Name
    kind: Name
    begin: Annotated[int, Ge(0)]
    end: Size
    d_out: Size


@dataclass(frozen=True)
class Layout:
    """What a packed model consists of, without the bytes.

    Attributes:
        spec: the decoder.
        dtype: the default of the projections; each shape has its own.
        head_dtype: of the embedding and the output head.
        source: name of the model it was made from.
        shapes: matrix name -> its shape; ``blocks.3.qkv``, ``embedding``, ``head``. An input-major head that the
            embedding is tied to is both, without an ``embedding``.
        segments: fused matrix name -> its projections, in the order of their columns. What reads one vector is
            a stage: one matrix, or one for each format among its projections, ``blocks.3.qkv`` and then
            ``blocks.3.qkv.1`` and so on. ``head`` is among them if the output head's rows are its inputs'.
    """

    __pydantic_config__ = STRICT

    spec: DecoderSpec
    dtype: Name
    head_dtype: Name
    source: Name
    shapes: Annotated[dict[Name, Shape], Len(1)]
    segments: Annotated[dict[Name, tuple[Segment, ...]], Len(1)]

    @property
    def format(self) -> Format:
        """The default weight format."""
        return stored_format(self.dtype)

    def matrices(self, stage: str) -> tuple[str, ...]:
        """Names of a stage's matrices, in the order in which their columns lie side by side."""
        found = [stage]
        while f"{stage}.{len(found)}" in self.segments:
            found.append(f"{stage}.{len(found)}")
        return tuple(found)

    def stage(self, stage: str) -> tuple[Segment, ...]:
        """The projections of a stage, their columns counted over all its matrices."""
        found: list[Segment] = []
        at = 0
        for name in self.matrices(stage):
            found += [replace(s, begin=at + s.begin, end=at + s.end) for s in self.segments[name]]
            at += self.shapes[name].columns
        return tuple(found)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The blocks' stages."""
        return tuple(stages(self.spec))

    @cached_property
    def stage_of(self) -> Mapping[str, Stage]:
        """Name of a blocks' matrix -> the stage that it is of."""
        return {name: stage for stage in self.stages for name in self.matrices(stage.name)}

    def share(self, name: str) -> Fraction:
        """Of all tokens, those that read a matrix of :attr:`segments`, if each expert has as many as the others."""
        stage = self.stage_of.get(name)
        return Fraction(1) if stage is None else stage.share

    @cached_property
    def matrix_of(self) -> Mapping[str, str]:
        """Name of a projection -> its matrix, where that is input-major."""
        return {s.name: name for name, segments in self.segments.items() for s in segments}

    @cached_property
    def prefill_tokens(self) -> int:
        """Shorter continuations are decoded token by token: the formats' own limits, by their weights."""
        fused = [self.shapes[name] for name in self.segments]
        total = sum(shape.entries for shape in fused)
        return round(sum(s.entries * s.format.prefill_tokens for s in fused) / total)

    @property
    def head_name(self) -> str:
        """Name of the output head's matrix, which may be the embedding."""
        return HEAD_MATRIX if HEAD_MATRIX in self.shapes else EMBEDDING

    @property
    def head_shape(self) -> Shape:
        """The output head's matrix, which may be the embedding."""
        return self.shapes[self.head_name]

    @property
    def gathered(self) -> bool:
        """Whether a token's embedding is a column of the head's matrix, which is input-major."""
        return EMBEDDING not in self.shapes

    def norms(self) -> Iterator[tuple[str, int]]:
        """(name, entries) of every norm's weight and bias."""
        roles = [f"blocks.{i}.{role}" for i, b in enumerate(self.spec.blocks) for role in b.norms]
        for name in (*roles, "final_norm"):
            width = self.spec.head_dim if name.endswith(("q_norm", "k_norm")) else self.spec.hidden
            yield name, width
            if self.spec.layer_norm:
                yield f"{name}.bias", width

    def routers(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(name, shape) of every router."""
        for i, block in enumerate(self.spec.blocks):
            if block.experts is not None:
                rows = len(block.experts.projections) + (block.experts.shared_gate is not None)
                yield f"blocks.{i}.{ROUTER}", (rows, padded(self.spec.hidden))

    def sizes(self, biased: Collection[str]) -> Sizes:
        """Name -> (dtype, shape) of every tensor, in the order of the file.

        Args:
            biased: the stages with a bias.
        """
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, shape in self.shapes.items():
            found |= {f"{name}.{suffix}": entry for suffix, entry in shape.tensors().items()}
            if name in biased:
                found[f"{name}.bias"] = torch.float32, (self.stage(name)[-1].end,)
        found |= {name: (torch.float32, (width,)) for name, width in self.norms()}
        found |= {name: (torch.float32, shape) for name, shape in self.routers()}
        if self.spec.positions is not None:
            found[POSITIONS] = torch.float32, (self.spec.context, self.spec.hidden)
        if self.spec.head_bias is not None:
            found[HEAD_BIAS] = torch.float32, (self.spec.vocabulary,)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"version": VERSION}
