"""`acttail sweep`: many cells of sparsity x allocator x rule, resumable."""

from typing import Annotated

import typer

from acttail.cli.common import (
    CalibrationText,
    CalibrationTokens,
    Dtype,
    Json,
    Metrics,
    Model,
    Prefill,
    TextName,
    Tokens,
    Window,
    names,
    number_list,
    out,
    print_json,
    work,
)


def sweep(
    model: Model,
    text: TextName,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Table to write: .csv or .parquet.")
    ],
    sparsity: Annotated[
        str, typer.Option(help="Comma-separated model sparsities.")
    ] = "0.4,0.5,0.6",
    allocator: Annotated[str, typer.Option(help="Comma-separated allocators.")] = "uniform,acttail",
    rule: Annotated[
        str,
        typer.Option(help="Comma-separated: default (the allocator's own), topk, wina, threshold."),
    ] = "default",
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 4096,
    tokens: Tokens = None,
    window: Window = 1024,
    dtype: Dtype = "bfloat16",
    prefill: Prefill = None,
    metrics: Metrics = "perplexity,kl,top1",
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    ray: Annotated[str | None, typer.Option(help="Run on Ray: auto, local, or an address.")] = None,
    report: Annotated[
        str | None, typer.Option(help="Also write a self-contained HTML page.")
    ] = None,
    json: Json = False,
) -> None:
    """Evaluate every combination; finished cells are kept, so a stopped sweep goes on."""
    from acttail.allocate import get
    from acttail.allocate.registry import RULES
    from acttail.budget import check_target
    from acttail.errors import ActTailError
    from acttail.evaluate.sweep import SweepSpec, cells
    from acttail.evaluate.sweep import sweep as run
    from acttail.prefill import PrefillPolicy
    from acttail.text import read_text

    targets = [check_target(s) for s in number_list(sparsity, "--sparsity")]
    for name in names(allocator):
        if get(name).needs_text and calibration_text is None:
            raise ActTailError(f"{name} is calibrated: give --calibration-text FILE (or 'self')")
    for name in names(rule):
        if name not in (*RULES, "default"):
            raise ActTailError(f"unknown rule {name!r}: use default, {', '.join(RULES)}")
    policy = str(PrefillPolicy.parse(prefill or "all"))
    read_text(text)
    spec = SweepSpec(
        model, text, calibration_text, calibration_tokens, tokens, window, policy, dtype,
        tuple(names(metrics)),
    )  # fmt: skip
    with work("sweeping") as progress:
        rows = run(
            spec, cells(targets, names(allocator), names(rule)), output, jobs=jobs, ray_address=ray,
            progress=progress,
        )  # fmt: skip
    if report:
        from acttail.files import finite, write_text
        from acttail.report import Report, render

        write_text(report, render(Report(rows[0]["model"], rows=finite(rows))))
    if json:
        print_json(rows)
        return
    out.print(f"{len(rows)} cells written to {output}")
