"""A plan again at another sparsity: the same as planning, under the true name, or a reason why not."""

from dataclasses import replace

import pytest
from families import build
from test_making import CountingWeights, curves_like

from acttail.allocate import ALLOCATORS, Needs, make_plan
from acttail.allocate.replan import curves_of, replan
from acttail.errors import PlanError
from acttail.model.weights import LoadedWeights
from acttail.plan import build_plan


def ks(plan):
    return {name: e.k for name, e in plan.projections.items()}


@pytest.mark.parametrize("name", [
    n for n, a in ALLOCATORS.items() if a.needs is Needs.ENTRIES and a.calibrate is None
])  # fmt: skip
def test_equals_planning(llama, name):
    rule = None if ALLOCATORS[name].fixed_rule else "topk"
    made, wanted = (make_plan(llama, s, allocator=name, rule=rule) for s in (0.3, 0.45))
    assert replan(made, 0.45) == wanted


@pytest.mark.parametrize("name", ["sensitivity", "refined"])
def test_curves_of_the_file_a_plan_names(llama, tmp_path, name):
    path = str(tmp_path / "curves.safetensors")
    curves_like(LoadedWeights(llama).projections).save(path)
    made, wanted = (
        make_plan(llama, s, allocator=name, arguments={"curves": path}, rule="topk")
        for s in (0.3, 0.6)
    )
    assert replan(made, 0.6) == wanted
    assert curves_of(made).grid.tolist() == curves_like([]).grid.tolist()
    (tmp_path / "curves.safetensors").unlink()
    with pytest.raises(PlanError, match=f"{name} needs its curves .*--curves"):
        replan(made, 0.6)


@pytest.mark.parametrize("name", ["acttail", "uniform", "energy", "greedy", "from-file"])
def test_a_plan_solved_by_curves_says_so(llama, name):
    """The old allocator's name, arguments and exponents would tell of a budget that is gone."""
    weights = LoadedWeights(llama)
    curves = curves_like(weights.projections, loss="output")
    made = replace(make_plan(llama, 0.5, allocator="acttail"), allocator=name)
    again = replan(made, 0.6, curves)
    assert again.allocator == "sensitivity"
    assert again.arguments == {"loss": "output", "curves": ""}
    assert all(e.alpha is None and e.tail_size is None for e in again.projections.values())
    context_free = make_plan(
        CountingWeights(llama), 0.6, allocator="sensitivity",
        arguments={"loss": "output"}, context=_with(weights, curves),
    )  # fmt: skip
    assert again == context_free


def _with(weights, curves):
    from acttail.allocate import AllocationContext

    return AllocationContext(weights, curves=curves)


def test_what_a_plan_does_not_hold(llama):
    energy = make_plan(llama, 0.5, allocator="energy")
    with pytest.raises(PlanError, match="energy needs the spectra of the weights"):
        replan(energy, 0.6)
    with pytest.raises(PlanError, match="greedy needs calibration text"):
        replan(replace(energy, allocator="greedy", arguments={"tokens": 512}), 0.6)
    with pytest.raises(PlanError, match="no alpha"):
        replan(replace(energy, allocator="acttail"), 0.6)
    weights = LoadedWeights(llama)
    given = {p.name: 0.5 for p in weights.projections}
    by_hand = build_plan(weights, given, sparsity=None, allocator="from-file", arguments={})
    with pytest.raises(PlanError, match="budget is from-file cannot be solved again"):
        replan(by_hand, 0.6)
    other = curves_like(LoadedWeights(build("gpt2")).projections)
    with pytest.raises(PlanError, match="another model"):
        replan(by_hand, 0.6, other)
