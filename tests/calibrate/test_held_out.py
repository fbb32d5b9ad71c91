"""Thresholds against TopK on held-out text, and what `refined` takes."""

from dataclasses import replace

import pytest
from byte_tokens import byte_tokenizer
from test_sensitivity import TEXT, tiny

from acttail import make_plan, perplexity, sparsify_
from acttail.allocate import AllocationContext
from acttail.allocate.registry import ALLOCATORS
from acttail.allocate.sensitivity import REFINED
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.held_out import against_topk
from acttail.calibrate.text import Text
from acttail.calibrate.thresholds import thresholds
from acttail.model.weights import LoadedWeights

LONG = Text("long", TEXT.content * 4)
USED = 96


def context_of(model, text=LONG):
    c = Calibration(model, byte_tokenizer(), text, tokens=USED, window=32)
    return AllocationContext(LoadedWeights(model), calibration=c)


def lopsided(calibration, sparsities):
    """Thresholds that drop nearly all of the first projections' inputs and nothing of the others."""
    names = list(sparsities)
    return {n: {"threshold": 1e3 if names.index(n) < len(names) // 2 else 0.0} for n in names}


def test_what_is_compared_is_what_a_plan_would_lose():
    model = tiny()
    context = context_of(model)
    plan = make_plan(model, 0.5, allocator="refined", rule="threshold", context=context)
    sparsities = {n: e.sparsity for n, e in plan.projections.items()}
    extras = {n: {"threshold": e.threshold} for n, e in plan.projections.items()}
    compared = against_topk(context.calibration, sparsities, extras)
    rest = Text("rest", LONG.content[USED : USED + 2048])
    assert len(rest.content) == compared.tokens // 31 * 32, "bytes are tokens"
    sparsify_(model, plan)
    result = perplexity(model, byte_tokenizer(), rest, window=32, metrics=("kl",))
    assert compared.thresholds == pytest.approx(result.kl, rel=1e-4)


def test_topk_is_given_the_share_that_thresholds_realised():
    model = tiny()
    context = context_of(model)
    sparsities = dict.fromkeys([p.name for p in context.projections], 0.5)
    # All or nothing: half of the projections at their end, against everything at about a half.
    compared = against_topk(context.calibration, sparsities, lopsided(None, sparsities))
    assert compared.topk < compared.thresholds
    nothing = {n: {"threshold": 0.0} for n in sparsities}
    assert against_topk(context.calibration, sparsities, nothing).topk == pytest.approx(0, abs=1e-6)


def test_a_short_text_is_scored_on_its_own_last_windows():
    model = tiny()
    context = context_of(model, Text("short", LONG.content[: USED + 10]))
    sparsities = dict.fromkeys([p.name for p in context.projections], 0.5)
    extras = thresholds(context.calibration, sparsities)
    assert against_topk(context.calibration, sparsities, extras).tokens == USED // 32 * 31


def test_refined_keeps_thresholds_only_where_they_lose_less(monkeypatch):
    model = tiny()
    context = context_of(model)
    plan = make_plan(model, 0.5, allocator="refined", context=context)
    under, topk = (
        float(part.split()[0]) for part in plan.notes["rule"].split("KL ")[1].split(", ")[:2]
    )
    assert plan.rule == ("threshold" if under < topk else "topk")
    start = make_plan(model, 0.5, allocator="sensitivity", context=context)

    monkeypatch.setitem(ALLOCATORS, "refined", replace(REFINED, calibrate=lopsided))
    kept = make_plan(model, 0.5, allocator="refined", context=context)
    assert kept.rule == "topk"
    assert kept.projections == start.projections, "what sensitivity gave"
    assert kept.notes["rule"].startswith("topk: KL ")
    asked = make_plan(model, 0.5, allocator="refined", rule="threshold", context=context)
    assert asked.rule == "threshold"
    assert not asked.notes
