"""`acttail analyze`: the heavy-tail exponent of every projection."""

from collections import defaultdict
from typing import Annotated, Any

import typer

from acttail.cli.common import Json, Model, out, print_json, work


def analyze(
    model: Model,
    estimator: Annotated[str, typer.Option(help="hill, ks, peak or farms.")] = "hill",
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the JSON here.")
    ] = None,
    json: Json = False,
    cache: Annotated[bool, typer.Option(help="Keep spectra in the cache folder.")] = True,
) -> None:
    """Fit the heavy tail of every projection's weight spectrum; needs no text.

    The weights are read one matrix at a time, so a model larger than memory can be analysed.
    """
    from acttail.analysis import analyze as run
    from acttail.analysis import as_weights
    from acttail.files import write_json

    weights = as_weights(model)
    with work("spectra") as progress:
        fits = run(weights, estimator=estimator, cache=cache, progress=progress)
    records = [fit.to_dict() for fit in fits]
    if output:
        write_json(output, records)
    if json:
        print_json(records)
        return
    _print_table(weights.name, estimator, records)
    if output:
        out.print(f"written to {output}")


def _print_table(name: str, estimator: str, records: list[dict[str, Any]]) -> None:
    from rich.table import Table

    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_kind[record["kind"]].append(record)
    table = Table(title=f"alpha of {len(records)} projections, {name}, {estimator}")
    table.add_column("kind")
    for heading in ("count", "shape", "mean", "lowest", "highest", "KS", "flagged"):
        table.add_column(heading, justify="right")
    for kind, group in by_kind.items():
        alphas = [r["alpha"] for r in group if r["alpha"] is not None]
        distances = [r["ks_distance"] for r in group if r["ks_distance"] is not None]
        first = group[0]
        table.add_row(
            kind,
            str(len(group)),
            f"{first['d_out']}×{first['d_in']}",
            f"{sum(alphas) / len(alphas):.2f}" if alphas else "–",
            f"{min(alphas):.2f}" if alphas else "–",
            f"{max(alphas):.2f}" if alphas else "–",
            f"{sum(distances) / len(distances):.3f}" if distances else "–",
            str(sum(r["flag"] is not None for r in group)),
        )
    out.print(table)
    from acttail.report.heatmap import grid, terminal

    cells = [(r["kind"], r["block"], r["alpha"]) for r in records]
    out.print(terminal(grid(cells), title="alpha"))
    flags = sorted({r["flag"].split(":")[0] for r in records if r["flag"]})
    if flags:
        out.print(f"flags: {', '.join(flags)} (per projection with --json)")
