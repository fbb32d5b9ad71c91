"""The loss, its gradient, and what is trained: every family, put in and taken out again."""

import pytest
import torch
from adapting import TEXT, lively, planned, settings
from families import FAMILIES, MOE, build

from acttail import densify_, sparsify_
from acttail.adapt.biases import possible
from acttail.adapt.data import cut
from acttail.adapt.distil import Distillation
from acttail.adapt.parts import KINDS, attach, undo, values
from acttail.errors import ModelError, TextError
from acttail.model.projections import find_projections

IDS = torch.arange(3, 43).reshape(2, 20)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("head", [False, True])
def test_the_gradient_is_that_of_the_divergence(family, head, monkeypatch):
    """Against autograd through the model's own logits; a small vocabulary is cut into pieces, too."""
    monkeypatch.setattr("acttail.adapt.distil._ENTRIES", 7 * 99)
    model = build(family)
    with torch.no_grad():
        expected_dense = torch.log_softmax(model(input_ids=IDS).logits.float(), -1)
    sparsify_(model, planned(model, head=head))
    parts = attach(model, ["norm"], rank=4, seed=0)
    distillation = Distillation(model, parts, IDS)
    loss = distillation.step([0, 1], IDS)
    found = {n: p.grad.clone() for part in parts for n, p in part.parameters.items()}
    model.zero_grad()
    q = torch.log_softmax(model(input_ids=IDS).logits.float(), -1)
    expected = (expected_dense.exp() * (expected_dense - q)).sum(-1).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert loss > 1e-5
    assert distillation.validate() == pytest.approx(loss, rel=1e-4)
    for name, p in parts[0].parameters.items():
        if p.grad is None:
            assert not found[name].any()
            continue
        assert torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_put_in_is_taken_out_again(family, name):
    model = build(family)
    before, config = state_of(model), model.config.to_dict()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        dense = model(input_ids=ids).logits
    plan = planned(model)
    sparsify_(model, plan)
    with torch.no_grad():
        sparse = model(input_ids=ids).logits
    refused = {
        "bias": {"mistral", "phi3", "mixtral"}, "lora": set(MOE), "norm": set(), "all": set(),
    }[name]  # fmt: skip
    if family in refused:
        with pytest.raises(ModelError, match="train norm"):
            attach(model, [name], rank=4, seed=0)
    else:
        parts = attach(model, [name], rank=4, seed=0)
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        assert len(wanted) == len({id(p) for part in parts for p in part.parameters.values()}) > 0
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, sparse, atol=1e-6)
            for value in values(parts).values():
                value.add_(0.1)
            assert not torch.allclose(model(input_ids=ids).logits, sparse, atol=1e-4)
        # The teacher is the model as it was.
        kept = Distillation(model, parts, ids)
        expected = kept._logits(kept._held[0][1])
        assert torch.allclose(expected, dense[0], atol=1e-5)
        undo(parts)
    assert same(state_of(model), before)
    densify_(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("rule", ["topk", "wina"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_merging_changes_nothing(family, rule):
    model = build(family)
    sparsify_(model, planned(model, allocator="uniform", rule=rule))
    parts = attach(model, ["lora", "norm", "bias"], rank=4, seed=0)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        for value in values(parts).values():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        expected = model(input_ids=ids).logits
        for part in parts:
            part.merge()
        # The rule of wina was bound to the norms of the old weights, and is so still.
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert not [n for n, _ in model.named_modules() if "lora" in n]
    for part in reversed(parts):
        part.undo()
    fresh = build(family)
    assert same(state_of(model), state_of(fresh))


def test_adapters_begin_where_the_seed_says():
    first, again, other = (build("llama") for _ in range(3))
    for model in (first, again, other):
        sparsify_(model, planned(model))
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    found = [
        values(attach(m, ["lora"], rank=4, seed=s)) for m, s in ((first, 1), (again, 1), (other, 2))
    ]
    assert torch.equal(torch.rand(1), drawn)  # nobody's own generator moves
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize(
    ("family", "flags", "kinds"),
    [
        ("llama", {"attention_bias", "mlp_bias"}, {"q", "k", "v", "o", "gate", "up", "down"}),
        ("gemma3", {"attention_bias"}, {"q", "k", "v", "o"}),
        ("qwen3", {"attention_bias"}, {"q", "k", "v", "o"}),
        ("qwen2", set(), set()),
        ("starcoder2", set(), set()),
        ("phi3", set(), set()),
    ],
)
def test_biases_go_where_the_config_can_say_so(family, flags, kinds):
    model = build(family)
    found = possible(model)
    assert set(found.flags) == flags
    assert {p.kind for p in find_projections(model) if p.module in found.modules} == kinds


def test_windows_are_cut_once(tokenizer):
    model = lively()
    asked = settings(held_out=128, batch=3)
    found = cut([TEXT], model, tokenizer, asked, None)
    whole = len(found.train) + len(found.held)
    assert whole == len(TEXT.content) // 32
    assert found.held.shape == (4, 32)
    order = [i for step in range(len(found.train) // 3 + 1) for i in found.step(step, asked)]
    n = len(found.train)
    assert sorted(order[:n]) == list(range(n))
    assert order[:n] != sorted(order[:n])
    # Of a short text a fifth validates, not all of it.
    few = cut([TEXT], model, tokenizer, settings(held_out=4096), 320)
    assert (len(few.train), len(few.held)) == (8, 2)
    # Each text is held out from.
    both = cut([TEXT, TEXT], model, tokenizer, asked, 320)
    assert (len(both.train), len(both.held)) == (16, 4)
    with pytest.raises(TextError, match="one to validate"):
        cut([TEXT], model, tokenizer, asked, 40)
