"""A bar chart of one benchmark of decoding."""

import os
from importlib.util import find_spec
from typing import Any

from acttail.base.files import check_ending, replacing
from acttail.errors import ActTailError


def check_plot(path: str | os.PathLike[str]) -> str:
    """The ending of a plot that is to be drawn.

    Raises:
        ActTailError: another than .svg or .png, or no matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ActTailError("plots need the extra: pip install 'acttail[plot]'")
    return check_ending(path, (".svg", ".png"), "a plot")


def draw(row: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw tokens per second of every contestant, with the ratio to the sparse engine beside each bar.

    Args:
        row: of :func:`acttail.evaluate.bench.run_bench`.
        path: ends in .svg or .png.

    Raises:
        ActTailError: another ending, no matplotlib, or the file cannot be written.
    """
    suffix = check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    speeds: dict[str, float] = row["tokens_per_second"]
    names = list(speeds)
    figure, axis = plt.subplots(figsize=(7, 0.6 * len(names) + 1.4), layout="constrained")
    bars = axis.barh(names, list(speeds.values()), color="#4477aa")
    labels = []
    for name in names:
        ratio = row["ratios"].get(name)
        text = f"{speeds[name]:.1f}"
        if ratio:
            text += f"   sparse is {ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"
        labels.append(text)
    axis.bar_label(bars, labels, padding=4, fontsize=9)
    axis.set_xlim(0, max(speeds.values()) * 1.6)
    axis.invert_yaxis()
    axis.set_xlabel("decoded tokens per second, median")
    axis.set_title(
        f"{row['model']}, {row['dtype']}, {row['threads']} thread(s), sparsity {row['sparsity']:g}",
        fontsize=10,
    )
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=suffix[1:])
    plt.close(figure)
