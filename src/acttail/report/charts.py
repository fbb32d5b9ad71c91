"""Inline SVG line charts: small, readable in print and in the dark, with a text alternative."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Distinct in lightness as well as hue, so that they survive a grey printer.
COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7c3aed", "#be123c", "#0e7490", "#a16207", "#475569")
_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 132, 16, 44
# Direct labels closer than this would overlap.
_LABEL_GAP = 15.0
# Farther out, no axis is computed: a perplexity of 1e308 is one of nothing.
_MOST = 1e300

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


@dataclass(frozen=True)
class Axes:
    """Where values lie in a chart.

    Attributes:
        x: (lowest, highest).
        y: (lowest, highest).
        log_x: whether x is logarithmic.
        log_y: whether y is logarithmic.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False
    log_y: bool = True

    def px(self, value: float) -> float:
        """Horizontal position."""
        return _LEFT + _share(value, self.x, log=self.log_x) * (_WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        """Vertical position."""
        return (
            _HEIGHT - _BOTTOM - _share(value, self.y, log=self.log_y) * (_HEIGHT - _TOP - _BOTTOM)
        )

    def frame(
        self, title: str, x_label: str, y_label: str, x_ticks: Sequence[float] = ()
    ) -> list[str]:
        """The chart's opening: grid, ticks and labels."""
        out = [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" class="chart">'
        ]
        for tick in _ticks(self.y, log=self.log_y):
            y = self.py(tick)
            out.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            out.append(
                f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        for tick in x_ticks or _ticks(self.x, log=self.log_x):
            out.append(
                f'<text class="tick" x="{self.px(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:.2g}</text>'
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        out.append(
            f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        )
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        out.append(
            f'<text class="label" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )
        return out


def _share(value: float, limits: tuple[float, float], *, log: bool) -> float:
    low, high = map(math.log, limits) if log else limits
    return ((math.log(value) if log else value) - low) / ((high - low) or 1.0)


def _drawable(value: float, *, log: bool) -> bool:
    """Whether an axis can hold a value and some room beside it in float64."""
    return abs(value) < _MOST and (value > 1 / _MOST or not log)


def _ticks(limits: tuple[float, float], *, log: bool) -> list[float]:
    if log:
        return _log_ticks(*limits)
    low, high = limits
    step = 10.0 ** math.floor(math.log10((high - low) or 1.0))
    step = next(m * step for m in (0.1, 0.2, 0.5, 1, 2, 5) if (high - low) / (m * step) <= 7)
    first = math.ceil(low / step - 1e-9)
    return [
        round((first + i) * step, 10) for i in range(math.floor(high / step + 1e-9) - first + 1)
    ]


def line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
    log: bool = True,
) -> str:
    """A line per series, with error bars and direct labels.

    Args:
        series: label -> points (x, y, standard error of y or None), finite, y > 0 if `log`.
        title: the chart's text alternative.
        x_label: under the x axis.
        y_label: beside the y axis.
        reference: a labelled horizontal line.
        log: whether the y axis is logarithmic.

    Returns:
        An <svg> element.
    """
    series = {
        label: [p for p in line if _drawable(p[1], log=log)] for label, line in series.items()
    }
    reference = reference if reference and _drawable(reference[1], log=log) else None
    points = [p for line in series.values() for p in line]
    if not points:
        return "<p>No finite values to draw.</p>"
    ys = [p[1] for p in points] + ([reference[1]] if reference else [])
    xs = [p[0] for p in points]
    room = 0.08 * ((max(ys) - min(ys)) or abs(max(ys)) or 1.0)
    ylim = (min(ys) / 1.1, max(ys) * 1.1) if log else (min(ys) - room, max(ys) + room)
    xlim = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.05, max(xs) + 0.05)
    axes = Axes(xlim, ylim, log_y=log)
    px, py = axes.px, axes.py
    few = sorted({round(v, 2) for v in xs})
    out = axes.frame(title, x_label, y_label, few if len(few) <= 9 else ())
    if reference:
        at = py(reference[1])
        out.append(
            f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{_LEFT + 6}" y="{at - 5:.1f}">{escape(reference[0])}</text>'
        )
    # By place alone: an error may be None, which has no order.
    drawn = [(label, sorted(line, key=lambda p: p[:2])) for label, line in series.items() if line]
    labels = _spread([py(line[-1][1]) for _, line in drawn])
    for i, ((label, line), label_y) in enumerate(zip(drawn, labels, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{px(at[0]):.1f},{py(at[1]):.1f}" for at in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, error in line:
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{colour}"/>')
            if error and error < _MOST and (error < y or not log):
                out.append(
                    f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(y - error):.1f}" '
                    f'y2="{py(y + error):.1f}" stroke="{colour}" stroke-width="1"/>'
                )
        out.append(
            f'<text class="series" x="{_WIDTH - _RIGHT + 10}" y="{label_y + 4:.1f}" fill="{colour}">{escape(label)}</text>'
        )
    out.append("</svg>")
    return "".join(out)


def bar_chart(bars: Sequence[tuple[str, float, str]], *, title: str, unit: str) -> str:
    """Horizontal bars with a note beside each.

    Args:
        bars: (name, value >= 0, note).
        title: the chart's text alternative.
        unit: of the values.
    """
    longest = max((value for _, value, _ in bars), default=0.0) or 1.0
    height, left, room = 30, 110, 300
    total = height * len(bars) + 30
    out = [
        f'<svg viewBox="0 0 {_WIDTH} {total}" role="img" aria-label="{escape(title)}" class="chart">'
    ]
    for i, (name, value, note) in enumerate(bars):
        y = height * i + 4
        width = (_WIDTH - left - room) * value / longest
        out.append(
            f'<text class="tick" x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="20" fill="{COLOURS[0]}"/>'
            f'<text class="tick" x="{left + width + 8:.1f}" y="{y + 15}">{value:,.1f} {escape(note)}</text>'
        )
    out.append(f'<text class="label" x="{left}" y="{total - 8}">{escape(unit)}</text></svg>')
    return "".join(out)
