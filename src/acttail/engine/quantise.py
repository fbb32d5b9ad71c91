"""Fits of integer levels to groups of weights: pure tensor maths, no bytes and no files.

Everywhere ``grouped`` is [groups, entries of a group, other] float32; a scale is [groups, 1, other],
already rounded to the half precision it will be stored in, so that levels fit the stored scale.
"""

from typing import NamedTuple

import torch

# The range is shrunk by these factors and the best in squared error kept: clipping the rarest entries
# pays where the rest then falls on finer levels.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


class Fit(NamedTuple):
    """Levels of one matrix: w = scale * level (+ minimum).

    Attributes:
        levels: the shape of what was fitted; whole numbers, from zero up for four bits.
        scale: [groups, 1, other].
        minimum: the same shape, or None for levels that lie around zero.
    """

    levels: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None


def fit_eight_bits(grouped: torch.Tensor, minimum: bool) -> Fit:
    """Levels -127..127 around zero.

    Raises:
        ValueError: a minimum was asked for; eight bits keep none.
    """
    if minimum:
        raise ValueError("eight bits keep no minimum")
    high = torch.maximum(grouped.amax(1, keepdim=True), -grouped.amin(1, keepdim=True))
    scale = _half(high / 127)
    return Fit((grouped / scale.clamp_min(1e-30)).round().clamp(-127, 127), scale, None)


def fit_four_bits(grouped: torch.Tensor, minimum: bool) -> Fit:
    """Levels 0..15: from a minimum up, or with 8 for zero."""
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    if minimum:
        return _from_a_minimum(grouped, low.clamp(max=0), high.clamp(min=0))
    return _around_zero(grouped, low, high)


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def _from_a_minimum(grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Fit:
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in _SHRINK:
        scale = _half((high - low) * shrink / 15)
        minimum = _half(low * shrink)
        levels = ((grouped - minimum) / scale.clamp_min(1e-30)).round().clamp(0, 15)
        error = (levels * scale + minimum - grouped).square().sum(1, keepdim=True)
        best = _better(best, (error, levels, scale, minimum))
    assert best is not None  # noqa: S101  (there is at least one factor)
    return Fit(best[1], best[2], best[3])


def _around_zero(grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Fit:
    """The sign of the scale puts the larger side on level -8, which is stored as 0 (as Q4_0 does)."""
    extreme = torch.where(-low > high, low, high)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in _SHRINK:
        scale = _half(extreme * shrink / -8)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        levels = (grouped / safe).round().clamp(-8, 7)
        error = (levels * scale - grouped).square().sum(1, keepdim=True)
        best = _better(best, (error, levels, scale))
    assert best is not None  # noqa: S101  (there is at least one factor)
    return Fit(best[1] + 8, best[2], None)


def _better(
    best: tuple[torch.Tensor, ...] | None, found: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Of two fits, group by group the one of the smaller error, which comes first in both."""
    if best is None:
        return found
    smaller = found[0] < best[0]
    return tuple(torch.where(smaller, n, o) for n, o in zip(found, best, strict=True))
