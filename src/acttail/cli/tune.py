"""`acttail tune`: measure which kernel is faster where, on this machine."""

from acttail.cli.console import note, out, print_json
from acttail.cli.dtypes import EngineDtype
from acttail.cli.options import Group, Json, Model
from acttail.cli.progress import work


def tune(
    model: Model,
    dtype: EngineDtype = "auto",
    group: Group = None,
    json: Json = False,
) -> None:
    """Time the kernels against each other for every matrix shape of a model, and keep the table.

    The engine then takes the dense kernel for a projection whose density is above the crossover, and reads rows
    once for several sequences from as many on as gained by it.
    """
    from acttail.engine.config import EngineConfig
    from acttail.engine.source import layout_for
    from acttail.engine.tune import tune as run
    from acttail.sparse.backends.abi import NEVER

    layout = layout_for(model, EngineConfig(dtype, group=group))
    with work("timing kernels") as progress:
        found = run([layout.shapes[name] for name in layout.segments], progress)
    if json:
        print_json([
            {"rows": c.shape.rows, "columns": c.shape.columns, "dtype": c.shape.dtype,
             "group": c.shape.group, "dense_above_density": c.density,
             "sparse_over_dense": {str(d): r for d, r in c.ratios.items()},
             "together_from": c.together if c.together < NEVER else None,
             "together_over_alone": {str(n): r for n, r in c.shared.items()}}
            for c in found
        ])  # fmt: skip
        return
    from rich.table import Table

    table = Table(title=f"time of sparse over dense by density, {dtype}")
    table.add_column("inputs x outputs")
    densities = list(found[0].ratios)
    for d in densities:
        table.add_column(f"{d:g}", justify="right")
    table.add_column("dense above", justify="right")
    table.add_column("together from", justify="right")
    for c in found:
        table.add_row(
            f"{c.shape.rows} x {c.shape.columns}", *(f"{c.ratios[d]:.2f}" for d in densities),
            f"{c.density:g}" if c.density < 1 else "never",
            str(c.together) if c.together < NEVER else "never",
        )  # fmt: skip
    out.print(table)
    note("kept in the cache; the engine uses it from now on")
