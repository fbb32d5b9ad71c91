"""A budget in what a decoded token costs, its bytes or its time, instead of in a share of the weights.

What a projection costs is a number per share of its inputs that is kept; who measured or counted it is none of this
file's business. Allocators know one currency, the cost of a whole projection: they get what a projection saves from
dense to nearly nothing, and the target is corrected until the real prices meet the goal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from acttail.allocate.base import Allocation
from acttail.allocate.context import Array
from acttail.errors import BudgetError
from acttail.maths.budget import HIGHEST, kept_entries
from acttail.model.projections import Projection

# A goal counts as met within this share of the dense cost; what rounding to whole inputs leaves is beyond help.
_TOLERANCE = 1e-4
_ROUNDS = 24
# Two targets that are no further apart round to the same inputs.
_NARROW = 1e-6


@dataclass(frozen=True)
class Price:
    """What one projection costs a token, as a function of the share of its inputs that is kept.

    Attributes:
        densities: [n] ascending shares in [0, 1].
        costs: [n] what each costs; between two of them it is linear.
    """

    densities: tuple[float, ...]
    costs: tuple[float, ...]

    def at(self, density: float) -> float:
        """The cost with this share of the inputs kept."""
        return float(np.interp(density, self.densities, self.costs))

    @property
    def saved(self) -> float:
        """What dropping all inputs would save, on a line from dense to the least that may be kept; above 0."""
        whole = self.at(1.0)
        return max((whole - self.at(1 - HIGHEST)) / HIGHEST, 1e-3 * whole, 1e-300)


@dataclass(frozen=True)
class Goal:
    """The most that a decoded token may cost.

    Attributes:
        what: the goal in words, for messages: ``a read share of 0.6``.
        wanted: the most, in the unit of the prices.
        dense: what a token of the dense model costs.
        fixed: what a token costs beside its projections and its output head.
        prices: projection -> its price; the output head's, if it could be in the budget.
        whole: name -> what costs that much where it is not in the budget: the output head as dense models have it.
        describe: (cost that the plan comes to) -> notes for the plan.
        share: (cost, of :attr:`dense`) -> the number that a user gives, to say what is in reach.
    """

    what: str
    wanted: float
    dense: float
    fixed: float
    prices: Mapping[str, Price]
    whole: Mapping[str, float] = field(default_factory=dict)
    describe: Callable[[float], Mapping[str, str]] = lambda cost: {}
    share: Callable[[float], float] = float

    def costs(self, projections: Sequence[Projection]) -> dict[str, float]:
        """Projection -> what dropping all of its inputs would save.

        Raises:
            BudgetError: one has no price.
        """
        unknown = next((p.name for p in projections if p.name not in self.prices), None)
        if unknown is not None:
            raise BudgetError(f"{self.what}: nothing says what {unknown} costs a token")
        return {p.name: self.prices[p.name].saved for p in projections}

    def spent(self, projections: Sequence[Projection], sparsities: Array) -> float:
        """What a token costs, after rounding to whole inputs.

        Args:
            projections: [P] those in the budget.
            sparsities: [P].
        """
        names = {p.name for p in projections}
        total = self.fixed + sum(cost for name, cost in self.whole.items() if name not in names)
        for p, s in zip(projections, map(float, sparsities), strict=True):
            total += self.prices[p.name].at(kept_entries(s, p.d_in) / p.d_in)
        return total

    def meet(
        self, projections: Sequence[Projection], allocate: Callable[[float], Allocation]
    ) -> tuple[Allocation, float]:
        """The allocation whose cost is what is wanted.

        Args:
            projections: [P] those in the budget.
            allocate: target in the currency of :meth:`costs`, a share in [0, 0.99] -> allocation.

        Returns:
            (allocation, what a token costs under it).

        Raises:
            BudgetError: it is out of reach; says what is in reach.
        """
        dense = self.spent(projections, np.zeros(len(projections)))
        least = self.spent(projections, np.full(len(projections), HIGHEST))
        if self.wanted < least - _TOLERANCE * self.dense:
            raise BudgetError(
                f"{self.what} is out of reach: with {HIGHEST:.0%} of every input dropped it is "
                f"{self.share(least):.3f}"
                + ("" if not set(self.whole) - {p.name for p in projections} else
                   "; an output head in the budget (--head) gives more")
            )  # fmt: skip
        # Regula falsi with the Illinois step: exact at once for prices on a line, and safe for those that bend.
        low, high = (0.0, dense - self.wanted), (HIGHEST, least - self.wanted)
        best: tuple[Allocation, float] | None = None
        side = 0
        for _ in range(_ROUNDS):
            share = low[1] / (low[1] - high[1]) if low[1] > high[1] else 0.0
            target = low[0] + min(max(share, 0.0), 1.0) * (high[0] - low[0])
            found = allocate(target)
            gap = self.spent(projections, found.sparsities) - self.wanted
            if best is None or abs(gap) < abs(best[1]):
                best = found, gap
            if abs(gap) <= _TOLERANCE * self.dense or high[0] - low[0] < _NARROW:
                break
            if gap > 0:
                low, high = (target, gap), (high[0], high[1] / 2 if side > 0 else high[1])
            else:
                low, high = (low[0], low[1] / 2 if side < 0 else low[1]), (target, gap)
            side = 1 if gap > 0 else -1
        assert best is not None  # noqa: S101
        return best[0], best[1] + self.wanted
