"""`adapt`: train a little of a sparse model until it says again what the dense one says."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from acttail.adapt.data import Windows, cut, sketched
from acttail.adapt.distil import Distillation
from acttail.adapt.exact import exact_plan
from acttail.adapt.parts import Part, attach, check_rule, undo, values
from acttail.adapt.provenance import sketched_again
from acttail.adapt.relu import Relu, Swap
from acttail.adapt.settings import BETAS, CLIP, Settings
from acttail.adapt.state import Position, RunState
from acttail.base.progress import Progress
from acttail.calibrate.text import Text
from acttail.errors import ActTailError
from acttail.plan import SparsityPlan
from acttail.sparse.apply import densify_, sparsify_

# Seconds between two writes of the state, and the most of a run's time that they may take.
_SAVE_SECONDS = 20.0
_SAVE_SHARE = 0.05


@dataclass(frozen=True)
class Adapted:
    """What came of a run; the model itself is changed in place.

    Attributes:
        plan: of the adapted model: the same budget, with sketches of the new weights.
        improved: whether the adapted model is nearer to the dense one on held-out text; if not, the model has
            its first weights again, beside ReLU where that was asked for.
        kl_before: KL(dense || sparse) per token on the held-out windows before, nats; with ReLU already put in.
        kl_after: that of the model as it is now, rounded to its dtype.
        steps: optimiser steps.
        tokens: trained on, every repeat counted.
        seconds: wall time of training and validation.
        cpu_seconds: time of all processors of the same.
        held_out: tokens that validated.
        parameters: numbers under training.
        texts: names of the texts.
        history: [(step, KL on the held-out windows)].
    """

    plan: SparsityPlan
    improved: bool
    kl_before: float
    kl_after: float
    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float
    held_out: int
    parameters: int
    texts: tuple[str, ...]
    history: tuple[tuple[int, float], ...]


def adapt(
    model: Any,
    tokenizer: Any,
    plan: SparsityPlan | None,
    texts: Sequence[Text],
    settings: Settings | None = None,
    *,
    relu: Relu | None = None,
    tokens: int | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    remark: Callable[[str], None] = lambda line: None,
) -> Adapted:
    """Distil a dense model into itself made sparse by a plan, in place.

    The loss is KL(dense || sparse) of the next token, averaged over all positions of a batch, with the plan's exact
    selection in the forward pass; gradients pass through the entries that stay. A run that was stopped goes on from
    the cache when it is started again with the same model, plan, text and settings.

    Args:
        model: a causal LM of transformers, dense or sparse; sparse under the returned plan afterwards.
        tokenizer: its tokenizer.
        plan: made for this model; None with `relu`, whose plan drops the exact zeros and nothing else.
        texts: to train and validate on; never what is scored.
        settings: see :class:`acttail.adapt.settings.Settings`.
        relu: puts ReLU into the model first, which it keeps; the model without is what is distilled.
        tokens: of each text to use; None for all.
        dtype: that the weights end in; None for what they had.
        autocast: dtype that products are computed in while training; None for float32.
        progress: called with (done, total): steps, or seconds where the run is so many minutes long.
        remark: takes one line about each validation.

    Returns:
        What came of it.

    Raises:
        PlanError: the plan was made for another model.
        ModelError: nothing of the kind can be trained in this model.
        TextError: too little text.
        ActTailError: the plan's rule does not go with what is trained, or both a plan and ReLU were given.
    """
    settings = settings or Settings()
    if (plan is None) == (relu is None):
        raise ActTailError("a model is adapted to a plan or to ReLU: give one of the two")
    if plan is not None:
        check_rule(settings.train, plan)
    densify_(model)
    ended = dtype or model.dtype
    windows = cut(texts, model, tokenizer, settings, tokens)
    model.eval().float()
    parts: list[Part] = []
    swap: Swap | None = None
    try:
        if relu is not None:
            swap = Swap(model, relu, windows.train)
        judge = _Judge(plan, relu, windows.held)
        judge.sparsify(model)
        asked = (judge.key(), windows.digest(), settings, ended, autocast)
        state = RunState(sketched(model, *asked))
        parts = attach(model, settings.train, rank=settings.rank, seed=settings.seed)
        run = _Run(model, parts, windows, settings, state, autocast, progress, remark, swap)
        at = run.train()
        made, improved, kl = _finish(model, judge, run, at, ended)
    except BaseException:
        undo(parts)
        densify_(model)
        if swap is not None:
            swap.undo()
        model.to(ended).requires_grad_(True)
        raise
    state.remove()
    model.to(ended).requires_grad_(True)
    return Adapted(
        plan=made, improved=improved, kl_before=at.before, kl_after=kl, steps=at.step,
        tokens=at.step * settings.batch * windows.train.shape[1], seconds=at.seconds,
        cpu_seconds=at.cpu_seconds, held_out=windows.held.numel(),
        parameters=sum(p.numel() for part in parts for p in part.parameters.values()),
        texts=windows.names, history=tuple(at.history),
    )  # fmt: skip


class _Run:
    """The training loop."""

    def __init__(
        self, model: Any, parts: list[Part], windows: Windows, settings: Settings, state: RunState,
        autocast: torch.dtype | None, progress: Progress | None, remark: Callable[[str], None],
        swap: Swap | None = None,
    ) -> None:  # fmt: skip
        self.parts, self.windows, self.settings = parts, windows, settings
        original = nullcontext if swap is None else swap.original
        self.distillation = Distillation(model, parts, windows.held, autocast, original)
        self.best: dict[str, torch.Tensor] = {}
        self._state, self._progress, self._remark = state, progress, remark
        self._optimiser = torch.optim.AdamW(
            [{"params": list(p.parameters.values()), "lr": p.rate, "rate": p.rate} for p in parts],
            betas=BETAS, weight_decay=0.0, fused=True,
        )  # fmt: skip
        self._parameters = [p for part in parts for p in part.parameters.values()]

    def train(self) -> Position:
        """Train until the run is over; the parts hold their best values then."""
        found = self._state.read(self.parts, self._optimiser, self.best)
        at = found or Position()
        clock = _Clock(at)
        saved = time.monotonic()
        if found is None:
            self._keep_best()
            at.before = at.best = self.distillation.validate()
            self._remark(
                f"before the first step: KL {at.before:.4f} nats per token on held-out text"
            )
        else:
            self._remark(f"goes on after step {at.step} of a run that was stopped")
        clock.tell()
        cost = 0.0
        while not at.over:
            self._one(at)
            clock.tell()
            done = self.settings.progress(at.step, at.seconds)
            if done >= (at.validated + 1) / self.settings.evaluations or done >= 1:
                self._validate(at, over=done >= 1)
                clock.tell()
            self._report(at)
            now = time.monotonic()
            if at.over or now - saved > max(_SAVE_SECONDS, cost / _SAVE_SHARE):
                self._state.write(at, self.parts, self._optimiser, self.best)
                saved = time.monotonic()
                cost = saved - now
        with torch.no_grad():
            for name, value in values(self.parts).items():
                value.copy_(self.best[name])
        return at

    def _one(self, at: Position) -> None:
        """One step of the optimiser."""
        numbers = self.windows.step(at.step, self.settings)
        self._optimiser.zero_grad()
        self.distillation.step(numbers, self.windows.train[numbers])
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        factor = self.settings.rate(at.step, self.settings.progress(at.step, at.seconds))
        for group in self._optimiser.param_groups:
            group["lr"] = group["rate"] * factor
        self._optimiser.step()
        at.step += 1

    def _validate(self, at: Position, *, over: bool) -> None:
        kl = self.distillation.validate()
        at.validated += 1
        at.history.append((at.step, kl))
        self._remark(f"step {at.step}: KL {kl:.4f} on held-out text ({at.before:.4f} before)")
        if kl < at.best:
            at.best, at.best_step, at.worse = kl, at.step, 0
            self._keep_best()
        else:
            at.worse += 1
        stalled = at.worse >= self.settings.patience
        if stalled and not over:
            self._remark(
                f"no better than step {at.best_step} in {at.worse} validations: stops early"
            )
        at.over = over or stalled

    def _keep_best(self) -> None:
        self.best = {name: value.clone() for name, value in values(self.parts).items()}

    def _report(self, at: Position) -> None:
        if self._progress is None:
            return
        if self.settings.steps is not None:
            self._progress(at.step, self.settings.steps)
        elif self.settings.minutes is not None:
            total = round(60 * self.settings.minutes)
            self._progress(min(int(at.seconds), total), total)


class _Clock:
    """Adds to a position the time that has passed since it was last told."""

    def __init__(self, position: Position) -> None:
        self._position = position
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def tell(self) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        self._position.seconds += wall - self._wall
        self._position.cpu_seconds += cpu - self._cpu
        self._wall, self._cpu = wall, cpu


class _Judge:
    """The plan that a run is under, and the one that its result gets."""

    def __init__(self, plan: SparsityPlan | None, relu: Relu | None, held: torch.Tensor) -> None:
        self._plan, self._relu, self._held = plan, relu, held

    def key(self) -> str:
        """All that it depends on, the model and its windows apart."""
        asked: SparsityPlan | Relu | None = self._plan or self._relu
        assert asked is not None  # noqa: S101  (one of the two is given)
        return json.dumps(asked.to_dict())

    def sparsify(self, model: Any, note: str | None = None) -> SparsityPlan:
        """Make a dense model sparse, as the run or its result is.

        Args:
            model: in place.
            note: what was done to its weights; None where they are those that the run began with.
        """
        if self._relu is not None:
            made = exact_plan(model, self._relu, self._held, note or "not trained")
        else:
            assert self._plan is not None  # noqa: S101  (one of the two is given)
            made = self._plan if note is None else sketched_again(self._plan, model, note)
        sparsify_(model, made)
        return made


def _finish(
    model: Any, judge: _Judge, run: _Run, at: Position, dtype: torch.dtype
) -> tuple[SparsityPlan, bool, float]:
    """Merge, round as the result will be, make the plan match, and judge the whole on held-out text.

    Returns:
        (plan of the model as it is now, whether it is better than what there was, its KL); where it is not, the
        weights are those from before, and so is the KL.
    """
    if at.best < at.before:
        for part in run.parts:
            part.merge()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.to(dtype))
        densify_(model)
        note = f"{'+'.join(run.settings.train)}, {at.step} steps on {', '.join(run.windows.names)}"
        adapted = judge.sparsify(model, note)
        kl = run.distillation.validate()
        if kl < at.before:
            return adapted, True, kl
    undo(run.parts)
    densify_(model)
    return judge.sparsify(model), False, at.before
