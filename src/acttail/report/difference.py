"""Two plans for one model, side by side."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from acttail.errors import PlanError
from acttail.model.projections import HEAD
from acttail.plan import SparsityPlan


@dataclass(frozen=True)
class ProjectionDifference:
    """One projection under two plans.

    Attributes:
        projection: its name.
        a: sparsity under the first plan.
        b: sparsity under the second.
        difference: b - a.
    """

    projection: str
    a: float
    b: float
    difference: float

    def to_dict(self) -> dict[str, str | float]:
        """Plain JSON data."""
        return asdict(self)


def difference(a: SparsityPlan, b: SparsityPlan) -> list[ProjectionDifference]:
    """What two plans say of every projection, in the model's order.

    An output head that one of them leaves out of its budget has the sparsity 0 there.

    Args:
        a: the first plan.
        b: the second.

    Raises:
        PlanError: they are for different models; says where they differ.
    """
    if a.fingerprint != b.fingerprint:
        only = sorted(
            n for n in set(a.projections) ^ set(b.projections)
            if (a.projections.get(n) or b.projections[n]).kind != HEAD
        )  # fmt: skip
        what = f"only one has {only[0]}" if only else "their shapes differ"
        raise PlanError(f"the plans are for different models: {what}")

    def sparsity(plan: SparsityPlan, name: str) -> float:
        return plan.projections[name].sparsity if name in plan.projections else 0.0

    pairs = [(n, sparsity(a, n), sparsity(b, n)) for n in {**a.projections, **b.projections}]
    return [ProjectionDifference(name, x, y, round(y - x, 9)) for name, x, y in pairs]


def sparsities_by_kind(plan: SparsityPlan) -> Mapping[str, list[float]]:
    """Kind of projection -> the sparsities of all of that kind."""
    found: dict[str, list[float]] = defaultdict(list)
    for entry in plan.projections.values():
        found[entry.kind].append(entry.sparsity)
    return found
