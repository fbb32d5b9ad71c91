"""The explicit relation between a projection's sparsity and the exponent alpha of its spectrum.

Pure maths, derived in docs/theory.md. A density proportional to lambda^(-alpha) has the rank-size
form lambda_k ~ k^(-p) with p = 1/(alpha - 1), so the top share q of N directions holds the energy
E(q) = H_{qN,p} / H_{N,p}, and keeping the energy 1 - tau needs the density q with E(q) = 1 - tau.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def rank_exponent(alpha: float) -> float:
    """P = 1 / (alpha - 1), the exponent of the rank-size form.

    Raises:
        ValueError: alpha <= 1, for which no density exists.
    """
    if not alpha > 1:
        raise ValueError(f"the relation needs alpha > 1, got {alpha}")
    return 1.0 / (alpha - 1.0)


def cumulative_energy(alpha: float, size: int) -> Array:
    """Energy share of the top k of `size` directions, k = 0..size.

    The finite sum H_{k,p} / H_{N,p}: valid for every alpha > 1, where the asymptotic form needs
    alpha > 2.

    Returns:
        [size + 1] float64, from 0 to 1.
    """
    ranks = np.arange(1, size + 1, dtype=np.float64)
    return energy_shares(np.exp(-rank_exponent(alpha) * np.log(ranks)))


def energy_shares(eigenvalues: npt.ArrayLike) -> Array:
    """Energy share of the top k of the given eigenvalues, k = 0..N.

    Args:
        eigenvalues: [N], non-negative, any order, not all zero.

    Returns:
        [N + 1] float64, from 0 to 1.
    """
    descending = np.sort(np.asarray(eigenvalues, dtype=np.float64))[::-1]
    sums = np.concatenate([[0.0], np.cumsum(descending)])
    if not sums[-1] > 0:
        raise ValueError("the spectrum holds no energy")
    return np.asarray(sums / sums[-1], dtype=np.float64)


def density_for_energy(shares: Array, kept: float) -> float:
    """Smallest density whose top directions hold the share `kept` of the energy.

    Interpolated between integer ranks: with ceil(qN) the solved budget misses by 6e-3.

    Args:
        shares: [N + 1] from :func:`cumulative_energy` or :func:`energy_shares`.
        kept: 1 - tau in [0, 1].
    """
    # Trailing ranks without energy repeat the value 1; the first of them is the density sought.
    size = len(shares) - 1
    first_full = int(np.searchsorted(shares, 1.0))
    return float(np.interp(kept, shares[: first_full + 1], np.arange(first_full + 1))) / size


def sparsity_asymptotic(alpha: float, tau: float) -> float:
    """S = 1 - (1 - tau)^((alpha - 1) / (alpha - 2)), the limit of many directions.

    Raises:
        ValueError: alpha <= 2, where the limit does not exist; use :func:`sparsity_finite`.
    """
    if not alpha > 2:
        raise ValueError(
            f"the asymptotic relation needs alpha > 2, got {alpha}; use the finite one"
        )
    return float(1.0 - (1.0 - tau) ** ((alpha - 1.0) / (alpha - 2.0)))


def sparsity_finite(alpha: float, tau: float, size: int) -> float:
    """s(alpha, tau) with the finite sums over `size` = min(d_in, d_out) directions.

    A heavier tail (smaller alpha) holds its energy in fewer directions and can be sparser: the
    *capacity* reading. See :func:`reflect` for the *importance* reading.
    """
    return 1.0 - density_for_energy(cumulative_energy(alpha, size), 1.0 - tau)


def reflect(alphas: npt.ArrayLike) -> Array:
    """Reflect each alpha about the mean, alpha -> 2 * mean - alpha: the *importance* reading.

    The lowest results are floored just above the smallest alpha seen, so that no reflected value is
    more extreme than the spectra that were measured, and none falls to 1.
    """
    values = np.asarray(alphas, dtype=np.float64)
    return np.asarray(np.maximum(2 * values.mean() - values, values.min() * (1 + 1e-6)))
