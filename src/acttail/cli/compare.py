"""`acttail compare`: dense and several allocators at several sparsities, on the same text."""

from typing import Annotated, Any

import typer

from acttail.cli.common import (
    CalibrationText,
    CalibrationTokens,
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Metrics,
    Model,
    Prefill,
    ResultFile,
    Set,
    Stride,
    TextName,
    Tokens,
    TrustRemoteCode,
    Window,
    calibration_for,
    load_model,
    names,
    number_list,
    out,
    print_json,
    read_calibration_text,
    settings,
    with_error,
    work,
)
from acttail.errors import ActTailError


def compare(
    model: Model,
    text: TextName,
    sparsity: Annotated[str, typer.Option(help="Comma-separated model sparsities.")] = "0.5,0.6",
    allocator: Annotated[str, typer.Option(help="Comma-separated allocators.")] = "uniform,acttail",
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 4096,
    set_: Set = None,
    tokens: Tokens = None,
    window: Window = 1024,
    stride: Stride = None,
    dtype: Dtype = "bfloat16",
    prefill: Prefill = None,
    metrics: Metrics = "perplexity",
    output: ResultFile = None,
    report: Annotated[
        str | None, typer.Option(help="Also write a self-contained HTML page.")
    ] = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Compare allocators at equal sparsity. --set takes ALLOCATOR.KEY=VALUE here."""
    from acttail.allocate import get
    from acttail.budget import check_target
    from acttail.evaluate.compare import compare as run
    from acttail.files import finite, write_json, write_text
    from acttail.prefill import PrefillPolicy
    from acttail.text import read_text

    targets = [check_target(s) for s in number_list(sparsity, "--sparsity")]
    chosen = names(allocator)
    arguments: dict[str, dict[str, str]] = {name: {} for name in chosen}
    for key, value in settings(set_).items():
        owner, dot, argument = key.partition(".")
        if not dot or owner not in arguments:
            raise ActTailError(
                f"--set takes ALLOCATOR.KEY=VALUE with one of {', '.join(chosen)}, got {key}"
            )
        arguments[owner][argument] = value
    for name in chosen:
        get(name).arguments(arguments[name])
    calibrated = any(get(name).needs_text for name in chosen)
    calibration_content = read_calibration_text(calibration_text, needed=calibrated)
    PrefillPolicy.parse(prefill or "all")
    content = read_text(text)
    lm, tokenizer = load_model(
        model,
        dtype,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        max_memory=max_memory,
    )
    calibration = None
    if calibrated:
        with work("calibrating") as progress:
            calibration = calibration_for(
                lm, tokenizer, calibration_content, calibration_tokens, progress
            )
    with work("comparing") as progress:
        rows = run(
            lm, tokenizer, content, sparsities=targets, allocators=arguments, window=window,
            tokens=tokens, stride=stride, prefill=prefill or "all", calibration=calibration,
            metrics=names(metrics), progress=progress,
        )  # fmt: skip
    if output:
        write_json(output, finite(rows))
    if report:
        from acttail.report import Report, render

        write_text(report, render(Report(rows[0]["model"], rows=finite(rows))))
    if json:
        print_json(rows)
        return
    _print(rows)
    if report:
        out.print(f"report written to {report}")


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first['model']} on {first['text']}",
        caption=f"{first['scored']:,} tokens scored, windows of {first['window']}, {first['dtype']}, "
        f"prefill {first['prefill']}; ± is one standard error",
    )
    headings = ["sparsity", "realised", "allocator", "perplexity", "÷ uniform"]
    with_kl = first["kl"] is not None
    for heading in [*headings, *(["KL", "top-1"] if with_kl else [])]:
        table.add_column(heading, justify="left" if heading == "allocator" else "right")
    previous = None
    for row in rows:
        if previous is not None and row["sparsity"] != previous:
            table.add_section()
        previous = row["sparsity"]
        ratio = row["ratio_to_uniform"]
        table.add_row(
            f"{row['sparsity']:g}",
            f"{row['realised_sparsity']:.4f}",
            row["allocator"] or "dense",
            with_error(row["perplexity"], row["perplexity_stderr"]),
            "" if ratio is None else f"{ratio:.3f}",
            *([f"{row['kl']:.3f}", f"{row['top1']:.3f}"] if with_kl else []),
        )
    out.print(table)
