"""`acttail convert`: write the native engine's weights to a folder."""

from pathlib import Path
from typing import Annotated

import typer

from acttail.cli.common import Json, Model, err, print_json, work
from acttail.errors import ActTailError

EngineDtype = Annotated[
    str, typer.Option("--dtype", help="Weights of the engine: fp32, bf16, int8 or int4.")
]


def convert(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="The folder to write.")],
    plan: Annotated[
        str | None, typer.Option(help="Plan file, kept inside; dense without one.")
    ] = None,
    dtype: EngineDtype = "bf16",
    head_dtype: Annotated[
        str | None,
        typer.Option(help="Embedding and output head; by default int8, and fp32 for fp32."),
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale in int8 and int4; 0 for one each.")
    ] = None,
    json: Json = False,
) -> None:
    """Convert a model for the native engine: packed, memory-bounded, loaded in a blink."""
    from acttail.engine.layout import DTYPES
    from acttail.engine.source import convert_model
    from acttail.plan import SparsityPlan

    for wanted in filter(None, (dtype, head_dtype)):
        if wanted not in DTYPES:
            raise ActTailError(f"unknown engine dtype {wanted!r}: use {', '.join(DTYPES)}")
    loaded = SparsityPlan.load(plan) if plan else None
    with work("converting") as progress:
        folder = convert_model(
            model,
            output,
            dtype=dtype,
            plan=loaded,
            head_dtype=head_dtype,
            group=group,
            progress=progress,
        )
    size = sum(f.stat().st_size for f in Path(folder).iterdir())
    if json:
        print_json({
            "folder": str(folder), "dtype": dtype, "bytes": size,
            "sparsity": loaded.sparsity if loaded else 0.0,
        })  # fmt: skip
        return
    err.print(f"{folder}: {size / 1e6:,.0f} MB of {dtype}; run it with: acttail generate {folder}")
