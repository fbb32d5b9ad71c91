"""`acttail convert`: write the native engine's weights to a folder."""

from pathlib import Path
from typing import Annotated

import typer

from acttail.cli.console import note, print_json
from acttail.cli.dtypes import EngineDtype, HeadDtype
from acttail.cli.judge import check_output_folder, plan_of
from acttail.cli.options import Group, Json, Model
from acttail.cli.progress import work


def convert(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="The folder to write.")],
    plan: Annotated[
        str | None, typer.Option(help="Plan file, kept inside; dense without one.")
    ] = None,
    dtype: EngineDtype = "auto",
    head_dtype: HeadDtype = None,
    group: Group = None,
    json: Json = False,
) -> None:
    """Convert a model for the native engine: packed, memory-bounded, loaded in a blink."""
    from acttail.engine.source import convert_model

    check_output_folder(output)
    loaded = plan_of(plan)
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
    note(f"{folder}: {size / 1e6:,.0f} MB, dtype {dtype}; run it with: acttail generate {folder}")
