"""Count what each projection really drops."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from acttail.errors import PlanError
from acttail.maths.budget import model_sparsity
from acttail.sparse.state import SparseState, sparse_state


@dataclass(frozen=True)
class RealisedSparsity:
    """What was dropped while counting.

    Attributes:
        projections: name -> share of the input entries dropped, over the tokens it saw. A routed
            expert that saw no token has its plan's value.
        model: cost-weighted mean.
    """

    projections: dict[str, float]
    model: float


class Counter:
    """Result of :func:`counting`; read it after the block."""

    def __init__(self, state: SparseState) -> None:
        self._state = state
        self.counts: dict[str, list[int]] = {name: [0, 0] for name in state.plan.projections}

    def realised(self) -> RealisedSparsity:
        """The realised sparsity of everything that ran so far."""
        planned = self._state.plan.projections
        by_name = {
            name: 1 - kept / seen if seen else planned[name].realised_sparsity
            for name, (kept, seen) in self.counts.items()
        }
        costs = [planned[name].cost for name in by_name]
        return RealisedSparsity(by_name, model_sparsity(list(by_name.values()), costs))


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter]:
    """Count what each projection drops inside the block; costs nothing outside of one.

    Raises:
        PlanError: the model is dense.
    """
    state = sparse_state(model)
    if state is None:
        raise PlanError("the model is dense: there is no realised sparsity to count")
    counter = Counter(state)
    before, state.counts = state.counts, counter.counts
    try:
        yield counter
    finally:
        state.counts = before
