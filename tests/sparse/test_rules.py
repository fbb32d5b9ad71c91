"""Selection rules besides TopK, each against a few plain lines of its source's definition."""

import pytest
import torch
from families import build

from acttail import make_plan, sparsify_
from acttail import plan as plan_format
from acttail.plan import SparsityPlan
from acttail.sparse.counting import counting
from acttail.sparse.rules import (
    RULES,
    Dense,
    NativeCode,
    NativeRule,
    ScaledTopK,
    Threshold,
    TopK,
    TopP,
    bind,
)


def test_wina_is_topk_of_magnitude_times_column_norm():
    """WINA (2505.19427), equation 5: keep the K largest |x_i| * ||W[:, i]||."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 40), torch.randn(30, 40) * torch.rand(40) * 3
    score = x.abs() * weight.norm(dim=0)
    expected = torch.zeros_like(x)
    for row in range(6):
        for j in sorted(range(40), key=lambda j: -score[row, j])[:13]:
            expected[row, j] = x[row, j]
    assert torch.equal(ScaledTopK(13, weight.norm(dim=0))(x), expected)


def test_wina_plan_on_a_model(llama):
    plan = make_plan(llama, 0.5, allocator="uniform", rule="wina")
    assert SparsityPlan.from_dict(plan.to_dict()).rule == "wina"
    ids = torch.randint(3, 99, (1, 12))
    for p in plan.projections:
        module = llama.get_submodule(p)
        norms, k = module.weight.detach().norm(dim=0), plan.projections[p].k
        module.register_forward_pre_hook(
            lambda m, a, norms=norms, k=k: (
                a[0] * torch.zeros_like(a[0]).scatter(-1, (a[0].abs() * norms).topk(k).indices, 1),
            )
        )
    with torch.no_grad():
        expected = llama(ids).logits
        twin = build("llama")
        torch.testing.assert_close(
            sparsify_(twin, plan)(ids).logits, expected, rtol=1e-4, atol=1e-5
        )


def test_threshold():
    x = torch.tensor([[0.5, -2.0, 1.0, float("nan")]])
    y = Threshold(1.0)(x)
    assert y[0, :3].tolist() == [0, -2, 0]
    assert y[0, 3].isnan()
    assert int(Threshold(1.0).kept(x).sum()) == 2


def test_top_p():
    x = torch.tensor([[5.0, -3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert TopP(0.75)(x).tolist() == [[5, -3, 0, 0], [1, 1, 1, 0]]
    assert TopP(0.01)(x).tolist() == [[5, 0, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(TopP(1.0)(x), x)
    assert int(TopP(0.75).kept(x).sum()) == 5


def test_topk_counts():
    x = torch.randn(3, 8)
    assert int(TopK(5).kept(x).sum()) == 15


def test_variable_rules_report_what_they_realised(llama):
    plan = make_plan(llama, 0.5, allocator="uniform")
    data = plan.to_dict() | {"rule": "threshold"}
    for entry in data["projections"].values():
        entry["threshold"] = 0.6
    sparsify_(llama, SparsityPlan.from_dict(data))
    seen = {}

    def hook(name):
        return lambda m, a, out: seen.setdefault(name, []).append(a[0])

    for name in data["projections"]:
        llama.get_submodule(name).register_forward_hook(hook(name))
    with torch.no_grad(), counting(llama) as counter:
        llama(torch.randint(3, 99, (2, 12)))
    for name, value in counter.realised().projections.items():
        x = seen[name][0]
        assert value == pytest.approx(float((x.abs() <= 0.6).float().mean()))


def as_rule(plan, rule, **fields):
    """The plan under another rule, every entry with these fields."""
    data = plan.to_dict() | {"rule": rule}
    for entry in data["projections"].values():
        entry.update(fields)
    return SparsityPlan.from_dict(data)


def test_the_registry_has_the_rules_of_the_plan_format():
    assert set(RULES) == set(plan_format.RULES)
    assert all(kind.name == name for name, kind in RULES.items())


@pytest.mark.parametrize("name", RULES)
def test_a_bound_rule_is_what_its_row_says(name, llama):
    plan = as_rule(make_plan(llama, 0.5, allocator="uniform"), name, threshold=0.5, p=0.5)
    kind, entry = RULES[name], next(iter(plan.projections.values()))
    rule = bind(plan, entry, lambda: torch.ones(entry.d_in))
    if kind.watch is None:
        assert isinstance(rule, kind.rule)
        assert rule.fixed_k == kind.fixed_k
        assert (rule.native and rule.native.code) == kind.native
    if kind.at_level is not None:
        assert isinstance(kind.at_level(0.5, entry.d_in), kind.rule)


def test_what_the_native_engine_is_told(llama):
    plan = make_plan(llama, 0.5, allocator="uniform")
    entry = next(iter(plan.projections.values()))
    norms = torch.rand(entry.d_in)

    def told(rule, **fields):
        made = as_rule(plan, rule, **fields)
        return bind(made, next(iter(made.projections.values())), lambda: norms).native

    assert told("topk") == NativeRule(NativeCode.TOPK, k=entry.k)
    assert told("wina").score_scale is norms
    assert told("threshold", threshold=0.25) == NativeRule(NativeCode.THRESHOLD, threshold=0.25)
    assert told("threshold") == NativeRule(NativeCode.DENSE)
    assert told("top-p", p=0.5) is None


@pytest.mark.parametrize("rule", ["threshold", "top-p", "cats"])
def test_what_lacks_its_number_stays_dense(rule, llama):
    """Whatever sparsity was solved for it: in the model, in what is counted and in the plan's own k."""
    ids = torch.randint(3, 99, (2, 12))
    with torch.no_grad():
        expected = llama(ids).logits
    plan = as_rule(make_plan(llama, 0.5, allocator="uniform"), rule)
    assert plan.realised_sparsity == 0
    assert plan.solved_sparsity == pytest.approx(0.5, abs=1e-3)
    assert SparsityPlan.from_dict(plan.to_dict()) == plan
    sparsify_(llama, plan)
    with torch.no_grad(), counting(llama) as counter:
        assert torch.equal(llama(ids).logits, expected)
    assert counter.realised().model == 0


def test_norms_are_asked_for_by_the_rule_that_scores_with_them(llama):
    def never():
        raise AssertionError

    plan = make_plan(llama, 0.5, allocator="uniform")
    entry = next(iter(plan.projections.values()))
    assert bind(plan, entry, never) == TopK(entry.k)
    whole = as_rule(make_plan(llama, 0.0, allocator="uniform"), "wina")
    assert bind(whole, next(iter(whole.projections.values())), never) == Dense()
