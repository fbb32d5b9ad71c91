"""`acttail tune`: measure which kernel is faster where, on this machine."""

from acttail.cli.console import note, out, print_json
from acttail.cli.dtypes import EngineDtype
from acttail.cli.options import Group, Json, Model
from acttail.cli.progress import work

# Of the densities that are measured; --json has all.
_SHOWN = (0.9, 0.7, 0.5, 0.2)


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

    table = Table(
        title=f"kernels, {dtype}", box=None,
        caption="sparse over dense: time by the share of rows that is kept. Dense above: that share from which on the dense "
        "kernel is taken. Together from: sequences whose rows are read once though their lists differ.",
    )  # fmt: skip
    table.add_column("inputs x outputs", no_wrap=True)
    for d in _SHOWN:
        table.add_column(f"at {d:g}", justify="right", no_wrap=True)
    table.add_column("dense above", justify="right", no_wrap=True)
    table.add_column("together from", justify="right", no_wrap=True)
    for c in found:
        table.add_row(
            f"{c.shape.rows} x {c.shape.columns}", *(f"{c.ratios[d]:.2f}" for d in _SHOWN),
            f"{c.density:g}" if c.density < 1 else "never",
            str(c.together) if c.together < NEVER else "never",
        )  # fmt: skip
    out.print(table)
    note("kept in the cache; the engine uses it from now on")
