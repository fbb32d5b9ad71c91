"""A plan again at another sparsity, from the plan alone: no model, no text, no spectra."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from acttail.allocate.base import AllocationContext, Array
from acttail.allocate.registry import get
from acttail.allocate.sensitivity import minimise
from acttail.budget import check_target, kept_entries
from acttail.curves import SensitivityCurves
from acttail.errors import PlanError
from acttail.plan import SparsityPlan


@dataclass
class _FromPlan(AllocationContext):
    """What a data-free allocator looks at, read off a plan."""

    plan: SparsityPlan | None = None

    def alphas(self, estimator: str) -> Array:
        """[P] the exponents the plan was made from."""
        assert self.plan is not None  # noqa: S101
        known = [e.alpha for e in self.plan.projections.values()]
        found = [a for a in known if a is not None]
        if not found:
            raise PlanError("the plan holds no alpha to make a budget from")
        mean = sum(found) / len(found)
        return np.array([mean if a is None else a for a in known], dtype=np.float64)

    def eigenvalues(self, *, farms: bool = False) -> dict[str, object]:
        """There are none."""
        raise PlanError("this allocator needs the weights' spectra, which a plan does not hold")


class _Entries:
    """The projections of a plan in the form of a weight source."""

    def __init__(self, plan: SparsityPlan) -> None:
        from acttail.projections import Projection

        self.name = plan.model
        self.projections = [
            Projection(
                name=name, block=e.block, kind=e.kind, d_in=e.d_in, d_out=e.d_out, cost=e.cost,
                module=name, parameter="weight", expert=None, transposed=False,
            )
            for name, e in plan.projections.items()
        ]  # fmt: skip


def curves_of(plan: SparsityPlan) -> SensitivityCurves | None:
    """The sensitivity curves a plan names, None if it names none or the file is gone.

    Raises:
        PlanError: the file is there and not a file of curves.
    """
    path = plan.arguments.get("curves")
    return SensitivityCurves.load(path) if path and Path(path).exists() else None


def replan(
    plan: SparsityPlan, sparsity: float, curves: SensitivityCurves | None = None
) -> SparsityPlan:
    """The same rule at another model sparsity.

    Args:
        plan: made by `sensitivity` (with `curves`), or by a rule that needs only shapes and alpha.
        sparsity: model sparsity in [0, 0.99].
        curves: of the plan's model; those the plan names by default.

    Raises:
        BudgetError: the sparsity is out of range or out of reach.
        PlanError: the plan does not hold what its rule needs: thresholds are calibrated for one
            sparsity, curves are missing, or they are another model's.
    """
    target = check_target(sparsity)
    if plan.rule not in ("topk", "wina"):
        raise PlanError(
            f"a plan of rule {plan.rule} holds for one sparsity: its thresholds were calibrated for it"
        )
    allocator = get(plan.allocator)
    curves = curves or curves_of(plan)
    if curves is not None:
        costs = {name: e.cost for name, e in plan.projections.items()}
        differ = sorted(set(costs) ^ set(curves.curves))
        if differ:
            raise PlanError(f"the curves are for another model: they differ in {differ[0]}")
        ordered = {name: curves.curves[name] for name in costs}
        solved = minimise(ordered, curves.grid, costs, target)
    elif allocator.needs_text:
        raise PlanError(
            f"{plan.allocator} needs its curves for another sparsity: give --curves FILE"
        )
    else:
        context = _FromPlan(_Entries(plan), plan=plan)  # type: ignore[arg-type]
        arguments = allocator.arguments(plan.arguments)
        values = allocator.allocate(context, target, arguments)
        solved = dict(zip(plan.projections, map(float, values), strict=True))
    entries = {
        name: replace(e, sparsity=round(solved[name], 9), k=kept_entries(solved[name], e.d_in))
        for name, e in plan.projections.items()
    }
    return replace(plan, sparsity=target, projections=entries)
