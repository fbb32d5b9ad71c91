"""`acttail sweep`: many cells of sparsity x allocator x rule, resumable."""

from typing import Annotated

import typer

from acttail.base.dtypes import FAST
from acttail.cli.console import print_json, say
from acttail.cli.dtypes import Dtype
from acttail.cli.judge import calibration_text as read_calibration_text
from acttail.cli.judge import (
    check_outputs,
    check_windows,
    given_curves,
    metrics_of,
    names,
    option,
    policy_of,
    sees_text,
    sparsities,
    text_of,
)
from acttail.cli.options import (
    Allocators,
    CalibrationText,
    CalibrationTokens,
    Curves,
    Json,
    Metrics,
    Model,
    Prefill,
    ReportPage,
    Sparsities,
    TextName,
    Tokens,
    Window,
)
from acttail.cli.progress import work


def sweep(
    model: Model,
    text: TextName,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Table to write: .csv or .parquet.")
    ],
    sparsity: Sparsities = "0.4,0.5,0.6",
    allocator: Allocators = "uniform,acttail",
    rule: Annotated[
        str,
        typer.Option(
            help="Comma-separated: default (the allocator's own), topk, wina, threshold, teal."
        ),
    ] = "default",
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 4096,
    curves: Curves = None,
    tokens: Tokens = None,
    window: Window = 1024,
    dtype: Dtype = FAST,
    prefill: Prefill = None,
    metrics: Metrics = "perplexity,kl,top1",
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    ray: Annotated[str | None, typer.Option(help="Run on Ray: auto, local, or an address.")] = None,
    report: ReportPage = None,
    json: Json = False,
) -> None:
    """Evaluate every combination; finished cells are kept, so a stopped sweep goes on."""
    from acttail.base.distribute import check_ray
    from acttail.evaluate.sweep import SweepSpec, cells, check_table
    from acttail.evaluate.sweep import sweep as run

    with option("--output"):
        check_table(output)
    check_outputs(None, report=report)
    targets = sparsities(sparsity)
    allocators, rules = names(allocator, "--allocator"), names(rule, "--rule")
    arguments = given_curves({name: {} for name in allocators}, curves)
    asked = [None if name == "default" else name for name in rules]
    judged = {(a, r): sees_text(a, arguments[a], r) for a in allocators for r in asked}
    first = next((pair for pair, calibrated in judged.items() if calibrated), None)
    policy = policy_of(prefill)
    wanted = tuple(metrics_of(metrics))
    check_windows(window, tokens)
    check_ray(ray)
    calibrated = first is not None
    named, under = first or ("", None)
    what = named + (f" with rule {under}" if under else "")
    read_calibration_text(calibration_text, needed=calibrated, what=what)
    text_of(text)
    spec = SweepSpec(
        model, text, calibration_text, calibration_tokens, tokens, window, str(policy or "all"),
        dtype, wanted,
    )  # fmt: skip
    with work("sweeping") as progress:
        rows = run(
            spec, cells(targets, allocators, rules, arguments), output, jobs=jobs,
            ray_address=ray, progress=progress,
        )  # fmt: skip
    if report:
        from acttail.base.files import finite, write_text
        from acttail.report import Report, render

        write_text(report, render(Report(rows[0]["model"], rows=finite(rows))))
    if json:
        print_json(rows)
        return
    say(f"{len(rows)} cells written to {output}")
