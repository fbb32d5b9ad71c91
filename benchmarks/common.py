"""What every benchmark shares: the machine's description and an append-only CSV per claim."""

import csv
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("ACTTAIL_SHARED", HERE.parent.parent / "shared"))
WIKITEXT_TEST = SHARED / "data" / "wikitext-2" / "wiki.test.raw"
WIKITEXT_VALIDATION = SHARED / "data" / "wikitext-2" / "wiki.valid.txt"


def protocol() -> dict[str, Any]:
    """On what a row was measured."""
    import transformers

    import acttail
    from acttail.machine import processor_name

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "acttail": acttail.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def append(name: str, row: dict[str, Any]) -> None:
    """Append a row to benchmarks/<name>.csv; the header is written once."""
    path = HERE / f"{name}.csv"
    row = {**row, **protocol()}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def rows(name: str) -> list[dict[str, str]]:
    """All rows of a CSV, oldest first; empty if there is none yet."""
    path = HERE / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fill(page: str, name: str, text: str) -> None:
    """Replace what is between the comments ``name: begin`` and ``name: end`` of a page of the project."""
    path = HERE.parent / page
    before, begin, rest = path.read_text().partition(f"<!-- {name}: begin -->")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not begin or not end:
        raise SystemExit(f"{page} has no place for {name}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
