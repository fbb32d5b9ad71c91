"""Heavy-tail fits of a spectrum: the exponent alpha of a density proportional to lambda^(-alpha).

Pure tensors: takes eigenvalues, returns a :class:`TailFit`; knows no weight, model or file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from acttail.errors import ActTailError, SpectrumError

# Above this the tail decays so fast that heavy-tail theory calls the layer random-like
# (Martin & Mahoney 2021); Marchenko-Pastur spectra land here.
RANDOM_LIKE_ALPHA = 6.0
# 1 % point of sqrt(n) * D when the exponent was fitted to the same data: the log of a Pareto variable
# is exponential, so this is Lilliefors' table for the exponential (1969).
_REJECTED = 1.25
# Rows of the KS candidate table worked at a time: bounds it to 4 MB for 4,096 eigenvalues, and what
# lies before a row's own tail is skipped.
_CANDIDATE_ROWS = 128


@dataclass(frozen=True)
class TailFit:
    """A fitted power-law tail.

    Attributes:
        alpha: exponent of the density; None when the spectrum has no tail to fit (see `flag`).
        xmin: smallest eigenvalue of the tail.
        ks_distance: Kolmogorov-Smirnov distance between the tail and the fit, in [0, 1].
        tail_size: number n of eigenvalues in the tail.
        stderr: (alpha - 1) / sqrt(n); None where it is not valid (farms: windows overlap).
        flag: what to know before trusting the fit; None when nothing stands out.
    """

    alpha: float | None
    xmin: float | None
    ks_distance: float | None
    tail_size: int
    stderr: float | None
    flag: str | None = None


def _positive(eigenvalues: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """Ascending eigenvalues above the numerical rank's floor, and a flag if some were below."""
    values = eigenvalues.to(torch.float64).sort().values
    if not bool(torch.isfinite(values).all()):
        raise SpectrumError("the spectrum has NaN or infinite eigenvalues")
    total = values.numel()
    top = float(values[-1]) if total else 0.0
    positive = values[values > top * total * torch.finfo(torch.float64).eps]
    flag = None
    if positive.numel() < total:
        flag = f"rank {positive.numel()} of {total}: zero eigenvalues left out"
    return positive, flag


def _mle(values: torch.Tensor, start: int) -> float:
    """The Hill estimate alpha = 1 + n / sum_j ln(lambda_j / lambda_start); inf for a flat tail."""
    tail = values[start:]
    total = float(torch.log(tail / tail[0]).sum())
    return 1.0 + tail.numel() / total if total > 0 else math.inf


def _ks(values: torch.Tensor, start: int, alpha: float) -> float:
    tail = values[start:]
    n = tail.numel()
    empirical = torch.arange(n, dtype=torch.float64) / n
    return float((empirical - (1 - (tail / tail[0]) ** (1 - alpha))).abs().max())


def _distances(values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """KS distance with the tail starting at each index of `starts`, vectorised."""
    # numpy: on rows this short, waking torch's threads costs more than the arithmetic.
    logs, first = np.log(values.numpy()), starts.numpy()
    count = len(logs)
    suffix = np.cumsum(logs[::-1])[::-1]
    sizes = count - first
    alphas = 1 + sizes / np.maximum(suffix[first] - sizes * logs[first], 1e-300)
    distances = np.empty(len(first))
    index = np.arange(count)
    for row in range(0, len(first), _CANDIDATE_ROWS):
        part = slice(row, row + _CANDIDATE_ROWS)
        lowest = first[part].min()
        at = first[part, None]  # [rows, 1]
        # Before a row's own start the exponent is positive; it is masked out below, but must not overflow.
        exponent = np.minimum((1 - alphas[part, None]) * (logs[lowest:] - logs[at]), 0)
        fitted = 1 - np.exp(exponent)  # [rows, N - lowest]
        gap = np.abs((index[lowest:] - at) / sizes[part, None] - fitted)
        distances[part] = np.where(index[lowest:] < at, 0, gap).max(1)
    return torch.from_numpy(distances)


def _fit_at(values: torch.Tensor, start: int, flag: str | None, *, stderr: bool = True) -> TailFit:
    n = values.numel() - start
    alpha = _mle(values, start)
    xmin = float(values[start])
    if not math.isfinite(alpha):
        return TailFit(None, xmin, None, n, None, "flat spectrum: all tail eigenvalues are equal")
    distance = _ks(values, start, alpha)
    flags = [flag] if flag else []
    if alpha > RANDOM_LIKE_ALPHA:
        flags.append(f"no heavy tail: alpha {alpha:.1f} > {RANDOM_LIKE_ALPHA:.0f}")
    if distance * math.sqrt(n) > _REJECTED:
        flags.append(f"poor fit: KS distance {distance:.2f} rejects a power law at 1 %")
    error = (alpha - 1) / math.sqrt(n) if stderr else None
    return TailFit(alpha, xmin, distance, n, error, "; ".join(flags) or None)


def _degenerate(values: torch.Tensor, flag: str | None) -> TailFit | None:
    if values.numel() == 0:
        return TailFit(None, None, None, 0, None, "zero matrix: no positive eigenvalue")
    if values.numel() < 4:
        n = values.numel()
        return TailFit(None, float(values[0]), None, n, None, f"too few eigenvalues to fit ({n})")
    if float(values[0]) == float(values[-1]):
        n = values.numel()
        return TailFit(
            None, float(values[0]), None, n, None, "flat spectrum: all eigenvalues equal"
        )
    return None


def fit_hill(eigenvalues: torch.Tensor) -> TailFit:
    """Hill estimate with the tail starting at the median eigenvalue.

    i = floor(N/2), n = N - i, alpha = 1 + n / sum_{j>=i} ln(lambda_j / lambda_i)
    (AlphaPruning's xmin_mid, Lu et al. 2024, arXiv 2410.10912).

    Args:
        eigenvalues: [N], any order, non-negative.

    Raises:
        SpectrumError: an eigenvalue is NaN or infinite.
    """
    values, flag = _positive(eigenvalues)
    return _degenerate(values, flag) or _fit_at(values, values.numel() // 2, flag)


def fit_ks(eigenvalues: torch.Tensor) -> TailFit:
    """Maximum likelihood for every candidate xmin; the one of least KS distance wins.

    (Clauset, Shalizi & Newman 2009, section 3.3; WeightWatcher.) The last eigenvalue cannot start a
    tail.

    Args:
        eigenvalues: [N], any order, non-negative.

    Raises:
        SpectrumError: an eigenvalue is NaN or infinite.
    """
    values, flag = _positive(eigenvalues)
    return _degenerate(values, flag) or _least_distance(
        values, torch.arange(values.numel() - 1), flag
    )


def fit_peak(eigenvalues: torch.Tensor) -> TailFit:
    """Least KS distance with xmin within [0.95, 1.5] times the spectrum's fullest bin.

    The bin is the fullest of 100 equal bins of log10 lambda, taken at its lower edge (AlphaPruning's
    xmin_peak, with the lower bound on the eigenvalues' own scale: their code compares against its
    logarithm, which switches the bound off).

    Args:
        eigenvalues: [N], any order, non-negative.

    Raises:
        SpectrumError: an eigenvalue is NaN or infinite.
    """
    values, flag = _positive(eigenvalues)
    early = _degenerate(values, flag)
    if early is not None:
        return early
    logs = torch.log10(values)
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, bins=100, min=low, max=high)
    peak = 10 ** (low + int(counts.argmax()) * (high - low) / 100)
    starts = torch.nonzero((values >= 0.95 * peak) & (values <= 1.5 * peak)).flatten()
    starts = starts[starts < values.numel() - 1]
    if starts.numel() == 0:
        return _fit_at(
            values, values.numel() // 2, "no eigenvalue near the peak; hill used instead"
        )
    return _least_distance(values, starts, flag)


def _least_distance(values: torch.Tensor, starts: torch.Tensor, flag: str | None) -> TailFit:
    return _fit_at(values, int(starts[int(_distances(values, starts).argmin())]), flag)


def fit_farms(pooled_eigenvalues: torch.Tensor) -> TailFit:
    """Hill estimate over the pooled spectrum of FARMS windows (see spectrum.farms_esd).

    No standard error is given: the windows overlap, so the pooled eigenvalues are not independent.

    Args:
        pooled_eigenvalues: [m * N], any order, non-negative.

    Raises:
        SpectrumError: an eigenvalue is NaN or infinite.
    """
    values, flag = _positive(pooled_eigenvalues)
    return _degenerate(values, flag) or _fit_at(values, values.numel() // 2, flag, stderr=False)


ESTIMATORS: dict[str, Callable[[torch.Tensor], TailFit]] = {
    "hill": fit_hill,
    "ks": fit_ks,
    "peak": fit_peak,
    "farms": fit_farms,
}


def check_estimator(name: str) -> None:
    """Refuse an estimator that there is not.

    Raises:
        ActTailError: names those there are.
    """
    if name not in ESTIMATORS:
        raise ActTailError(f"unknown estimator {name!r}: use {', '.join(ESTIMATORS)}")
