"""Fill a report: from a model's weights, plan files and the JSON that other commands print."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acttail.analysis import as_weights, spectra
from acttail.checkpoint import WeightSource
from acttail.curves import SensitivityCurves
from acttail.errors import ActTailError
from acttail.machine import processor_name
from acttail.plan import SparsityPlan, created_with, fingerprint
from acttail.report.density import bins, histogram
from acttail.report.page import Report
from acttail.tail import ESTIMATORS

# Numbers of a sweep's table that the page uses.
_NUMERIC = (
    "sparsity", "realised_sparsity", "perplexity", "perplexity_stderr", "kl", "kl_stderr", "top1",
    "top1_stderr", "scored", "windows", "window", "stride",
)  # fmt: skip


def report_of(
    model: Any, *, plans: Sequence[str] = (), results: Sequence[str] = (), curves: str | None = None,
    estimator: str = "ks", with_spectra: bool = True, progress: Callable[[int, int], None] | None = None,
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
    if estimator not in ESTIMATORS:
        raise ActTailError(f"unknown estimator {estimator!r}: use {', '.join(ESTIMATORS)}")
    weights = as_weights(model)
    report = Report(weights.name, card=_card(weights), estimator=estimator)
    for path in plans:
        plan = SparsityPlan.load(path)
        plan.check(weights, contents=False)
        report.plans.append((Path(path).stem, plan))
    for path in results:
        add_results(report, path)
    if curves:
        report.curves = SensitivityCurves.load(curves)
    if with_spectra:
        _analyse(report, weights, estimator, progress)
    return report


def _analyse(report: Report, weights: WeightSource, estimator: str, progress: Any) -> None:
    from acttail.analysis import ProjectionFit

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
        ("fingerprint", fingerprint(projections)),
        ("analysed on", processor_name()),
        ("versions", ", ".join(f"{k} {v}" for k, v in created_with().items())),
    ]


def add_results(report: Report, path: str) -> None:
    """Add what a file of results holds, by its form.

    Raises:
        ActTailError: no such file, or it is of no kind that is known.
    """
    for row in _read(Path(path)):
        if "tokens_per_second" in row and "ratios" in row:
            report.speed.append(row)
        elif "perplexity" in row or "tasks" in row:
            report.rows.append(row)
        else:
            raise ActTailError(
                f"{path} is not a result of compare, eval, sweep or bench: its rows hold "
                f"{', '.join(list(row)[:4]) or 'nothing'}"
            )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return [_typed(row) for row in csv.DictReader(file)]
        if path.suffix == ".parquet":
            return _parquet(path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ActTailError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ActTailError(f"{path} is neither JSON, .csv nor .parquet ({error})") from error
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
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _typed(row: dict[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {key: value or None for key, value in row.items()}
    for key in _NUMERIC:
        if out.get(key) is not None:
            out[key] = float(out[key])
    return out
