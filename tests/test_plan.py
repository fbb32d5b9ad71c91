"""The plan file: it round-trips, refuses what it does not know, and knows its model."""

import json

import pytest
import torch
from families import FAMILIES, build

from acttail import SparsityPlan, make_plan
from acttail.errors import BudgetError, PlanError
from acttail.model.weights import LoadedWeights
from acttail.plan import build_plan, sketch


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    plan = make_plan(build(family), 0.45)
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    assert {
        "version",
        "model",
        "fingerprint",
        "allocator",
        "arguments",
        "sparsity",
        "projections",
    } <= set(data)
    for entry in data["projections"].values():
        assert {"sparsity", "k", "alpha"} <= set(entry)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(colour="red"), "unknown key 'colour'"),
        (lambda d: d.pop("sparsity"), "lacks the key 'sparsity'"),
        (lambda d: d.update(projections={}), "lists no projections"),
        (lambda d: next(iter(d["projections"].values())).update(k=0), "out of range"),
        (lambda d: next(iter(d["projections"].values())).update(k=10**6), "out of range"),
        (lambda d: next(iter(d["projections"].values())).update(sparsity=2.0), "out of range"),
        (lambda d: next(iter(d["projections"].values())).update(hue=1), "unknown key 'hue'"),
        (lambda d: next(iter(d["projections"].values())).update(sketch="ab"), "projection"),
        (lambda d: next(iter(d["projections"].values())).update(block="<b>"), "block is wrong"),
        (lambda d: next(iter(d["projections"].values())).update(block=-1), "block is out of range"),
        (lambda d: next(iter(d["projections"].values())).update(k=2.0), "k is wrong"),
        (lambda d: next(iter(d["projections"].values())).update(kind="q\x1b[31m"), "kind is out"),
        (
            lambda d: next(iter(d["projections"].values())).update(threshold="0.1"),
            "threshold is wrong",
        ),
        (lambda d: next(iter(d["projections"].values())).update(sparsity=0.9), "do not belong"),
        (lambda d: d["projections"].update({"a\nb": {}}), "projections"),
        (lambda d: d.update(model="m\x07"), "model is out of range"),
        (lambda d: d.update(sparsity=True), "sparsity is wrong"),
    ],
)
def test_malformed(llama, tmp_path, change, match):
    data = make_plan(llama, 0.5, allocator="uniform").to_dict()
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=match):
        SparsityPlan.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"'])
def test_not_a_plan(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError):
        SparsityPlan.load(path)
    with pytest.raises(PlanError, match="cannot read"):
        SparsityPlan.load(tmp_path / "absent.json")


def test_another_model_is_refused_by_its_first_difference(llama):
    plan = make_plan(llama, 0.5, allocator="uniform")
    for other, match in (
        (build("llama", seed=1), "weights of model.layers.0.self_attn.q_proj differ"),
        (build("llama-mqa-tied"), r"k_proj is 12x48 there, 24x48 in the plan"),
        (build("gpt2"), "no projection model.layers.0"),
        (build("qwen3"), "q_proj is 64x48"),
    ):
        with pytest.raises(PlanError, match=match):
            plan.check(LoadedWeights(other))
    data = plan.to_dict()
    data["projections"].popitem()
    smaller = SparsityPlan.from_dict(data)
    with pytest.raises(PlanError, match="does not mention its projection"):
        smaller.check(LoadedWeights(llama))


def test_one_changed_matrix_is_named(llama):
    plan = make_plan(llama, 0.5, allocator="uniform")
    llama.model.layers[2].mlp.down_proj.weight.data += 0.01 * torch.randn(48, 72)
    with pytest.raises(PlanError, match=r"layers\.2\.mlp\.down_proj differ"):
        plan.check(LoadedWeights(llama))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_model_in_another_dtype_is_the_same(llama, dtype):
    plan = make_plan(llama, 0.5, allocator="uniform")
    plan.check(LoadedWeights(llama.to(dtype)))
    llama.model.layers[0].mlp.up_proj.weight.data *= 1.5
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.up_proj differ"):
        plan.check(LoadedWeights(llama))


def test_sketch_is_layout_independent():
    weight = torch.randn(70, 90)
    assert sketch(weight) == sketch(weight.T.contiguous().T)
    assert sketch(torch.zeros(3, 3)) == (0.0, 0.0)


def test_from_given_sparsities(llama):
    weights = LoadedWeights(llama)
    given = {p.name: 0.25 for p in weights.projections}
    plan = build_plan(weights, given, sparsity=None, allocator="from-file", arguments={})
    assert plan.sparsity == pytest.approx(0.25)
    with pytest.raises(PlanError, match="has no projection nowhere"):
        build_plan(weights, {**given, "nowhere": 0.1}, sparsity=None, allocator="x", arguments={})
    missing = dict(list(given.items())[1:])
    with pytest.raises(PlanError, match="no sparsity is given"):
        build_plan(weights, missing, sparsity=None, allocator="x", arguments={})
    first = next(iter(given))
    for bad in (1.5, float("nan"), "much"):
        with pytest.raises(BudgetError, match=first):
            build_plan(weights, {**given, first: bad}, sparsity=None, allocator="x", arguments={})
