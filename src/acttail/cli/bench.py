"""`acttail bench`: decoding speed, dense against sparse, and against others, by turns."""

from typing import Annotated, Any

import typer

from acttail.cli.console import note, out, print_json, say
from acttail.cli.dtypes import AnyDtype
from acttail.cli.judge import check_outputs, names, option
from acttail.cli.lossless import Drafts, Lossless, drafters_of
from acttail.cli.options import CalibrationText, Curves, Json, Model, ResultFile
from acttail.cli.planning import (
    MaxKl,
    MaxLoss,
    ReadShare,
    Speedup,
    engine_of,
    opened_plan,
    plan_or_request,
    request_of,
)
from acttail.cli.progress import work
from acttail.errors import ActTailError

_AGAINST = ("hf", "llama.cpp")


def bench(
    model: Model,
    plan: Annotated[str | None, typer.Option(help="Plan file.")] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Or a sparsity; the same everywhere unless --allocator. MODEL's own plan by default, else 0.5."
        ),
    ] = None,
    read_share: ReadShare = None,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    max_kl: MaxKl = None,
    allocator: Annotated[
        str | None, typer.Option(help="The rule that makes the budget.", metavar="NAME")
    ] = None,
    curves: Curves = None,
    calibration_text: CalibrationText = None,
    dtype: AnyDtype = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that decode; all cores by default.", min=1)
    ] = None,
    prompt_tokens: Annotated[
        str,
        typer.Option(help="Tokens of the prompt; several, separated by commas, to see contexts."),
    ] = "128",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded per run.", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="Runs of each, by turns.", min=1)] = 7,
    against: Annotated[
        str, typer.Option(help="Comma-separated: hf (transformers, eager), llama.cpp.")
    ] = "",
    gguf: Annotated[
        str | None,
        typer.Option(
            "--peer-file",
            "--gguf",
            help="llama.cpp's file, taken as it is ('own': MODEL's own); by default its quantiser makes one "
            "of the engine's width from MODEL's GGUF.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda (ROCm too): there, through transformers; the native engine without."
        ),
    ] = None,
    lossless: Lossless = False,
    drafts: Drafts = None,
    output: ResultFile = None,
    plot: Annotated[str | None, typer.Option(help="Draw the result here (.svg or .png).")] = None,
    json: Json = False,
) -> None:
    """Measure tokens per second, the bytes a token reads, and what share of the memory's speed that is."""
    from acttail.evaluate.bench import check_llama_cpp, check_peer_file, own_plan, run_bench
    from acttail.model.opened import open_model

    others = names(against, "--against") if against else []
    unknown = sorted(set(others) - set(_AGAINST))
    if unknown:
        raise ActTailError(f"--against takes {' and '.join(_AGAINST)}, not {unknown[0]!r}")
    prompts = _whole_numbers(prompt_tokens)
    # What follows a random prompt repeats itself, which n-grams would be praised for.
    drafters = drafters_of(lossless, drafts, default="plan")
    if device is not None and lossless:
        raise ActTailError("--lossless is the native engine's: leave out --device")
    if device is not None and (others or gguf or threads or plot or len(prompts) != 1):
        raise ActTailError(
            "--device takes one --prompt-tokens and none of --against, --peer-file, --threads, --plot"
        )
    asked = plan_or_request(
        plan, sparsity=sparsity, read_share=read_share, speedup=speedup, max_loss=max_loss, max_kl=max_kl, curves=curves, text=calibration_text,
        engine=engine_of(dtype, threads),
        allocator=allocator
        or ("uniform" if (sparsity, read_share, speedup) != (None, None, None) and curves is None else None),
    )  # fmt: skip
    with option("--peer-file"):
        check_peer_file(gguf)
    check_outputs(output, plot=plot)
    if plot is not None:
        from acttail.report.speed import check_plot

        with option("--plot"):
            check_plot(plot)
    opened = open_model(model)
    if "llama.cpp" in others:
        check_llama_cpp(opened, gguf)  # before a plan is made
    loaded = opened_plan(
        opened, asked or own_plan(opened) or request_of(sparsity=0.5, allocator="uniform")
    )
    with work("measuring") as progress:
        if device is not None:
            from acttail.evaluate.gpu import run_gpu_bench

            row = run_gpu_bench(
                opened, device=device, plan=loaded, dtype=dtype or "bf16",
                prompt_tokens=prompts[0], new_tokens=new_tokens, rounds=rounds, progress=progress,
            )  # fmt: skip
        else:
            row = run_bench(
                opened, plan=loaded, dtype=dtype, threads=threads, prompt_tokens=prompts,
                new_tokens=new_tokens, rounds=rounds, against=others, gguf=gguf, lossless=drafters, progress=progress,
            )  # fmt: skip
    if output:
        from acttail.base.files import finite, write_json

        write_json(output, finite(row))
    if plot is not None:
        from acttail.report.speed import draw

        draw(row, plot)
        note(f"wrote {plot}")
    if json:
        print_json(row)
    elif device is not None:
        _print_gpu(row)
    else:
        _print(row)


def _whole_numbers(text: str) -> list[int]:
    found = names(text, "--prompt-tokens")
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise ActTailError(f"--prompt-tokens takes whole numbers from 1 on, got {text!r}")
    return [int(part) for part in found]


def _print_gpu(row: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{row['model']}, {row['dtype']}, {row['device']}")
    for column in ("", "tokens/s", "fastest sparse is", "MB read", "of memory"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, speed in row["tokens_per_second"].items():
        ratio = row["ratios"].get(name)
        table.add_row(
            name, f"{speed:,.1f}",
            f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "",
            f"{row['bytes_per_token'][name] / 1e6:,.1f}", f"{100 * row['bandwidth_share'][name]:.0f} %",
        )  # fmt: skip
    out.print(table)
    say(
        f"sparsity {row['sparsity']:g}; {row['rounds']} rounds by turns, {row['prompt_tokens']} + "
        f"{row['new_tokens']} tokens; memory reads {row['bandwidth'] / 1e9:,.1f} GB/s",
        style="dim",
    )


def _print(row: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"{row['model']}, {row['dtype']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
    table = Table(title=title)
    # Six columns that fit a terminal of 80.
    for column in ("", "decode", "sparse is", "prefill", "MB read", "of memory"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, speed in row["tokens_per_second"].items():
        ratio = row["ratios"].get(name)
        traffic = row["bytes_per_token"].get(name)
        table.add_row(
            name if name != "sparse" else f"sparse ({row['sparsity']:.4g})", f"{speed:,.1f}",
            f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "",
            f"{row['prefill_tokens_per_second'][name]:,.0f}",
            f"{traffic / 1e6:,.1f}" if traffic else "",
            f"{100 * row['bandwidth_share'][name]:.0f} %" if traffic else "",
        )  # fmt: skip
    out.print(table)
    say(
        f"{row['rounds']} rounds by turns, {row['prompt_tokens']} + {row['new_tokens']} tokens; decode and prefill in "
        "tokens/s, what a token reads, and that as a share of the memory's speed; "
        f"realised sparsity {row['realised_sparsity']:.4f}; "
        f"memory reads {row['bandwidth'] / 1e9:.1f} GB/s with {row['threads']} thread(s); engine {row['engine']}"
        + (
            f"; dense kernel for {len(row['dense_kernel'])} projections"
            if row["dense_kernel"]
            else ""
        ),
        style="dim",
    )
    dense = row["ratios"].get("dense")
    if row["forecast"] is not None and dense is not None:
        off = row["forecast"] / dense["median"] - 1
        say(
            f"forecast of the plan: {row['forecast']:.2f}x dense; measured {dense['median']:.2f}x, so the forecast is "
            f"{abs(off):.1%} {'above' if off > 0 else 'below'}"
        )
    if "drafts" in row:
        ratio = row["lossless_ratio"]
        say(
            f"lossless: {ratio['median']:.2f}x dense ({ratio['low']:.2f}-{ratio['high']:.2f}); {row['drafts']['said']}"
        )
    for entry in row["contexts"][1:]:
        speeds = ", ".join(f"{n} {v:,.1f}" for n, v in entry["tokens_per_second"].items())
        say(f"after {entry['prompt_tokens']} tokens: {speeds} tokens/s")
