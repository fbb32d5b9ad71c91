"""Fill a report: from a model's weights, plan files and the JSON that other commands print."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acttail.base.machine import processor_name
from acttail.base.progress import Progress
from acttail.base.schema import SchemaError, read_json
from acttail.calibrate.curves import SensitivityCurves
from acttail.errors import ActTailError, reason
from acttail.model.opened import as_weights
from acttail.model.weights import WeightSource
from acttail.plan import SparsityPlan, created_with, fingerprint
from acttail.report.density import bins, histogram
from acttail.report.page import Report
from acttail.report.rows import NUMERIC, is_speed
from acttail.spectrum.analysis import spectra
from acttail.spectrum.tail import ESTIMATORS, check_estimator


def report_of(
    model: Any, *, plans: Sequence[str] = (), results: Sequence[str] = (), curves: str | None = None,
    estimator: str = "ks", with_spectra: bool = True, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Everything known about a model's sparsity.

    Args:
        model: what :func:`acttail.analyze` takes; weights are read one matrix at a time.
        plans: plan files.
        results: files that `compare --json`, `eval --json`, `bench --json` or `sweep` wrote.
        curves: a file of sensitivity curves.
        estimator: of alpha.
        with_spectra: analyse the weights too.
        progress: called with (done, total).

    Raises:
        ActTailError: a file is of no kind that is known, or the estimator is not.
        PlanError: a plan is for another model.
    """
    check_estimator(estimator)
    # The files first: they are read in a moment, a model is not.
    report = Report("", estimator=estimator)
    report.plans = [(Path(path).stem, SparsityPlan.load(path)) for path in plans]
    for path in results:
        add_results(report, path)
    if curves:
        report.curves = SensitivityCurves.load(curves)
    weights = as_weights(model)
    report.title, report.card = weights.name, _card(weights)
    for _, plan in report.plans:
        plan.check(weights, contents=False)
    if with_spectra:
        _analyse(report, weights, estimator, progress)
    return report


def _analyse(
    report: Report, weights: WeightSource, estimator: str, progress: Progress | None
) -> None:
    from acttail.spectrum.analysis import ProjectionFit

    found = spectra(weights, farms=estimator == "farms", progress=progress)
    count = bins(len(weights.projections))
    for projection in weights.projections:
        values = found[projection.name]
        fit = ESTIMATORS[estimator](values)
        report.fits.append(ProjectionFit(projection, fit).to_dict())
        report.spectra[projection.name] = histogram(values, count) | {
            "alpha": fit.alpha, "xmin": fit.xmin, "tail": fit.tail_size, "size": len(values),
        }  # fmt: skip


def _card(weights: WeightSource) -> list[tuple[str, str]]:
    projections = weights.projections
    shapes: dict[str, str] = {}
    for p in projections:
        shapes.setdefault(p.kind, f"{p.d_out}×{p.d_in}")
    total = sum(p.d_in * p.d_out for p in projections)
    read = sum(p.cost for p in projections)
    return [
        ("model", weights.name),
        ("blocks", str(len({p.block for p in projections}))),
        ("projections", str(len(projections))),
        ("shapes (out×in)", ", ".join(f"{kind} {shape}" for kind, shape in shapes.items())),
        ("weights in projections", f"{total / 1e6:,.1f} million"),
        ("read per token, dense", f"{read / 1e6:,.1f} million"),
        *_head_card(weights, read),
        ("fingerprint", fingerprint(projections)),
        ("analysed on", processor_name()),
        ("versions", ", ".join(f"{k} {v}" for k, v in created_with().items())),
    ]


def _head_card(weights: WeightSource, read: float) -> list[tuple[str, str]]:
    head = weights.head
    if head is None:
        return []
    tied = ", tied to the embedding" if head.tied else ""
    share = f"{head.cost / (head.cost + read):.0%} of what a dense token reads with logits"
    return [("output head", f"{head.d_out}×{head.d_in}{tied}: {share}")]


def add_results(report: Report, path: str) -> None:
    """Add what a file of results holds, by its form.

    Raises:
        ActTailError: no such file, or it is of no kind that is known.
    """
    for row in _read(Path(path)):
        try:
            found = report.speed if is_speed(row) else report.rows
        except SchemaError as error:
            raise ActTailError(
                f"{path} is not a result of compare, eval, sweep or bench: {error}"
            ) from None
        found.append(row)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                data: Any = [_typed(row) for row in csv.DictReader(file)]
        elif path.suffix == ".parquet":
            data = _parquet(path)
        else:
            data = read_json(path, "a result")
    except OSError as error:
        raise ActTailError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise ActTailError(f"{path} is no table of results: {reason(error)}") from error
    rows = data if isinstance(data, list) else [data]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ActTailError(f"{path} holds no results")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ActTailError(
            "parquet files need the extra: pip install 'acttail[parquet]'"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except OSError:
        raise
    except Exception as error:
        raise ActTailError(f"{path} is no table of results: {reason(error)}") from error
    return rows


def _typed(row: Mapping[str | None, Any]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise ValueError("a row is longer or shorter than the table's head")
    out: dict[str, Any] = {str(key): value or None for key, value in row.items()}
    for key in NUMERIC:
        if out.get(key) is not None:
            out[key] = float(out[key])
    return out
