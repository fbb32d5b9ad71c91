"""`acttail bench`: decoding speed, dense against sparse, and against others, by turns."""

from typing import Annotated, Any

import typer

from acttail.cli.common import Json, Model, ResultFile, err, names, out, print_json, work
from acttail.cli.convert import EngineDtype
from acttail.errors import ActTailError

_AGAINST = ("hf", "llama.cpp")


def bench(
    model: Model,
    plan: Annotated[str | None, typer.Option(help="Plan file.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Or a sparsity, the same everywhere; 0.5 by default.")
    ] = None,
    dtype: EngineDtype = "bf16",
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
        str | None, typer.Option(help="llama.cpp's file; by default made from MODEL's own GGUF.")
    ] = None,
    output: ResultFile = None,
    plot: Annotated[str | None, typer.Option(help="Draw the result here (.svg or .png).")] = None,
    json: Json = False,
) -> None:
    """Measure tokens per second, the bytes a token reads, and what share of the memory's speed that is."""
    from acttail.evaluate.bench import run_bench

    others = names(against)
    unknown = sorted(set(others) - set(_AGAINST))
    if unknown:
        raise ActTailError(f"--against takes {' and '.join(_AGAINST)}, not {unknown[0]!r}")
    if plan is not None and sparsity is not None:
        raise ActTailError("give --plan or --sparsity, not both")
    try:
        prompts = [int(part) for part in names(prompt_tokens)]
    except ValueError as error:
        raise ActTailError(f"--prompt-tokens takes whole numbers, got {prompt_tokens!r}") from error
    with work("measuring") as progress:
        row = run_bench(
            model, plan=plan, sparsity=sparsity, dtype=dtype, threads=threads, prompt_tokens=prompts,
            new_tokens=new_tokens, rounds=rounds, against=others, gguf=gguf, progress=progress,
        )  # fmt: skip
    if output:
        from acttail.files import finite, write_json

        write_json(output, finite(row))
    if plot is not None:
        from acttail.report.speed import draw

        draw(row, plot)
        err.print(f"[dim]wrote {plot}[/dim]")
    if json:
        print_json(row)
    else:
        _print(row)


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
            name if name != "sparse" else f"sparse ({row['sparsity']:g})", f"{speed:,.1f}",
            f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "",
            f"{row['prefill_tokens_per_second'][name]:,.0f}",
            f"{traffic / 1e6:,.1f}" if traffic else "",
            f"{100 * row['bandwidth_share'][name]:.0f} %" if traffic else "",
        )  # fmt: skip
    out.print(table)
    out.print(
        f"[dim]{row['rounds']} rounds by turns, {row['prompt_tokens']} + {row['new_tokens']} tokens; decode and prefill in "
        "tokens/s, what a token reads, and that as a share of the memory's speed; "
        f"memory reads {row['bandwidth'] / 1e9:.1f} GB/s with {row['threads']} thread(s); engine {row['engine']}"
        + (
            f"; dense kernel for {len(row['dense_kernel'])} projections"
            if row["dense_kernel"]
            else ""
        )
        + "[/dim]"
    )
    for entry in row["contexts"][1:]:
        speeds = ", ".join(f"{n} {v:,.1f}" for n, v in entry["tokens_per_second"].items())
        out.print(f"after {entry['prompt_tokens']} tokens: {speeds} tokens/s")
