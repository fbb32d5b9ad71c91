"""`acttail analyze`: the heavy-tail exponent of every projection."""

from collections import defaultdict
from typing import Annotated, Any

import typer

from acttail.cli.console import note, out, print_json, say
from acttail.cli.judge import check_estimators, check_outputs
from acttail.cli.options import Json, Model
from acttail.cli.progress import work

# Multiply-adds of all Gram matrices: a minute or so on two cores.
_WORTH_SAYING = 1e12


def analyze(
    model: Model,
    estimator: Annotated[str, typer.Option(help="hill, ks, peak or farms.")] = "hill",
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the JSON here.")
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="The output head's spectrum, too.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes that share the work.", min=1)] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Run on Ray instead: auto, local, or an address.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it would cost on this machine.")
    ] = False,
    json: Json = False,
    cache: Annotated[bool, typer.Option(help="Keep spectra in the cache folder.")] = True,
) -> None:
    """Fit the heavy tail of every projection's weight spectrum; needs no text.

    The weights are read one matrix at a time, so a model larger than memory can be analysed. A stopped
    analysis goes on where it was.
    """
    from acttail.base.distribute import check_ray
    from acttail.base.files import write_json
    from acttail.model.opened import open_model
    from acttail.model.weights import with_head
    from acttail.spectrum.analysis import analyze as run

    check_estimators(estimator)
    check_ray(ray)
    check_outputs(output)
    opened = open_model(model)
    weights = with_head(opened.weights) if head else opened.weights
    cost = _cost(weights.projections, workers=jobs, always=estimate, json=json)
    if estimate:
        if json:
            print_json(cost)
        return
    with work("spectra") as progress:
        fits = run(
            opened, estimator=estimator, head=head, cache=cache, jobs=jobs, ray_address=ray,
            progress=progress,
        )  # fmt: skip
    records = [fit.to_dict() for fit in fits]
    if output:
        write_json(output, records)
    if json:
        print_json(records)
        return
    _print_table(weights.name, estimator, records)
    if output:
        say(f"written to {output}")


def _cost(projections: Any, *, workers: int, always: bool, json: bool) -> dict[str, Any]:
    """Say what an analysis will cost, if it is more than a moment."""
    from dataclasses import asdict

    from acttail.base.progress import spoken_seconds
    from acttail.spectrum.estimate import estimate as cost_of

    # A billion multiply-adds take well under a second: no need to measure this machine for them.
    rough = sum(min(p.d_in, p.d_out) ** 2 * max(p.d_in, p.d_out) for p in projections)
    if rough < _WORTH_SAYING and not always:
        return {}
    found = cost_of(projections)
    line = (
        f"{found.matrices} matrices: about {spoken_seconds(found.seconds)} on this machine, "
        f"{workers * found.bytes_per_worker / 2**30:.1f} GiB at most for {workers} at a time (less what is cached)"
    )
    if always and not json:
        say(line)
    else:
        note(line)
    return asdict(found)


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
        say(f"flags: {', '.join(flags)} (per projection with --json)")
