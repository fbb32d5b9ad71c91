"""`acttail cache`: the converted models that are kept."""

from datetime import datetime
from typing import Annotated

import typer

from acttail.cli.console import note, print_json
from acttail.cli.options import Json
from acttail.errors import ActTailError


def cache(
    action: Annotated[
        str | None, typer.Argument(help="clear; without it, list.", metavar="[clear]")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models or ids to throw away; all without any.", metavar="[NAME...]"),
    ] = None,
    json: Json = False,
) -> None:
    """List or throw away the converted models that are kept, last used first, and the plans made for them.

    They make the second start of a model fast. ACTTAIL_CACHE_LIMIT (20GB) bounds them: what was used
    longest ago goes first.
    """
    from acttail.engine import kept, kept_plans

    if action not in (None, "clear"):
        raise ActTailError(
            f"unknown action {action!r}: acttail cache lists, acttail cache clear throws away"
        )
    if action == "clear":
        found = kept.clear(names or ())
        plans = kept_plans.clear({e.model for e in found} if names else None)
    else:
        found, plans = kept.entries(), kept_plans.count()
    beside = f" and {plans} plan{'s' * (plans != 1)}" if plans else ""
    total = sum(e.bytes for e in found)
    if json:
        print_json([
            {
                "model": e.model, "id": e.folder.name, "dtype": e.dtype, "bytes": e.bytes,
                "used": datetime.fromtimestamp(e.used).isoformat(timespec="seconds"),
            }
            for e in found
        ])  # fmt: skip
        return
    if action == "clear":
        note(f"{len(found)} models, {total / 1e6:,.0f} MB{beside} thrown away")
        return
    for e in found:
        when = datetime.fromtimestamp(e.used).strftime("%Y-%m-%d %H:%M")
        typer.echo(
            f"{e.folder.name[:8]}  {e.dtype:<6} {e.bytes / 1e6:>9,.0f} MB  {when}  {e.model}"
        )
    where = found[0].folder.parent if found else None
    note(f"{len(found)} models, {total / 1e6:,.0f} MB{beside}" + (f" in {where}" if where else ""))
