"""How fast a plan will decode on this machine, before there is one: a budget in time.

Two measurements make the forecast. The kernels' times by shape and density (:mod:`acttail.engine.tune`) say what a
projection's inputs cost against another's. The engine itself, timed by turns dense and at a few uniform sparsities,
says what a token costs beside its matrices, selection and attention included, and how much the kernels' times count
among all else: time(plan) / time(dense) = a + b * kernels(plan) / kernels(dense), fitted by least squares.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from acttail.allocate import make_plan
from acttail.allocate.goal import Goal, Price
from acttail.base.machine import processor_name
from acttail.base.progress import Progress
from acttail.engine import Engine, NativeEngine
from acttail.engine.config import EngineConfig
from acttail.engine.layout import Layout
from acttail.engine.tune import Crossover, measured
from acttail.engine.uniform import uniform_plan
from acttail.errors import BudgetError
from acttail.evaluate.speed import Contestant, EngineContestant, Speed, measure
from acttail.model.opened import Opened
from acttail.plan import SparsityPlan

# What a plan says of its speed; the number comes first.
FORECAST = "forecast"
_UNIFORM = (0.3, 0.5, 0.7)
# A prompt so short that it is decoded: what is timed is decoding.
_PROMPT = 2
# Many short runs by turns: a virtual machine's speed drifts by a tenth within a second, and a ratio of neighbours does
# not see it. A run takes about this long, all of them this long, with so many rounds at least and at most.
_RUN_SECONDS, _SECONDS = 0.15, 20.0
_ROUNDS = (5, 30)
_FEWEST, _MOST = 2, 64


@dataclass(frozen=True)
class Clock:
    """Where the time of a token goes, in units of a dense token's.

    Attributes:
        base: of a token under any plan, beside its matrices.
        prices: projection -> its time by the share of its inputs that is kept.
        threads: that were timed.
        dtype: of the engine's weights.
    """

    base: float
    prices: Mapping[str, Price]
    threads: int
    dtype: str


def check_speedup(speedup: float) -> None:
    """Refuse what is no speedup.

    Raises:
        BudgetError: it is not a finite number of at least 1.
    """
    if not 1 <= speedup < math.inf:
        raise BudgetError(f"a speedup must be a number of at least 1, got {speedup}")


def speed_goal(
    model: Opened, config: EngineConfig, speedup: float, *, head: bool, progress: Progress | None = None
) -> Goal:  # fmt: skip
    """The most time that a token may take: that of a dense one over the speedup.

    Args:
        model: opened.
        config: of the engine that will decode.
        speedup: at least 1.
        head: whether the output head is in the budget.
        progress: called with (runs done, runs) while the engine is timed.

    Raises:
        BudgetError: no such speedup.
        UnsupportedModelError: the native engine does not run the model.
        ActTailError: there is no native library.
    """
    check_speedup(speedup)
    clock = time_engine(model, config, head=head, progress=progress)

    def describe(cost: float) -> dict[str, str]:
        at = f"{clock.dtype} on {clock.threads} thread{'s' * (clock.threads > 1)} of {processor_name()}"
        return {
            FORECAST: f"{1 / cost:.3f} times the dense decode, {at} ({speedup:g} was asked for)"
        }

    return Goal(
        f"a speedup of {speedup:g}", 1 / speedup, 1.0, clock.base, clock.prices, {}, describe,
        lambda cost: 1 / cost,
    )  # fmt: skip


def forecast_of(plan: SparsityPlan) -> float | None:
    """The speedup over dense decoding that a plan forecasts, None if it says nothing of it."""
    try:
        return float(plan.notes[FORECAST].split()[0])
    except (KeyError, IndexError, ValueError):  # none, or a note of somebody's own
        return None


def time_engine(
    model: Opened, config: EngineConfig, *, head: bool, progress: Progress | None = None
) -> Clock:
    """Time the engine dense and at uniform sparsities, and share the difference out among the projections.

    Args:
        model: opened.
        config: of the engine.
        head: whether the output head may be sparse.
        progress: called with (runs done, runs).

    Raises:
        UnsupportedModelError: the native engine does not run the model.
        ActTailError: there is no native library.
    """
    dense = _opened(model, None, config)
    # A head that may be sparse lies by its inputs, in memory of its own.
    plan = make_plan(model, 0.5, allocator="uniform", head=True) if head else None
    sparse = _opened(model, plan, config) if head else dense
    contestants: dict[str, Contestant] = {"dense": EngineContestant(dense)}
    for s in _UNIFORM:
        other = sparse.with_own_plan(uniform_plan(sparse, s))
        contestants[f"{s}"] = EngineContestant(other)
    layout = sparse.packed.layout
    crossings = dict(zip(layout.segments, measured(layout.shapes[n] for n in layout.segments), strict=True))  # fmt: skip
    speeds = _run(contestants, dense.vocabulary, dense.threads, progress)
    times = [1 / speeds.ratio(f"{s}", "dense").median for s in _UNIFORM]
    base, factor = fit([_kernels(layout, crossings, 1 - s) for s in _UNIFORM], times)
    whole = _kernels(layout, crossings, 1.0, relative=False)
    prices = {}
    for name, segments in layout.segments.items():
        outputs = sum(segment.d_out for segment in segments)
        for segment in segments:
            mine = float(layout.share(name)) * segment.d_out / outputs
            share = factor * crossings[name].seconds * mine / whole
            prices[segment.name] = priced(crossings[name], share)
    return Clock(base, prices, dense.threads, dense.dtype)


def fit(kernels: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """A and b of times = a + b * kernels, by least squares; neither is below 0.

    Args:
        kernels: [n] time of the kernels over that of dense ones.
        times: [n] time of a token over that of a dense one.
    """
    b, a = np.polyfit(np.asarray(kernels), np.asarray(times), 1)
    if a < 0:  # a line through nothing
        return 0.0, float(np.dot(kernels, times) / np.dot(kernels, kernels))
    return float(a), max(float(b), 1e-6)


def priced(crossing: Crossover, dense: float) -> Price:
    """The price of a projection whose dense kernel costs `dense`: of sparse kernels up to the crossover, then of that.

    A kernel that is measured to take longer with less to read is noise, so prices do not fall with the density.
    """
    densities = sorted(crossing.ratios)
    ratios = [min(crossing.ratios[d], 1.0) if d < crossing.density or crossing.density == 1 else 1.0 for d in densities]  # fmt: skip
    rising = np.maximum.accumulate(ratios)
    # Below the least that was measured, a line to nothing.
    return Price((0.0, *densities), (0.0, *(dense * float(r) for r in rising)))


def _opened(model: Opened, plan: SparsityPlan | None, config: EngineConfig) -> NativeEngine:
    found = Engine.from_pretrained(
        model, plan, dtype=config.dtype, threads=config.threads, native=True
    )
    assert isinstance(found, NativeEngine)  # noqa: S101
    return found if plan is not None else found.with_plan(None)


def _kernels(
    layout: Layout, crossings: Mapping[str, Crossover], density: float, *, relative: bool = True
) -> float:
    """Seconds of the kernels of one token with this share of every input kept; over those of a dense token."""
    seconds = {n: float(layout.share(n)) * crossings[n].seconds for n in layout.segments}
    total = sum(priced(crossings[n], s).at(density) for n, s in seconds.items())
    return total / sum(seconds.values()) if relative else total


def _run(
    contestants: Mapping[str, Contestant], vocabulary: int, threads: int, progress: Progress | None
) -> Speed:
    """Every contestant by turns."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary // 10, vocabulary, (_PROMPT,), generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        contestants["dense"].round(prompt, _FEWEST)
        runs = [sum(contestants["dense"].round(prompt, _FEWEST)) for _ in range(3)]
        each = max(statistics.median(runs) / (_PROMPT + _FEWEST), 1e-9)
        tokens = min(max(round(_RUN_SECONDS / each), _FEWEST), _MOST)
        run = len(contestants) * each * (_PROMPT + tokens)
        rounds = min(max(round(_SECONDS / run), _ROUNDS[0]), _ROUNDS[1])
        return measure(contestants, prompt, new_tokens=tokens, rounds=rounds, progress=progress)
    finally:
        torch.set_num_threads(before)
