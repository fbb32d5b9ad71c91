"""A plan on request: what was asked for instead of a plan file, and the one way it becomes a plan.

Every command that takes ``--sparsity``, ``--read-share``, ``--speedup``, ``--max-kl`` or ``--max-loss`` opens its plan here. What was made for a model
on disk is kept, so that the next start neither solves nor calibrates again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from acttail.allocate import (
    DEFAULT,
    AllocationContext,
    budgeted,
    check_head,
    make_plan,
    needs_text,
)
from acttail.allocate.goal import Goal
from acttail.base.dtypes import FAST, name_of
from acttail.base.progress import Progress
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.elsewhere import Elsewhere
from acttail.calibrate.selftext import sample_text
from acttail.calibrate.text import Text
from acttail.engine import kept_plans
from acttail.engine.config import EngineConfig
from acttail.engine.reads import check_read_share, read_goal
from acttail.engine.tune import machine
from acttail.errors import ActTailError
from acttail.evaluate.forecast import check_speedup, speed_goal
from acttail.evaluate.quality import (
    HELD_OUT_TOKENS,
    Limit,
    QualityPlan,
    check_limit,
    plan_for_quality,
)
from acttail.evaluate.recommend import (
    SAMPLED_TOKENS,
    SAMPLED_WINDOW,
    Recommendation,
    recommend,
)
from acttail.maths.budget import check_target
from acttail.model.opened import Opened, open_model
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan
from acttail.sparse.apply import densify_
from acttail.sparse.state import sparse_state

# What is asked to say what goes on: (what) -> a context that gives a progress.
Stages = Callable[[str], AbstractContextManager[Progress | None]]
# Of a budget that is to meet a limit.
FOR_QUALITY = "sensitivity"


def silent(what: str) -> AbstractContextManager[Progress | None]:
    """Stages of which nothing is said."""
    return nullcontext()


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is to be; one of `sparsity`, `read_share`, `speedup`, `max_loss` and `max_kl` says how sparse.

    Attributes:
        sparsity: model sparsity in [0, 0.99].
        read_share: share of the dense model's bytes that a decoded token reads, above 0 and at most 1.
        speedup: over dense decoding on this machine, as forecast; at least 1.
        max_loss: most that the loss may rise on held-out text, nats per token.
        max_kl: most KL divergence from the dense model there, nats per token.
        allocator: name of the rule; by default ``acttail``, and ``sensitivity`` under a limit.
        arguments: overrides of the rule's defaults; ``curves`` among them names a file.
        rule: which entries stay; the allocator's own by default.
        head: whether the output head is in the budget; None leaves it to the allocator.
        text: calibration text; None samples it from the model, where it is needed.
        tokens: of the text that are used.
        dtype: of the model that calibrates.
        loading: further arguments of :meth:`acttail.model.opened.Opened.load`, such as a device map.
        engine: that decodes under the plan, whose bytes `read_share` counts and whose time `speedup`.
        candidates: allocators to try on held-out text, the best of which makes the plan (`allocator` stays None);
            of :func:`acttail.evaluate.recommend.candidates`.
        ray: address of a Ray cluster that measures curves; the plan is the same.

    Raises:
        ActTailError: not one of the five, or an unknown allocator, argument or rule.
        BudgetError: a number out of range.
    """

    sparsity: float | None = None
    max_loss: float | None = None
    max_kl: float | None = None
    allocator: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rule: str | None = None
    head: bool | None = None
    text: Text | None = None
    tokens: int = 4096
    dtype: str = FAST
    loading: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    read_share: float | None = None
    speedup: float | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    ray: str | None = None

    def __post_init__(self) -> None:
        budgets = (self.sparsity, self.read_share, self.speedup, self.max_loss, self.max_kl)
        given = [v for v in budgets if v is not None]
        if len(given) != 1:
            raise ActTailError(
                "a plan is asked for by one of sparsity, read_share, speedup, max_loss and max_kl"
            )
        if self.sparsity is not None:
            check_target(self.sparsity)
        elif self.read_share is not None:
            check_read_share(self.read_share)
        elif self.speedup is not None:
            check_speedup(self.speedup)
        else:
            check_limit(given[0])
        if self.candidates:
            self._check_candidates()
            return
        if self.allocator is None:
            chosen = DEFAULT if self.limit is None else FOR_QUALITY
            object.__setattr__(self, "allocator", chosen)
        check_head(self.name, self.head)
        needs_text(self.name, self.arguments, self.rule)

    def _check_candidates(self) -> None:
        """What a choice among allocators leaves open."""
        for what, given in {
            "a limit": self.limit, "an allocator": self.allocator, "a rule": self.rule, "a sparse head": self.head,
            "arguments": {k for k in self.arguments if k != "curves"},
        }.items():  # fmt: skip
            if given:
                raise ActTailError(f"where the allocator is chosen by trying, leave out {what}")
        for name in self.candidates:
            needs_text(name)

    @property
    def name(self) -> str:
        """Of the allocator, or of those to choose from."""
        return "|".join(self.candidates) or str(self.allocator)

    @property
    def limit(self) -> tuple[Limit, float] | None:
        """What is limited, and to how many nats; None where the sparsity is given."""
        if self.max_loss is not None:
            return "loss", self.max_loss
        return None if self.max_kl is None else ("kl", self.max_kl)

    @property
    def calibrated(self) -> bool:
        """Whether it takes a loaded model and text."""
        return (
            bool(self.candidates)
            or self.limit is not None
            or needs_text(self.name, self.arguments, self.rule)
        )

    @property
    def _curves_there(self) -> bool:
        """Whether the file of curves that is named is there to be read."""
        path = self.arguments.get("curves")
        return bool(path) and Path(str(path)).exists()

    @property
    def writes_curves(self) -> bool:
        """Whether a file of curves is named that is to be written."""
        return bool(self.arguments.get("curves")) and not self._curves_there

    @property
    def key(self) -> str:
        """Digest of all that the plan depends on, the model apart."""
        curves = self.arguments.get("curves", "")
        asked = {
            "sparsity": self.sparsity, "limit": self.limit, "allocator": self.name, "rule": self.rule,
            "head": self.head, "arguments": {k: str(v) for k, v in self.arguments.items() if k != "curves"},
            "curves": hashlib.sha256(Path(curves).read_bytes()).hexdigest() if self._curves_there else None,
        }  # fmt: skip
        if self.read_share is not None:
            asked |= {"read share": self.read_share, "engine": repr(self.engine)}
        if self.speedup is not None:
            asked |= {"speedup": self.speedup, "engine": repr(self.engine), "machine": machine()}
        if self.calibrated:
            content = None if self.text is None else self.text.content
            asked |= {
                "text": content and hashlib.sha256(content.encode()).hexdigest(), "tokens": self.tokens,
                "dtype": self.dtype,
            }  # fmt: skip
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class RequestedPlan:
    """What became of a request.

    Attributes:
        plan: that was asked for.
        quality: what was measured on the way, where a limit was given and the plan was not kept.
        kept: whether an earlier start made it.
        recommendation: what was tried, where the allocator was to be chosen and the plan was not kept.
    """

    plan: SparsityPlan
    quality: QualityPlan | None = None
    kept: bool = False
    recommendation: Recommendation | None = None


def requested(
    model: Opened, request: PlanRequest, stages: Stages = silent, *, fresh: bool = False
) -> RequestedPlan:
    """The plan that was asked for, kept from an earlier start or made now.

    Args:
        model: opened; loaded only if the plan is calibrated.
        request: what was asked.
        stages: told what goes on.
        fresh: make it, whatever is kept.

    Raises:
        BudgetError: the sparsity is out of reach, or no sparsity meets the limit.
        ModelError: the model cannot be read.
        TextError: the text is too short.
    """
    found = None
    if not fresh and not request.writes_curves:
        found = kept_plans.read(kept_plans.place_of(model, request.key))
    if found is not None:
        return RequestedPlan(found, kept=True)
    made = make(model, request, stages)
    # With curves that are there now, it is the request of the next start.
    kept_plans.keep(kept_plans.place_of(model, request.key), made.plan)
    return made


def make(model: Opened, request: PlanRequest, stages: Stages = silent) -> RequestedPlan:
    """Make the plan that was asked for; as :func:`requested`, but nothing is read and nothing kept."""
    named: dict[str, Any] = {
        "allocator": request.name, "arguments": request.arguments, "rule": request.rule, "head": request.head,
    }  # fmt: skip
    goal = _goal(model, request, stages)
    if not request.calibrated:
        assert goal is not None  # noqa: S101
        with stages("planning") as progress:
            return RequestedPlan(make_plan(model, goal, progress=progress, **named))
    with stages(f"loading {model.name}") as progress:
        lm, tokenizer = model.load(dtype=request.dtype, progress=progress, **request.loading)
    if sparse_state(lm) is not None:
        densify_(lm)  # what is measured is the model, not a plan that it carries
    elsewhere = None
    if request.ray is not None:
        # Not "fast", which another machine may take for another dtype.
        load = partial(_dense, model.findable, name_of(lm.dtype))
        elsewhere = Elsewhere(request.ray, load)
    if request.candidates:
        assert goal is not None  # noqa: S101
        return _chosen(lm, tokenizer, goal, request, stages, elsewhere)
    with stages("calibrating") as progress:
        text = request.text
        if text is None:
            tokens = request.tokens + (HELD_OUT_TOKENS if request.limit else 0)
            text = sample_text(lm, tokenizer, tokens=tokens, progress=progress)
        calibration = Calibration(
            lm, tokenizer, text, tokens=request.tokens, progress=progress, elsewhere=elsewhere
        )
        context = AllocationContext(LoadedWeights(lm), progress=progress, calibration=calibration)
        if request.limit is None:
            assert goal is not None  # noqa: S101
            return RequestedPlan(make_plan(None, goal, context=context, **named))
        metric, limit = request.limit
        quality = plan_for_quality(context, limit, metric=metric, **named)
    return RequestedPlan(quality.plan, quality)


def _dense(name: str, dtype: str) -> Any:
    """The dense model of a name, in whichever process."""
    lm, _ = open_model(name).load(dtype=dtype)
    if sparse_state(lm) is not None:
        densify_(lm)
    return lm


def _goal(model: Opened, request: PlanRequest, stages: Stages) -> float | Goal | None:
    """How sparse the plan is to be; None where a limit says it."""
    if request.read_share is not None:
        return read_goal(model, request.engine, request.read_share)
    if request.speedup is not None:
        with stages("timing the engine") as progress:
            return speed_goal(
                model, request.engine, request.speedup, head=_takes_head(model, request), progress=progress
            )  # fmt: skip
    return request.sparsity


def _takes_head(model: Opened, request: PlanRequest) -> bool:
    """Whether the output head will be in the budget; what is tried by trying leaves it dense."""
    if request.candidates:
        return False
    context = AllocationContext(model.weights)
    asked = budgeted(context, request.name, request.head, request.arguments)
    return asked is not context


def _chosen(
    lm: Any, tokenizer: Any, goal: float | Goal, request: PlanRequest, stages: Stages,
    elsewhere: Elsewhere | None,
) -> RequestedPlan:  # fmt: skip
    """The plan of the candidate that costs least on text that none was calibrated on."""
    calibrated = any(needs_text(name) for name in request.candidates)
    text, size = request.text, {"tokens": request.tokens}
    if not calibrated:
        size = {"tokens": SAMPLED_TOKENS, "window": SAMPLED_WINDOW}
    if text is None:
        wanted = size["tokens"] + (HELD_OUT_TOKENS if calibrated else 0)
        with stages("sampling text from the model") as progress:
            text = sample_text(lm, tokenizer, tokens=wanted, progress=progress)
    curves = {name: dict(request.arguments) for name in request.candidates if needs_text(name)}
    with stages("trying allocators") as progress:
        calibration = Calibration(
            lm, tokenizer, text, progress=progress, elsewhere=elsewhere, **size
        )
        context = AllocationContext(LoadedWeights(lm), progress=progress, calibration=calibration)
        found = recommend(context, goal, request.candidates, arguments=curves, progress=progress)
    return RequestedPlan(found.best.plan, recommendation=found)
