"""What one decoded token reads of memory, at batch 1: the one place that counts it.

Weights
    Entries of matrices, without the padding to whole blocks, as the native kernels count them: a projection
    has d_in * d_out, and of a block's experts count as many as a token visits. An output head that is read by its outputs counts apart from the projections; one with
    rows of its own (a plan drops some of its input) is one of them. Nothing else counts.
Share
    Weights of the projections that were read, over all they have: exactly 1 for a dense token, and never
    more. A dense kernel reads every row of its projection, whatever the plan drops.
Bytes
    What lies in memory, so padding is counted. Of the rows of a matrix the share that is read; its scales
    and minima whole, for hardly a group of inputs is without one that is kept; the head whole; and what
    little else a token meets (norms, biases, routers, its own embedding). The KV cache counts
    apart: keys and values of every position, with their scales.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from acttail.engine.formats import KvFormat
from acttail.engine.layout import EMBEDDING, HEAD_MATRIX, Layout
from acttail.engine.spec import DecoderSpec
from acttail.engine.store import Packed
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan

# Bytes of a cache line, the least that is read of memory.
_LINE = 64


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights read per decoded token; the KV cache is not counted.

    Attributes:
        dense: with every input entry kept.
        sparse: under the plan; equal to `dense` without one.
        projections: the projections' part of `dense`, a routed expert weighted by how often it runs.
        lm_head: the output head's part of `dense`; without rows of its own it is read whole in both.
        other: norms, biases, routers and one token's embedding, read whole in both.
    """

    dense: int
    sparse: int
    projections: int
    lm_head: int
    other: int


def matrix_weights(layout: Layout, name: str) -> int:
    """Weights of one fused matrix."""
    return layout.shapes[name].rows * sum(s.d_out for s in layout.segments[name])


def projection_weights(layout: Layout) -> int:
    """Weights of all projections: what a dense token reads of them."""
    found: Counter[Fraction] = Counter()
    for name in layout.segments:
        found[layout.share(name)] += matrix_weights(layout, name)
    # Whole, for a block's experts are of one size.
    return int(sum(share * weights for share, weights in found.items()))


def head_weights(layout: Layout) -> int:
    """Weights of an output head that every token with logits reads whole; 0 if it is among the projections."""
    if HEAD_MATRIX in layout.segments:
        return 0
    return layout.spec.vocabulary * layout.spec.hidden


def read_share(layout: Layout, weights_read: float) -> float:
    """Share of the projections' weights that a token with logits read.

    Args:
        layout: of the packed model.
        weights_read: counted by the kernels, the head included; of several tokens, their mean.

    Returns:
        From 0 to 1; 0 if no token was counted.
    """
    return shares_of(layout)(weights_read)


def shares_of(layout: Layout) -> Callable[[float], float]:
    """:func:`read_share` of one layout, whose weights are counted once: a server asks with every token."""
    head, projections = head_weights(layout), projection_weights(layout)
    return lambda weights_read: max(0.0, weights_read - head) / projections


def planned_weights(
    layout: Layout, plan: SparsityPlan | None, dense_kernel: Collection[str] = ()
) -> dict[str, float]:
    """Fused matrix -> weights that a token reads if every projection keeps the plan's number of inputs.

    Of an expert the share of all tokens that visit it, if it has as many as the others.

    Args:
        layout: of the packed model.
        plan: it runs under, None for dense.
        dense_kernel: names of projections that read every row whatever they keep.
    """
    found = {}
    for name, segments in layout.segments.items():
        rows = layout.shapes[name].rows
        found[name] = float(layout.share(name) * sum(
            s.d_out * (rows if s.name in dense_kernel else _kept(plan, s.name, rows)) for s in segments
        ))  # fmt: skip
    return found


def _kept(plan: SparsityPlan | None, name: str, rows: int) -> int:
    """Inputs that a projection keeps: all without a plan, and of a head that the plan says nothing of."""
    return plan.projections[name].k if plan is not None and name in plan.projections else rows


def packed_bytes(
    packed: Packed, plan: SparsityPlan | None = None, *, dense_kernel: Collection[str] = (),
    share: float | None = None,
) -> TokenBytes:  # fmt: skip
    """Bytes that one token of the native engine reads.

    Args:
        packed: the weights.
        plan: it runs under, None for dense.
        dense_kernel: names of projections that read every row whatever they keep.
        share: what :func:`read_share` counted; None to believe the plan. Where matrices differ in their
            formats it is shared out among them as the plan would have it.
    """
    layout = packed.layout
    planned = planned_weights(layout, plan, dense_kernel)
    read = 1.0 if share is None else share * projection_weights(layout) / sum(planned.values())
    dense = round(sum(layout.share(n) * layout.shapes[n].bytes for n in layout.segments))
    sparse = 0.0
    for name, weights in planned.items():
        shape = layout.shapes[name]
        part = read * weights / matrix_weights(layout, name)
        sparse += (
            part * shape.rows * shape.row_bytes + float(layout.share(name)) * shape.scale_bytes
        )
    head = layout.head_shape.bytes
    whole = 0 if HEAD_MATRIX in layout.segments else head
    dense -= head - whole
    other = other_bytes(layout, {n: t.nbytes for n, t in packed.tensors.items()})
    return TokenBytes(dense + head + other, round(sparse + whole + other), dense, head, other)


def other_bytes(layout: Layout, sizes: Mapping[str, int]) -> int:
    """Bytes that a token reads beside the matrices: norms, biases and its own embedding.

    Args:
        layout: of the packed model.
        sizes: bytes of each of its tensors.
    """
    held = {
        f"{name}.{suffix}" for name, shape in layout.shapes.items() for suffix in shape.tensors()
    }
    small = sum(size for name, size in sizes.items() if name not in held)
    return small + embedding_bytes(layout)


def embedding_bytes(layout: Layout) -> int:
    """Bytes that a token reads of its embedding: a row of the table, or a line of memory for each number of a column."""
    if not layout.gathered:
        table = layout.shapes[EMBEDDING]
        return table.bytes // table.rows
    return _LINE * sum(rows for _, (rows, _) in layout.head_shape.tensors().values())


def projection_bytes(layout: Layout) -> dict[str, tuple[float, float]]:
    """Projection -> bytes of its rows, of which a plan reads a share, and of its scales, which are read whole.

    Both of an expert times the share of all tokens that visit it. Projections side by side share their matrix's bytes as they do its outputs, the padding included.
    """
    found = {}
    for name, segments in layout.segments.items():
        shape = layout.shapes[name]
        outputs = sum(s.d_out for s in segments)
        for s in segments:
            part = float(layout.share(name)) * s.d_out / outputs
            found[s.name] = part * shape.rows * shape.row_bytes, part * shape.scale_bytes
    return found


def kv_bytes(spec: DecoderSpec, kv: KvFormat, context: int) -> int:
    """Bytes of the KV cache that a token reads.

    Windows of attention are not considered: up to their size a block reads what the others read.

    Args:
        spec: the decoder.
        kv: format of its cache.
        context: positions held.
    """
    heads = 2 * len(spec.blocks) * spec.kv_heads  # a key and a value of each
    return heads * context * (spec.head_dim * kv.bytes + kv.scale_bytes)


def loaded_bytes(model: Any, plan: SparsityPlan | None = None) -> TokenBytes:
    """Bytes that one token of transformers reads if it reads the kept rows alone.

    Args:
        model: causal LM of transformers.
        plan: it runs under, None for dense.
    """
    weights = LoadedWeights(model)
    size = {
        p.name: model.get_parameter(p.parameter_name).element_size() for p in weights.projections
    }
    dense = sum(p.cost * size[p.name] for p in weights.projections)
    sparse = dense if plan is None else sum(
        p.cost * size[p.name] * plan.projections[p.name].k / p.d_in for p in weights.projections
    )  # fmt: skip
    held = {p.parameter_name for p in weights.projections}
    head = getattr(model.get_output_embeddings(), "weight", None)
    lm_head = head.numel() * head.element_size() if head is not None else 0
    kept = plan.head[1].k / plan.head[1].d_in if plan is not None and plan.head is not None else 1.0
    other = 0
    for name, parameter in model.named_parameters():
        if name in held or parameter is head:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        rows = parameter[:1] if hasattr(owner, "num_embeddings") else parameter
        other += rows.numel() * parameter.element_size()
    return TokenBytes(
        round(dense + lm_head + other),
        round(sparse + kept * lm_head + other),
        round(dense),
        lm_head,
        other,
    )
