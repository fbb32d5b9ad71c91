"""`sensitivity`: the budget of least predicted loss, from measured curves and one multiplier.

Minimise sum_i F_i(s_i) subject to sum_i w_i s_i = S sum_i w_i. Every projection minimises
F_i(s) - mu * w_i * s on the lower convex hull of its curve, and the multiplier mu is found by bisection
(Everett 1963): exact on the hull, and another S costs nothing once the curves are there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acttail.allocate.base import AllocationContext, Allocator, Array, calibration_of
from acttail.budget import HIGHEST, solve
from acttail.curves import SensitivityCurves, interpolator, measure
from acttail.errors import PlanError

# Spacing of the sparsities the optimum is picked from; between two of them it is interpolated.
_STEP = 0.0025


def lower_hull(x: Array, y: Array) -> Array:
    """Indices of the lower convex hull of a curve (Andrew's monotone chain).

    Args:
        x: [n] ascending.
        y: [n].
    """
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull)


def minimise(
    curves: Mapping[str, Array], grid: Array, costs: Mapping[str, float], sparsity: float
) -> dict[str, float]:
    """Sparsities of least total loss that meet the budget.

    Args:
        curves: name -> [G] non-decreasing losses.
        grid: [G] sparsities from 0.
        costs: name -> cost.
        sparsity: model sparsity.

    Returns:
        name -> sparsity in [0, 0.99].

    Raises:
        BudgetError: the target is out of reach.
    """
    fine = np.append(np.arange(0.0, HIGHEST, _STEP), HIGHEST)
    hulls = []
    for name, curve in curves.items():
        values = interpolator(grid, curve)(fine)
        index = lower_hull(fine, values)
        s, f = fine[index], values[index]
        # Marginal loss per unit of cost along the hull: ascending, so the choice is one search.
        hulls.append((s, np.diff(f) / np.diff(s) / max(costs[name], 1e-300)))
    weights = np.array([costs[name] for name in curves])
    slopes = np.concatenate([m for _, m in hulls])
    positive = slopes[slopes > 0]
    low = float(np.log(positive.min())) - 1 if positive.size else 0.0
    high = float(np.log(positive.max())) + 1 if positive.size else 1.0

    def family(log_mu: float) -> Array:
        if log_mu <= low:
            return np.zeros(len(hulls))
        mu = np.exp(log_mu)
        return np.array([s[np.searchsorted(m, mu)] for s, m in hulls])

    found = solve(family, weights, sparsity, (low, high))
    return dict(zip(curves, map(float, found), strict=True))


def allocate(context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]) -> Array:
    """[P] sparsities of least predicted loss.

    Raises:
        TextError: no calibration text was given.
        PlanError: the file of curves belongs to another model.
    """
    curves = curves_for(context, arguments)
    costs = {p.name: p.cost for p in context.projections}
    found = minimise(curves.curves, curves.grid, costs, sparsity)
    return np.array([found[p.name] for p in context.projections])


def curves_for(context: AllocationContext, arguments: Mapping[str, Any]) -> SensitivityCurves:
    """The curves an allocation uses: from the file named, or measured once per context.

    Raises:
        TextError: no calibration text was given and no file.
        PlanError: the file belongs to another model.
    """
    path = arguments.get("curves", "")
    names = [p.name for p in context.projections]
    if path and Path(path).exists():
        curves = SensitivityCurves.load(path)
        missing = sorted(set(names) ^ set(curves.curves))
        if missing:
            raise PlanError(
                f"the curves in {path} are for another model: they differ in {missing[0]}"
            )
        return SensitivityCurves(curves.grid, {n: curves.curves[n] for n in names}, curves.about)
    calibration = calibration_of(context)
    loss = arguments.get("loss", "fisher")
    key = f"curves-{loss}"
    if key not in calibration.results:
        calibration.results[key] = measure(calibration, loss=loss)
    found: SensitivityCurves = calibration.results[key]
    if path:
        found.save(path)
    return found


# Sparsity per token follows the token: under one threshold, tokens with large inputs keep more. On
# held-out text this is worth 5-8 % of perplexity at equal realised sparsity (docs/log.md).
REFINED = Allocator(
    "refined", "calibrated: sensitivity with per-token dynamic k under thresholds (a mean budget)",
    {"loss": "fisher", "curves": ""}, allocate, needs_text=True, rule="threshold",
)  # fmt: skip
SENSITIVITY = Allocator(
    "sensitivity", "calibrated: least predicted loss from measured curves",
    {"loss": "fisher", "curves": ""}, allocate, needs_text=True,
)  # fmt: skip
