"""Loss curves over sparsity: interpolation, convex hulls, and the budget of least total loss.

Minimise sum_i F_i(s_i) subject to sum_i w_i s_i = S sum_i w_i. Every projection minimises
F_i(s) - mu * w_i * s on the lower convex hull of its curve, and the multiplier mu is found by bisection
(Everett 1963): exact on the hull, and another S costs nothing once the curves are there.
"""

from collections.abc import Callable, Mapping

import numpy as np

from acttail.maths.budget import HIGHEST, Array, solve

# Spacing of the sparsities the optimum is picked from; between two of them it is interpolated.
_STEP = 0.0025


def interpolator(grid: Array, values: Array) -> Callable[[Array], Array]:
    """Smooth monotone cubic through a curve (Fritsch & Butland, by scipy's PCHIP).

    With linear pieces the optimum would stick to grid points.
    """
    from scipy.interpolate import PchipInterpolator

    smooth = PchipInterpolator(grid, values)
    return lambda s: np.asarray(smooth(np.clip(s, grid[0], grid[-1])), dtype=np.float64)


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
