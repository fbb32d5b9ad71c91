"""`ffn-only`: sparsity in the feed-forward networks alone, attention left dense.

The setting of Dhar et al. 2024 (arXiv 2412.12178): percentile thresholds on the inputs of the FFN's
projections. The FFN holds a part of the weights, so the model sparsity it can reach is bounded.
"""

from collections.abc import Mapping
from typing import Any

from acttail.allocate.base import Allocation, Allocator, confined
from acttail.allocate.context import AllocationContext
from acttail.sparse.rules import THRESHOLD

_FFN_KINDS = frozenset({"gate", "up", "gate_up", "down", "fc1", "fc2"})


def allocate(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """One sparsity for every FFN projection, 0 elsewhere.

    Raises:
        BudgetError: the target is beyond what the FFN can give; names the largest.
    """
    names = {p.name for p in context.projections if p.kind in _FFN_KINDS}
    return Allocation(confined(context, sparsity, names, "ffn-only", "attention stays dense"))


FFN_ONLY = Allocator(
    "ffn-only", "calibrated: percentile thresholds in the FFN alone, after Dhar et al.", {}, allocate,
    rule=THRESHOLD, head=False,
)  # fmt: skip
