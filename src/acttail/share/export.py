"""Plans in the forms of other projects."""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acttail._version import __version__
from acttail.base.files import write_json, write_text
from acttail.errors import PlanError
from acttail.maths.budget import model_sparsity
from acttail.plan import ProjectionPlan, SparsityPlan

# Columns of TEAL's results.csv, one per projection of a Llama block.
_TEAL = ("q", "k", "v", "o", "gate", "up", "down")


def teal(plan: SparsityPlan, folder: Path) -> list[Path]:
    """TEAL's folder of greedy results: ``layer-N/results.csv`` with one row of sparsities.

    TEAL's loader picks the row whose effective sparsity fits, so one plan is one row.

    Args:
        plan: of a model with the seven projections of a Llama block.
        folder: to write into.

    Returns:
        The files.

    Raises:
        PlanError: the model's blocks have other projections.
    """
    blocks: dict[int, dict[str, ProjectionPlan]] = defaultdict(dict)
    for name, entry in plan.projections.items():
        if entry.kind not in _TEAL or entry.kind in blocks[entry.block]:
            raise PlanError(
                f"TEAL knows blocks of {', '.join(_TEAL)} only; this plan has {name} ({entry.kind})"
            )
        blocks[entry.block][entry.kind] = entry
    written = []
    for block, entries in sorted(blocks.items()):
        missing = next((k for k in _TEAL if k not in entries), None)
        if missing is not None:
            raise PlanError(f"TEAL needs a {missing} projection in block {block}; there is none")
        effective = model_sparsity(
            [entries[k].sparsity for k in _TEAL], [entries[k].cost for k in _TEAL]
        )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["Effective Sparsity", *_TEAL])
        writer.writerow([round(effective, 6), *(round(entries[k].sparsity, 6) for k in _TEAL)])
        path = folder / f"layer-{block}" / "results.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text.getvalue())
        written.append(path)
    return written


def nncf(plan: SparsityPlan, folder: Path) -> list[Path]:
    """Target map of NNCF's activation sparsity: patterns of module names with their sparsity.

    ``{TargetScope(patterns=e["patterns"]): e["sparsity"] for e in json.load(file)}`` is what
    ``sparsify_activations`` takes. Projections of equal sparsity share an entry; NNCF calibrates its own
    thresholds.

    Args:
        plan: any.
        folder: to write into.
    """
    groups: dict[float, list[str]] = defaultdict(list)
    for name, entry in plan.projections.items():
        groups[round(entry.sparsity, 4)].append(name)
    entries = [
        {"patterns": [f".*{re.escape(name)}.*" for name in names], "sparsity": sparsity}
        for sparsity, names in sorted(groups.items())
        if sparsity > 0
    ]
    path = folder / "target_sparsity_by_scope.json"
    write_json(path, entries)
    return [path]


def plain(plan: SparsityPlan, folder: Path) -> list[Path]:
    """One JSON object: projection -> sparsity, kept entries, and the threshold if there is one.

    Args:
        plan: any.
        folder: to write into.
    """
    projections: dict[str, Any] = {
        name: {
            "sparsity": e.sparsity, "k": e.k, "d_in": e.d_in, "d_out": e.d_out,
            **({"threshold": e.threshold} if e.threshold is not None else {}),
        }
        for name, e in plan.projections.items()
    }  # fmt: skip
    path = folder / "projections.json"
    about = {"model": plan.model, "rule": plan.rule, "made_with": f"acttail {__version__}"}
    write_json(path, about | {"projections": projections})
    return [path]


FORMATS: dict[str, Callable[[SparsityPlan, Path], list[Path]]] = {
    "plain": plain,
    "teal": teal,
    "nncf": nncf,
}


def read_target_map(path: Path) -> dict[str, float]:
    """What :func:`nncf` wrote, as pattern -> sparsity."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {pattern: e["sparsity"] for e in entries for pattern in e["patterns"]}
