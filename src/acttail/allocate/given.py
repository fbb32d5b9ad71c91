"""Sparsities made elsewhere: a JSON object {projection: sparsity}, made a plan."""

import os
from collections.abc import Mapping

from acttail.base.controls import clean
from acttail.base.schema import read_json
from acttail.errors import BudgetError, PlanError
from acttail.maths.budget import HIGHEST, check_target
from acttail.model.weights import WeightSource
from acttail.plan import SparsityPlan, build_plan


def read_sparsities(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read a file of sparsities.

    Args:
        path: JSON {projection: sparsity in [0, 0.99]}.

    Raises:
        PlanError: no such file, not JSON, or not one object of numbers; names the projection.
        BudgetError: a sparsity is out of range.
    """
    given = read_json(path, "a file of sparsities", error=PlanError)
    if not isinstance(given, dict) or not given:
        raise PlanError(f"{path} must hold one object {{projection: sparsity}}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(
                f"{path}: the sparsity of {clean(name)} must be a number, got {value!r}"
            )
        try:
            check_target(value, high=HIGHEST + 1e-12)
        except BudgetError as error:
            raise BudgetError(f"{path}: projection {clean(name)}: {error}") from error
    return given


def plan_from_sparsities(
    weights: WeightSource, given: Mapping[str, float], *, name: str, sparsity: float | None = None
) -> SparsityPlan:
    """A plan of given sparsities.

    Args:
        weights: the model.
        given: projection -> sparsity, one for every projection.
        name: of the file they came from, kept in the plan.
        sparsity: the model sparsity they are meant to have; None takes what they have.

    Raises:
        PlanError: a projection is missing or unknown, or their mean is not `sparsity`.
        BudgetError: a sparsity is out of range.
    """
    made = build_plan(
        weights, given, sparsity=None, allocator="from-file", arguments={"from": name}
    )
    if sparsity is not None and abs(made.solved_sparsity - sparsity) > 1e-3:
        raise PlanError(
            f"the sparsities in {name} average {made.solved_sparsity:.4f}, not the requested {sparsity}"
        )
    return made
