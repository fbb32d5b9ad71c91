"""Allocators by name, and the door through which plans are made."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from acttail.allocate.acttail import ACTTAIL
from acttail.allocate.base import Allocator, Needs
from acttail.allocate.cats import CATS
from acttail.allocate.context import AllocationContext, calibration_of
from acttail.allocate.controls import DEPTH, LAROSA, PER_TYPE, PERMUTED, REVERSED, UNIFORM, WINA
from acttail.allocate.ffn import FFN_ONLY
from acttail.allocate.goal import Goal
from acttail.allocate.greedy import GREEDY
from acttail.allocate.selection import selection_for
from acttail.allocate.sensitivity import REFINED, SENSITIVITY
from acttail.allocate.theory import ENERGY, THEORY, THEORY_CAPACITY, THEORY_IMPORTANCE
from acttail.base.progress import Progress
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.curves import SensitivityCurves
from acttail.calibrate.held_out import against_topk
from acttail.errors import ActTailError
from acttail.maths.budget import check_target
from acttail.model.opened import as_weights
from acttail.plan import SparsityPlan, build_plan

DEFAULT = "acttail"
ALLOCATORS: dict[str, Allocator] = {
    a.name: a
    for a in (
        UNIFORM, ACTTAIL, THEORY, THEORY_CAPACITY, THEORY_IMPORTANCE,
        ENERGY, DEPTH, PERMUTED, REVERSED, PER_TYPE, SENSITIVITY, REFINED, GREEDY, WINA, CATS, FFN_ONLY,
        LAROSA,
    )
}  # fmt: skip


def get(name: str) -> Allocator:
    """The allocator of this name.

    Raises:
        ActTailError: there is none; lists those there are.
    """
    if name not in ALLOCATORS:
        raise ActTailError(f"unknown allocator {name!r}: use {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]


def needs_text(
    allocator: str, arguments: Mapping[str, Any] | None = None, rule: str | None = None
) -> bool:
    """Whether a plan cannot be made without a loaded model and calibration text.

    Args:
        allocator: its name.
        arguments: overrides of its defaults. With a file of curves that is there, the curves need
            neither model nor text.
        rule: as for :func:`make_plan`.

    Raises:
        ActTailError: unknown allocator, argument or rule, or a rule the allocator does not go with.
    """
    row = get(allocator)
    row.arguments(arguments or {})
    if selection_for(row, rule).calibrate is not None:
        return True
    return measures_curves(allocator, arguments) or row.needs is Needs.TEXT


def measures_curves(allocator: str, arguments: Mapping[str, Any] | None = None) -> bool:
    """Whether sensitivity curves will be measured for a plan: it is made of some, and no file has them.

    Args:
        allocator: its name.
        arguments: overrides of its defaults.

    Raises:
        ActTailError: unknown allocator or argument.
    """
    row = get(allocator)
    merged = row.arguments(arguments or {})
    return row.needs is Needs.CURVES and not (merged["curves"] and Path(merged["curves"]).exists())


def with_curves(
    allocators: Mapping[str, Mapping[str, Any]], path: str | None
) -> dict[str, dict[str, Any]]:
    """Arguments of several allocators, with a file of curves for those that use one.

    Args:
        allocators: name -> arguments; a file named there stays.
        path: the file: read if it is there, else written; None changes nothing.

    Raises:
        ActTailError: none of the allocators uses curves.
        PlanError: the file is there and holds no curves.
    """
    given = {name: dict(arguments) for name, arguments in allocators.items()}
    if path is None:
        return given
    takers = [name for name in given if get(name).needs is Needs.CURVES]
    if not takers:
        users = " or ".join(a.name for a in ALLOCATORS.values() if a.needs is Needs.CURVES)
        raise ActTailError(
            f"none of {', '.join(given)} uses curves; add {users}, or leave them out"
        )
    if Path(path).exists():
        SensitivityCurves.load(path)
    for name in takers:
        given[name] = {"curves": path} | given[name]
    return given


def budgeted(
    context: AllocationContext,
    allocator: str,
    head: bool | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> AllocationContext:
    """The context with the output head in the budget, or without it.

    Args:
        context: of the model.
        allocator: that makes the budget.
        head: as for :func:`make_plan`.
        arguments: overrides of the allocator's defaults.

    Raises:
        ActTailError: unknown allocator or argument, or one that cannot put the head into its budget.
        PlanError: the file of curves that the arguments name holds none.
        ModelError: the model has no head that could be sparse.
    """
    check_head(allocator, head)
    if head is None:
        row = get(allocator)
        merged = row.arguments(arguments or {})
        head = context.weights.head is not None and row.head_asked(context, merged)
    return context.with_head() if head else context


def check_head(allocator: str, head: bool | None) -> None:
    """Judge whether an allocator can do with the output head what was asked.

    Raises:
        ActTailError: unknown allocator, or one that cannot put the head into its budget.
    """
    row = get(allocator)
    if head and not row.head:
        able = ", ".join(a.name for a in ALLOCATORS.values() if a.head)
        raise ActTailError(
            f"{row.name} leaves the output head dense: leave out --head, or take one of {able}"
        )


def make_plan(
    model: Any,
    sparsity: float | Goal,
    *,
    allocator: str = DEFAULT,
    arguments: Mapping[str, Any] | None = None,
    context: AllocationContext | None = None,
    calibration: Calibration | None = None,
    rule: str | None = None,
    head: bool | None = None,
    progress: Progress | None = None,
) -> SparsityPlan:
    """Decide how sparse each projection may be.

    Args:
        model: a loaded transformers model, an opened WeightSource, or what :func:`acttail.load` takes
            (then the weights are read one matrix at a time, each once).
        sparsity: model sparsity S, the cost-weighted mean, in [0, 0.99]; or what a decoded token may cost, of
            which the plan's S then follows.
        allocator: name of the rule; ``acttail`` by default.
        arguments: overrides of the rule's defaults.
        context: reuse the spectra and curves of an earlier call for the same model.
        rule: which entries stay: ``topk``, ``wina``, ``threshold`` or ``teal`` (thresholds by
            TEAL's histograms; both need calibration); the allocator's own by default, or what it takes otherwise
            where text that calibration has not seen prefers that.
        calibration: a :class:`acttail.calibrate.calibration.Calibration`, for the calibrated rules.
        head: whether the output head takes part in the budget, at the cost of its weights: it then has a
            sparsity of its own, and S is the mean over projections and head. False leaves it dense; None
            leaves it to the allocator.
        progress: called with (done, total) during long work.

    Returns:
        A plan whose solved sparsities meet S within 1e-3 (its ``realised_sparsity`` says what is left
        after rounding to whole entries).

    Raises:
        BudgetError: S is not a number in [0, 0.99], or the goal is out of reach.
        ActTailError: unknown allocator, argument or rule, a rule the allocator does not go with, or a head
            that it cannot put into its budget.
        TextError: calibration is needed and not given.
        ModelError: the model cannot be read, is not a decoder, or has no output head.
        SpectrumError: a weight has NaN or infinite entries.
    """
    row = get(allocator)
    selection = selection_for(row, rule)
    target = None if isinstance(sparsity, Goal) else check_target(sparsity)
    merged = row.arguments(arguments or {})
    if context is None:
        context = AllocationContext(as_weights(model), progress=progress)
    if calibration is not None:
        context.calibration = calibration
    context = budgeted(context, allocator, head, merged)
    if selection.calibrate is not None:
        calibration_of(context)  # before the budget is solved, which may take minutes
    notes: dict[str, str] = {}
    if isinstance(sparsity, Goal):
        priced = replace(context, prices=sparsity.costs(context.projections))
        allocation, cost = sparsity.meet(
            context.projections, lambda share: row.allocate(priced, share, merged)
        )
        notes |= sparsity.describe(cost)
    else:
        allocation = row.allocate(context, check_target(sparsity), merged)
    names = [p.name for p in context.projections]
    sparsities = dict(zip(names, map(float, allocation.sparsities), strict=True))
    extras = None
    if selection.calibrate is not None:
        extras = selection.calibrate(calibration_of(context), sparsities)
        if row.otherwise is not None and rule is None and target != 0:
            compared = against_topk(calibration_of(context), sparsities, extras)
            pays = compared.thresholds < compared.topk
            notes["rule"] = (
                f"{(row.rule if pays else row.otherwise).name}: KL {compared.thresholds:.4f} under thresholds, "
                f"{compared.topk:.4f} under TopK, on {compared.tokens:,} held-out tokens"
            )
            if not pays:
                selection, extras = selection_for(row, row.otherwise.name), None
    return build_plan(
        context.weights,
        sparsities,
        sparsity=target,
        allocator=allocator,
        arguments=merged,
        fits=allocation.fits,
        rule=selection.rule.name,
        extras=extras,
        sketches=context.sketches(),
        notes=notes,
    )
