"""Plans as they are made: each matrix is read once, rules go with allocators, nothing asked for is dropped."""

from collections import Counter

import numpy as np
import pytest
from families import build

from acttail.allocate import (
    ALLOCATORS,
    SELECTIONS,
    AllocationContext,
    Needs,
    get,
    make_plan,
    needs_text,
    with_curves,
)
from acttail.allocate.selection import selection_for
from acttail.calibrate.curves import SensitivityCurves
from acttail.errors import ActTailError, PlanError, TextError
from acttail.model.weights import LoadedWeights
from acttail.plan import RULES, sketch

GRID = np.array([0.0, 0.5, 0.9, 0.99])


class CountingWeights:
    """A real model's weights, every read of a matrix counted, of a few of its entries too."""

    def __init__(self, model):
        self._weights = LoadedWeights(model)
        self.name, self.projections = self._weights.name, self._weights.projections
        self.head = self._weights.head
        self.reads = Counter()

    def weight(self, projection):
        self.reads[projection.name] += 1
        return self._weights.weight(projection)

    def entries(self, projection, index):
        self.reads[projection.name] += 1
        return self._weights.entries(projection, index)

    def tensor(self, name):
        return self._weights.tensor(name)


def curves_like(projections, loss="fisher", seed=0):
    rng = np.random.default_rng(seed)
    curves = {p.name: float(rng.uniform(0.5, 2)) * GRID**2 for p in projections}
    return SensitivityCurves(GRID, curves, {"loss": loss})


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("arguments", [
    ("acttail", {}), ("acttail", {"estimator": "farms"}), ("energy", {}), ("uniform", {}), ("wina", {}),
])  # fmt: skip
def test_each_matrix_is_read_once(family, arguments):
    allocator, given = arguments
    model = build(family)
    for _ in ("spectra computed", "spectra from the cache"):
        weights = CountingWeights(model)
        plan = make_plan(weights, 0.5, allocator=allocator, arguments=given)
        assert weights.reads == dict.fromkeys(plan.projections, 1)
    # What was taken on the way is the sketch of that matrix, and none is mixed up with another.
    loaded = LoadedWeights(model)
    for p in loaded.projections:
        assert plan.projections[p.name].sketch == sketch(loaded.weight(p))


def test_another_sparsity_of_a_context_reads_nothing(llama):
    weights = CountingWeights(llama)
    context = AllocationContext(weights)
    for sparsity in (0.3, 0.5):
        for allocator in ("acttail", "theory", "uniform", "energy"):
            make_plan(None, sparsity, allocator=allocator, context=context)
    assert set(weights.reads.values()) == {1}


def test_curves_of_a_file_read_each_matrix_once(llama, tmp_path):
    weights = CountingWeights(llama)
    path = tmp_path / "curves.safetensors"
    curves_like(weights.projections).save(path)
    make_plan(weights, 0.5, allocator="sensitivity", arguments={"curves": str(path)})
    assert set(weights.reads.values()) == {1}


def test_fits_of_one_plan_do_not_leak_into_the_next(llama):
    context = AllocationContext(LoadedWeights(llama))
    assert make_plan(None, 0.5, context=context).projections[_first(context)].alpha is not None
    for name in ("uniform", "depth", "energy"):
        plan = make_plan(None, 0.5, allocator=name, context=context)
        assert all(e.alpha is None and e.tail_size is None for e in plan.projections.values())


def _first(context):
    return context.projections[0].name


@pytest.mark.parametrize("name", ["cats", "wina"])
def test_an_allocator_that_is_its_rule_takes_no_other(llama, name):
    weights = CountingWeights(llama)
    for rule in ("topk", "threshold", "teal"):
        with pytest.raises(ActTailError, match=f"{name} has a rule of its own"):
            make_plan(weights, 0.2, allocator=name, rule=rule)
    assert not weights.reads, "judged before anything is read"
    assert selection_for(get(name), name).rule.name == name


def test_rules_are_judged_before_the_model_is_read(llama):
    weights = CountingWeights(llama)
    for rule in ("best", "top-p", "cats"):
        with pytest.raises(ActTailError, match=f"unknown rule '{rule}': use topk, wina, "):
            make_plan(weights, 0.5, rule=rule)
    for rule in ("threshold", "teal"):
        with pytest.raises(TextError, match="--calibration-text"):
            make_plan(weights, 0.5, rule=rule)
    assert not weights.reads
    assert make_plan(weights, 0.5, allocator="uniform", rule="wina").rule == "wina"


def needs_more(row):
    """Whether a rule needs more of an entry than its k."""
    return RULES[row.rule.name] is not None


def test_a_rule_that_needs_text_has_its_step():
    """Whatever an allocator runs under, what the rule needs of each entry is there afterwards."""
    for row in ALLOCATORS.values():
        selection = selection_for(row, None)
        assert (selection.calibrate is not None) == needs_more(selection) == needs_more(row)
    for name, selection in SELECTIONS.items():
        assert selection_for(get("uniform"), name) is selection
        assert (selection.calibrate is not None) == needs_more(selection)


def test_who_needs_text(tmp_path):
    there = tmp_path / "curves.safetensors"
    there.write_bytes(b"")
    for name, row in ALLOCATORS.items():
        rule = None if row.fixed_rule else "topk"
        own = row.fixed_rule and row.calibrate is not None
        assert needs_text(name, rule=rule) == (own or row.needs in (Needs.CURVES, Needs.TEXT))
        if not row.fixed_rule:
            assert needs_text(name, rule="threshold")
            assert needs_text(name, rule="teal")
    assert not needs_text("sensitivity", {"curves": str(there)})
    assert needs_text("sensitivity", {"curves": str(tmp_path / "nowhere")})
    assert needs_text("refined", {"curves": str(there)}), "its thresholds come from text"
    assert needs_text("ffn-only")
    with pytest.raises(ActTailError, match="no argument 'curve'"):
        needs_text("sensitivity", {"curve": str(there)})


def test_ffn_only_under_topk_needs_no_text(llama):
    plan = make_plan(llama, 0.3, allocator="ffn-only", rule="topk")
    assert plan.solved_sparsity == pytest.approx(0.3, abs=1e-3)


def test_a_file_of_curves_goes_to_those_that_use_it(tmp_path, llama):
    path = tmp_path / "curves.safetensors"
    asked = {"uniform": {}, "sensitivity": {"loss": "fisher"}, "refined": {"curves": "mine"}}
    found = with_curves(asked, str(path))
    assert found["uniform"] == {}
    assert found["sensitivity"] == {"loss": "fisher", "curves": str(path)}
    assert found["refined"] == {"curves": "mine"}
    assert with_curves(asked, None) == asked
    with pytest.raises(
        ActTailError, match=r"none of uniform, acttail uses curves; add sensitivity"
    ):
        with_curves({"uniform": {}, "acttail": {}}, str(path))
    path.write_bytes(b"junk")
    with pytest.raises(PlanError, match="cannot read curves"):
        with_curves(asked, str(path))


def test_the_loss_asked_for_is_the_loss_of_the_curves(llama, tmp_path):
    path = str(tmp_path / "curves.safetensors")
    curves_like(LoadedWeights(llama).projections, loss="output").save(path)
    with pytest.raises(PlanError, match="measured with loss=output, not fisher: set loss=output"):
        make_plan(llama, 0.5, allocator="sensitivity", arguments={"curves": path})
    plan = make_plan(
        llama, 0.5, allocator="sensitivity", arguments={"curves": path, "loss": "output"}
    )
    assert plan.arguments == {"curves": path, "loss": "output"}


def test_curves_at_hand_are_used_and_not_measured(llama):
    context = AllocationContext(LoadedWeights(llama))
    context.curves = curves_like(context.projections)
    plan = make_plan(None, 0.5, allocator="sensitivity", context=context)
    assert plan.solved_sparsity == pytest.approx(0.5, abs=1e-3)
    context.curves = curves_like(LoadedWeights(build("gpt2")).projections)
    with pytest.raises(PlanError, match="another model"):
        make_plan(None, 0.5, allocator="sensitivity", context=context)
