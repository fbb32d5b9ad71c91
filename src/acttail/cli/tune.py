"""`acttail tune`: measure which kernel is faster where, on this machine."""

from typing import Annotated

import typer

from acttail.cli.common import Json, Model, err, out, print_json, work
from acttail.cli.convert import EngineDtype
from acttail.errors import ActTailError


def tune(
    model: Model,
    dtype: EngineDtype = "bf16",
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale in int8 and int4.")
    ] = None,
    json: Json = False,
) -> None:
    """Time the sparse against the dense kernel for every matrix shape of a model, and keep the table.

    The engine then takes the dense kernel for a projection whose density is above the crossover.
    """
    from acttail.engine.convert import Conversion
    from acttail.engine.layout import DTYPES
    from acttail.engine.source import open_for_engine
    from acttail.engine.tune import tune as run

    if dtype not in DTYPES:
        raise ActTailError(f"unknown engine dtype {dtype!r}: use {', '.join(DTYPES)}")
    opened = open_for_engine(model, own_blocks=dtype in ("int8", "int4"))
    layout = Conversion(opened.spec, opened.weights, dtype, group=group).layout
    with work("timing kernels") as progress:
        found = run([layout.shapes[name] for name in layout.segments], progress)
    if json:
        print_json([
            {"rows": c.shape.rows, "columns": c.shape.columns, "dtype": c.shape.dtype,
             "group": c.shape.group, "dense_above_density": c.density,
             "sparse_over_dense": {str(d): r for d, r in c.ratios.items()}}
            for c in found
        ])  # fmt: skip
        return
    from rich.table import Table

    table = Table(title=f"time of sparse over dense, {dtype}")
    table.add_column("inputs x outputs")
    densities = list(found[0].ratios)
    for d in densities:
        table.add_column(f"density {d:g}", justify="right")
    table.add_column("dense above", justify="right")
    for c in found:
        table.add_row(
            f"{c.shape.rows} x {c.shape.columns}", *(f"{c.ratios[d]:.2f}" for d in densities),
            f"{c.density:g}" if c.density < 1 else "never",
        )  # fmt: skip
    out.print(table)
    err.print("[dim]kept in the cache; the engine uses it from now on[/dim]")
