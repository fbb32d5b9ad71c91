"""Sweeps: many cells of model x sparsity x allocator x rule, resumable, in processes or on Ray.

Each finished cell is written whole to a folder beside the output before the next one starts, so a sweep
that was killed goes on where it stopped; the table is put together at the end.
"""

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from acttail.base import temporaries
from acttail.base.distribute import runner
from acttail.base.dtypes import FAST, name_of, torch_name
from acttail.base.files import check_ending, check_folder, finite, replacing, write_json
from acttail.base.progress import Progress
from acttail.base.schema import read_kept
from acttail.calibrate.calibration import Calibration
from acttail.errors import ActTailError, BudgetError
from acttail.evaluate.perplexity import perplexity
from acttail.model.load import load
from acttail.model.precision import fast_dtype
from acttail.model.weights import LoadedWeights
from acttail.sparse.apply import densify_, sparsify_

# Columns that are objects go into the table as JSON text; the per-projection values stay in the cells.
_LEFT_OUT = ("projections",)


@dataclass(frozen=True)
class Cell:
    """One row to be: an allocator at a sparsity with a rule; allocator None is the dense model."""

    allocator: str | None
    sparsity: float
    rule: str = "topk"
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepSpec:
    """What every cell of a sweep shares: the protocol.

    Attributes:
        model: what :func:`acttail.load` takes.
        text: name of the text to score.
        calibration_text: name of the calibration text; None where no cell needs one.
        calibration_tokens: tokens of it.
        tokens: tokens to score, None for all.
        window: tokens per window.
        prefill: the prefill policy.
        dtype: of the model; ``fast`` becomes what it is on this machine.
        metrics: see :func:`acttail.perplexity`.
    """

    model: str
    text: str
    calibration_text: str | None = None
    calibration_tokens: int = 4096
    tokens: int | None = None
    window: int = 1024
    prefill: str = "all"
    dtype: str = FAST
    metrics: tuple[str, ...] = ("perplexity", "kl", "top1")

    def __post_init__(self) -> None:
        # Either spelling finds the cells that are done.
        name = torch_name(self.dtype)
        object.__setattr__(self, "dtype", name_of(fast_dtype()) if name == FAST else name)


def cells(
    sparsities: Sequence[float],
    allocators: Sequence[str],
    rules: Sequence[str] = ("topk",),
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Cell]:
    """The dense cell and the product of the rest."""
    given = arguments or {}
    return [Cell(None, 0.0)] + [
        Cell(a, s, r, given.get(a, {})) for s in sparsities for a in allocators for r in rules
    ]


def _key(spec: SweepSpec, cell: Cell) -> str:
    described = json.dumps([asdict(spec), asdict(cell)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:24]


# One loaded model per process, with the spectra and curves of its context.
_loaded: dict[str, Any] = {}


def _context(spec: SweepSpec) -> tuple[Any, Any, Any, Any]:
    from acttail.allocate import AllocationContext
    from acttail.calibrate.selftext import sample_text
    from acttail.calibrate.text import read_text

    key = json.dumps(asdict(spec), sort_keys=True)
    if key not in _loaded:
        _loaded.clear()
        model, tokenizer = load(spec.model, dtype=spec.dtype)
        context = AllocationContext(LoadedWeights(model))
        if spec.calibration_text is not None:
            text = (
                sample_text(model, tokenizer, tokens=spec.calibration_tokens)
                if spec.calibration_text == "self"
                else read_text(spec.calibration_text)
            )
            context.calibration = Calibration(
                model, tokenizer, text, tokens=spec.calibration_tokens
            )
        _loaded[key] = (model, tokenizer, read_text(spec.text), context)
    found: tuple[Any, Any, Any, Any] = _loaded[key]
    return found


def run_cell(spec: SweepSpec, cell: Cell, threads: int | None = None) -> dict[str, Any]:
    """Evaluate one cell in this process: the record, and the seconds its plan took.

    Raises:
        ActTailError: anything wrong with the cell or the spec.
    """
    import time

    import torch

    from acttail.allocate import make_plan
    from acttail.evaluate.record import identity, record

    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer, text, context = _context(spec)
    densify_(model)
    started = time.perf_counter()
    if cell.allocator is not None:
        try:
            plan = make_plan(
                model, cell.sparsity, allocator=cell.allocator, arguments=cell.arguments,
                rule=None if cell.rule == "default" else cell.rule, context=context,
                head=False,  # one budget for all cells: equal S is equal bytes
            )  # fmt: skip
        except BudgetError as error:
            # Not every rule reaches every sparsity: the cell is there, empty, and says why.
            return identity(model) | {
                "allocator": cell.allocator, "rule": cell.rule, "sparsity": cell.sparsity,
                "unreachable": str(error),
            }  # fmt: skip
        sparsify_(model, plan, prefill=spec.prefill, check_contents=False)
    planned = time.perf_counter() - started
    try:
        result = perplexity(
            model, tokenizer, text, window=spec.window, tokens=spec.tokens, prefill=spec.prefill,
            metrics=spec.metrics,
        )  # fmt: skip
        return record(model, result) | {"plan_seconds": round(planned, 3)}
    finally:
        densify_(model)


def check_table(path: str | os.PathLike[str]) -> None:
    """Make sure that a sweep's table can be written here.

    Raises:
        ActTailError: another ending than .csv or .parquet, a missing package, or no such folder.
    """
    suffix = check_ending(path, (".csv", ".parquet"), "a sweep")
    # Its folder is made.
    check_folder(Path(path).parent)
    if suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ActTailError("Parquet needs pyarrow (pip install pyarrow); or write a .csv")


def sweep(
    spec: SweepSpec,
    wanted: Sequence[Cell],
    output: str | os.PathLike[str],
    *,
    jobs: int = 1,
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run every cell that has no result yet, and write the table.

    Args:
        spec: the protocol.
        wanted: the cells.
        output: a .csv or .parquet file; finished cells are kept in ``<output>.cells/``.
        jobs: processes; each loads the model once and takes its share of the threads.
        ray_address: ``auto`` or a Ray address; runs the cells as Ray tasks instead.
        progress: called with (cells done, cells).

    Returns:
        One record per cell, in the order of `wanted`.

    Raises:
        ActTailError: unknown ending of `output`, a missing package, or a bad cell; names it.
    """
    check_table(output)
    target = Path(output)
    folder = target.with_name(f"{target.name}.cells")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ActTailError(f"cannot write {folder}: {error.strerror}") from error
    temporaries.sweep(folder)  # of a killed sweep, whose cells this one need not write
    files = {_key(spec, cell): cell for cell in wanted}
    rows = {key: read_kept(folder / f"{key}.json", dict[str, Any]) for key in files}
    todo = {key: cell for key, cell in files.items() if rows[key] is None}
    done = len(files) - len(todo)
    if progress is not None:
        progress(done, len(files))
    with runner(run_cell, jobs=jobs, ray_address=ray_address) as run:
        for key, row in run({key: (spec, cell) for key, cell in todo.items()}):
            rows[key] = finite(row)
            write_json(folder / f"{key}.json", rows[key])
            done += 1
            if progress is not None:
                progress(done, len(files))
    # As the next sweep reads them: lists for tuples.
    found: list[dict[str, Any]] = json.loads(json.dumps(list(rows.values())))
    _write_table(target, found)
    return found


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value
        for key, value in row.items()
        if key not in _LEFT_OUT
    }


def _write_table(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    flat = [{key: row.get(key) for key in columns} for row in flat]
    with replacing(target) as temporary:
        if target.suffix == ".csv":
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=columns)
                writer.writeheader()
                writer.writerows(flat)
            return
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(flat), temporary)
