"""A packed model in the hands of the native engine: what its C ABI is told, and the calls that run it."""

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from acttail.engine.blocks import padded
from acttail.engine.formats import kv_format
from acttail.engine.layout import (
    EMBEDDING,
    HEAD_BIAS,
    HEAD_MATRIX,
    POSITIONS,
    ROUTER,
    Layout,
    Segment,
)
from acttail.engine.packing import unpack
from acttail.engine.shapes import Shape
from acttail.engine.spec import ExpertsSpec, check_rule, mlp_norm_of
from acttail.engine.store import Packed
from acttail.engine.transcode import matrix_struct
from acttail.errors import ActTailError, PlanError
from acttail.model.projections import HEAD
from acttail.plan import SparsityPlan
from acttail.sparse.backends import abi, cpu
from acttail.sparse.backends.abi import Block, Fused, Mlp, Model, Norm, Rope
from acttail.sparse.rules import Rule, bind

# Rows of a head kept by outputs that are unpacked at a time.
_TABLE_ROWS = 8192


def library() -> ctypes.CDLL:
    """The native library with the engine's signatures.

    Raises:
        ActTailError: it is not available; says why.
    """
    try:
        return cpu.library()
    except RuntimeError as error:
        raise ActTailError(f"the native engine is not available: {error}") from error


class KvPool:
    """Counts the memory of the KV caches that are made in it."""

    def __init__(self) -> None:
        self._lib = library()
        handle = ctypes.c_void_p()
        code = self._lib.acttail_pool_new(ctypes.byref(handle))
        if code:
            raise ActTailError(f"no pool of KV caches: {abi.reason(code)}")
        self.handle = handle.value

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._lib.acttail_pool_free(self.handle)
            self.handle = None

    @property
    def bytes(self) -> int:
        """Of all caches now; what several share counts once."""
        return int(self._lib.acttail_pool_bytes(self.handle))


class NativeDecoder:
    """A packed model in the hands of the native engine.

    Args:
        packed: the weights; held as long as the decoder lives.
        plan: which rows each projection keeps; None for dense.
        threads: that run a token together.
        kv_dtype: of the KV cache: ``fp32``, ``bf16`` or ``int8``.
        dense_kernel: projections that read all rows though most of their input is zeroed.
        together: matrices of which it was measured from how many vectors on lists that differ are read as one.
        pool: of the KV caches; a new one by default.

    Raises:
        UnsupportedRuleError: the engine does not run the plan's rule.
        PlanError: the plan was made for other projections.
        ActTailError: no native library, or the engine refuses the model.
    """

    def __init__(
        self, packed: Packed, plan: SparsityPlan | None, threads: int, kv_dtype: str,
        dense_kernel: frozenset[str] = frozenset(), pool: KvPool | None = None,
        together: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        check_rule(plan)
        self.lib = library()
        self.pool = pool or KvPool()
        self.packed, self.plan, self.threads, self.kv_dtype = packed, plan, threads, kv_dtype
        self.dense_kernel, self._together = dense_kernel, together or {}
        # Sequences share the workers' scratch: one pass at a time, whatever thread it comes from.
        self.lock = threading.RLock()
        self._held: list[Any] = []
        # Projection name -> its rule, for prompts; empty without a plan.
        self.rules: dict[str, Rule] = {}
        model = self._model()
        handle = ctypes.c_void_p()
        code = self.lib.acttail_engine_new(ctypes.byref(model), threads, ctypes.byref(handle))
        if code:
            raise ActTailError(
                f"the native engine refused the model with {threads} threads: {abi.reason(code)}"
            )
        self.handle = handle.value

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.lib.acttail_engine_free(self.handle)
            self.handle = None

    def new_cache(self, capacity: int) -> int:
        """Handle of an empty KV cache, for the caller to free with `acttail_cache_free`.

        Args:
            capacity: positions it has room for.

        Raises:
            ActTailError: not enough memory for it.
        """
        cache = ctypes.c_void_p()
        code = self.lib.acttail_cache_new(
            self.handle, self.pool.handle, capacity, ctypes.byref(cache)
        )
        if code or cache.value is None:
            raise ActTailError(f"no KV cache for {capacity} tokens: {abi.reason(code)}")
        return cache.value

    def fork_cache(self, cache: int, length: int, capacity: int) -> int:
        """Handle of another KV cache that shares the first positions of one.

        Args:
            cache: handle of the one.
            length: positions shared.
            capacity: positions the new one has room for.

        Raises:
            ActTailError: there are not so many positions, or not enough memory.
        """
        made = ctypes.c_void_p()
        code = self.lib.acttail_cache_fork(cache, length, capacity, ctypes.byref(made))
        if code or made.value is None:
            raise ActTailError(f"no KV cache that shares {length} tokens: {abi.reason(code)}")
        return made.value

    def _float(self, values: torch.Tensor) -> int:
        held = values.float().contiguous()
        self._held.append(held)
        return held.data_ptr()

    def _norm(self, name: str) -> Norm:
        found = (self.packed.tensors.get(n) for n in (name, f"{name}.bias"))
        weight, bias = (tensor.data_ptr() if tensor is not None else None for tensor in found)
        return Norm(weight, bias, int(self.packed.layout.spec.rectifies(name)))

    def _segment(self, s: Segment, at: int) -> abi.Segment:
        """A projection whose matrix begins at column `at` of its stage."""
        out = abi.Segment(begin=at + s.begin, end=at + s.end, outputs=s.d_out)
        if self.plan is None or (s.kind == HEAD and self.plan.head is None):
            return out
        entry = self.plan.projections.get(s.name)
        if entry is None:
            raise PlanError(f"the plan has no projection {s.name}: it was made for another model")
        layout = self.packed.layout
        name = layout.matrix_of.get(s.name)
        d_in = layout.spec.hidden if name is None else layout.shapes[name].rows
        if (entry.d_in, entry.d_out) != (d_in, s.d_out):
            raise PlanError(
                f"the plan's {s.name} maps {entry.d_in} to {entry.d_out} features, this model's {d_in} "
                f"to {s.d_out}: it was made for another model"
            )
        out.dense_kernel = int(s.name in self.dense_kernel)
        rule = bind(self.plan, entry, partial(self.column_norms, s))
        told = rule.native
        assert told is not None  # noqa: S101  (such plans are refused on entry)
        out.rule, out.k, out.threshold = told.code, told.k, told.threshold
        if told.score_scale is not None:
            out.score_scale = self._float(told.score_scale)
        self.rules[s.name] = rule
        return out

    def column_norms(self, s: Segment) -> torch.Tensor:
        """[d_in] norms of the weight's columns, as WINA scores with."""
        name = self.packed.layout.matrix_of.get(s.name)
        if name is None:
            return self._table_norms()
        shape = self.packed.layout.shapes[name]
        columns = self.rows(name, 0, shape.rows, s.begin, s.begin + s.d_out, torch.float32)
        norms: torch.Tensor = torch.linalg.vector_norm(columns, dim=1)
        return norms

    def _table_norms(self) -> torch.Tensor:
        """[hidden] norms of the columns of a head that is kept by outputs."""
        layout = self.packed.layout
        squares = torch.zeros(layout.spec.hidden)
        for part in torch.arange(layout.head_shape.rows).split(_TABLE_ROWS):  # type: ignore[no-untyped-call]
            squares += self._table_rows(layout.head_name, part).square().sum(0)
        return squares.sqrt()

    def _table_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """[n, hidden] float32, rows of a matrix that is kept by outputs."""
        layout = self.packed.layout
        picked = {k: t.index_select(0, rows) for k, t in self.packed.matrix(name).items()}
        values = unpack(picked, replace(layout.shapes[name], rows=len(rows)))
        return values[:, : layout.spec.hidden]

    def rows(
        self, name: str, first: int, last: int, begin: int, end: int, dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Rows of an input-major matrix as [last - first, end - begin] bfloat16 or float32."""
        struct = self.matrix(name)
        if out is None:
            out = torch.empty(last - first, end - begin, dtype=dtype)
        code = self.lib.acttail_decode_rows(
            ctypes.byref(struct), first, last, begin, end, int(dtype == torch.float32), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if code:
            raise RuntimeError(f"native decode_rows of {name}: {abi.reason(code)}")
        return out

    def embeddings(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, hidden] float32 of the embedding, as the weights are packed: without its factor.

        Args:
            tokens: [n] int64.
        """
        layout = self.packed.layout
        if not layout.gathered:
            return self._table_rows(EMBEDDING, tokens)
        out, tokens = torch.empty(len(tokens), layout.spec.hidden), tokens.contiguous()
        code = self.lib.acttail_gather_columns(
            ctypes.byref(self.matrix(HEAD_MATRIX)), tokens.data_ptr(), len(tokens), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if code:
            raise RuntimeError(f"native gather_columns: {abi.reason(code)}")
        return out

    def matrix(self, name: str) -> abi.Matrix:
        """The struct of a packed matrix, which the decoder's weights must outlive."""
        return matrix_struct(self.packed.matrix(name), self.packed.layout.shapes[name])

    def _fused(self, stage: str) -> Fused:
        layout, found, at = self.packed.layout, Fused(), 0
        for name in layout.matrices(stage):
            struct = self.matrix(name)
            struct.together = self._together.get(name, 0)
            found.matrix[found.matrices] = struct
            found.matrices += 1
            for s in layout.segments[name]:
                found.segment[found.segments] = self._segment(s, at)
                found.segments += 1
            at += layout.shapes[name].columns
        bias = self.packed.tensors.get(f"{stage}.bias")
        found.bias = bias.data_ptr() if bias is not None else None
        return found

    def _mlp(self, prefix: str, inner: int) -> Mlp:
        at = mlp_offsets(self.packed.layout, prefix, inner)
        return Mlp(
            gate_up=self._fused(f"{prefix}.gate_up"), down=self._fused(f"{prefix}.down"), gate_offset=at["gate"],
            up_offset=at["up"], intermediate=inner,
        )  # fmt: skip

    def _route(self, block: Block, index: int, experts: ExpertsSpec) -> None:
        """Tell a block of its experts."""
        count = len(experts.projections)
        mlps = (Mlp * count)()
        for e in range(count):
            mlps[e] = self._mlp(f"blocks.{index}.experts.{e}", experts.inner)
        self._held.append(mlps)
        router = self.packed.tensors[f"blocks.{index}.{ROUTER}"]
        rows, columns = router.shape
        shape = Shape("fp32", rows, columns, 0, output_major=True)
        block.router = matrix_struct({"weight": router}, shape)
        block.expert, block.experts, block.active = mlps, count, experts.active
        block.normalised = int(experts.normalised)
        block.shared_gate = int(experts.shared_gate is not None)

    def _model(self) -> Model:
        spec, layout = self.packed.layout.spec, self.packed.layout
        blocks = (Block * len(spec.blocks))()
        for i, described in enumerate(spec.blocks):
            block, prefix = blocks[i], f"blocks.{i}"
            block.qkv, block.o = self._fused(f"{prefix}.qkv"), self._fused(f"{prefix}.o")
            if f"{prefix}.down" in layout.segments:
                block.mlp = self._mlp(prefix, spec.inner(i))
            if described.experts is not None:
                self._route(block, i, described.experts)
            for role in described.norms:
                setattr(block, role, self._norm(f"{prefix}.{role}"))
            for kind, offset in attention_offsets(layout, i).items():
                setattr(block, f"{kind}_offset", offset)
            block.mlp_norm = self._norm(f"blocks.{i}.{mlp_norm_of(described.norms)}")
            block.window, block.rope = described.window, described.rope
            block.parallel = int(spec.parallel)
        ropes = (Rope * len(spec.ropes))()
        for rope, (frequencies, scale) in zip(ropes, spec.ropes, strict=True):
            rope.inv_freq = self._float(torch.tensor(frequencies))
            rope.half, rope.scale = len(frequencies), scale
        embedding = abi.Matrix() if layout.gathered else self.matrix(EMBEDDING)
        head = self.matrix(layout.head_name) if layout.head_shape.output_major else abi.Matrix()
        self._held += [blocks, ropes]
        head_input = Fused()
        if HEAD_MATRIX in layout.segments:
            head_input = self._fused(HEAD_MATRIX)
        elif self.plan is not None and self.plan.head is not None:
            # Rows of its own it has not: its input is masked, and all of it read.
            found = Segment(self.plan.head[0], HEAD, 0, padded(spec.vocabulary), spec.vocabulary)
            head_input.segment[0], head_input.segments = self._segment(found, 0), 1
        # Gemma's factor was trained rounded to the model's dtype.
        factor = torch.tensor(spec.embedding_scale)
        factor = factor.to(layout.format.compute).float()
        tables = {
            field: self.packed.tensors[name].data_ptr() if name in self.packed.tensors else None
            for field, name in (("position", POSITIONS), ("head_bias", HEAD_BIAS))
        }
        return Model(
            block=blocks, rope=ropes, embedding=embedding, head=head, head_input=head_input, final_norm=self._norm("final_norm"),
            **tables, positions=spec.context, residual_scale=spec.residual_scale, logit_scale=spec.logit_scale,
            blocks=len(spec.blocks), ropes=len(spec.ropes), hidden=spec.hidden, heads=spec.heads,
            kv_heads=spec.kv_heads, head_dim=spec.head_dim, intermediate=spec.intermediate,
            vocabulary=spec.vocabulary, norm_eps=spec.norm_eps, attention_scale=spec.attention_scale,
            attention_softcap=spec.attention_softcap, logit_softcap=spec.logit_softcap,
            embedding_scale=float(factor), layer_norm=int(spec.layer_norm),
            activation=spec.activation, kv_format=kv_format(self.kv_dtype).number,
        )  # fmt: skip

    def forward(
        self, cache: int, tokens: torch.Tensor, logits: torch.Tensor | None, *, every: bool = False
    ) -> int:
        """Run tokens one after the other.

        Args:
            cache: handle of a KV cache.
            tokens: [n] int64.
            logits: [vocabulary] float32 for the last token, [n, vocabulary] if `every`, or None.
            every: fill the logits of every token.

        Returns:
            How many weights all of them read together, as native/engine.h counts: without padding, and
            with the output head for every row of logits.

        Raises:
            ActTailError: the cache is full, a token id is out of range, or memory runs out.
        """
        read = ctypes.c_double()
        code = self.lib.acttail_engine_forward(
            self.handle, cache, tokens.data_ptr(), tokens.numel(), int(every),
            logits.data_ptr() if logits is not None else None, ctypes.byref(read),
        )  # fmt: skip
        if code:
            raise _not_run(code)
        return int(read.value)

    def step(
        self, caches: Sequence[int], tokens: Sequence[int], logits: Sequence[torch.Tensor | None]
    ) -> list[int]:
        """Run tokens in one pass that reads each weight once; each gets exactly what it would get alone.

        Args:
            caches: handle of each token's KV cache; the tokens of one cache are its next ones in order.
            tokens: at most :data:`abi.MOST_TOGETHER`.
            logits: of each token, [vocabulary] float32 to fill or None.

        Returns:
            How many weights each of them would have read alone, as :meth:`forward` counts.

        Raises:
            ActTailError: a cache is full, a token id is out of range, or memory runs out.
        """
        n = len(tokens)
        pointers = [out.data_ptr() if out is not None else None for out in logits]
        read = (ctypes.c_double * n)()
        code = self.lib.acttail_engine_step(
            self.handle, (ctypes.c_void_p * n)(*caches), (ctypes.c_int64 * n)(*tokens), n,
            (ctypes.c_void_p * n)(*pointers), read,
        )  # fmt: skip
        if code:
            raise _not_run(code)
        return [int(weights) for weights in read]


def _not_run(code: int) -> ActTailError:
    if code == abi.BAD_ARGUMENT:
        return ActTailError(
            "the sequence is longer than its KV cache, or a token id is not in the vocabulary"
        )
    return ActTailError(f"the native engine did not run the tokens: {abi.reason(code)}")


def attention_offsets(layout: Layout, block: int) -> dict[str, int]:
    """First column of q, k and v in their stage."""
    found: dict[str, int] = {}
    spec = layout.spec
    for s in layout.stage(f"blocks.{block}.qkv"):
        if s.kind == "qkv":
            width = spec.heads * spec.head_dim
            found |= {"q": s.begin, "k": s.begin + width}
            found["v"] = found["k"] + spec.kv_heads * spec.head_dim
        else:
            found[s.kind] = s.begin
    return found


def mlp_offsets(layout: Layout, prefix: str, inner: int) -> dict[str, int]:
    """First column of gate and up in their stage; gate is -1 in an MLP without one.

    Args:
        layout: that they are of.
        prefix: of the MLP's stages: ``blocks.3``, or of an expert ``blocks.3.experts.7``.
        inner: features inside of it.
    """
    found = {"gate": -1}
    for s in layout.stage(f"{prefix}.gate_up"):
        if s.kind == "gate_up":
            found |= {"gate": s.begin, "up": s.begin + inner}
        elif s.kind == "fc1":
            found["up"] = s.begin
        else:
            found[s.kind] = s.begin
    return found
