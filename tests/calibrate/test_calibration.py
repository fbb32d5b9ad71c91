"""What was measured on one calibration is never served for another."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sensitivity import TEXT, calibration, tiny

from acttail import make_plan
from acttail.allocate import AllocationContext
from acttail.allocate.greedy import paths
from acttail.calibrate.measure import measure
from acttail.calibrate.text import Text
from acttail.model.weights import LoadedWeights

CHANGES = {
    "tokens": {"tokens": 64},
    "window": {"window": 48},
    "seed": {"seed": 1},
    # The same name: a text is what it holds.
    "text": {"text": Text(TEXT.name, TEXT.content[::-1])},
}


def plan_of(model, c, allocator="sensitivity", **arguments):
    context = AllocationContext(LoadedWeights(model), calibration=c)
    return make_plan(None, 0.5, allocator=allocator, arguments=arguments, context=context)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_protocol_is_measured_again(change):
    model = tiny()
    c = calibration(model)
    first = plan_of(model, c)
    changed = replace(c, **change)
    assert changed.key("x") != c.key("x")
    expected = measure(changed, resume=False)
    found = measure(changed)  # not the other's partial sums from the cache either
    for name, values in expected.curves.items():
        np.testing.assert_array_equal(found.curves[name], values)
    assert plan_of(model, changed) != first
    assert plan_of(model, c) == first


@pytest.mark.parametrize("parameter", [
    "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight",
])  # fmt: skip
def test_changed_weights_are_measured_again(parameter):
    """Those of a projection, and those that are none."""
    model = tiny()
    c = calibration(model)
    made = []

    def again():
        return c.once(lambda: made.append(1), "x")

    again()
    again()
    assert len(made) == 1
    before = measure(c)
    with torch.no_grad():
        model.get_parameter(parameter).mul_(1.5)
    again()
    assert len(made) == 2
    after = measure(c)
    expected = measure(c, resume=False)
    assert any((after.curves[n] != before.curves[n]).any() for n in before.curves)
    for name, values in expected.curves.items():
        np.testing.assert_array_equal(after.curves[name], values)


def test_results_are_kept_by_what_they_are_of():
    c = calibration(tiny())
    assert c.once(lambda: "a", "curves", "fisher") == "a"
    assert c.once(lambda: "b", "curves", "output") == "b"
    assert c.once(lambda: "c", "curves", "fisher") == "a"


def test_greedy_of_fewer_tokens_is_found_again(tmp_path):
    model = tiny()
    c = calibration(model)
    assert plan_of(model, c, "greedy", tokens=16) != plan_of(model, c, "greedy", tokens=32)
    # The first 32 ids are the same ones, so the paths in the cache are theirs as well.
    assert paths(replace(c, tokens=64), 32) == paths(c, 32)
    assert len(list((tmp_path / "cache" / "greedy").iterdir())) == 2


def test_curves_read_no_weight_for_a_plan_that_nobody_keeps(monkeypatch):
    """Measuring runs the model; the sketches are taken once, for the plan that comes out."""
    reads = []
    real = LoadedWeights.weight
    monkeypatch.setattr(LoadedWeights, "weight", lambda s, p: reads.append(p.name) or real(s, p))
    model = tiny()
    plan = plan_of(model, calibration(model))
    assert sorted(reads) == sorted(plan.projections)
