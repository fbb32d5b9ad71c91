"""Batched prefill: a prompt in one pass of matrix products, into the native KV cache.

torch's own GEMM, for it is hard to beat at many rows; what is ours is that quantised weights are decoded
one matrix at a time into a scratch buffer, and that the plan's selection is applied to every row the
prefill policy makes sparse.
"""

import ctypes
import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from acttail.engine.layout import unpack
from acttail.engine.native import NativeDecoder, matrix_struct, offsets
from acttail.engine.spec import BlockSpec, DecoderSpec
from acttail.engine.store import Segment
from acttail.plan import SparsityPlan
from acttail.rules import Rule, ScaledTopK, Threshold, TopK

_ACTIVATIONS = {
    0: F.silu,
    1: lambda x: F.gelu(x, approximate="tanh"),
    2: F.gelu,
    3: F.relu,
}


class Prefill:
    """Runs prompts of one native decoder.

    Args:
        decoder: its weights and plan.
    """

    def __init__(self, decoder: NativeDecoder) -> None:
        self.decoder = decoder
        packed = decoder.packed
        self.spec: DecoderSpec = packed.layout.spec
        self.dtype = torch.float32 if packed.layout.dtype == "fp32" else torch.bfloat16
        self._tensors = packed.tensors
        shapes = packed.layout.shapes
        fused = [s for n, s in shapes.items() if n in packed.layout.segments]
        self._scratch = torch.empty(0, dtype=self.dtype)
        if packed.layout.dtype in ("int8", "int4"):
            self._scratch = torch.empty(max(s.rows * s.columns for s in fused), dtype=self.dtype)
        self._rules: dict[str, Rule | None] = {}

    def _weights(self, name: str) -> torch.Tensor:
        """[d_in, columns] in the compute dtype; valid until the next call."""
        shape = self.decoder.packed.layout.shapes[name]
        raw = self._tensors[f"{name}.weight"]
        if shape.dtype in ("fp32", "bf16"):
            return raw.view(self.dtype)
        out = self._scratch[: shape.rows * shape.columns].view(shape.rows, shape.columns)
        return self.decoder.rows(name, 0, shape.rows, 0, shape.columns, self.dtype, out)

    def __call__(
        self, tokens: torch.Tensor, rows: torch.Tensor | bool, cache: int, past: int
    ) -> torch.Tensor:
        """Run a prompt.

        Args:
            tokens: [n] int64.
            rows: which of them are sparse: True, False or [n] bool.
            cache: handle of the KV cache; receives n positions from `past` on.
            past: positions it holds already.

        Returns:
            [n, hidden] the stream after the last norm, in the compute dtype.
        """
        x = self._embed(tokens)
        positions = torch.arange(past, past + len(tokens), dtype=torch.float32)
        ropes = [self._rope(f, s, positions) for f, s in self.spec.ropes]
        masks: dict[int, torch.Tensor] = {}
        for i, block in enumerate(self.spec.blocks):
            h = self._norm(f"blocks.{i}.input_norm", x)
            a = self._attention(i, block, h, ropes[block.rope], rows, cache, past, masks)
            x = x + self._norm(f"blocks.{i}.attention_norm", a)
            h = self._norm(f"blocks.{i}.mlp_norm", x)
            at = offsets(self.decoder.packed.layout.segments, i, self.spec)
            both = self._project(f"blocks.{i}.gate_up", h, rows)
            gate = both[:, at["gate"] : at["gate"] + self.spec.intermediate]
            up = both[:, at["up"] : at["up"] + self.spec.intermediate]
            inner = _ACTIVATIONS[self.spec.activation](gate) * up
            m = self._project(f"blocks.{i}.down", inner, rows)[:, : self.spec.hidden]
            x = x + self._norm(f"blocks.{i}.output_norm", m)
        return self._norm("final_norm", x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] float32 of the output head.

        Args:
            hidden: [n, hidden], as returned by a call.
        """
        packed = self.decoder.packed
        name = "head" if "head" in packed.layout.shapes else "embedding"
        shape = packed.layout.shapes[name]
        spec = self.spec
        if shape.dtype in ("fp32", "bf16") and len(hidden) > 1:
            weights = packed.tensors[f"{name}.weight"].view(
                torch.float32 if shape.dtype == "fp32" else torch.bfloat16
            )
            out = (hidden @ weights[:, : spec.hidden].T.to(hidden.dtype)).float()
        else:
            struct = matrix_struct(packed.matrix(name), shape)
            out = torch.empty(len(hidden), spec.vocabulary)
            x = F.pad(hidden.float(), (0, shape.columns - spec.hidden)).contiguous()
            for row, to in zip(x, out, strict=True):
                self.decoder.lib.acttail_dot_rows(
                    ctypes.byref(struct), row.data_ptr(), to.data_ptr()
                )
        if spec.logit_softcap:
            out = torch.tanh(out / spec.logit_softcap) * spec.logit_softcap
        return out

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        packed = self.decoder.packed
        shape = packed.layout.shapes["embedding"]
        picked = {k: t.index_select(0, tokens) for k, t in packed.matrix("embedding").items()}
        x = unpack(picked, shape)[:, : self.spec.hidden].to(self.dtype)
        scale = torch.tensor(self.spec.embedding_scale, dtype=self.dtype)
        return x * scale if self.spec.embedding_scale != 1.0 else x

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self._tensors.get(name)
        if weight is None:
            return x
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.spec.norm_eps).to(x.dtype)

    @staticmethod
    def _rope(
        frequencies: list[float], scale: float, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None] * torch.tensor(frequencies)  # [n, half]
        return angles.cos() * scale, angles.sin() * scale

    def _project(self, name: str, x: torch.Tensor, rows: torch.Tensor | bool) -> torch.Tensor:
        """[n, columns] of a fused matrix; each projection sees its own selection of the input."""
        plan = self.decoder.plan
        weights = self._weights(name)
        segments = self.decoder.packed.layout.segments[name]
        bias = self._tensors.get(f"{name}.bias")
        if plan is None or rows is False:
            out = x @ weights
        else:
            selected = [self._select(plan, s, x, rows) for s in segments]
            if len(segments) == 1:
                out = selected[0] @ weights
            else:
                out = torch.empty(x.shape[0], weights.shape[1], dtype=x.dtype)
                for s, kept in zip(segments, selected, strict=True):
                    out[:, s.begin : s.end] = kept @ weights[:, s.begin : s.end]
        return out if bias is None else out + bias.to(out.dtype)

    def _select(
        self, plan: SparsityPlan, s: Segment, x: torch.Tensor, rows: torch.Tensor | bool
    ) -> torch.Tensor:
        rule = self._rule(plan, s)
        if rule is None:
            return x
        kept = rule(x)
        return kept if rows is True else torch.where(rows[:, None], kept, x)  # type: ignore[index]

    def _rule(self, plan: SparsityPlan, s: Segment) -> Rule | None:
        """The projection's selection rule; None if it keeps everything."""
        if s.name not in self._rules:
            entry = plan.projections[s.name]
            rule: Rule | None = None
            if plan.rule == "threshold":
                rule = None if entry.threshold is None else Threshold(entry.threshold)
            elif entry.k < entry.d_in:
                wina = plan.rule == "wina"
                rule = ScaledTopK(entry.k, self.decoder.column_norms(s)) if wina else TopK(entry.k)
            self._rules[s.name] = rule
        return self._rules[s.name]

    def _attention(
        self, index: int, block: BlockSpec, h: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor | bool, cache: int, past: int, masks: dict[int, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        spec, n = self.spec, len(h)
        at = offsets(self.decoder.packed.layout.segments, index, spec)
        qkv = self._project(f"blocks.{index}.qkv", h, rows)

        def heads(kind: str, count: int) -> torch.Tensor:
            width = count * spec.head_dim
            part = qkv[:, at[kind] : at[kind] + width].reshape(n, count, spec.head_dim)
            part = self._norm(f"blocks.{index}.{kind}_norm", part)
            return part if kind == "v" else _rotate(part, *rope)

        q, k, v = heads("q", spec.heads), heads("k", spec.kv_heads), heads("v", spec.kv_heads)
        keys, values = k.float().contiguous(), v.float().contiguous()
        lib: Any = self.decoder.lib
        code = lib.acttail_cache_write(cache, index, past, n, keys.data_ptr(), values.data_ptr())
        if code:
            raise RuntimeError(f"native cache_write: status {code}")
        if past:
            shape = past, spec.kv_heads, spec.head_dim
            old_k, old_v = torch.empty(shape), torch.empty(shape)
            code = lib.acttail_cache_read(cache, index, 0, past, old_k.data_ptr(), old_v.data_ptr())
            if code:
                raise RuntimeError(f"native cache_read: status {code}")
            k, v = torch.cat([old_k.to(k.dtype), k]), torch.cat([old_v.to(v.dtype), v])
        out = self._attend(block, q, k, v, past, masks)  # [heads, n, head_dim]
        flat = out.transpose(0, 1).reshape(n, -1)
        return self._project(f"blocks.{index}.o", flat, rows)[:, : spec.hidden]

    def _attend(
        self, block: BlockSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int,
        masks: dict[int, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        total = len(k)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, n, head_dim]
        spec = self.spec
        window = block.window if 0 < block.window < total else 0
        if not past and not window and not spec.attention_softcap:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=spec.attention_scale, enable_gqa=True
            )[0]
        if window not in masks:
            distance = torch.arange(past, total)[:, None] - torch.arange(total)[None]
            seen = distance >= 0
            masks[window] = seen & (distance < window) if window else seen
        mask = masks[window]
        if not spec.attention_softcap:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=spec.attention_scale, enable_gqa=True
            )[0]
        repeat = spec.heads // spec.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = (q @ k.transpose(-1, -2)).float() * spec.attention_scale
        cap = spec.attention_softcap
        scores = (torch.tanh(scores / cap) * cap).masked_fill(~mask, -math.inf)
        return (torch.softmax(scores, dim=-1).to(v.dtype) @ v)[0]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[n, heads, head_dim] with the first 2 * half features of each head rotated."""
    half = cos.shape[-1]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)
