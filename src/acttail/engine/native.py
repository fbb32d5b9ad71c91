"""The engine's C ABI: structs, and the calls that run a decoder (native/engine.h)."""

import ctypes
import threading
from collections.abc import Mapping
from typing import Any

import torch

from acttail.backends import cpu
from acttail.backends.cpu import Matrix
from acttail.engine.layout import FORMATS, Shape
from acttail.engine.store import Packed, Segment
from acttail.errors import ActTailError, PlanError
from acttail.plan import SparsityPlan

KV_FORMATS = {"fp32": 0, "bf16": 1, "int8": 2}
_RULES = {"dense": 0, "topk": 1, "threshold": 2}
_pointer, _i32, _i64, _f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class SegmentStruct(ctypes.Structure):
    """struct acttail_segment."""

    _fields_ = (
        ("begin", _i64), ("end", _i64), ("k", _i64), ("score_scale", _pointer), ("threshold", _f32),
        ("rule", _i32), ("dense_kernel", _i32), ("padding", _i32),
    )  # fmt: skip


class Fused(ctypes.Structure):
    """struct acttail_fused."""

    _fields_ = (
        ("matrix", Matrix), ("segment", SegmentStruct * 3), ("bias", _pointer), ("segments", _i32),
        ("padding", _i32),
    )  # fmt: skip


class Norm(ctypes.Structure):
    """struct acttail_norm."""

    _fields_ = (("weight", _pointer), ("bias", _pointer))


class Block(ctypes.Structure):
    """struct acttail_block."""

    _fields_ = (
        ("qkv", Fused), ("o", Fused), ("gate_up", Fused), ("down", Fused),
        ("input_norm", Norm), ("attention_norm", Norm), ("mlp_norm", Norm), ("output_norm", Norm),
        ("q_norm", Norm), ("k_norm", Norm),
        ("q_offset", _i64), ("k_offset", _i64), ("v_offset", _i64), ("gate_offset", _i64), ("up_offset", _i64),
        ("window", _i64), ("rope", _i32), ("padding", _i32),
    )  # fmt: skip


class Rope(ctypes.Structure):
    """struct acttail_rope."""

    _fields_ = (("inv_freq", _pointer), ("half", _i64), ("scale", _f32), ("padding", _i32))


class Model(ctypes.Structure):
    """struct acttail_model."""

    _fields_ = (
        ("block", ctypes.POINTER(Block)), ("rope", ctypes.POINTER(Rope)), ("embedding", Matrix),
        ("head", Matrix), ("final_norm", Norm),
        ("blocks", _i64), ("ropes", _i64), ("hidden", _i64), ("heads", _i64), ("kv_heads", _i64),
        ("head_dim", _i64), ("intermediate", _i64), ("vocabulary", _i64),
        ("norm_eps", _f32), ("attention_scale", _f32), ("attention_softcap", _f32),
        ("logit_softcap", _f32), ("embedding_scale", _f32),
        ("layer_norm", _i32), ("activation", _i32), ("kv_format", _i32),
    )  # fmt: skip


def matrix_struct(tensors: Mapping[str, torch.Tensor], shape: Shape) -> Matrix:
    """The struct of a packed matrix; the tensors must outlive it."""
    found = Matrix(FORMATS[shape.dtype], shape.group, shape.rows, shape.columns)
    found.data = tensors["weight"].data_ptr()
    found.scale = tensors["scale"].data_ptr() if "scale" in tensors else None
    found.minimum = tensors["minimum"].data_ptr() if "minimum" in tensors else None
    return found


def library() -> ctypes.CDLL:
    """The native library with the engine's signatures.

    Raises:
        ActTailError: it is not available; says why.
    """
    try:
        return _declared(cpu.library())
    except RuntimeError as error:
        raise ActTailError(f"the native engine is not available: {error}") from error


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    if getattr(lib, "acttail_declared", False):
        return lib
    lib.acttail_engine_new.argtypes = [ctypes.POINTER(Model), ctypes.c_int]
    lib.acttail_engine_new.restype = _pointer
    lib.acttail_engine_free.argtypes = [_pointer]
    lib.acttail_engine_free.restype = None
    lib.acttail_cache_new.argtypes = [_pointer, _i64]
    lib.acttail_cache_new.restype = _pointer
    lib.acttail_cache_free.argtypes = [_pointer]
    lib.acttail_cache_free.restype = None
    for name in ("acttail_cache_length", "acttail_cache_bytes"):
        function = getattr(lib, name)
        function.argtypes, function.restype = [_pointer], _i64
    lib.acttail_cache_truncate.argtypes = [_pointer, _i64]
    lib.acttail_cache_set_length.argtypes = [_pointer, _i64]
    lib.acttail_cache_write.argtypes = [_pointer, _i64, _i64, _i64, _pointer, _pointer]
    lib.acttail_cache_read.argtypes = [_pointer, _i64, _i64, _i64, _pointer, _pointer]
    lib.acttail_engine_forward.argtypes = [
        _pointer, _pointer, _pointer, _i64, ctypes.c_int, _pointer, ctypes.POINTER(ctypes.c_double),
    ]  # fmt: skip
    lib.acttail_decode_rows.argtypes = [
        ctypes.POINTER(Matrix), _i64, _i64, _i64, _i64, ctypes.c_int, _pointer, ctypes.c_int,
    ]  # fmt: skip
    lib.acttail_add_rows.argtypes = [
        ctypes.POINTER(Matrix), _pointer, _pointer, _i64, _i64, _i64, _pointer, _i64, _i64,
    ]  # fmt: skip
    lib.acttail_dot_rows.argtypes = [ctypes.POINTER(Matrix), _pointer, _pointer]
    lib.acttail_read_seconds.argtypes = [_pointer, _i64, ctypes.c_int]
    lib.acttail_read_seconds.restype = ctypes.c_double
    lib.acttail_declared = True  # type: ignore[attr-defined]
    return lib


class NativeDecoder:
    """A packed model in the hands of the native engine.

    Args:
        packed: the weights; held as long as the decoder lives.
        plan: which rows each projection keeps; None for dense.
        threads: that run a token together.
        kv_dtype: of the KV cache: ``fp32``, ``bf16`` or ``int8``.
        dense_kernel: projections that read all rows though most of their input is zeroed.

    Raises:
        PlanError: the plan has a rule the engine does not run, or was made for other projections.
        ActTailError: no native library, or the engine refuses the model.
    """

    def __init__(
        self, packed: Packed, plan: SparsityPlan | None, threads: int, kv_dtype: str,
        dense_kernel: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.lib = library()
        self.packed, self.plan, self.threads, self.kv_dtype = packed, plan, threads, kv_dtype
        self.dense_kernel = dense_kernel
        # Sequences share the workers' scratch: one pass at a time, whatever thread it comes from.
        self.lock = threading.RLock()
        self._held: list[Any] = []
        model = self._model()
        self.handle = self.lib.acttail_engine_new(ctypes.byref(model), threads)
        if not self.handle:
            raise ActTailError(
                "the native engine refused the model: bad sizes or not enough memory"
            )

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.lib.acttail_engine_free(self.handle)
            self.handle = None

    def _float(self, values: torch.Tensor) -> int:
        held = values.float().contiguous()
        self._held.append(held)
        return held.data_ptr()

    def _norm(self, name: str) -> Norm:
        tensor = self.packed.tensors.get(name)
        return Norm(tensor.data_ptr() if tensor is not None else None, None)

    def _segment(self, s: Segment) -> SegmentStruct:
        out = SegmentStruct(begin=s.begin, end=s.end)
        if self.plan is None:
            return out
        entry = self.plan.projections.get(s.name)
        if entry is None:
            raise PlanError(f"the plan has no projection {s.name}: it was made for another model")
        d_in = self.packed.layout.shapes[self._matrix_of(s)].rows
        if (entry.d_in, entry.d_out) != (d_in, s.d_out):
            raise PlanError(
                f"the plan's {s.name} maps {entry.d_in} to {entry.d_out} features, this model's {d_in} "
                f"to {s.d_out}: it was made for another model"
            )
        out.dense_kernel = int(s.name in self.dense_kernel)
        match self.plan.rule:
            case "topk" | "wina":
                out.rule, out.k = _RULES["topk"], entry.k
                if self.plan.rule == "wina" and entry.k < entry.d_in:
                    out.score_scale = self._float(self.column_norms(s))
            case "threshold":
                if entry.threshold is not None:
                    out.rule, out.threshold = _RULES["threshold"], entry.threshold
            case other:
                raise PlanError(f"the native engine does not run the rule {other}")
        return out

    def _matrix_of(self, s: Segment) -> str:
        return next(n for n, found in self.packed.layout.segments.items() if s in found)

    def column_norms(self, s: Segment) -> torch.Tensor:
        """[d_in] norms of the weight's columns, as WINA scores with."""
        name = self._matrix_of(s)
        shape = self.packed.layout.shapes[name]
        columns = self.rows(name, 0, shape.rows, s.begin, s.begin + s.d_out, torch.float32)
        norms: torch.Tensor = torch.linalg.vector_norm(columns, dim=1)
        return norms

    def rows(
        self, name: str, first: int, last: int, begin: int, end: int, dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Rows of an input-major matrix as [last - first, end - begin] bfloat16 or float32."""
        shape = self.packed.layout.shapes[name]
        struct = matrix_struct(self.packed.matrix(name), shape)
        if out is None:
            out = torch.empty(last - first, end - begin, dtype=dtype)
        code = self.lib.acttail_decode_rows(
            ctypes.byref(struct), first, last, begin, end, int(dtype == torch.float32), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if code:
            raise RuntimeError(f"native decode_rows of {name}: status {code}")
        return out

    def _fused(self, name: str) -> Fused:
        layout = self.packed.layout
        found = Fused(matrix=matrix_struct(self.packed.matrix(name), layout.shapes[name]))
        segments = layout.segments[name]
        for i, s in enumerate(segments):
            found.segment[i] = self._segment(s)
        found.segments = len(segments)
        bias = self.packed.tensors.get(f"{name}.bias")
        found.bias = bias.data_ptr() if bias is not None else None
        return found

    def _model(self) -> Model:
        spec, layout = self.packed.layout.spec, self.packed.layout
        blocks = (Block * len(spec.blocks))()
        for i, described in enumerate(spec.blocks):
            block = blocks[i]
            for fused in ("qkv", "o", "gate_up", "down"):
                setattr(block, fused, self._fused(f"blocks.{i}.{fused}"))
            for role in described.norms:
                setattr(block, role, self._norm(f"blocks.{i}.{role}"))
            for kind, offset in offsets(layout.segments, i, spec).items():
                setattr(block, f"{kind}_offset", offset)
            block.window, block.rope = described.window, described.rope
        ropes = (Rope * len(spec.ropes))()
        for rope, (frequencies, scale) in zip(ropes, spec.ropes, strict=True):
            rope.inv_freq = self._float(torch.tensor(frequencies))
            rope.half, rope.scale = len(frequencies), scale
        embedding = matrix_struct(self.packed.matrix("embedding"), layout.shapes["embedding"])
        tied = "head" not in layout.shapes
        head = (
            embedding if tied else matrix_struct(self.packed.matrix("head"), layout.shapes["head"])
        )
        self._held += [blocks, ropes]
        # Gemma's factor was trained rounded to the model's dtype.
        factor = torch.tensor(spec.embedding_scale)
        factor = factor if layout.dtype == "fp32" else factor.bfloat16().float()
        return Model(
            block=blocks, rope=ropes, embedding=embedding, head=head, final_norm=self._norm("final_norm"),
            blocks=len(spec.blocks), ropes=len(spec.ropes), hidden=spec.hidden, heads=spec.heads,
            kv_heads=spec.kv_heads, head_dim=spec.head_dim, intermediate=spec.intermediate,
            vocabulary=spec.vocabulary, norm_eps=spec.norm_eps, attention_scale=spec.attention_scale,
            attention_softcap=spec.attention_softcap, logit_softcap=spec.logit_softcap,
            embedding_scale=float(factor), layer_norm=0,
            activation=spec.activation, kv_format=KV_FORMATS[self.kv_dtype],
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
            How many weights were read.

        Raises:
            ActTailError: the cache is full or a token id is out of range.
        """
        read = ctypes.c_double()
        code = self.lib.acttail_engine_forward(
            self.handle, cache, tokens.data_ptr(), tokens.numel(), int(every),
            logits.data_ptr() if logits is not None else None, ctypes.byref(read),
        )  # fmt: skip
        if code:
            raise ActTailError(
                "the sequence is longer than its KV cache, or a token id is not in the vocabulary"
            )
        return int(read.value)


def offsets(segments: Mapping[str, tuple[Segment, ...]], block: int, spec: Any) -> dict[str, int]:
    """First column of q, k, v, gate and up in their fused matrices."""
    found: dict[str, int] = {}
    for s in segments[f"blocks.{block}.qkv"]:
        if s.kind == "qkv":
            width = spec.heads * spec.head_dim
            found |= {"q": s.begin, "k": s.begin + width}
            found["v"] = found["k"] + spec.kv_heads * spec.head_dim
        else:
            found[s.kind] = s.begin
    for s in segments[f"blocks.{block}.gate_up"]:
        if s.kind == "gate_up":
            found |= {"gate": s.begin, "up": s.begin + spec.intermediate}
        else:
            found[s.kind] = s.begin
    return found
