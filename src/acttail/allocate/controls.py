"""Controls that any claim for alpha must beat: uniform, depth, and alpha with its meaning removed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from acttail.allocate.acttail import DEFAULTS, from_alphas
from acttail.allocate.base import Allocation, Allocator, unit
from acttail.allocate.context import AllocationContext
from acttail.maths.budget import HIGHEST, check_target, solve, solve_offsets
from acttail.sparse import rules


def allocate_uniform(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """The same sparsity everywhere."""
    return Allocation(np.full(len(context.projections), check_target(sparsity)))


def allocate_depth(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """A sparsity linear in the block's index: o = eps * u(block)."""
    wanted = arguments["epsilon"] * unit(context.blocks.astype(np.float64))
    return Allocation(solve_offsets(wanted, context.costs, sparsity))


def allocate_permuted(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """ActTail's rule on alphas dealt out at random over the projections."""
    alphas = context.alphas(arguments["estimator"])
    shuffled = np.random.default_rng(arguments["seed"]).permutation(alphas)
    return from_alphas(context, sparsity, arguments, shuffled)


def allocate_reversed(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """ActTail's rule with the opposite sign: each alpha reflected about the mean."""
    alphas = context.alphas(arguments["estimator"])
    return from_alphas(context, sparsity, arguments, 2 * alphas.mean() - alphas)


def allocate_per_type(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """One sparsity per kind: o = eps * u(mean alpha of the kind)."""
    alphas = context.alphas(arguments["estimator"])
    kinds = [p.kind for p in context.projections]
    means = {k: alphas[[x == k for x in kinds]].mean() for k in set(kinds)}
    wanted = arguments["epsilon"] * unit(np.array([means[k] for k in kinds]))
    solved = solve_offsets(wanted, context.costs, sparsity)
    return Allocation(solved, context.fits(arguments["estimator"]))


def allocate_larosa(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """LaRoSA's hand-set split (arXiv 2507.01299): s_i = c * f_i, with f set by the vector that is read.

    What reads the residual stream (q, k, v, gate, up) gets the factor `stream`, what reads an inner
    vector (o, down) the factor `inner`; c meets the budget. The rotation of LaRoSA is not part of it.
    """
    factors = np.array(
        [arguments["inner" if p.kind in _INNER else "stream"] for p in context.projections]
    )
    target = check_target(sparsity)
    return Allocation(
        solve(lambda c: np.clip(c * factors, 0.0, HIGHEST), context.costs, target, (0.0, 1e3))
    )


# Kinds that read an inner vector of the block: the heads' outputs or the MLP's intermediate.
_INNER = frozenset({"o", "down", "fc2"})
LAROSA = Allocator(
    "larosa", "control: LaRoSA's hand-set split, 0.8 for the stream's readers and 1.2 for o and down",
    {"stream": 0.8, "inner": 1.2}, allocate_larosa,
)  # fmt: skip
UNIFORM = Allocator("uniform", "control: the same sparsity everywhere", {}, allocate_uniform)
WINA = Allocator(
    "wina",
    "uniform with WINA's score, magnitude times column norm",
    {},
    allocate_uniform,
    rule=rules.WINA,
    fixed_rule=True,
)
DEPTH = Allocator(
    "depth", "control: linear in the block index; a negative epsilon makes early blocks sparser",
    {"epsilon": 0.1}, allocate_depth,
)  # fmt: skip
PERMUTED = Allocator(
    "permuted", "control: acttail on shuffled alphas", {**DEFAULTS, "seed": 0}, allocate_permuted
)
REVERSED = Allocator(
    "reversed", "control: acttail with the opposite sign", dict(DEFAULTS), allocate_reversed
)
PER_TYPE = Allocator(
    "per-type", "control: one sparsity per kind of projection, from the kind's mean alpha",
    {"estimator": "hill", "epsilon": -0.1}, allocate_per_type,
)  # fmt: skip
