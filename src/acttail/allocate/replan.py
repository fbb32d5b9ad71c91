"""A plan again at another sparsity, from the plan alone: no model, no text, no spectra."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from acttail.allocate.base import Allocator, Needs
from acttail.allocate.context import AllocationContext
from acttail.allocate.registry import ALLOCATORS
from acttail.allocate.sensitivity import SENSITIVITY
from acttail.calibrate.curves import SensitivityCurves
from acttail.errors import PlanError
from acttail.maths.budget import check_target, kept_entries
from acttail.model.projections import Projection
from acttail.plan import SparsityPlan
from acttail.sparse.rules import kind_of
from acttail.spectrum.tail import TailFit


class _Entries:
    """The projections of a plan in the form of a weight source without weights."""

    def __init__(self, plan: SparsityPlan) -> None:
        self.name = plan.model
        self.head: Projection | None = None  # one in the budget is among the projections
        self.projections = [
            Projection(
                name=name, block=e.block, kind=e.kind, d_in=e.d_in, d_out=e.d_out, cost=e.cost,
                module=name, parameter="weight", expert=None, transposed=False,
            )
            for name, e in plan.projections.items()
        ]  # fmt: skip

    def weight(self, projection: Projection) -> torch.Tensor:
        """There is none."""
        raise PlanError(f"a plan does not hold the weights of {projection.name}")

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """There are none."""
        return self.weight(projection)

    def tensor(self, name: str) -> torch.Tensor:
        """There is none."""
        raise PlanError(f"a plan does not hold the parameter {name}")


@dataclass
class _PlanContext(AllocationContext):
    """What an allocator looks at, read off a plan."""

    plan: SparsityPlan | None = None

    def fits(self, estimator: str) -> dict[str, TailFit]:
        """The fits the plan was made from."""
        assert self.plan is not None  # noqa: S101
        entries = self.plan.projections
        if all(e.alpha is None for e in entries.values()):
            raise PlanError("the plan holds no alpha to make a budget from")
        return {
            name: TailFit(e.alpha, e.xmin, e.ks_distance, e.tail_size or 0, e.stderr, e.flag)
            for name, e in entries.items()
        }


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
    """A plan of the same rule at another model sparsity.

    The same allocator solves it, if a plan holds what it needs. Where curves are given they decide: a
    plan of an allocator that uses none becomes a plan of ``sensitivity``, and says so.

    Args:
        plan: made by an allocator that needs only shapes and alpha; or any, with `curves`.
        sparsity: model sparsity in [0, 0.99].
        curves: of the plan's model; those the plan names by default.

    Raises:
        BudgetError: the sparsity is out of range or out of reach.
        PlanError: the plan does not hold what its allocator needs: thresholds are calibrated for one
            sparsity, curves are missing, or they are another model's.
    """
    target = check_target(sparsity)
    if not kind_of(plan).replannable:
        raise PlanError(
            f"a plan of rule {plan.rule} holds for one sparsity: its thresholds were calibrated for it"
        )
    curves = curves or curves_of(plan)
    allocator, arguments = _solver(plan, curves)
    context = _PlanContext(_Entries(plan), curves=curves, plan=plan)
    solved = allocator.allocate(context, target, arguments).sparsities
    # Exponents that this budget was not made from would mislead.
    dropped: dict[str, Any] = {}
    if allocator.name != plan.allocator:
        dropped = {f.name: None for f in fields(TailFit)}
    entries = {
        name: replace(e, sparsity=round(s, 9), k=kept_entries(s, e.d_in), **dropped)
        for (name, e), s in zip(plan.projections.items(), map(float, solved), strict=True)
    }
    return replace(
        plan, sparsity=target, projections=entries, allocator=allocator.name, arguments=arguments, notes={}
    )  # fmt: skip


def _solver(
    plan: SparsityPlan, curves: SensitivityCurves | None
) -> tuple[Allocator, dict[str, Any]]:
    """The allocator that solves the plan again, and its arguments.

    Raises:
        PlanError: nothing that a plan holds is enough for its allocator.
    """
    row = ALLOCATORS.get(plan.allocator)
    if curves is not None:
        if row is None or row.needs is not Needs.CURVES:
            row, given = SENSITIVITY, {}
        else:
            given = dict(plan.arguments)
        # The loss is a property of the curves, whatever was asked for when the plan was made.
        return row, row.arguments(given | _loss_of(curves))
    if row is None:
        raise PlanError(
            f"a plan whose budget is {plan.allocator} cannot be solved again: give --curves FILE"
        )
    match row.needs:
        case Needs.ENTRIES:
            return row, row.arguments(plan.arguments)
        case Needs.CURVES:
            raise PlanError(f"{row.name} needs its curves for another sparsity: give --curves FILE")
    raise PlanError(
        f"{row.name} needs {row.needs.value}, which a plan does not hold: "
        "make the plan again, or give --curves FILE"
    )


def _loss_of(curves: SensitivityCurves) -> dict[str, str]:
    return {"loss": curves.about["loss"]} if "loss" in curves.about else {}
