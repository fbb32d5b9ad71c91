"""Heat maps of one number per projection: block by kind, as SVG and for a terminal."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Viridis (Smith & van der Walt 2015, CC0) at ninths: even in lightness, safe for colour-blind readers.
_STOPS = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
    (110, 206, 88), (181, 222, 43), (253, 231, 37),
)  # fmt: skip
_SHADES = " ░▒▓█"
_LABEL, _TOP, _BAR = 72, 22, 46
# Blocks on one line of a terminal of 80 columns, beside the kind's name.
_TERMINAL_BLOCKS = 64


@dataclass(frozen=True)
class Grid:
    """One number per block and kind.

    Attributes:
        kinds: rows, in the model's order.
        blocks: columns, ascending.
        values: (kind, block) -> mean over the projections there (experts share a cell); missing where
            there is none.
    """

    kinds: list[str]
    blocks: list[int]
    values: Mapping[tuple[str, int], float]

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value; (nan, nan) of an empty grid."""
        found = list(self.values.values())
        return (min(found), max(found)) if found else (math.nan, math.nan)

    @property
    def colours(self) -> tuple[float, float]:
        """Range the colours span: without the outermost 2 % where that is less than half of the range.

        One alpha of 22 among two hundred from 1.4 to 6 would make all others look alike.
        """
        low, high = self.range
        found = sorted(self.values.values())
        cut = len(found) // 50
        if cut and found[-1 - cut] - found[cut] < 0.5 * (high - low):
            return found[cut], found[-1 - cut]
        return low, high


def grid(entries: Sequence[tuple[str, int, float | None]]) -> Grid:
    """Gather (kind, block, value) into a grid; None and NaN leave a cell empty."""
    groups: dict[tuple[str, int], list[float]] = defaultdict(list)
    for kind, block, value in entries:
        if value is not None and math.isfinite(value):
            groups[kind, block].append(value)
    kinds = list(dict.fromkeys(kind for kind, _, _ in entries))
    blocks = sorted({block for _, block, _ in entries})
    return Grid(kinds, blocks, {k: sum(v) / len(v) for k, v in groups.items()})


def colour(share: float) -> str:
    """Colour of a value in [0, 1]."""
    at = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(at), len(_STOPS) - 2)
    mixed = [
        round(a + (at - low) * (b - a)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True)
    ]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def svg(found: Grid, *, title: str, digits: int = 3) -> str:
    """The grid as an <svg> element with a colour bar; each cell tells its value when pointed at."""
    low, high = found.colours
    if math.isnan(low):
        return "<p>No values to draw.</p>"
    lowest, highest = found.range
    span = (high - low) or 1.0
    width = max(5.0, min(22.0, 660 / len(found.blocks)))
    height = 22.0
    right = _LABEL + width * len(found.blocks)
    bottom = _TOP + height * len(found.kinds)
    total = max(right + 8, _LABEL + 260)
    out = [
        f'<svg viewBox="0 0 {total:.0f} {bottom + _BAR + 8:.0f}" role="img" aria-label="{escape(title)}, '
        f'from {lowest:.{digits}f} to {highest:.{digits}f}" class="heat">'
    ]
    every = max(1, math.ceil(24 / width))
    for column, block in enumerate(found.blocks):
        if column % every == 0:
            x = _LABEL + width * (column + 0.5)
            out.append(
                f'<text class="tick" x="{x:.1f}" y="{_TOP - 7}" text-anchor="middle">{escape(str(block))}</text>'
            )
    for row, kind in enumerate(found.kinds):
        y = _TOP + height * row
        out.append(
            f'<text class="tick" x="{_LABEL - 8}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(kind)}</text>'
        )
        for column, block in enumerate(found.blocks):
            value = found.values.get((kind, block))
            if value is None:
                continue
            x = _LABEL + width * column
            cell = f"{escape(str(block))}/{escape(kind)}"
            told = f"block {escape(str(block))}, {escape(kind)}: {value:.{digits}f}"
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{colour((value - low) / span)}" data-cell="{cell}">'
                f"<title>{told}</title></rect>"
            )
    steps, bar = 40, 180.0
    for step in range(steps):
        out.append(
            f'<rect x="{_LABEL + bar * step / steps:.1f}" y="{bottom + 18:.1f}" width="{bar / steps + 0.3:.1f}" '
            f'height="10" fill="{colour(step / (steps - 1))}"/>'
        )
    ends = (
        (_LABEL, "start", f"{low:.{digits}f}" + (" and less" if low > lowest else "")),
        (_LABEL + bar, "end", f"{high:.{digits}f}" + (" and more" if high < highest else "")),
    )
    for x, anchor, text in ends:
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 42:.1f}" text-anchor="{anchor}">{text}</text>'
        )
    out.append("</svg>")
    return "".join(out)


def terminal(found: Grid, *, title: str) -> str:
    """The grid in shades of block characters, for a terminal of 80 columns.

    Blocks beyond 64 share characters.
    """
    low, high = found.colours
    if math.isnan(low):
        return f"{title}: no values"
    span = (high - low) or 1.0
    per = math.ceil(len(found.blocks) / _TERMINAL_BLOCKS)
    wide = 2 if len(found.blocks) * 2 <= _TERMINAL_BLOCKS else 1
    groups = [found.blocks[i : i + per] for i in range(0, len(found.blocks), per)]
    name = max(map(len, found.kinds))
    lines = [f"{title} by block (→ {found.blocks[0]} to {found.blocks[-1]})"]
    for kind in found.kinds:
        cells = ""
        for group in groups:
            values = [found.values[kind, b] for b in group if (kind, b) in found.values]
            if not values:
                cells += "·" * wide
                continue
            share = (sum(values) / len(values) - low) / span
            cells += _SHADES[max(0, min(int(share * len(_SHADES)), len(_SHADES) - 1))] * wide
        lines.append(f"{kind:>{name}} │{cells}│")
    lines.append(f"{'':>{name}}  {low:.3f} '{_SHADES}' {high:.3f}")
    return "\n".join(lines)
