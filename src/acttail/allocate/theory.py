"""Data-free budgets from the explicit relation between sparsity and alpha; no scale to choose.

Every projection keeps the same share of its spectrum's energy, 1 - tau, and tau is solved so that
the budget holds (docs/theory.md). `energy` does the same with the measured spectrum instead of the
fitted tail: the control that asks whether the fit adds anything.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from acttail.allocate.base import Allocate, Allocation, Allocator, Needs
from acttail.allocate.context import AllocationContext, Array
from acttail.errors import ActTailError
from acttail.maths.budget import HIGHEST, LOWEST, solve
from acttail.maths.relation import cumulative_energy, density_for_energy, energy_shares, reflect

SIGNS = ("capacity", "importance")
# exp(-700) is the smallest share of energy a float64 holds apart from zero.
_LARGEST_EXPONENT = 700.0


def _equal_energy(shares: list[Array], costs: Array, sparsity: float) -> Array:
    """Sparsities at which all projections keep one and the same share exp(-x) of their energy."""

    def at(x: float) -> Array:
        kept = float(np.exp(-x))
        return np.clip([1 - density_for_energy(s, kept) for s in shares], LOWEST, HIGHEST)

    # At x = 0 everything with energy stays; a rank-deficient matrix is sparse even there, so the
    # family is opened below by scaling down to fully dense.
    full = at(0.0)

    def family(x: float) -> Array:
        return at(x) if x >= 0 else np.asarray(full * max(0.0, 1 + x), dtype=np.float64)

    return solve(family, costs, sparsity, (-1.0, _LARGEST_EXPONENT))


def allocate_theory(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """Sparsities s(alpha_i, tau) with one tau for the model.

    Raises:
        ActTailError: unknown sign.
    """
    sign = arguments["sign"]
    if sign not in SIGNS:
        raise ActTailError(f"unknown sign {sign!r}: use {' or '.join(SIGNS)}")
    alphas = context.alphas(arguments["estimator"])
    if sign == "importance":
        alphas = reflect(alphas)
    shares = [
        cumulative_energy(float(alpha), min(p.d_in, p.d_out))
        for alpha, p in zip(alphas, context.projections, strict=True)
    ]
    solved = _equal_energy(shares, context.costs, sparsity)
    return Allocation(solved, context.fits(arguments["estimator"]))


def allocate_energy(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """Sparsities at which every matrix keeps the same share of its own measured energy."""
    found = context.eigenvalues()
    flat = np.ones(2)
    shares = [
        energy_shares(found[p.name].numpy() if float(found[p.name].sum()) > 0 else flat)
        for p in context.projections
    ]
    return Allocation(_equal_energy(shares, context.costs, sparsity))


def _with_sign(sign: str) -> Allocate:
    def allocate(
        context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
    ) -> Allocation:
        return allocate_theory(context, sparsity, {**arguments, "sign": sign})

    return allocate


THEORY = Allocator(
    "theory", "data-free: the explicit relation s(alpha, tau), sign=capacity or importance",
    {"estimator": "hill", "sign": "capacity"}, allocate_theory,
)  # fmt: skip
THEORY_CAPACITY = Allocator(
    "theory-capacity", "the relation with lower alpha sparser", {"estimator": "hill"},
    _with_sign("capacity"),
)  # fmt: skip
THEORY_IMPORTANCE = Allocator(
    "theory-importance", "the relation with higher alpha sparser", {"estimator": "hill"},
    _with_sign("importance"),
)  # fmt: skip
ENERGY = Allocator(
    "energy", "control: equal energy of the measured spectrum, no fit", {}, allocate_energy,
    needs=Needs.SPECTRA,
)  # fmt: skip
