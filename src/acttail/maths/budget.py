"""The one budget solver: from offsets, or a family of sparsities, to sparsities that meet the target.

Pure maths over arrays. The model sparsity is S = sum_i w_i s_i / sum_i w_i with w_i the cost of a
projection; every solver here returns values whose S is within 1e-9 of the target.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from acttail.errors import BudgetError

Array = npt.NDArray[np.float64]

# Densest and sparsest a projection may be. One entry in a hundred is left so that no projection is
# cut off from its input.
LOWEST, HIGHEST = 0.0, 0.99


def check_target(sparsity: float, low: float = LOWEST, high: float = HIGHEST) -> float:
    """Return the target as a float, or raise.

    Raises:
        BudgetError: the target is not a number in [low, high].
    """
    value = float(sparsity)
    if not low <= value <= high:  # NaN fails this as well
        raise BudgetError(f"sparsity must be a number from {low} to {high}, got {sparsity}")
    return value


def model_sparsity(sparsities: npt.ArrayLike, costs: npt.ArrayLike) -> float:
    """S = sum_i w_i s_i / sum_i w_i.

    Args:
        sparsities: [P].
        costs: [P], non-negative, not all zero.
    """
    w = np.asarray(costs, dtype=np.float64)
    return float(np.dot(np.asarray(sparsities, dtype=np.float64), w) / w.sum())


def solve(family: Callable[[float], Array], costs: npt.ArrayLike, target: float,
          bracket: tuple[float, float]) -> Array:  # fmt: skip
    """Find the member of a one-parameter family of sparsities that meets the target.

    Args:
        family: maps the parameter to sparsities [P]; continuous, and non-decreasing in it.
        costs: [P] weights of the mean.
        target: model sparsity to hit.
        bracket: parameter values whose model sparsities enclose the target.

    Returns:
        [P] sparsities whose cost-weighted mean is within 1e-9 of the target.

    Raises:
        BudgetError: the bracket does not enclose the target.
    """
    low, high = bracket
    w = np.asarray(costs, dtype=np.float64)
    if (
        model_sparsity(family(low), w) > target + 1e-9
        or model_sparsity(family(high), w) < target - 1e-9
    ):
        reach = model_sparsity(family(low), w), model_sparsity(family(high), w)
        raise BudgetError(
            f"sparsity {target} is out of reach: this allocation spans {reach[0]:.4f} to {reach[1]:.4f}"
        )
    for _ in range(200):
        middle = 0.5 * (low + high)
        gap = model_sparsity(family(middle), w) - target
        if abs(gap) < 1e-12:
            return family(middle)
        low, high = (middle, high) if gap < 0 else (low, middle)
    # Where the family is steep the parameter runs out of digits first: mix its two neighbours.
    below, above = family(low), family(high)
    s_below, s_above = model_sparsity(below, w), model_sparsity(above, w)
    share = 0.0 if s_above == s_below else (target - s_below) / (s_above - s_below)
    return below + min(max(share, 0.0), 1.0) * (above - below)


def solve_offsets(offsets: npt.ArrayLike, costs: npt.ArrayLike, target: float,
                  low: float = LOWEST, high: float = HIGHEST) -> Array:  # fmt: skip
    """s_i = clip(S + o_i + c, low, high) with the one scalar c for which the budget holds.

    Clipping with redistribution is needed: at S = 0.8 the unclipped map of the classical recipe asks
    for ratios above 1 on LLaMA-2.

    Args:
        offsets: [P], any finite numbers.
        costs: [P].
        target: model sparsity in [low, high].
        low: densest a projection may be.
        high: sparsest a projection may be.

    Returns:
        [P] sparsities in [low, high].

    Raises:
        BudgetError: the target is outside [low, high] or an offset is not finite.
    """
    target = check_target(target, low, high)
    o = np.asarray(offsets, dtype=np.float64)
    if not np.isfinite(o).all():
        raise BudgetError("an allocator produced an offset that is not finite")
    reach = float(np.abs(o).max(initial=0.0)) + 1.0
    return solve(lambda c: np.clip(target + o + c, low, high), costs, target, (-reach, reach))


def kept_entries(sparsity: float, d_in: int) -> int:
    """K = max(1, floor(d (1 - s) + 1/2)), in float64, the number of input entries that stay."""
    return max(1, int(np.floor(np.float64(d_in) * (1.0 - np.float64(sparsity)) + 0.5)))
