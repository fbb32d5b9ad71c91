"""`acttail compare`: dense and several allocators at several sparsities, on the same text."""

from typing import Any

from acttail.base.dtypes import FAST
from acttail.cli.console import out, print_json, say, with_error
from acttail.cli.dtypes import Dtype
from acttail.cli.judge import calibration_text as read_calibration_text
from acttail.cli.judge import (
    check_outputs,
    check_spread,
    check_windows,
    given_curves,
    metrics_of,
    names,
    policy_of,
    sees_text,
    settings,
    sparsities,
    text_of,
)
from acttail.cli.loading import calibration_for, load_model
from acttail.cli.options import (
    Allocators,
    CalibrationText,
    CalibrationTokens,
    Curves,
    DeviceMap,
    Json,
    MaxMemory,
    Metrics,
    Model,
    Prefill,
    ReportPage,
    ResultFile,
    Set,
    Sparsities,
    Stride,
    TextName,
    Tokens,
    TrustRemoteCode,
    Window,
)
from acttail.cli.progress import work
from acttail.errors import ActTailError


def compare(
    model: Model,
    text: TextName,
    sparsity: Sparsities = "0.5,0.6",
    allocator: Allocators = "uniform,acttail",
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 4096,
    curves: Curves = None,
    set_: Set = None,
    tokens: Tokens = None,
    window: Window = 1024,
    stride: Stride = None,
    dtype: Dtype = FAST,
    prefill: Prefill = None,
    metrics: Metrics = "perplexity",
    output: ResultFile = None,
    report: ReportPage = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Compare allocators at equal sparsity. --set takes ALLOCATOR.KEY=VALUE here."""
    from acttail.base.files import finite, write_json, write_text
    from acttail.evaluate.compare import compare as run

    targets = sparsities(sparsity)
    arguments = given_curves(_arguments(names(allocator, "--allocator"), set_), curves)
    judged = [sees_text(name, given) for name, given in arguments.items()]
    calibrated = any(judged)
    policy = policy_of(prefill)
    wanted = metrics_of(metrics)
    check_windows(window, tokens, stride)
    check_outputs(output, report=report)
    check_spread(device_map, max_memory)
    calibration_content = read_calibration_text(calibration_text, needed=calibrated)
    content = text_of(text)
    lm, tokenizer = load_model(
        model, dtype, trust_remote_code=trust_remote_code, device_map=device_map,
        max_memory=max_memory,
    )  # fmt: skip
    calibration = None
    if calibrated:
        with work("calibrating") as progress:
            calibration = calibration_for(
                lm, tokenizer, calibration_content, calibration_tokens, progress
            )
    with work("comparing") as progress:
        rows = run(
            lm, tokenizer, content, sparsities=targets, allocators=arguments, window=window,
            tokens=tokens, stride=stride, prefill=str(policy or "all"), calibration=calibration,
            metrics=wanted, progress=progress,
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
        say(f"report written to {report}")


def _arguments(chosen: list[str], pairs: list[str] | None) -> dict[str, dict[str, Any]]:
    """Allocator -> its arguments, from ALLOCATOR.KEY=VALUE pairs."""
    found: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for key, value in settings(pairs).items():
        owner, dot, argument = key.partition(".")
        if not dot or owner not in found:
            raise ActTailError(
                f"--set takes ALLOCATOR.KEY=VALUE with one of {', '.join(chosen)}, got {key}"
            )
        found[owner][argument] = value
    return found


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
