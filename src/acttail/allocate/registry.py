"""Allocators by name, and the door through which plans are made."""

from collections.abc import Mapping
from typing import Any

from acttail.allocate.acttail import ACTTAIL
from acttail.allocate.base import AllocationContext, Allocator, calibration_of
from acttail.allocate.cats import CATS, gate_thresholds
from acttail.allocate.controls import DEPTH, LAROSA, PER_TYPE, PERMUTED, REVERSED, UNIFORM, WINA
from acttail.allocate.ffn import FFN_ONLY
from acttail.allocate.greedy import GREEDY
from acttail.allocate.sensitivity import REFINED, SENSITIVITY
from acttail.allocate.theory import ENERGY, THEORY, THEORY_CAPACITY, THEORY_IMPORTANCE
from acttail.analysis import Progress, as_weights
from acttail.budget import check_target
from acttail.errors import ActTailError
from acttail.plan import SparsityPlan, build_plan
from acttail.thresholds import teal_thresholds, thresholds

DEFAULT = "acttail"
# top-p has no budget of its own: it is measured by `critical`, not planned.
RULES = ("topk", "wina", "threshold", "teal")
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


def make_plan(
    model: Any,
    sparsity: float,
    *,
    allocator: str = DEFAULT,
    arguments: Mapping[str, Any] | None = None,
    context: AllocationContext | None = None,
    calibration: Any = None,
    rule: str | None = None,
    progress: Progress | None = None,
) -> SparsityPlan:
    """Decide how sparse each projection may be.

    Args:
        model: a loaded transformers model, an opened WeightSource, or what :func:`acttail.load` takes
            (then the weights are read one matrix at a time).
        sparsity: model sparsity S, the cost-weighted mean, in [0, 0.99].
        allocator: name of the rule; ``acttail`` by default.
        arguments: overrides of the rule's defaults.
        context: reuse the spectra and curves of an earlier call for the same model.
        rule: which entries stay: ``topk``, ``wina``, ``threshold`` or ``teal`` (thresholds by
            TEAL's histograms; both need calibration); the allocator's own by default.
        calibration: a :class:`acttail.calibrate.Calibration`, for the calibrated rules.
        progress: called with (done, total) during long work.

    Returns:
        A plan whose solved sparsities meet S within 1e-3 (its ``realised_sparsity`` says what is left
        after rounding to whole entries).

    Raises:
        BudgetError: S is not a number in [0, 0.99].
        ActTailError: unknown allocator or argument.
        ModelError: the model cannot be read or is not a decoder.
        SpectrumError: a weight has NaN or infinite entries.
    """
    allocation = get(allocator)
    if rule is not None and rule not in (*RULES, allocation.rule):
        raise ActTailError(f"unknown rule {rule!r}: use {', '.join(RULES)}")
    target = check_target(sparsity)
    merged = allocation.arguments(arguments or {})
    if context is None:
        context = AllocationContext(as_weights(model), progress=progress)
    if calibration is not None:
        context.calibration = calibration
    context.used_fits = None
    solved = allocation.allocate(context, target, merged)
    sparsities = dict(zip((p.name for p in context.projections), map(float, solved), strict=True))
    extras = None
    if allocation.rule == "cats" and rule not in (None, "cats"):
        raise ActTailError("cats has a rule of its own; leave --rule out")
    if allocation.rule == "cats":
        extras = gate_thresholds(calibration_of(context), sparsities)
    elif rule == "teal":
        extras, rule = teal_thresholds(calibration_of(context), sparsities), "threshold"
    elif (rule or allocation.rule) == "threshold":
        extras = thresholds(calibration_of(context), sparsities)
    return build_plan(
        context.weights,
        sparsities,
        sparsity=target,
        allocator=allocator,
        arguments=merged,
        fits=context.used_fits,
        rule=rule or allocation.rule,
        extras=extras,
    )
