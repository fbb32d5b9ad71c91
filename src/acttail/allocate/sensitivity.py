"""`sensitivity`: the budget of least predicted loss, from measured curves and one multiplier.

The maths are in :mod:`acttail.maths.curves`; here is where the curves come from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acttail.allocate.base import Allocation, Allocator, Needs
from acttail.allocate.context import AllocationContext, calibration_of
from acttail.calibrate.curves import SensitivityCurves
from acttail.calibrate.measure import measure
from acttail.errors import PlanError
from acttail.maths.curves import minimise
from acttail.sparse.rules import THRESHOLD, TOPK


def allocate(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """Sparsities of least predicted loss.

    Raises:
        TextError: no calibration text was given.
        PlanError: the curves belong to another model, or were measured with another loss.
    """
    curves = curves_for(context, arguments)
    costs = dict(zip((p.name for p in context.projections), map(float, context.costs), strict=True))
    found = minimise(curves.curves, curves.grid, costs, sparsity)
    return Allocation(np.array([found[p.name] for p in context.projections]))


def curves_for(context: AllocationContext, arguments: Mapping[str, Any]) -> SensitivityCurves:
    """The curves an allocation uses: the context's, those of the file named, or measured once.

    Curves that are measured are written to the file named.

    Raises:
        TextError: no calibration text was given and no curves.
        PlanError: the curves belong to another model, or were measured with another loss.
    """
    path = arguments.get("curves", "")
    loss = arguments.get("loss")
    given = _given(context, arguments)
    if given is not None:
        return _checked(context, *given, loss)
    calibration = calibration_of(context)
    wanted = loss or DEFAULTS["loss"]
    found = calibration.once(lambda: measure(calibration, loss=wanted), "curves", wanted)
    if path:
        found.save(path)
    return _checked(context, found, "measured", loss)


def head_measured(context: AllocationContext, arguments: Mapping[str, Any]) -> bool:
    """Whether a budget by curves takes the output head without being asked to.

    It does, unless the curves at hand were measured without it.

    Raises:
        PlanError: the file named holds no curves.
    """
    given = _given(context, arguments)
    head = context.weights.head
    return head is not None and (given is None or head.name in given[0].curves)


def _given(
    context: AllocationContext, arguments: Mapping[str, Any]
) -> tuple[SensitivityCurves, str] | None:
    """The curves at hand and where they are from: the context's, those of the file named, or None."""
    path = arguments.get("curves", "")
    if context.curves is not None:
        return context.curves, "given"
    if path and Path(path).exists():
        return SensitivityCurves.load(path), f"in {path}"
    return None


def _checked(
    context: AllocationContext, curves: SensitivityCurves, which: str, loss: str | None
) -> SensitivityCurves:
    """The curves in the context's order of projections."""
    names = [p.name for p in context.projections]
    head = context.weights.head.name if context.weights.head is not None else ""
    if head in names and head not in curves.curves:
        raise PlanError(
            f"the curves {which} were measured without the output head {head}: measure them again, or leave "
            "the head dense (--no-head)"
        )
    # Those of a head that stays dense are there, and not needed.
    differ = sorted((set(names) ^ set(curves.curves)) - {head})
    if differ:
        raise PlanError(f"the curves {which} are for another model: they differ in {differ[0]}")
    measured = curves.about.get("loss")
    if None not in (loss, measured) and loss != measured:
        raise PlanError(
            f"the curves {which} were measured with loss={measured}, not {loss}: "
            f"set loss={measured}, or give another file"
        )
    return SensitivityCurves(curves.grid, {n: curves.curves[n] for n in names}, curves.about)


DEFAULTS = {"loss": "fisher", "curves": ""}
# Sparsity per token follows the token: under one threshold, tokens with large inputs keep more. On
# held-out text this is worth 5-8 % of perplexity on SmolLM2 from 0.5 on and loses elsewhere (docs/log.md),
# so thresholds are kept only where they lose less than TopK.
REFINED = Allocator(
    "refined", "calibrated: sensitivity with per-token dynamic k under thresholds, where that loses less",
    DEFAULTS, allocate, needs=Needs.CURVES, rule=THRESHOLD, otherwise=TOPK, head_asked=head_measured,
)  # fmt: skip
SENSITIVITY = Allocator(
    "sensitivity", "calibrated: least predicted loss from measured curves",
    DEFAULTS, allocate, needs=Needs.CURVES, head_asked=head_measured,
)  # fmt: skip
