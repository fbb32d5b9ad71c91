"""Which allocator to take for a model: each one's plan is tried on text that no calibration saw.

Data-free rules are chosen on a few models and need not carry over to another: the fit of `acttail` that is best on one
family loses to `uniform` on the next. A small check on the model itself decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acttail.allocate import DEFAULT, AllocationContext, make_plan, needs_text
from acttail.allocate.context import calibration_of
from acttail.allocate.goal import Goal
from acttail.base.progress import Progress
from acttail.errors import BudgetError
from acttail.evaluate.dense_logits import DenseLogits
from acttail.evaluate.perplexity import perplexity
from acttail.evaluate.quality import HELD_OUT_TOKENS, held_out
from acttail.maths.budget import check_target
from acttail.plan import SparsityPlan
from acttail.sparse.apply import densify_, sparsified

# What to try, best known first. Of two that are equally good the first is taken.
DATA_FREE = (DEFAULT, "uniform")
CALIBRATED = ("sensitivity", "refined", *DATA_FREE)
# Tokens of text sampled from the model where none is given: the plans differ by ten times the error of 2,048.
SAMPLED_TOKENS = 2048
SAMPLED_WINDOW = 256


@dataclass(frozen=True)
class Tried:
    """One allocator's plan and what it costs.

    Attributes:
        plan: at the sparsity asked for.
        kl: to the dense model, nats per token, on the text of the check.
        error: its standard error.
    """

    plan: SparsityPlan
    kl: float
    error: float


@dataclass(frozen=True)
class Recommendation:
    """What was tried, in order, and the text it was tried on.

    Attributes:
        tried: one for each allocator.
        text: its name.
        tokens: scored.
    """

    tried: tuple[Tried, ...]
    text: str
    tokens: int

    @property
    def best(self) -> Tried:
        """The one of the least KL."""
        return min(self.tried, key=lambda t: t.kl)

    @property
    def reason(self) -> str:
        """Why it is the one, in a line."""
        others = ", ".join(
            f"{t.plan.allocator} {t.kl:.4f}" for t in self.tried if t is not self.best
        )
        return (
            f"{self.best.plan.allocator}: KL to dense {self.best.kl:.4f} ± {self.best.error:.4f} nats per token "
            f"on {self.tokens:,} tokens of {self.text} ({others})"
        )


def candidates(*, calibrated: bool) -> tuple[str, ...]:
    """What can be tried: everything with calibration text (or curves) given, else what needs none."""
    return CALIBRATED if calibrated else DATA_FREE


def recommend(
    context: AllocationContext, sparsity: float | Goal, allocators: Sequence[str], *,
    arguments: Mapping[str, Mapping[str, Any]] | None = None, tokens: int = HELD_OUT_TOKENS,
    progress: Progress | None = None,
) -> Recommendation:  # fmt: skip
    """Make each allocator's plan and measure its KL; the output head stays dense in all, so their bytes are equal.

    Args:
        context: with a calibration, whose text after its own tokens is scored; where no allocator is calibrated,
            all of it.
        sparsity: of the model, above 0 and to 0.99; or what a token may cost.
        allocators: their names, at least one.
        arguments: of each, where they are not its own.
        tokens: to score at most.
        progress: called with (plans measured, plans).

    Raises:
        BudgetError: the sparsity is out of range or 0, where all plans are the same.
        TextError: no text, or too little.
    """
    if not isinstance(sparsity, Goal) and check_target(sparsity) == 0:
        raise BudgetError("at sparsity 0 every plan is the dense model: there is nothing to choose")
    calibration = calibration_of(context)
    model, tokenizer = calibration.model, calibration.tokenizer
    seen = any(needs_text(name) for name in allocators)
    text = held_out(calibration) if seen else calibration.text
    window = calibration.batches().shape[1]
    held = DenseLogits()
    densify_(model)
    tried = []
    scored = 0
    for done, name in enumerate(allocators):
        own = (arguments or {}).get(name)
        plan = make_plan(None, sparsity, allocator=name, arguments=own, context=context, head=False)
        with sparsified(model, plan):
            result = perplexity(
                model, tokenizer, text, window=window, tokens=max(window, tokens // window * window),
                metrics=("kl",), dense_logits=held,
            )  # fmt: skip
        tried.append(Tried(plan, result.kl or 0.0, result.kl_stderr or 0.0))
        scored = result.scored
        if progress is not None:
            progress(done + 1, len(allocators))
    return Recommendation(tuple(tried), text.name, scored)
