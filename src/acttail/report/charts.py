"""Inline SVG line charts: small, readable in print and in the dark, with a text alternative."""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

# Distinct in lightness as well as hue, so that they survive a grey printer.
COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7c3aed", "#be123c", "#0e7490", "#a16207", "#475569")
_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 132, 16, 44
# Direct labels closer than this would overlap.
_LABEL_GAP = 15.0

Point = tuple[float, float, float | None]  # x, y, standard error


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two values on a logarithmic axis, three or more where there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 10), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [1 + 0.1 * i for i in range(90)]):
        ticks = sorted({round(m * 10.0**e, 10) for e in decades for m in steps})
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: 1 + len(ticks) // 9]


def _spread(positions: Sequence[float]) -> list[float]:
    """Move labels apart, keeping their order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + _LABEL_GAP)
    return placed


def line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
) -> str:
    """A line per series over a logarithmic y axis, with error bars and direct labels.

    Args:
        series: label -> points (x, y, standard error of y or None), y > 0 and finite.
        title: the chart's text alternative.
        x_label: under the x axis.
        y_label: beside the y axis.
        reference: a labelled horizontal line.

    Returns:
        An <svg> element.
    """
    points = [p for line in series.values() for p in line]
    if not points:
        return "<p>No finite values to draw.</p>"
    ys = [p[1] for p in points] + ([reference[1]] if reference else [])
    xs = [p[0] for p in points]
    low, high = min(ys) / 1.1, max(ys) * 1.1
    left, right = min(xs), max(xs)
    span = (right - left) or 0.1

    def px(x: float) -> float:
        return _LEFT + (x - left) / span * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        share = (math.log(y) - math.log(low)) / (math.log(high) - math.log(low))
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    out = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" class="chart">'
    ]
    for tick in _log_ticks(low, high):
        y = py(tick)
        out.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for x in sorted({round(x, 2) for x in xs}):
        out.append(
            f'<text class="tick" x="{px(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.2g}</text>'
        )
    out.append(
        f'<text class="label" x="{px((left + right) / 2):.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    out.append(
        f'<text class="label" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    if reference:
        y = py(reference[1])
        out.append(
            f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{_LEFT + 6}" y="{y - 5:.1f}">{escape(reference[0])}</text>'
        )
    drawn = [(label, sorted(line)) for label, line in series.items() if line]
    labels = _spread([py(line[-1][1]) for _, line in drawn])
    for i, ((label, line), label_y) in enumerate(zip(drawn, labels, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, error in line:
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{colour}"/>')
            if error and error < y:
                out.append(
                    f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(y - error):.1f}" '
                    f'y2="{py(y + error):.1f}" stroke="{colour}" stroke-width="1"/>'
                )
        out.append(
            f'<text class="series" x="{_WIDTH - _RIGHT + 10}" y="{label_y + 4:.1f}" fill="{colour}">{escape(label)}</text>'
        )
    out.append("</svg>")
    return "".join(out)
