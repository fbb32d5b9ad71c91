"""`acttail plan diff A B`: two plans side by side."""

from statistics import fmean
from typing import TYPE_CHECKING

from acttail.cli.console import out, print_json, say

if TYPE_CHECKING:
    from acttail.plan import SparsityPlan
    from acttail.report.difference import ProjectionDifference

_SHOWN = 20


def diff(first: str, second: str, *, json: bool) -> None:
    """Print how two plan files differ.

    Raises:
        PlanError: a file is no plan, or the plans are for different models.
    """
    from acttail.plan import SparsityPlan
    from acttail.report.difference import difference

    a, b = SparsityPlan.load(first), SparsityPlan.load(second)
    found = difference(a, b)
    if json:
        print_json([d.to_dict() for d in found])
        return
    say(f"A = {first}\nB = {second}")
    _print(a, b, found)


def _print(a: "SparsityPlan", b: "SparsityPlan", found: "list[ProjectionDifference]") -> None:
    from rich.table import Table

    from acttail.report.difference import sparsities_by_kind

    table = Table()
    for heading in ("", "A", "B", "B − A"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(label: str, x: float, y: float, digits: int = 3) -> None:
        table.add_row(label, f"{x:.{digits}f}", f"{y:.{digits}f}", f"{y - x:+.{digits}f}")

    table.add_row("allocator", a.allocator, b.allocator, "")
    budgets = ["projections" if plan.head is None else "projections and head" for plan in (a, b)]
    if budgets[0] != budgets[1]:
        table.add_row("budget", *budgets, "")
    row("requested", a.sparsity, b.sparsity)
    row("realised", a.realised_sparsity, b.realised_sparsity, 4)
    of_a, of_b = sparsities_by_kind(a), sparsities_by_kind(b)
    for kind in {**of_a, **of_b}:  # an output head that one of them leaves out is dense there
        row(f"mean {kind}", fmean(of_a.get(kind, [0.0])), fmean(of_b.get(kind, [0.0])))
    table.add_section()
    for d in sorted(found, key=lambda d: -abs(d.difference))[:_SHOWN]:
        row(d.projection, d.a, d.b)
    out.print(table)
    if len(found) > _SHOWN:
        say(f"the {_SHOWN} largest differences of {len(found)} are shown; --json prints all")
