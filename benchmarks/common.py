"""What every benchmark shares: its options, on what a row was measured, one CSV per claim, the tables of the docs.

A row says the model, the text that was scored or fed, the text that rules were calibrated on, the processor, the
threads and the versions; "none" where nothing of the kind is read. Texts are those that every Python ships, or
WikiText-2 where a folder `shared` beside the project (or $ACTTAIL_SHARED) holds it.
"""

import argparse
import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("ACTTAIL_SHARED", HERE.parent.parent / "shared"))
_WIKITEXT = SHARED / "data" / "wikitext-2"
MODEL = "smollm2-135m"
# A row names what was really read: the package's model is a file of 4-bit blocks.
_LABELS = {MODEL: f"{MODEL} GGUF Q4_1"}


def public_or(path: Path, public: str) -> str:
    """The file if it is there, else the name of a text that every Python ships."""
    return str(path) if path.exists() else public


PYTHON = "python-docs:score"
SCORED = public_or(_WIKITEXT / "wiki.test.raw", PYTHON)
# WikiText-2 test where it is there; a second text shows whether a rule is over-fitted to the first.
TEXTS = {"python-docs": PYTHON} if SCORED == PYTHON else {"wikitext": SCORED, "python-docs": PYTHON}
CALIBRATION = public_or(_WIKITEXT / "wiki.valid.txt", "python-docs:calibration")
# The rows of results.md were measured while this fit was the default; it is named, so that they can be measured again.
FIRST_FIT = {"estimator": "ks", "epsilon": 0.15}
FITTED = dict.fromkeys(("acttail", "permuted", "reversed"), FIRST_FIT)


@dataclass(frozen=True)
class On:
    """What a row is measured on.

    Attributes:
        model: name, and the format where a file's own blocks are read.
        text: what is scored or fed, with a hash of a text's content.
        calibration: what rules are calibrated on.
    """

    model: str = "none"
    text: str = "none"
    calibration: str = "none"


def label(model: str) -> str:
    """How a model is called in a row."""
    return _LABELS.get(model, Path(model).name if Path(model).exists() else model)


class Rows:
    """The CSV of one claim.

    Args:
        name: of the claim and its file.
        folder: that holds it.
    """

    def __init__(self, name: str, folder: Path = HERE) -> None:
        self.name = name
        self.path = folder / f"{name}.csv"

    def append(self, row: Mapping[str, Any], on: On) -> None:
        """Append a row; the header is written with the first.

        Raises:
            SystemExit: the file has other columns, as one of an older script would.
        """
        full = {**asdict(on), **_machine(), **row}
        full = {k: full[k] for k in (*row, *(k for k in full if k not in row))}
        new = not self.path.exists()
        header = list(full)
        if not new:
            with self.path.open(newline="") as file:
                header = next(csv.reader(file), [])
            if set(header) != set(full):
                raise SystemExit(
                    f"{self.path} has other columns ({_difference(header, full)}): "
                    "move it away, or give the rows in it these columns"
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=header)
            if new:
                writer.writeheader()
            writer.writerow(full)
        print(self.name, {k: v for k, v in row.items() if len(str(v)) < 40}, flush=True)

    def all(self) -> list[dict[str, str]]:
        """All rows, oldest first; empty if there is none yet."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def done(self, on: On, *keys: str) -> set[tuple[str, ...]]:
        """These columns of the rows that were measured on the same; what a stopped run need not repeat."""
        same = asdict(on).items() | {("cpu", _machine()["cpu"])}
        return {tuple(r[k] for k in keys) for r in self.all() if same <= r.items()}

    def latest(self, *keys: str, **where: str) -> dict[tuple[str, ...], dict[str, str]]:
        """The newest row of each value of these columns.

        Rows of another model, text or processor than the newest one's are left out: no table mixes them.

        Args:
            keys: columns that tell rows apart; among them those of `On` that may differ within a table.
            where: columns that must have this value.
        """
        found = [r for r in self.all() if where.items() <= r.items()]
        same = [k for k in ("model", "text", "calibration", "cpu") if k not in keys]
        return {
            tuple(r[k] for k in keys): r for r in found if all(r[k] == found[-1][k] for k in same)
        }


def _difference(header: Sequence[str], row: Mapping[str, Any]) -> str:
    parts = (
        ("lacks", [k for k in row if k not in header]),
        ("has besides", [k for k in header if k not in row]),
    )
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names)


def _machine() -> dict[str, Any]:
    import transformers

    import acttail
    from acttail.base.machine import processor_name

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "acttail": acttail.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def fill(out: Path, page: str, name: str, text: str) -> None:
    """Replace what is between the comments ``name: begin`` and ``name: end`` of a page of the project.

    Args:
        out: where the rows are; the page is left alone, and the table printed, unless they are the project's own.
        page: from the root of the project.
        name: of the place.
        text: to put there.
    """
    if out != HERE:
        print(text)
        return
    path = HERE.parent / page
    before, begin, rest = path.read_text().partition(f"<!-- {name}: begin -->")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not begin or not end:
        raise SystemExit(f"{page} has no place for {name}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def options(
    doc: str | None, *which: str, rounds: int | None = None, tokens: int | None = None
) -> argparse.ArgumentParser:
    """The options that benchmarks have in common.

    Args:
        doc: the script's docstring.
        which: of "model", "text", "calibration", "table"; every script has `--out`.
        rounds: default of `--rounds`, None for a script without.
        tokens: default of `--tokens`, None for a script without.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if "model" in which:
        parser.add_argument("--model", default=MODEL, help=f"name or folder (default {MODEL})")
    if "text" in which:
        parser.add_argument("--text", default=SCORED, help="what is scored")
    if "calibration" in which:
        parser.add_argument("--calibration", default=CALIBRATION, help="what rules are set on")
        parser.add_argument("--calibration-tokens", type=int, default=16384)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="by turns, after a warm-up")
    if tokens is not None:
        parser.add_argument("--tokens", type=int, default=tokens, help="that are scored")
    if "table" in which:
        parser.add_argument("--table-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--out", type=lambda p: Path(p).resolve(), default=HERE.resolve(), metavar="FOLDER",
        help="of the CSV; another than the project's leaves the pages of the docs alone",
    )  # fmt: skip
    return parser
