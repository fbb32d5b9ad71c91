"""The page: what is known of a model's sparsity, section by section; a section without data is left out."""

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from acttail._version import __version__
from acttail.base.files import finite
from acttail.calibrate.curves import SensitivityCurves
from acttail.plan import DEFAULT_RULE, SparsityPlan
from acttail.report.charts import Point, bar_chart, line_chart
from acttail.report.density import esd_chart
from acttail.report.heatmap import Grid, grid, svg

Rows = Sequence[Mapping[str, Any]]
# Projections whose spectrum or curve the page carries at most; evenly picked beyond it.
MOST_PICKED = 4000
_CURVE_DIGITS = 4
_FOLDER = Path(__file__).parent


@dataclass
class Report:
    """What a page is made of; everything but the title may be missing.

    Attributes:
        title: name of the model.
        card: (what, value) pairs about the model.
        fits: records of `acttail analyze --json`.
        spectra: projection -> histogram of :mod:`acttail.report.density`, with ``alpha``, ``xmin``,
            ``tail`` and ``size``.
        plans: (name, plan) pairs.
        rows: records of evaluations: of `compare`, `eval` or `sweep`.
        speed: records of `acttail bench --json`.
        curves: sensitivity curves.
        estimator: of the fits.
    """

    title: str
    card: list[tuple[str, str]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    spectra: dict[str, dict[str, Any]] = field(default_factory=dict)
    plans: list[tuple[str, SparsityPlan]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    curves: SensitivityCurves | None = None
    estimator: str = ""


def render(report: Report) -> str:
    """One self-contained HTML page.

    Args:
        report: what to show.

    Returns:
        HTML below 2 MB that loads nothing from anywhere; without scripts only the picking of a
        projection is lost.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    picked = _picked(report)
    data = json.dumps(finite(picked), separators=(",", ":"), allow_nan=False)
    script, style = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("report.js", "report.css")
    )
    return environment.get_template("report.html.j2").render(
        report=report, version=__version__, plans=[_plan(n, p) for n, p in report.plans],
        alpha=_alpha(report.fits), results=_results(report.rows), tasks=_tasks(report.rows),
        speed=[_speed(r) for r in report.speed], curves=_curves(report), protocol=_protocol(report),
        first=_first(report, picked), data=Markup(data.replace("<", "\\u003c")), picked=picked,  # noqa: S704
        script=_ours(script), style=_ours(style), script_hash=_hash(script), style_hash=_hash(style),
    )  # fmt: skip


def _ours(text: str) -> Markup:
    """A script or style of this package, as it is."""
    return Markup(text)  # noqa: S704


def _hash(text: str) -> Markup:
    """What a content security policy calls an inline script or style by: no other one runs."""
    return _ours(f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}")


def _safe(svg_text: str) -> Markup:
    # The charts escape every label themselves.
    return Markup(svg_text)  # noqa: S704


def _heat(found: Grid, title: str, digits: int = 3) -> dict[str, Any]:
    return {"chart": _safe(svg(found, title=title, digits=digits)), "grid": found, "title": title,
            "digits": digits}  # fmt: skip


def _plan(name: str, plan: SparsityPlan) -> dict[str, Any]:
    entries = [(e.kind, e.block, e.realised_sparsity) for e in plan.projections.values()]
    arguments = ", ".join(f"{k}={v}" for k, v in plan.arguments.items() if k != "curves") or "none"
    title = f"Sparsity of {name}, by block and projection"
    return {"name": name, "plan": plan, "arguments": arguments, "heat": _heat(grid(entries), title)}


def _alpha(fits: Rows) -> list[dict[str, Any]]:
    if not fits:
        return []
    found = []
    for key, title, digits in (
        ("alpha", "Heavy-tail exponent alpha, by block and projection", 2),
        ("ks_distance", "Kolmogorov-Smirnov distance of the fit, by block and projection", 3),
    ):
        values = grid([(f["kind"], f["block"], f[key]) for f in fits])
        if values.values:
            found.append(_heat(values, title, digits))
    return found


def _name_of(row: Mapping[str, Any]) -> str:
    name = row.get("allocator") or "dense"
    rule = row.get("rule")
    return f"{name} ({rule})" if rule not in (None, DEFAULT_RULE) else str(name)


def _results(rows: Rows) -> dict[str, Any] | None:
    """Charts of perplexity and KL against realised sparsity, one line per allocator."""
    scored = [r for r in rows if "perplexity" in r]
    if not scored:
        return None
    dense = next((r for r in scored if not r.get("allocator")), None)
    charts = []
    for key, label, reference in (
        (
            "perplexity",
            "perplexity (log scale)",
            ("dense", dense["perplexity"]) if dense and dense["perplexity"] is not None else None,
        ),
        ("kl", "KL to the dense model, nats per token (log scale)", None),
    ):
        series: dict[str, list[Point]] = defaultdict(list)
        for row in scored:
            value = row.get(key)
            realised = row.get("realised_sparsity")
            if row.get("allocator") and value is not None and realised is not None and value > 0:
                series[_name_of(row)].append((realised, value, row.get(f"{key}_stderr")))
        if series:
            title = f"{label.split(' (')[0].capitalize()} against realised sparsity, one line per allocator"
            charts.append(
                _safe(line_chart(series, title=title, x_label="realised sparsity", y_label=label, reference=reference))
            )  # fmt: skip
    shown = [
        {"sparsity": 0.0, "realised_sparsity": None, **r, "label": _name_of(r)} for r in scored
    ]
    return {"charts": charts, "rows": shown}


def _tasks(rows: Rows) -> dict[str, Any] | None:
    scored = [r for r in rows if r.get("tasks")]
    if not scored:
        return None
    names = list(dict.fromkeys(t for r in scored for t in r["tasks"]))
    lines: dict[str, list[Point]] = defaultdict(list)
    table = []
    for row in scored:
        values = {t: _main_metric(row["tasks"][t]) for t in names if t in row["tasks"]}
        table.append(
            {"label": _name_of(row), "sparsity": row.get("sparsity", 0.0), "values": values}
        )
        if len(values) == len(names):
            mean = sum(v for v, _ in values.values()) / len(values)
            error = math.hypot(*(e or 0 for _, e in values.values())) / len(values)
            lines[_name_of(row)].append(
                (row.get("realised_sparsity", row.get("sparsity", 0.0)), mean, error)
            )
    dense = lines.pop("dense", None)
    chart = None
    if lines:
        reference = ("dense", dense[0][1]) if dense else None
        chart = _safe(line_chart(
            lines, title="Mean accuracy against realised sparsity", x_label="realised sparsity",
            y_label="mean accuracy", reference=reference, log=False,
        ))  # fmt: skip
    return {"names": names, "table": table, "chart": chart}


def _main_metric(task: Mapping[str, Any]) -> tuple[float, float | None]:
    """Length-normalised accuracy where the task has it, else accuracy, else the first metric."""
    metrics = task["metrics"]
    key = next((k for k in ("acc_norm", "acc") if k in metrics), next(iter(metrics)))
    value, error = metrics[key]["value"], metrics[key]["stderr"]
    return float(value), None if error is None else float(error)


def _speed(row: Mapping[str, Any]) -> dict[str, Any]:
    bars = []
    for name, value in row["tokens_per_second"].items():
        ratio = row["ratios"].get(name)
        note = (
            f"sparse is {ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})"
            if ratio
            else ""
        )
        label = f"sparse {row['sparsity']:g}" if name == "sparse" else name
        bars.append((label, float(value), note))
    title = f"Decoded tokens per second, {row['dtype']}, {row['threads']} thread(s)"
    return {
        "title": title,
        "row": row,
        "chart": _safe(bar_chart(bars, title=title, unit="tokens per second")),
    }


def _curves(report: Report) -> dict[str, Any] | None:
    """Mean curve of each kind of projection."""
    if report.curves is None:
        return None
    kinds: dict[str, list[Any]] = defaultdict(list)
    for name, curve in report.curves.curves.items():
        kinds[name.rsplit(".", 1)[-1]].append(curve)
    grid_ = report.curves.grid
    series = {
        kind: [
            (float(s), float(v), None)
            for s, v in zip(grid_, np.mean(found, axis=0), strict=True)
            if v > 0
        ]
        for kind, found in kinds.items()
    }
    chart = line_chart(
        series, title="Mean sensitivity curve of each kind of projection", x_label="sparsity of one projection",
        y_label="predicted loss (log scale)",
    )  # fmt: skip
    return {"chart": _safe(chart), "about": report.curves.about}


def _picked(report: Report) -> dict[str, Any]:
    """What the script draws a projection from."""
    curves = report.curves.curves if report.curves else {}
    names = list(report.spectra) or list(curves)
    step = math.ceil(len(names) / MOST_PICKED) or 1
    about = {f["projection"]: f for f in report.fits}
    chosen = {}
    for name in names[::step]:
        entry: dict[str, Any] = {}
        if name in report.spectra:
            entry["esd"] = report.spectra[name]
        if name in curves:
            entry["curve"] = [float(f"{v:.{_CURVE_DIGITS}g}") for v in curves[name]]
        if name in about:
            f = about[name]
            entry |= {"block": f["block"], "kind": f["kind"], "shape": f"{f['d_out']}×{f['d_in']}",
                      "flag": f["flag"], "ks": f["ks_distance"], "stderr": f["stderr"]}  # fmt: skip
        plans = {
            n: p.projections[name].realised_sparsity
            for n, p in report.plans
            if name in p.projections
        }
        entry["plans"] = {n: round(v, 4) for n, v in plans.items()}
        chosen[name] = entry
    grid_ = [float(s) for s in report.curves.grid] if report.curves else []
    return {"projections": chosen, "grid": grid_, "left_out": len(names) - len(chosen)}


def _first(report: Report, picked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The projection shown before (and without) the script."""
    for name, entry in picked["projections"].items():
        if "esd" in entry:
            return {"name": name, "chart": _safe(esd_chart(entry["esd"], name))}
        return {"name": name, "chart": None}
    return None


def _protocol(report: Report) -> list[tuple[str, str]]:
    """How the numbers were made, in full."""
    out = [("page", f"made by acttail {__version__}")]
    if report.fits:
        out.append(
            (
                "alpha",
                f"estimator {report.estimator}; eigenvalues of WᵀW in float64, weights as stored",
            )
        )
    for row in report.rows[:1]:
        names = {"model": "model", "revision": "revision", "text": "text", "dtype": "dtype", "prefill": "prefill policy",
                 "engine": "engine"}  # fmt: skip
        out += [(label, str(row[key])) for key, label in names.items() if row.get(key)]
        if row.get("window"):
            out.append((
                "windows",
                f"{row.get('scored')} tokens scored in {row.get('windows')} windows of {row['window']}, stride "
                f"{row.get('stride')}, BOS {'added' if row.get('bos') else 'not added'}; errors clustered by window",
            ))  # fmt: skip
        versions = row.get("versions")
        if isinstance(versions, Mapping):
            out.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    for name, plan in report.plans:
        made = ", ".join(f"{k} {v}" for k, v in plan.created_with.items())
        out.append((f"plan {name}", f"fingerprint {plan.fingerprint}; made with {made}"))
    for row in report.speed:
        out.append((
            "speed",
            f"{row['rounds']} rounds by turns, {row['prompt_tokens']} + {row['new_tokens']} tokens, {row['threads']} "
            "thread(s); medians, ratios of rounds with their range",
        ))  # fmt: skip
    if report.curves:
        out.append(("curves", ", ".join(f"{k} {v}" for k, v in report.curves.about.items())))
    return out
