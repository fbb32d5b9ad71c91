"""How many bytes of weights one decoded token reads, dense and sparse."""

from dataclasses import dataclass
from typing import Any

from acttail.checkpoint import LoadedWeights
from acttail.plan import SparsityPlan


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights read per decoded token at batch 1; the KV cache is not counted.

    Attributes:
        dense: with every input entry kept.
        sparse: under the plan; equal to `dense` without one.
        projections: the projections' part of `dense`, a routed expert weighted by how often it runs.
        lm_head: the output head's part, read whole in both.
        other: norms, biases, routers and one row of each embedding table, read whole in both.
    """

    dense: int
    sparse: int
    projections: int
    lm_head: int
    other: int


def token_bytes(model: Any, plan: SparsityPlan | None = None) -> TokenBytes:
    """Count the bytes that one decoded token reads.

    Args:
        model: causal LM of transformers.
        plan: the plan it runs under, None for dense.
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
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    head_bytes = head_weight.numel() * head_weight.element_size() if head_weight is not None else 0
    other = 0
    for name, parameter in model.named_parameters():
        if name in held or parameter is head_weight:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        rows = parameter[:1] if hasattr(owner, "num_embeddings") else parameter
        other += rows.numel() * parameter.element_size()
    return TokenBytes(
        round(dense + head_bytes + other), round(sparse + head_bytes + other), round(dense),
        head_bytes, other,
    )  # fmt: skip
