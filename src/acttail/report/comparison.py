"""The page that `acttail compare --report` writes."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from acttail.report.charts import Point, line_chart


def comparison_page(rows: Sequence[dict[str, Any]]) -> str:
    """One self-contained HTML page: chart, table and the protocol in full.

    Args:
        rows: records of :func:`acttail.evaluate.compare.compare`, dense first.

    Returns:
        HTML, a few tens of kilobytes; loads nothing from anywhere.
    """
    dense = rows[0]
    series: dict[str, list[Point]] = defaultdict(list)
    for row in rows[1:]:
        value = row["perplexity"]
        if value is not None and math.isfinite(value):
            series[row["allocator"]].append(
                (row["realised_sparsity"], value, row["perplexity_stderr"])
            )
    reference = ("dense", dense["perplexity"]) if dense["perplexity"] else None
    chart = line_chart(
        series,
        title="Perplexity against realised sparsity, one line per allocator",
        x_label="realised sparsity",
        y_label="perplexity (log scale)",
        reference=reference,
    )
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("comparison.html.j2").render(
        rows=rows, dense=dense, chart=chart
    )
