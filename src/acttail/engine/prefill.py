"""Batched prefill: a prompt in one pass of matrix products, into the native KV cache.

torch's own GEMM, for it is hard to beat at many rows; what is ours is that quantised weights are decoded
one matrix at a time into a scratch buffer, and that the plan's selection is applied to every row the
prefill policy makes sparse.
"""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from acttail.engine.layout import HEAD_BIAS, HEAD_MATRIX, POSITIONS, ROUTER
from acttail.engine.native import NativeDecoder, attention_offsets, mlp_offsets
from acttail.engine.shapes import Shape
from acttail.engine.spec import BlockSpec, DecoderSpec, mlp_norm_of
from acttail.model.precision import fast_dtype
from acttail.sparse.backends import abi
from acttail.sparse.rules import Dense

_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    0: F.silu,
    1: lambda x: F.gelu(x, approximate="tanh"),
    2: F.gelu,
    3: F.relu,
}


# Of the head: a piece of 64 MB in float32 beside 1,024 inputs.
_HEAD_COLUMNS = 16384


class Prefill:
    """Runs prompts of one native decoder.

    Args:
        decoder: its weights and plan.
    """

    def __init__(self, decoder: NativeDecoder) -> None:
        self.decoder = decoder
        packed = decoder.packed
        self.spec: DecoderSpec = packed.layout.spec
        # Where bfloat16 products are emulated they take 30 times as long as float32's: 170 ms a token of SmolLM2-135M on
        # two cores of a Zen 3.
        compute = packed.layout.format.compute
        self.dtype = torch.promote_types(compute, fast_dtype("cpu"))
        self._tensors = packed.tensors
        shapes = packed.layout.shapes
        decoded = [
            shapes[n].entries
            for n in packed.layout.segments
            if n != HEAD_MATRIX and not self._as_it_lies(shapes[n])
        ]
        self._scratch = torch.empty(max(decoded, default=0), dtype=self.dtype)

    def _as_it_lies(self, shape: Shape) -> bool:
        """Whether a matrix can be multiplied with as it is stored."""
        return shape.format.torch_dtype == self.dtype

    def _weights(self, name: str) -> torch.Tensor:
        """[d_in, columns] in the compute dtype; valid until the next call."""
        shape = self.decoder.packed.layout.shapes[name]
        raw = self._tensors[f"{name}.weight"]
        if self._as_it_lies(shape):
            return raw.view(self.dtype)
        out = self._scratch[: shape.entries].view(shape.rows, shape.columns)
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
        x = self._embed(tokens, past)
        positions = torch.arange(past, past + len(tokens), dtype=torch.float32)
        ropes = [self._rope(f, s, positions) for f, s in self.spec.ropes]
        masks: dict[int, torch.Tensor] = {}
        for i, block in enumerate(self.spec.blocks):
            h = self._norm(f"blocks.{i}.input_norm", x)
            rope = ropes[block.rope] if block.rope >= 0 else None
            a = self._attention(i, block, h, rope, rows, cache, past, masks)
            before, x = x, x + self._scaled(self._norm(f"blocks.{i}.attention_norm", a))
            role = mlp_norm_of(block.norms)
            h = self._norm(f"blocks.{i}.{role}", before if self.spec.parallel else x)
            m = self._mlps(i, block, h, rows)
            x = x + self._scaled(self._norm(f"blocks.{i}.output_norm", m))
        return self._norm("final_norm", x)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | bool) -> torch.Tensor:
        """[n, vocabulary] float32 of the output head.

        Args:
            hidden: [n, hidden], as returned by a call.
            rows: which of them are sparse, as for the call.
        """
        plan = self.decoder.plan
        if plan is not None and plan.head is not None and rows is not False:
            hidden = self._select(plan.head[0], hidden, rows)
        out = self._head(hidden)
        if self.spec.logit_scale != 1.0:
            out *= self.spec.logit_scale
        bias = self._tensors.get(HEAD_BIAS)
        if bias is not None:
            out += bias
        cap = self.spec.logit_softcap
        return torch.tanh(out / cap) * cap if cap else out

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        packed = self.decoder.packed
        name, shape = packed.layout.head_name, packed.layout.head_shape
        spec = self.spec
        if not shape.output_major:
            by = self._by_rows if len(hidden) == 1 else self._by_inputs
            return by(hidden, name, shape)
        stored = shape.format.torch_dtype
        if stored is not None and len(hidden) > 1:
            weights = packed.tensors[f"{name}.weight"].view(stored)
            out = (hidden @ weights[:, : spec.hidden].T.to(hidden.dtype)).float()
        else:
            struct = self.decoder.matrix(name)
            out = torch.empty(len(hidden), spec.vocabulary)
            x = F.pad(hidden.float(), (0, shape.columns - spec.hidden)).contiguous()
            for row, to in zip(x, out, strict=True):
                self.decoder.lib.acttail_dot_rows(
                    ctypes.byref(struct), row.data_ptr(), to.data_ptr()
                )
        return out

    def _by_rows(self, hidden: torch.Tensor, name: str, shape: Shape) -> torch.Tensor:
        """[1, vocabulary] float32, of the rows of what is not zero: the end of every prompt.

        Unpacking all of the head for one product took 340 ms of a prompt of Gemma 3 270M.
        """
        x = hidden[0].float()
        index = x.nonzero()[:, 0]
        out, kept = torch.zeros(1, shape.columns), x[index].contiguous()
        rows = index.to(torch.int32)
        struct = self.decoder.matrix(name)
        for begin in range(0, shape.columns, _HEAD_COLUMNS):
            code = self.decoder.lib.acttail_add_rows(
                ctypes.byref(struct), rows.data_ptr() if len(kept) < shape.rows else None, kept.data_ptr(), len(kept),
                begin, min(begin + _HEAD_COLUMNS, shape.columns), out.data_ptr(), 1, shape.columns,
            )  # fmt: skip
            if code:
                raise RuntimeError(f"native add_rows of {name}: {abi.reason(code)}")
        return out[:, : self.spec.vocabulary]

    def _by_inputs(self, hidden: torch.Tensor, name: str, shape: Shape) -> torch.Tensor:
        """[n, vocabulary] float32, some columns at a time so that what is unpacked of them stays small."""
        out = torch.empty(len(hidden), self.spec.vocabulary)
        for begin in range(0, self.spec.vocabulary, _HEAD_COLUMNS):
            end = min(begin + _HEAD_COLUMNS, shape.columns)
            part = self.decoder.rows(name, 0, shape.rows, begin, end, self.dtype)
            wanted = min(end, self.spec.vocabulary)
            out[:, begin:wanted] = (hidden.to(self.dtype) @ part)[:, : wanted - begin].float()
        return out

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.spec.residual_scale if self.spec.residual_scale != 1.0 else x

    def _embed(self, tokens: torch.Tensor, past: int) -> torch.Tensor:
        x = self.decoder.embeddings(tokens).to(self.dtype)
        compute = self.decoder.packed.layout.format.compute
        scale = torch.tensor(self.spec.embedding_scale, dtype=compute)
        if self.spec.embedding_scale != 1.0:
            x = x * scale.to(self.dtype)
        positions = self._tensors.get(POSITIONS)
        return x if positions is None else x + positions[past : past + len(tokens)].to(self.dtype)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self._tensors.get(name)
        if weight is None:
            return x
        width, eps = (x.shape[-1],), self.spec.norm_eps
        if self.spec.layer_norm:
            bias = self._tensors[f"{name}.bias"]
            made = F.layer_norm(x.float(), width, weight, bias, eps).to(x.dtype)
        else:
            made = F.rms_norm(x.float(), width, weight, eps).to(x.dtype)
        return made.relu() if self.spec.rectifies(name) else made

    @staticmethod
    def _rope(
        frequencies: list[float], scale: float, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None] * torch.tensor(frequencies)  # [n, half]
        return angles.cos() * scale, angles.sin() * scale

    def _project(self, stage: str, x: torch.Tensor, rows: torch.Tensor | bool) -> torch.Tensor:
        """[n, columns] of a stage; each projection sees its own selection of the input."""
        names = self.decoder.packed.layout.matrices(stage)
        parts = [self._product(name, x, rows) for name in names]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        bias = self._tensors.get(f"{stage}.bias")
        return out if bias is None else out + bias.to(out.dtype)

    def _product(self, name: str, x: torch.Tensor, rows: torch.Tensor | bool) -> torch.Tensor:
        """[n, columns] of one of its matrices."""
        weights = self._weights(name)
        segments = self.decoder.packed.layout.segments[name]
        if self.decoder.plan is None or rows is False:
            return x @ weights
        selected = [self._select(s.name, x, rows) for s in segments]
        if len(segments) == 1:
            return selected[0] @ weights
        out = torch.empty(x.shape[0], weights.shape[1], dtype=x.dtype)
        for s, kept in zip(segments, selected, strict=True):
            out[:, s.begin : s.end] = kept @ weights[:, s.begin : s.end]
        return out

    def _select(self, name: str, x: torch.Tensor, rows: torch.Tensor | bool) -> torch.Tensor:
        rule = self.decoder.rules[name]
        if isinstance(rule, Dense):
            return x
        kept = rule(x)
        return kept if rows is True else torch.where(rows[:, None], kept, x)  # type: ignore[index]

    def _mlps(
        self, index: int, block: BlockSpec, h: torch.Tensor, rows: torch.Tensor | bool
    ) -> torch.Tensor:
        """[n, hidden] of a block's own MLP, of the experts that each row's router chooses, or of both."""
        prefix, experts = f"blocks.{index}", block.experts
        if experts is None:
            return self._mlp(prefix, self.spec.inner(index), h, rows)
        router = self._tensors[f"{prefix}.{ROUTER}"][:, : self.spec.hidden]
        products = F.linear(h.float(), router)
        count = len(experts.projections)
        weights, chosen = products[:, :count].softmax(-1).topk(experts.active, dim=-1)
        if experts.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(h)
        for e in sorted(set(chosen.flatten().tolist())):
            row, slot = torch.where(chosen == e)
            own = rows if isinstance(rows, bool) else rows[row]
            made = self._mlp(f"{prefix}.experts.{e}", experts.inner, h[row], own)
            out.index_add_(0, row, made * weights[row, slot, None].to(made.dtype))
        if f"{prefix}.down" not in self.decoder.packed.layout.segments:
            return out
        made = self._mlp(prefix, self.spec.inner(index), h, rows)
        if experts.shared_gate is not None:
            made = made * products[:, count:].sigmoid().to(made.dtype)
        return out + made

    def _mlp(
        self, prefix: str, inner: int, h: torch.Tensor, rows: torch.Tensor | bool
    ) -> torch.Tensor:
        """[n, hidden] of one MLP."""
        at = mlp_offsets(self.decoder.packed.layout, prefix, inner)
        both = self._project(f"{prefix}.gate_up", h, rows)
        activate = _ACTIVATIONS[self.spec.activation]
        made = both[:, at["up"] : at["up"] + inner]
        if at["gate"] < 0:
            made = activate(made)
        else:
            made = activate(both[:, at["gate"] : at["gate"] + inner]) * made
        return self._project(f"{prefix}.down", made, rows)[:, : self.spec.hidden]

    def _attention(
        self, index: int, block: BlockSpec, h: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None,
        rows: torch.Tensor | bool, cache: int, past: int, masks: dict[int, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        spec, n = self.spec, len(h)
        at = attention_offsets(self.decoder.packed.layout, index)
        qkv = self._project(f"blocks.{index}.qkv", h, rows)

        def heads(kind: str, count: int) -> torch.Tensor:
            width = count * spec.head_dim
            part = qkv[:, at[kind] : at[kind] + width].reshape(n, count, spec.head_dim)
            part = self._norm(f"blocks.{index}.{kind}_norm", part)
            return part if kind == "v" or rope is None else _rotate(part, *rope)

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
