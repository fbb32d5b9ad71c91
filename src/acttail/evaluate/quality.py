"""Ask for quality instead of sparsity: the largest sparsity whose loss stays within a limit.

The curves predict a first answer; text that calibration has not seen decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from acttail.allocate.context import AllocationContext, calibration_of
from acttail.allocate.registry import budgeted, get, make_plan
from acttail.allocate.sensitivity import curves_for
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.curves import predicted_loss
from acttail.calibrate.text import Text, tokenize
from acttail.errors import BudgetError, TextError
from acttail.evaluate.dense_logits import DenseLogits
from acttail.evaluate.perplexity import perplexity
from acttail.maths.budget import HIGHEST
from acttail.maths.curves import minimise
from acttail.plan import SparsityPlan
from acttail.sparse.apply import densify_, sparsified

Limit = Literal["loss", "kl"]
# Width of the last bracket of the search.
_TOLERANCE = 0.005
# Tokens that a limit is verified on.
HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class QualityPlan:
    """The plan found and what it costs.

    Attributes:
        plan: the plan of the largest sparsity found.
        predicted: KL divergence per token that the curves predict, nats.
        measured: what was measured on held-out calibration text: the rise of the loss per token, or
            the KL divergence to the dense model, nats.
        limit: what was asked for.
    """

    plan: SparsityPlan
    predicted: float
    measured: float
    limit: float


def held_out(calibration: Calibration) -> Text:
    """The calibration text after the tokens that calibration uses.

    Raises:
        TextError: less than one window is left.
    """
    ids = tokenize(calibration.text, calibration.tokenizer)[calibration.tokens :]
    window = calibration.batches().shape[1]
    if ids.numel() < 2 * window:
        raise TextError(
            f"the calibration text {calibration.text.name} leaves only {ids.numel()} tokens to verify on; "
            f"give a longer one or fewer --calibration-tokens"
        )
    # A window is lost to decoding and encoding again, at most.
    content = calibration.tokenizer.decode(ids[: HELD_OUT_TOKENS + 2 * window])
    return Text(f"{calibration.text.name}#held-out", content)


def check_limit(limit: float) -> None:
    """Refuse a limit that nothing meets.

    Raises:
        BudgetError: it is not a positive number.
    """
    if not limit > 0:
        raise BudgetError(
            f"a limit on the loss is a positive number of nats per token, got {limit}"
        )


def plan_for_quality(
    context: AllocationContext,
    limit: float,
    *,
    metric: Limit = "loss",
    allocator: str = "sensitivity",
    arguments: Mapping[str, Any] | None = None,
    rule: str | None = None,
    head: bool | None = None,
) -> QualityPlan:
    """The plan of the largest sparsity whose measured loss on held-out text is within the limit.

    Args:
        context: with a calibration.
        limit: nats per token, positive.
        metric: ``loss``, the rise of the negative log-likelihood, or ``kl``, the divergence from the
            dense model.
        allocator: any rule; the curves' prediction starts the search whichever it is.
        arguments: the rule's arguments.
        rule: which entries stay.
        head: whether the output head takes part in the budget; None leaves it to the allocator.

    Raises:
        BudgetError: the limit is not a positive number, or not even the smallest sparsity meets it.
        TextError: no calibration text, or too little of it is left to verify on.
    """
    check_limit(limit)
    calibration = calibration_of(context)
    context = budgeted(context, allocator, head, arguments)
    text = held_out(calibration)
    merged = get(allocator).arguments(arguments or {})
    model, tokenizer = calibration.model, calibration.tokenizer
    window = calibration.batches().shape[1]

    tokens = max(window, HELD_OUT_TOKENS // window * window)
    metrics = ("perplexity", "kl") if metric == "kl" else ("perplexity",)

    held = DenseLogits()

    def score() -> tuple[float, float]:
        result = perplexity(
            model, tokenizer, text, window=window, tokens=tokens, metrics=metrics, dense_logits=held
        )
        return result.nll, result.kl or 0.0

    densify_(model)
    dense = score()[0]

    def attempt(sparsity: float) -> tuple[SparsityPlan, float]:
        plan = make_plan(
            model, sparsity, allocator=allocator, arguments=merged, rule=rule, context=context
        )
        with sparsified(model, plan):
            nll, kl = score()
        return plan, kl if metric == "kl" else nll - dense

    curves = curves_for(context, merged)

    def predicted(plan: SparsityPlan) -> float:
        return predicted_loss(curves, {n: p.sparsity for n, p in plan.projections.items()})

    low, high = 0.0, HIGHEST
    guess = _predicted_sparsity(context, limit, merged)
    best: tuple[SparsityPlan, float] | None = None
    while high - low > _TOLERANCE:
        plan, measured = attempt(guess)
        if measured <= limit:
            low, best = guess, (plan, measured)
            guess = min(0.5 * (low + high), low + 0.05)  # the prediction is near: small steps first
        else:
            high = guess
            guess = max(0.5 * (low + high), high - 0.05)
    if best is None:
        raise BudgetError(f"no sparsity keeps the {metric} within {limit}; raise the limit")
    return QualityPlan(best[0], predicted(best[0]), best[1], limit)


def _predicted_sparsity(
    context: AllocationContext, limit: float, arguments: Mapping[str, Any]
) -> float:
    """Largest sparsity whose predicted KL is within the limit, by bisection on the curves alone."""
    curves = curves_for(context, arguments)
    costs = {p.name: p.cost for p in context.projections}
    low, high = 0.0, HIGHEST
    while high - low > _TOLERANCE:
        middle = 0.5 * (low + high)
        found = minimise(curves.curves, curves.grid, costs, middle)
        low, high = (middle, high) if predicted_loss(curves, found) <= limit else (low, middle)
    return min(max(low, 0.02), 0.95)
