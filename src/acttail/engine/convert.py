"""From a model's weights to the native engine's: packed, fused, one matrix in memory at a time."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from acttail.checkpoint import GgufWeights, StoredBlocks, WeightSource
from acttail.engine.layout import BLOCK, HEAD_GROUPS, Shape, pack, pack_nibbles, padded, shape_for
from acttail.engine.spec import DecoderSpec
from acttail.engine.store import Layout, Packed, Segment, Sizes, allocate, write_folder
from acttail.errors import ActTailError, ModelError
from acttail.evaluate.perplexity import Progress
from acttail.plan import ProjectionPlan, SparsityPlan

# Which projections are put side by side: those that read one vector.
FUSED = (
    ("qkv", ("q", "k", "v", "qkv")), ("o", ("o",)),
    ("gate_up", ("gate", "up", "gate_up")), ("down", ("down",)),
)  # fmt: skip

# Kinds of GGUF blocks that an engine dtype takes as they are.
_STORED_KINDS = {"int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1")}


def _kept_first(entry: ProjectionPlan | None) -> float:
    """Sort key: what keeps more of the input comes first, so that kept rows are read from their start."""
    if entry is None:
        return 0.0
    return entry.threshold if entry.threshold is not None else entry.sparsity


class Conversion:
    """How one model is converted; makes the layout, then the tensors.

    Args:
        spec: the decoder.
        weights: where its weights come from.
        dtype: ``fp32``, ``bf16``, ``int8`` or ``int4``.
        plan: decides the order of fused projections; None for dense.
        head_dtype: of the embedding and the output head; by default fp32 for fp32, else int8.
        group: inputs that share a scale; None for the dtype's default.
    """

    def __init__(
        self, spec: DecoderSpec, weights: WeightSource, dtype: str, *, plan: SparsityPlan | None = None,
        head_dtype: str | None = None, group: int | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.weights, self.plan, self.group = spec, weights, plan, group
        self.by_name = {p.name: p for p in weights.projections}
        # Read whole for every token, and the loss is not measurable: KL 5e-5 with int8 groups of 32 where
        # bf16 itself has 7e-5 (SmolLM2-135M, docs/performance.md).
        head_dtype = head_dtype or ("fp32" if dtype == "fp32" else "int8")
        shapes: dict[str, Shape] = {}
        segments: dict[str, tuple[Segment, ...]] = {}
        for i in range(len(spec.blocks)):
            for fused, _ in FUSED:
                name = f"blocks.{i}.{fused}"
                segments[name] = self._segments(i, fused)
                d_in = self.by_name[segments[name][0].name].d_in
                shape = shape_for(dtype, d_in, segments[name][-1].end, group=group)
                kind = self._stored_kind(segments[name], dtype)
                if kind is not None:
                    shape = replace(shape, group=32, asymmetric=kind == "Q4_1")
                shapes[name] = shape
        own_group = HEAD_GROUPS.get(head_dtype)
        table = shape_for(
            head_dtype, spec.hidden, spec.vocabulary, group=own_group, output_major=True
        )
        shapes["embedding"] = table
        if spec.head != spec.embedding:
            shapes["head"] = table
        self.layout = Layout(spec, dtype, head_dtype, weights.name, shapes, segments)

    def _segments(self, block: int, fused: str) -> tuple[Segment, ...]:
        names = self.spec.blocks[block].projections
        members = [names[kind] for kind in dict(FUSED)[fused] if kind in names]
        entries = self.plan.projections if self.plan else {}
        members.sort(key=lambda n: _kept_first(entries.get(n)))
        found, begin = [], 0
        for name in members:
            p = self.by_name[name]
            end = begin + padded(p.d_out)
            found.append(Segment(name, p.kind, begin, end, p.d_out))
            begin = end
        return tuple(found)

    def _stored_kind(self, segments: tuple[Segment, ...], dtype: str) -> str | None:
        """The kind of the GGUF's own blocks, if all members have the same, of this width."""
        if self.group not in (None, 32) or not isinstance(self.weights, GgufWeights):
            return None
        kinds = {self.weights.stored_kind(self.by_name[s.name]) for s in segments}
        kind = kinds.pop() if len(kinds) == 1 else None
        return kind if kind in _STORED_KINDS.get(dtype, ()) else None

    def sizes(self) -> Sizes:
        """Name -> (dtype, shape) of every tensor, in the order of :meth:`tensors`."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, shape in self.layout.shapes.items():
            found |= {f"{name}.{suffix}": entry for suffix, entry in shape.tensors().items()}
            if name in self._biases:
                found[f"{name}.bias"] = torch.float32, (shape.columns,)
        for name, width in self._norms():
            found[name] = torch.float32, (width,)
        return found

    def _norms(self) -> Iterator[tuple[str, int]]:
        for i, block in enumerate(self.spec.blocks):
            for role in block.norms:
                per_head = role in ("q_norm", "k_norm")
                yield f"blocks.{i}.{role}", self.spec.head_dim if per_head else self.spec.hidden
        yield "final_norm", self.spec.hidden

    @cached_property
    def _biases(self) -> dict[str, torch.Tensor]:
        """Fused matrix -> bias of all its columns; nothing for those without. Small, so read once."""
        found: dict[str, torch.Tensor] = {}
        for name, segments in self.layout.segments.items():
            for s in segments:
                with suppress(ModelError):  # most projections have none
                    part = self.weights.tensor(f"{self.by_name[s.name].module}.bias")
                    whole = found.setdefault(name, torch.zeros(self.layout.shapes[name].columns))
                    whole[s.begin : s.begin + s.d_out] = part.float()
        return found

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything, one matrix in memory at a time."""
        total = len(self.layout.shapes)
        for done, (name, shape) in enumerate(self.layout.shapes.items(), 1):
            if name in self.layout.segments:
                packed = self._fused(name, shape)
            else:
                source = self.spec.embedding if name == "embedding" else self.spec.head
                packed = pack(self.weights.tensor(source), shape)
            for suffix in shape.tensors():
                yield f"{name}.{suffix}", packed[suffix]
            if name in self._biases:
                yield f"{name}.bias", self._biases[name]
            if progress is not None:
                progress(done, total)
        names = {
            f"blocks.{i}.{r}": n for i, b in enumerate(self.spec.blocks) for r, n in b.norms.items()
        }
        for name, width in self._norms():
            values = self.weights.tensor(names.get(name, self.spec.final_norm)).float()
            if values.numel() != width:
                raise ActTailError(f"{name} has {values.numel()} entries, not {width}")
            yield name, (values + self.spec.norm_shift).clone()

    def _fused(self, name: str, shape: Shape) -> dict[str, torch.Tensor]:
        """Members packed one after the other and put side by side."""
        segments = self.layout.segments[name]
        stored = self._stored_kind(segments, shape.dtype) is not None
        parts = []
        for s in segments:
            own = replace(shape, columns=s.end - s.begin)
            if stored and isinstance(self.weights, GgufWeights):
                parts.append(_from_stored(self.weights.stored(self.by_name[s.name]), own))
            else:
                parts.append(pack(self.weights.weight(self.by_name[s.name]), own))
        return {suffix: torch.cat([p[suffix] for p in parts], dim=1) for suffix in parts[0]}


def _from_stored(blocks: StoredBlocks, shape: Shape) -> dict[str, torch.Tensor]:
    """The engine's layout of a GGUF's own levels: nothing is rounded again."""
    extra = shape.columns - blocks.levels.shape[0]
    zero = 8 if blocks.bits == 4 and blocks.minimum is None else 0
    levels = nn.functional.pad(blocks.levels.T.contiguous(), (0, extra), value=zero)
    packed = {
        "weight": levels.view(torch.uint8) if blocks.bits == 8 else pack_nibbles(levels),
        "scale": nn.functional.pad(blocks.scale.T.contiguous(), (0, extra)),
    }
    if blocks.minimum is not None:
        packed["minimum"] = nn.functional.pad(blocks.minimum.T.contiguous(), (0, extra))
    return packed


def convert_in_memory(conversion: Conversion, progress: Progress | None = None) -> Packed:
    """Pack a model into an arena.

    Args:
        conversion: what and how.
        progress: called with (matrices done, matrices).
    """
    tensors, arena = allocate(conversion.sizes())
    for name, tensor in conversion.tensors(progress):
        tensors[name].copy_(tensor)
    return Packed(conversion.layout, tensors, conversion.plan, arena)


def convert_to_folder(
    conversion: Conversion, folder: str | os.PathLike[str], progress: Progress | None = None
) -> None:
    """Pack a model into an .acttail folder, without holding it in memory.

    Args:
        conversion: what and how.
        folder: made if absent.
        progress: called with (matrices done, matrices).

    Raises:
        ActTailError: the folder cannot be written.
    """
    write_folder(
        Path(folder), conversion.layout, conversion.sizes(),
        lambda: conversion.tensors(progress), conversion.plan,
    )  # fmt: skip


def dequantised_state(packed: Packed) -> Mapping[str, torch.Tensor]:
    """Projection weight name -> float32 [d_out, d_in] as the engine reads them; for checks."""
    from acttail.engine.layout import unpack

    found = {}
    for name, segments in packed.layout.segments.items():
        values = unpack(packed.matrix(name), packed.layout.shapes[name])
        for s in segments:
            found[s.name] = values[s.begin : s.begin + s.d_out]
    return found


assert BLOCK == 64  # noqa: S101  (native/kernels.hpp, kBlock)
