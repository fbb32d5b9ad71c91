"""From a model's weights to the native engine's: packed, fused, one matrix in memory at a time."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from acttail.base.controls import clean
from acttail.base.progress import Progress
from acttail.engine.blocks import padded
from acttail.engine.config import EngineConfig
from acttail.engine.formats import DEFAULT, Format, format_of_kind, projection_format, weight_format
from acttail.engine.layout import (
    EMBEDDING,
    HEAD_BIAS,
    HEAD_MATRIX,
    POSITIONS,
    Layout,
    Segment,
    Sizes,
    Stage,
    stages,
)
from acttail.engine.packing import pack, unpack
from acttail.engine.shapes import Shape, shape_for
from acttail.engine.spec import DecoderSpec, bias_of
from acttail.engine.store import Packed, allocate, write_folder
from acttail.engine.transcode import put_blocks, put_floats, put_table, takes_table
from acttail.errors import ActTailError, ModelError
from acttail.model.gguf import GgufWeights
from acttail.model.gguf_blocks import KINDS, BlockKind
from acttail.model.projections import Projection
from acttail.model.weights import WeightSource
from acttail.plan import SparsityPlan
from acttail.sparse.policy import PrefillPolicy
from acttail.sparse.rules import kind_of


def _kept_first(plan: SparsityPlan | None, name: str) -> float:
    """Sort key: what keeps more of the input comes first, so that a row kept by several is one run.

    By the number that the plan's rule cuts at, so that the order is the one that the kernels find. They take
    any order (a later plan may want another), and read neighbours that agree in one run.
    """
    entry = plan.projections.get(name) if plan is not None else None
    if plan is None or entry is None or plan.left_dense(entry):
        return 0.0
    if kind_of(plan).fixed_k or entry.threshold is None:
        return entry.realised_sparsity
    return entry.threshold


class Conversion:
    """How one model is converted; makes the layout, then the tensors.

    Args:
        spec: the decoder.
        weights: where its weights come from.
        config: weight formats and groups.
        plan: decides how the output head lies, and the order of fused projections; None for dense.
        ordered: whether the plan decides that order; without, any plan of such a head is as welcome.

    Raises:
        ActTailError: a group was asked for that a GGUF file's own scales do not have.
    """

    def __init__(
        self, spec: DecoderSpec, weights: WeightSource, config: EngineConfig, *,
        plan: SparsityPlan | None = None, ordered: bool = True,
    ) -> None:  # fmt: skip
        self._order = plan if ordered else None
        self.spec, self.weights, self.plan, self.group = spec, weights, plan, config.group
        self.by_name = {p.name: p for p in weights.projections}
        self.form = projection_format(config.weights, config.group)
        self.own_widths = config.own_widths
        if self.own_widths and self.group is not None and isinstance(weights, GgufWeights):
            raise ActTailError(
                "a GGUF's scales stay as they are unless a dtype is named: leave out group, or name one"
            )
        head = config.head
        shapes: dict[str, Shape] = {}
        segments: dict[str, tuple[Segment, ...]] = {}
        for stage in stages(spec):
            for n, (own, group, members) in enumerate(self._by_format(stage)):
                name = f"{stage.name}.{n}" if n else stage.name
                shapes[name], segments[name] = self._laid_out(members, own, group)
        table = shape_for(
            head.name, spec.hidden, spec.vocabulary, group=head.head_group, output_major=True
        )
        tied, by_inputs = spec.head == spec.embedding, self._sparse_head()
        # Tied weights are kept once: a column of them costs a line of memory for each input, some ten microseconds, where the
        # table would be as large as the head.
        if not (tied and by_inputs):
            shapes[EMBEDDING] = table
        if by_inputs:
            shapes[HEAD_MATRIX], segments[HEAD_MATRIX] = self._head_by_inputs(head)
        elif not tied:
            shapes[HEAD_MATRIX] = table
        default = config.weights.name
        if config.own_widths:
            # The format of most of the weights stands for the model.
            total: Counter[str] = Counter()
            for name in segments.keys() - {HEAD_MATRIX}:
                total[shapes[name].dtype] += shapes[name].entries
            default = total.most_common(1)[0][0]
        name = clean(weights.name) or "model"
        self.layout = Layout(spec, default, head.name, name, shapes, segments)

    def _sparse_head(self) -> bool:
        """Whether the plan drops some of the head's input, so that its rows had better be its inputs'."""
        return (
            self.plan is not None
            and self.plan.sparse_head is not None
            and self.weights.head is not None
        )

    def _head_by_inputs(self, form: Format) -> tuple[Shape, tuple[Segment, ...]]:
        """The output head as a matrix whose rows are its inputs'."""
        head = self.weights.head
        assert head is not None  # noqa: S101
        self.by_name[head.name] = head
        group = form.head_group
        if self.own_widths and isinstance(self.weights, GgufWeights):
            form, group = self._own_format(head)
        return self._laid_out([head], form, group)

    def head_by_inputs(self) -> Shape:
        """The output head's matrix under a plan that drops some of its input."""
        if HEAD_MATRIX in self.layout.segments:
            return self.layout.shapes[HEAD_MATRIX]
        return self._head_by_inputs(weight_format(self.layout.head_dtype))[0]

    def _laid_out(
        self, members: list[Projection], form: Format, group: int | None
    ) -> tuple[Shape, tuple[Segment, ...]]:
        """An input-major matrix of projections side by side; scales as a GGUF has them, if it is of this format."""
        segments = self._segments(members, form.columns)
        shape = shape_for(form.name, members[0].d_in, segments[-1].end, group=group)
        kind = self._stored_kind(segments, form.gguf)
        if kind is not None:
            shape = replace(shape, group=kind.entries, asymmetric=kind.minimum)
        return shape, segments

    def _by_format(self, stage: Stage) -> list[tuple[Format, int | None, list[Projection]]]:
        """What reads one vector: a format, a group (None for the format's) and the projections that have them.

        One entry unless each projection is as wide as its file has it; what keeps most comes first.
        """
        members = list(stage.members.values())
        members.sort(key=lambda n: _kept_first(self._order, n))
        found: dict[tuple[object, ...], tuple[Format, int | None, list[Projection]]] = {}
        for p in (self.by_name[n] for n in members):
            form, group = self._own_format(p) if self.own_widths else (self.form, self.group)
            own = self._kind(p) if self.own_widths else None
            key = form.name, group, own is not None and own.minimum
            found.setdefault(key, (form, group, []))[2].append(p)
        return list(found.values())

    def _own_format(self, projection: Projection) -> tuple[Format, int | None]:
        """The format and group of a projection as wide as its file has it.

        Kinds without a format become int8 in groups of 32, which holds each of their numbers to half of a 127th
        of the group's largest.
        """
        if not isinstance(self.weights, GgufWeights):
            return DEFAULT, None
        kind = self._kind(projection)
        found = format_of_kind(kind.name) if kind is not None else None
        if found is not None:
            return found, None
        if self.weights.stored_types(projection) <= {"F32", "F16", "BF16"}:
            return DEFAULT, None
        return weight_format("int8"), 32

    def rounded(self) -> str | None:
        """What of a GGUF is not kept number by number though its own widths are asked for, in words; None if nothing."""
        if not (self.own_widths and isinstance(self.weights, GgufWeights)):
            return None
        counted: Counter[tuple[str, str]] = Counter()
        for name, segments in self.layout.segments.items():
            shape = self.layout.shapes[name]
            for s in segments:
                types = self.weights.stored_types(self.by_name[s.name])
                # F32 becomes bf16 as it does of any other model.
                lost = types - set(shape.format.gguf) - {"F32", "BF16"}
                counted.update((found, shape.dtype) for found in lost)
        if not counted:
            return None
        found = ", ".join(
            f"{n} in {kind} become {own}" for (kind, own), n in sorted(counted.items())
        )
        return (
            f"{self.layout.source}: no format here holds every number of some matrices: {found} "
            "(docs/formats.md says how near); --dtype fp32 is nearest"
        )

    def _segments(self, members: list[Projection], columns: int) -> tuple[Segment, ...]:
        found, begin = [], 0
        for p in members:
            end = begin + padded(p.d_out, columns)
            found.append(Segment(p.name, p.kind, begin, end, p.d_out))
            begin = end
        return tuple(found)

    def _stored_kind(
        self, segments: tuple[Segment, ...], taken: tuple[str, ...]
    ) -> BlockKind | None:
        """The kind of the GGUF's own blocks, if those of all members are `taken` and alike; that of one of them."""
        kinds = [self._kind(self.by_name[s.name]) for s in segments]
        alike = {
            (k.entries, k.minimum) if k is not None and k.name in taken else None for k in kinds
        }
        found = kinds[0]
        if found is None or len(alike) != 1 or None in alike:
            return None
        return found if self.group in (None, found.entries) else None

    def _taken(self, projection: Projection, shape: Shape) -> bool:
        """Whether a GGUF's own blocks of a projection are taken as they are."""
        kind = self._kind(projection)
        if kind is None or kind.name not in shape.format.gguf:
            return False
        return (kind.entries, kind.minimum) == (shape.group, shape.asymmetric)

    def _kind(self, projection: Projection) -> BlockKind | None:
        """The kind of a GGUF's own blocks of a matrix; None for any other."""
        if not isinstance(self.weights, GgufWeights):
            return None
        name = self.weights.stored_kind(projection)
        return KINDS[name] if name is not None else None

    def sizes(self) -> Sizes:
        """Name -> (dtype, shape) of every tensor, in the order of :meth:`tensors`."""
        return self.layout.sizes(self._biases)

    def _norms(self) -> Iterator[tuple[str, str, int, float]]:
        """(name, parameter, entries, what is added to them) of every norm's weight and bias."""
        spec = self.spec
        sources = {
            f"blocks.{i}.{role}": name
            for i, block in enumerate(spec.blocks)
            for role, name in block.norms.items()
        } | {"final_norm": spec.final_norm}
        for name, width in self.layout.norms():
            norm = name.removesuffix(".bias")
            if name == norm:
                yield name, sources[norm], width, spec.norm_shift
            else:
                yield name, bias_of(sources[norm]), width, 0.0

    @cached_property
    def _biases(self) -> dict[str, torch.Tensor]:
        """Stage -> bias of all its columns; nothing for those without. Small, so read once."""
        found: dict[str, torch.Tensor] = {}
        for stage in self.layout.stages:
            segments = self.layout.stage(stage.name)
            for s in segments:
                with suppress(ModelError):  # most projections have none
                    part = self.weights.tensor(f"{self.by_name[s.name].module}.bias")
                    whole = found.setdefault(stage.name, torch.zeros(segments[-1].end))
                    whole[s.begin : s.begin + s.d_out] = part.float()
        return found

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything, one matrix in memory at a time."""
        for name, shape in self._counted(progress):
            made = {k: torch.empty(size, dtype=kind) for k, (kind, size) in shape.tensors().items()}
            self._write(name, shape, made)
            for suffix, tensor in made.items():
                yield f"{name}.{suffix}", tensor
            if name in self._biases:
                yield f"{name}.bias", self._biases[name]
        yield from self._small()

    def fill(self, tensors: Mapping[str, torch.Tensor], progress: Progress | None = None) -> None:
        """Write everything into tensors of :meth:`sizes`; a GGUF's own blocks without a copy between."""
        for name, shape in self._counted(progress):
            self._write(name, shape, {k: tensors[f"{name}.{k}"] for k in shape.tensors()})
            if name in self._biases:
                tensors[f"{name}.bias"].copy_(self._biases[name])
        for name, values in self._small():
            tensors[name].copy_(values)

    def _counted(self, progress: Progress | None) -> Iterator[tuple[str, Shape]]:
        total = len(self.layout.shapes)
        for done, item in enumerate(self.layout.shapes.items(), 1):
            yield item
            if progress is not None:
                progress(done, total)

    def _small(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, source, width, shift in self._norms():
            values = self.weights.tensor(source).float()
            if values.numel() != width:
                raise ActTailError(f"{name} has {values.numel()} entries, not {width}")
            yield name, (values + shift).clone()
        spec = self.spec
        for name, (rows, columns) in self.layout.routers():
            yield name, self._router(name, rows, columns)
        if spec.positions is not None:
            table = self.weights.tensor(spec.positions).float()[spec.first_position :]
            if table.shape != (spec.context, spec.hidden):
                raise ActTailError(
                    f"{spec.positions} has not {spec.context} positions of {spec.hidden} features"
                )
            yield POSITIONS, table.contiguous()
        if spec.head_bias is not None:
            bias = self.weights.tensor(spec.head_bias).float()
            if bias.shape != (spec.vocabulary,):
                raise ActTailError(
                    f"{spec.head_bias} has {bias.numel()} entries, not {spec.vocabulary}"
                )
            yield HEAD_BIAS, bias.contiguous()

    def _router(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] float32: a row for each expert, then that of the shared MLP's gate."""
        experts = self.spec.blocks[int(name.split(".")[1])].experts
        assert experts is not None  # noqa: S101  (the layout says so)
        names = [experts.router, *([experts.shared_gate] if experts.shared_gate else [])]
        parts = [self.weights.tensor(n).float() for n in names]
        found = torch.zeros(rows, columns)
        whole = torch.cat(parts)
        if whole.shape != (rows, self.spec.hidden):
            raise ActTailError(
                f"{experts.router} has not a row of {self.spec.hidden} features for each expert"
            )
        found[:, : self.spec.hidden] = whole
        return found

    def _write(self, name: str, shape: Shape, into: dict[str, torch.Tensor]) -> None:
        """Fill the tensors of one matrix."""
        if name not in self.layout.segments:
            self._table(self.spec.embedding if name == EMBEDDING else self.spec.head, shape, into)
            return
        for s in self.layout.segments[name]:
            projection = self.by_name[s.name]
            if self._taken(projection, shape) and isinstance(self.weights, GgufWeights):
                begin = s.begin
                for part in self.weights.stored(projection):
                    put_blocks(part, shape, into, begin)
                    begin += len(part.data)
                continue
            if shape.format.fitted:
                put_floats(self.weights.weight(projection), shape, into, s.begin)
                continue
            own = replace(shape, columns=s.end - s.begin)
            for suffix, packed in pack(self.weights.weight(projection), own).items():
                begin = into[suffix].shape[1] * s.begin // shape.columns
                into[suffix][:, begin : begin + packed.shape[1]] = packed

    def _table(self, parameter: str, shape: Shape, into: dict[str, torch.Tensor]) -> None:
        """Fill the embedding or an output head that is kept by outputs."""
        if isinstance(self.weights, GgufWeights):
            stored = self.weights.stored_table(parameter)
            if stored is not None and takes_table(stored, shape):
                put_table(stored, shape, into)
                return
        for suffix, packed in pack(self.weights.tensor(parameter), shape).items():
            into[suffix].copy_(packed)


def convert_in_memory(
    conversion: Conversion, progress: Progress | None = None,
    policy: PrefillPolicy | str | None = None,
) -> Packed:  # fmt: skip
    """Pack a model into an arena.

    Args:
        conversion: what and how.
        progress: called with (matrices done, matrices).
        policy: the model's own prefill policy, None if it has none.
    """
    tensors, arena = allocate(conversion.sizes())
    conversion.fill(tensors, progress)
    own = PrefillPolicy.choose(policy)
    return Packed(conversion.layout, tensors, conversion.plan, arena, own)


def convert_to_folder(
    conversion: Conversion, folder: str | os.PathLike[str], policy: PrefillPolicy,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Pack a model into an .acttail folder, without holding it in memory.

    Args:
        conversion: what and how.
        folder: made if absent.
        policy: kept inside.
        progress: called with (matrices done, matrices).

    Raises:
        ActTailError: the folder cannot be written.
    """
    write_folder(
        Path(folder), conversion.layout, conversion.sizes(),
        lambda: conversion.tensors(progress), conversion.plan, policy,
    )  # fmt: skip


def dequantised_state(packed: Packed) -> Mapping[str, torch.Tensor]:
    """Projection weight name -> float32 [d_out, d_in] as the engine reads them; for checks."""
    found = {}
    for name, segments in packed.layout.segments.items():
        values = unpack(packed.matrix(name), packed.layout.shapes[name])
        for s in segments:
            found[s.name] = values[s.begin : s.begin + s.d_out]
    return found
