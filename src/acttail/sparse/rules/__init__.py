"""Selection rules: which entries of an input vector stay. One row per name, bound to a projection.

A new rule is one file here with its class and its row, the row in :data:`RULES` below, and its name in
:data:`acttail.plan.RULES` (the schema of plan files lies below this room). To be asked for by `--rule` it
gets a line in acttail.allocate.selection, with its calibration if it needs one.
"""

from acttail.plan import ProjectionPlan, SparsityPlan
from acttail.sparse.rules.base import (
    Dense,
    NativeCode,
    NativeRule,
    Norms,
    Rule,
    RuleKind,
    Watched,
)
from acttail.sparse.rules.cats import CATS, GateTap, GateThreshold
from acttail.sparse.rules.threshold import THRESHOLD, Threshold
from acttail.sparse.rules.top_p import TOP_P, TopP
from acttail.sparse.rules.topk import TOPK, WINA, ScaledTopK, TopK

__all__ = [
    "CATS", "RULES", "THRESHOLD", "TOPK", "TOP_P", "WINA", "Dense", "GateTap", "GateThreshold", "NativeCode",
    "NativeRule", "Norms", "Rule", "RuleKind", "ScaledTopK", "Threshold", "TopK", "TopP", "Watched", "bind",
    "kind_of",
]  # fmt: skip

RULES: dict[str, RuleKind] = {kind.name: kind for kind in (TOPK, WINA, THRESHOLD, TOP_P, CATS)}


def kind_of(plan: SparsityPlan) -> RuleKind:
    """The row of a plan's rule."""
    return RULES[plan.rule]


def bind(plan: SparsityPlan, entry: ProjectionPlan, norms: Norms) -> Rule:
    """The rule of one projection.

    Args:
        plan: of the model.
        entry: the projection's, of this plan.
        norms: gives the weight's column norms, [d_in] float32; called only where they are needed.

    Returns:
        :class:`Dense` for a projection that keeps everything: the field its rule needs is not there, or
        its fixed k is d_in.
    """
    kind = kind_of(plan)
    if plan.left_dense(entry) or (kind.fixed_k and entry.k >= entry.d_in):
        return Dense()
    return kind.bind(entry, norms)
