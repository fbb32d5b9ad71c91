"""Histograms of spectra for the page: the density on logarithmic axes, and the fitted tail."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from acttail.report.charts import COLOURS, Axes

# Of all projections together: keeps the page below 2 MB whatever the model.
_NUMBERS = 80_000
_MOST_BINS, _FEWEST_BINS = 48, 12
# Eigenvalues below this share of the largest are numerical noise and would only stretch the axis.
_FLOOR = 1e-7


def bins(projections: int) -> int:
    """Bins per histogram for a model of so many projections."""
    return max(_FEWEST_BINS, min(_MOST_BINS, _NUMBERS // max(projections, 1)))


def histogram(eigenvalues: torch.Tensor, count: int) -> dict[str, Any]:
    """Density of a spectrum in bins of equal width in log10.

    Args:
        eigenvalues: [N] float64, not negative.
        count: bins.

    Returns:
        ``low``, ``step`` (log10 of the first edge, and the bins' width) and ``density``: [count], the
        share of eigenvalues per unit of lambda, None for an empty bin.
    """
    top = float(eigenvalues.max())
    kept = eigenvalues[eigenvalues > top * _FLOOR]
    if top <= 0 or not kept.numel():
        return {"low": 0.0, "step": 1.0, "density": []}
    low, high = math.log10(float(kept.min())), math.log10(top)
    step = (high - low) / count or 1e-3
    index = ((kept.log10() - low) / step).long().clamp_(0, count - 1)
    found = torch.bincount(index, minlength=count)
    edges = 10 ** (low + step * torch.arange(count + 1, dtype=torch.float64))
    density = found / edges.diff() / eigenvalues.numel()
    values = [
        float(f"{d:.4g}") if n else None
        for d, n in zip(density.tolist(), found.tolist(), strict=True)
    ]
    return {"low": round(low, 5), "step": round(step, 6), "density": values}


def points(found: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(lambda, density) at the middles of the bins that hold something."""
    return [
        (10 ** (found["low"] + found["step"] * (i + 0.5)), d)
        for i, d in enumerate(found["density"])
        if d is not None
    ]


def tail_line(found: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Two points of the fitted density (n / N) (alpha - 1) / xmin (lambda / xmin)^(-alpha)."""
    alpha, xmin = found.get("alpha"), found.get("xmin")
    if not alpha or not xmin:
        return []
    scale = found["tail"] / found["size"] * (alpha - 1) / xmin
    end = 10 ** (found["low"] + found["step"] * len(found["density"]))
    return [(x, scale * (x / xmin) ** -alpha) for x in (xmin, end)]


def esd_chart(found: Mapping[str, Any], name: str) -> str:
    """The density of one projection's spectrum with its fitted tail, as an <svg> element."""
    drawn, tail = points(found), tail_line(found)
    if len(drawn) < 2:
        return "<p>This spectrum has too few eigenvalues to draw.</p>"
    xs, ys = zip(*drawn, *tail, strict=True)
    axes = Axes((min(xs), max(xs)), (min(ys) / 1.5, max(ys) * 1.5), log_x=True)
    out = axes.frame(f"Eigenvalue density of {name}", "eigenvalue of WᵀW", "density")
    out += [
        f'<circle cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="3" fill="{COLOURS[0]}"/>'
        for x, y in drawn
    ]
    if tail:
        path = " ".join(f"{axes.px(x):.1f},{axes.py(y):.1f}" for x, y in tail)
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[1]}" stroke-width="2"/>'
        )
        out.append(
            f'<text class="series" x="{axes.px(tail[1][0]) + 8:.1f}" y="{axes.py(tail[1][1]):.1f}" '
            f'fill="{COLOURS[1]}">alpha {found["alpha"]:.2f}</text>'
        )
    out.append("</svg>")
    return "".join(out)
