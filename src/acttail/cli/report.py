"""`acttail report`: one HTML page about a model's sparsity."""

from typing import Annotated

import typer

from acttail.cli.console import say
from acttail.cli.judge import check_estimators, check_outputs, curves_of, option, plan_of
from acttail.cli.options import Model
from acttail.cli.progress import work


def report(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="HTML file to write.")],
    plan: Annotated[
        list[str] | None, typer.Option(help="Plan file to show; may be repeated.")
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(help="JSON of compare, eval or bench, or a sweep's table; may be repeated."),
    ] = None,
    curves: Annotated[str | None, typer.Option(help="File of sensitivity curves.")] = None,
    estimator: Annotated[str, typer.Option(help="hill, ks, peak or farms.")] = "ks",
    spectra: Annotated[bool, typer.Option(help="Analyse the weights' spectra.")] = True,
) -> None:
    """Write one self-contained HTML page: plans, alpha, spectra, results, speed, protocol."""
    from acttail.base.files import write_text
    from acttail.report import Report, render
    from acttail.report.gather import add_results, report_of

    check_outputs(output)
    check_estimators(estimator)
    for path in plan or ():
        plan_of(path)
    with option("--results"):
        for path in results or ():
            add_results(Report(""), path)
    curves_of(curves)
    with work("spectra") as progress:
        found = report_of(
            model, plans=plan or (), results=results or (), curves=curves, estimator=estimator,
            with_spectra=spectra, progress=progress,
        )  # fmt: skip
    page = render(found)
    write_text(output, page)
    say(f"report written to {output} ({len(page.encode()) / 1024:,.0f} KiB)")
