"""Allocators: the budget holds for all of them, and each follows its formula."""

import numpy as np
import pytest
import torch
from families import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acttail.allocate import ALLOCATORS, AllocationContext, get, make_plan, needs_text
from acttail.allocate.acttail import GRANULARITIES, offsets
from acttail.allocate.base import block_means, unit
from acttail.errors import ActTailError, BudgetError
from acttail.maths.budget import model_sparsity
from acttail.model.projections import Projection
from acttail.model.weights import LoadedWeights

DATA_FREE = [name for name in ALLOCATORS if not needs_text(name)]


class RandomWeights:
    """A made-up model: random shapes and spectra, no transformer around them."""

    name = "random"
    head = None

    def __init__(self, seed: int, blocks: int, costs_scale: float) -> None:
        rng = np.random.default_rng(seed)
        self.projections = []
        self._weights = {}
        for block in range(blocks):
            for kind in ("q", "down", "up"):
                d_in, d_out = (int(v) for v in rng.integers(5, 60, size=2))
                name = f"{block}.{kind}"
                cost = float(d_in * d_out * rng.uniform(1, costs_scale))
                self.projections.append(
                    Projection(name, block, kind, d_in, d_out, cost, name, "weight", None, False)
                )
                decay = np.arange(1, d_in + 1) ** -rng.uniform(0, 2)
                self._weights[name] = torch.from_numpy(rng.standard_normal((d_out, d_in)) * decay)

    def weight(self, projection):
        return self._weights[projection.name]

    def entries(self, projection, index):
        return self._weights[projection.name].flatten()[index]


@given(
    st.integers(0, 10_000), st.integers(1, 4), st.floats(1, 100), st.floats(0, 0.99),
    st.sampled_from(DATA_FREE),
)  # fmt: skip
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_budget_holds_for_every_allocator(seed, blocks, scale, target, name):
    weights = RandomWeights(seed, blocks, scale)
    plan = make_plan(weights, target, allocator=name)
    values = [p.sparsity for p in plan.projections.values()]
    assert all(0 <= s <= 0.99 for s in values)
    assert plan.solved_sparsity == pytest.approx(target, abs=1e-3)
    costs = [p.cost for p in weights.projections]
    assert plan.solved_sparsity == pytest.approx(model_sparsity(values, costs))
    assert all(
        p.k == max(1, int(p.d_in * (1 - p.sparsity) + 0.5)) for p in plan.projections.values()
    )


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_every_allocator_on_real_module_trees(name, family):
    plan = make_plan(build(family), 0.5, allocator=name)
    assert plan.solved_sparsity == pytest.approx(0.5, abs=1e-3)
    assert plan.allocator == name
    uses_alpha = name not in ("uniform", "wina", "depth", "energy", "larosa")
    assert all((p.alpha is not None) == uses_alpha for p in plan.projections.values())


def context_of(model):
    return AllocationContext(LoadedWeights(model))


def test_offsets_follow_the_formulas(llama):
    context = context_of(llama)
    alphas = context.alphas("hill")
    bar = block_means(alphas, context.blocks)
    deviation = alphas - bar
    expected = {
        "projection": 0.2 * unit(alphas),
        "block": 0.2 * unit(bar),
        "within-block": -0.2 * unit(deviation),
        "two-level": 0.2 * unit(bar) - 0.3 * unit(deviation),
    }
    for granularity, value in expected.items():
        np.testing.assert_allclose(offsets(alphas, context, granularity, 0.2, 0.3), value)
    by_type = offsets(alphas, context, "type-normalised", 0.2, 0.3)
    assert by_type.min() == pytest.approx(-0.2)
    assert by_type.max() == pytest.approx(0.2)
    for b in range(3):
        assert bar[context.blocks == b] == pytest.approx(alphas[context.blocks == b].mean())


def test_signs(llama):
    """Importance: higher alpha sparser. Capacity: lower alpha sparser."""
    context = context_of(llama)
    for arguments, sign in (
        ({"granularity": "projection"}, 1),
        ({"granularity": "within-block"}, -1),
    ):
        plan = make_plan(llama, 0.5, arguments={**arguments, "estimator": "ks", "epsilon": 0.1})
        s = np.array([p.sparsity for p in plan.projections.values()])
        alphas = context.alphas("ks")
        x = alphas if sign > 0 else alphas - block_means(alphas, context.blocks)
        assert np.corrcoef(x, s)[0, 1] * sign > 0.99
    alphas = context.alphas("hill")
    for name, sign in (("theory-capacity", -1), ("theory-importance", 1)):
        square = [i for i, p in enumerate(context.projections) if p.kind in "qo"]
        s = np.array(
            [p.sparsity for p in make_plan(llama, 0.5, allocator=name).projections.values()]
        )
        assert np.corrcoef(alphas[square], s[square])[0, 1] * sign > 0.9


def test_theory_sign_argument_equals_the_named_forms(llama):
    for sign in ("capacity", "importance"):
        a = make_plan(llama, 0.4, allocator="theory", arguments={"sign": sign})
        b = make_plan(llama, 0.4, allocator=f"theory-{sign}")
        assert [p.k for p in a.projections.values()] == [p.k for p in b.projections.values()]
    with pytest.raises(ActTailError, match="unknown sign"):
        make_plan(llama, 0.4, allocator="theory", arguments={"sign": "up"})


def test_controls(llama):
    uniform = make_plan(llama, 0.37, allocator="uniform")
    assert {p.sparsity for p in uniform.projections.values()} == {0.37}
    depth = make_plan(llama, 0.5, allocator="depth", arguments={"epsilon": 0.2})
    by_block = [
        {round(p.sparsity, 6) for p in depth.projections.values() if p.block == b} for b in range(3)
    ]
    assert [len(s) for s in by_block] == [1, 1, 1]
    assert min(by_block[2]) - min(by_block[0]) == pytest.approx(0.4)
    kinds = {}
    for p in make_plan(llama, 0.5, allocator="per-type").projections.values():
        kinds.setdefault(p.kind, set()).add(round(p.sparsity, 9))
    assert all(len(v) == 1 for v in kinds.values())
    assert len(set().union(*kinds.values())) > 1
    reversed_, forward = (make_plan(llama, 0.5, allocator=a) for a in ("reversed", "acttail"))
    a = np.array([p.sparsity for p in reversed_.projections.values()])
    b = np.array([p.sparsity for p in forward.projections.values()])
    assert np.corrcoef(a, b)[0, 1] < -0.99


def test_permuted_is_seeded(llama):
    plans = [make_plan(llama, 0.5, allocator="permuted", arguments={"seed": s}) for s in (1, 1, 2)]
    ks = [[p.k for p in plan.projections.values()] for plan in plans]
    assert ks[0] == ks[1]
    assert ks[0] != ks[2]


def test_a_zero_matrix_gets_a_neutral_budget(llama):
    llama.model.layers[1].self_attn.o_proj.weight.data.zero_()
    plan = make_plan(llama, 0.5, arguments={"granularity": "projection"})
    entry = plan.projections["model.layers.1.self_attn.o_proj"]
    assert entry.alpha is None
    assert "zero matrix" in entry.flag
    assert plan.solved_sparsity == pytest.approx(0.5)


def test_arguments_are_checked():
    rule = get("acttail")
    assert rule.arguments({"epsilon": "0.3"})["epsilon"] == 0.3
    for bad, match in (
        ({"eps": 1}, "no argument 'eps'"),
        ({"epsilon": "wide"}, "must be of type float"),
        ({"epsilon": "nan"}, "must be finite"),
    ):
        with pytest.raises(ActTailError, match=match):
            rule.arguments(bad)
    with pytest.raises(ActTailError, match="unknown allocator 'best'"):
        get("best")


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "per-neuron"])
def test_granularities_by_name(llama, granularity):
    if granularity in GRANULARITIES:
        make_plan(llama, 0.3, arguments={"granularity": granularity})
    else:
        with pytest.raises(ActTailError, match="unknown granularity"):
            make_plan(llama, 0.3, arguments={"granularity": granularity})


@pytest.mark.parametrize("target", [1.2, float("nan"), -1])
def test_bad_targets(llama, target):
    with pytest.raises(BudgetError):
        make_plan(llama, target)


def test_ffn_only_leaves_attention_dense(llama):
    rule = get("ffn-only")
    context = context_of(llama)
    s = rule.allocate(context, 0.4, {}).sparsities
    assert model_sparsity(s, context.costs) == pytest.approx(0.4)
    for p, value in zip(context.projections, s, strict=True):
        assert (value > 0) == (p.kind in ("gate", "up", "down"))
    with pytest.raises(BudgetError, match=r"at most, not 0\.9"):
        rule.allocate(context, 0.9, {})


def test_unit():
    assert unit(np.array([2.0, 3.0, 4.0])).tolist() == [-1, 0, 1]
    assert unit(np.array([2.0, 2.0])).tolist() == [0, 0]
