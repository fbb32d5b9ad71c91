"""The output head as a projection: in plans, in transformers' models, in budgets."""

import copy
import json

import numpy as np
import pytest
import torch
from byte_tokens import byte_tokenizer
from families import FAMILIES, build
from transformers import AutoModelForCausalLM

from acttail import SparsityPlan, densify_, make_plan, sparsify_
from acttail.allocate import ALLOCATORS, AllocationContext
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.measure import measure
from acttail.calibrate.text import Text
from acttail.errors import ActTailError, ModelError, PlanError
from acttail.maths.losses import divergence
from acttail.model.opened import as_weights
from acttail.model.projections import find_head, weight_of
from acttail.model.weights import LoadedWeights, with_head
from acttail.report.difference import difference
from acttail.sparse.counting import counting
from acttail.sparse.ops import topk_mask

TIED = ["llama-mqa-tied", "gemma3", "gpt2", "opt"]
IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))


def calibration(model):
    text = Text("calibration", "".join(chr(97 + (i * i * 7) % 2) for i in range(400)))
    return Calibration(model, byte_tokenizer(), text, tokens=96, window=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_keeps_its_k_largest_inputs(family):
    model = build(family)
    head = find_head(model)
    dense = model(IDS).logits
    seen = []
    handle = model.get_submodule(head.module).register_forward_pre_hook(
        lambda m, a: seen.append(a[0])
    )
    plan = make_plan(model, 0.0, allocator="uniform", head=True)
    entry = plan.projections[head.name]
    assert plan.head == (head.name, entry)
    assert (entry.d_out, entry.d_in) == tuple(weight_of(model, head).shape)
    one = copy.deepcopy(plan.to_dict())
    one["projections"][head.name] |= {"k": 20, "sparsity": 1 - 20 / entry.d_in}
    sparsify_(model, SparsityPlan.from_dict(one))
    with counting(model) as counter:
        logits = model(IDS).logits
    handle.remove()
    expected = topk_mask(seen[0], 20) @ weight_of(model, head).T
    expected = expected / getattr(model.config, "logits_scaling", 1)
    bias = model.get_submodule(head.module).bias
    if bias is not None:
        expected = expected + bias
    if getattr(model.config, "final_logit_softcapping", None):
        cap = model.config.final_logit_softcapping
        expected = torch.tanh(expected / cap) * cap
    torch.testing.assert_close(logits, expected)
    assert counter.realised().projections[head.name] == pytest.approx(1 - 20 / entry.d_in)
    densify_(model)
    assert torch.equal(model(IDS).logits, dense)


@pytest.mark.parametrize("family", ["llama", *TIED])
def test_saved_and_loaded_with_its_weights_tied_as_before(family, tmp_path):
    model = build(family)
    sparsify_(model, make_plan(model, 0.5, allocator="uniform", head=True), prefill="first_dense=3")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.weight is embedding.weight) == (family in TIED)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    plan = SparsityPlan.from_dict(json.loads((tmp_path / "config.json").read_text())["quantization_config"]["plan"])  # fmt: skip
    weights = as_weights(tmp_path)
    plan.check(weights)  # the sketch is of the tied parameter, read from the file
    torch.testing.assert_close(weights.weight(weights.head), head.weight)


@pytest.mark.parametrize("family", ["llama", "llama-mqa-tied"])
def test_input_major_weights_give_the_same(family):
    model = build(family)
    plan = make_plan(model, 0.5, allocator="uniform", head=True)
    expected = sparsify_(model, plan)(IDS[:1, :4]).logits
    sparsify_(model, plan, native=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:1, :4]).logits, expected)
    densify_(model)
    assert model.get_output_embeddings().weight.is_contiguous()


@pytest.mark.parametrize("wanted", [0, 1, 3, torch.tensor([2, 5])])
def test_a_policy_tells_the_heads_tokens_apart(wanted):
    """The head sees the tokens that logits are wanted of, and each is sparse or dense as in the blocks."""
    model = build("llama")
    plan = make_plan(model, 0.5, allocator="uniform", head=True)
    expected = sparsify_(model, plan, prefill="first_dense=5")(IDS).logits
    picked = expected[:, wanted] if isinstance(wanted, torch.Tensor) else expected[:, -wanted:]
    torch.testing.assert_close(model(IDS, logits_to_keep=wanted).logits, picked)
    free = dict(plan.to_dict())
    free["projections"] = {n: e for n, e in free["projections"].items() if n != "lm_head"}
    without = sparsify_(model, SparsityPlan.from_dict(free), prefill="first_dense=5")(IDS).logits
    torch.testing.assert_close(without[:, :5], expected[:, :5])
    assert not torch.allclose(without[:, 5:], expected[:, 5:])


def test_plans_of_version_1_leave_the_head_dense():
    model = build("llama")
    old = make_plan(model, 0.5, allocator="uniform").to_dict() | {"version": 1}
    plan = SparsityPlan.from_dict(old)
    assert plan.head is None
    assert plan.version == 2
    plan.check(LoadedWeights(model))
    dense = type(model.lm_head)
    sparsify_(model, plan)
    assert type(model.lm_head) is dense


def test_the_budget_counts_the_head():
    model = build("llama")
    plan = make_plan(model, 0.5, head=True)
    costs = {n: e.cost for n, e in plan.projections.items()}
    assert costs["lm_head"] == 99 * 48
    mean = sum(costs[n] * e.sparsity for n, e in plan.projections.items()) / sum(costs.values())
    assert mean == pytest.approx(0.5, abs=1e-6)
    assert plan.projections["lm_head"].alpha is not None
    flat = make_plan(model, 0.5)
    shown = {d.projection: d for d in difference(flat, plan)}
    assert shown["lm_head"].a == 0
    assert shown["lm_head"].b == plan.projections["lm_head"].sparsity


@pytest.mark.parametrize("name", ["greedy", "cats", "ffn-only"])
def test_allocators_that_cannot_refuse_by_name(name):
    assert not ALLOCATORS[name].head
    with pytest.raises(ActTailError, match=f"{name} leaves the output head dense"):
        make_plan(build("llama"), 0.3, allocator=name, head=True)


@pytest.mark.parametrize("rule", ["topk", "wina", "threshold", "teal"])
def test_every_rule_works_for_the_head(rule):
    model = build("llama-mqa-tied")
    plan = make_plan(
        model, 0.5, allocator="uniform", rule=rule, head=True, calibration=calibration(model)
    )
    sparsify_(model, plan)
    with counting(model) as counter:
        model(IDS)
    assert 0.2 < counter.realised().projections["lm_head"] < 0.8
    densify_(model)


def test_a_model_without_a_head_says_so():
    model = build("llama").model
    with pytest.raises(ModelError, match="no linear output head"):
        make_plan(model, 0.5, allocator="uniform", head=True)
    plan = make_plan(build("llama"), 0.5, allocator="uniform", head=True)
    with pytest.raises(PlanError):
        plan.check(LoadedWeights(model))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_measured_divergence_of_the_head(family):
    """`kl` runs what comes after the blocks alone: the logits of TopK on the head's input."""
    model = build(family)
    c = calibration(model)
    curves = measure(c, loss="kl", grid=(0.0, 0.5, 0.9), resume=False)
    batches = c.batches()
    expected = []
    for s in (0.5, 0.9):
        one = make_plan(model, 0.0, allocator="uniform", head=True).to_dict()
        k = round(48 * (1 - s))
        one["projections"]["lm_head"] |= {"k": k, "sparsity": 1 - k / 48}
        with torch.no_grad():
            dense = model(batches).logits.flatten(0, -2)
            sparse = sparsify_(model, SparsityPlan.from_dict(one))(batches).logits.flatten(0, -2)
        densify_(model)
        expected.append(float(divergence(dense, sparse)[0].mean()))
    np.testing.assert_allclose(curves.curves["lm_head"][1:], expected, rtol=1e-3)


def test_curves_without_the_head_are_refused_where_it_is_wanted():
    model = build("llama")
    c = calibration(model)
    curves = measure(c, resume=False)
    context = AllocationContext(LoadedWeights(model), calibration=c, curves=curves)
    plan = make_plan(model, 0.5, allocator="sensitivity", context=context, head=True)
    assert plan.projections["lm_head"].sparsity > 0
    assert make_plan(model, 0.5, allocator="sensitivity", context=context, head=False).head is None
    del curves.curves["lm_head"]
    with pytest.raises(PlanError, match="without the output head lm_head"):
        make_plan(model, 0.5, allocator="sensitivity", context=context, head=True)
    assert with_head(with_head(context.weights)).projections[-1].kind == "lm_head"


@pytest.mark.parametrize("name", ["sensitivity", "refined"])
def test_calibrated_budgets_take_the_head_unless_the_curves_lack_it(name, tmp_path):
    model = build("llama")
    c = calibration(model)
    curves = measure(c, resume=False)
    context = AllocationContext(LoadedWeights(model), calibration=c, curves=curves)
    assert make_plan(model, 0.5, allocator=name, context=context).head is not None
    assert make_plan(model, 0.5, allocator="acttail", context=context).head is None
    del curves.curves["lm_head"]
    assert make_plan(model, 0.5, allocator=name, context=context).head is None
    curves.save(tmp_path / "curves.safetensors")
    context = AllocationContext(LoadedWeights(model), calibration=c)
    given = {"curves": str(tmp_path / "curves.safetensors")}
    plan = make_plan(model, 0.5, allocator=name, context=context, arguments=given)
    assert plan.head is None
