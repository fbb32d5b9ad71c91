"""Projections of every family: names, kinds, shapes, costs, shared inputs."""

import pytest
import torch
from families import FAMILIES, MOE, build, config
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from acttail.errors import ModelError
from acttail.model.hf import meta_model
from acttail.model.projections import find_projections, weight_of

KINDS = {
    "phi3": {"qkv", "o", "gate_up", "down"},
    "starcoder2": {"q", "k", "v", "o", "fc1", "fc2"},
    "phi": {"q", "k", "v", "o", "fc1", "fc2"},
    "gpt2": {"qkv", "o", "fc1", "fc2"},
    "opt": {"q", "k", "v", "o", "fc1", "fc2"},
    "mixtral": {"q", "k", "v", "o", "gate_up", "down"},
    "qwen2-moe": {"q", "k", "v", "o", "gate_up", "gate", "up", "down"},
    "qwen3-moe": {"q", "k", "v", "o", "gate_up", "gate", "up", "down"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model = build(family)
    found = find_projections(model)
    names = [p.name for p in found]
    assert len(set(names)) == len(names)
    assert {p.kind for p in found} == KINDS.get(family, {"q", "k", "v", "o", "gate", "up", "down"})
    assert sorted({p.block for p in found}) == [0, 1, 2]
    for p in found:
        assert weight_of(model, p).shape == (p.d_out, p.d_in)
        for other in p.shared_input:
            assert p.name in next(q for q in found if q.name == other).shared_input
    # Nothing linear inside a block is missed, except what chooses experts.
    covered = {p.parameter_name for p in found}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and any(f".{i}." in name for i in range(3)) and "norm" not in name:
            router = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
            assert router != (name in covered), name


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_device_gives_the_same(family):
    assert find_projections(meta_model(config(family))) == find_projections(build(family))


@pytest.mark.parametrize("family", MOE)
def test_experts_cost_what_a_token_reads(family):
    found = find_projections(build(family))
    experts = [p for p in found if p.expert is not None]
    assert {p.expert for p in experts} == {0, 1, 2, 3}
    for p in experts:
        assert p.cost == p.d_in * p.d_out * 2 / 4
    for p in found:
        if p.expert is None:
            assert p.cost == p.d_in * p.d_out


def test_shared_inputs():
    found = {p.name: p for p in find_projections(build("qwen2-moe"))}
    q = found["model.layers.0.self_attn.q_proj"]
    assert {n.rsplit(".", 1)[-1] for n in q.shared_input} == {"k_proj", "v_proj"}
    routed = found["model.layers.0.mlp.experts.gate_up_proj.1"]
    assert "model.layers.0.mlp.shared_expert.up_proj" in routed.shared_input
    assert found["model.layers.0.mlp.experts.down_proj.1"].shared_input == ()


def test_a_stack_as_deep_as_it_has_experts_is_not_confused():
    cfg = config("mixtral").__class__(**{**config("mixtral").to_dict(), "num_local_experts": 3})
    assert {p.block for p in find_projections(meta_model(cfg))} == {0, 1, 2}


def test_not_a_decoder():
    with pytest.raises(ModelError, match="no config"):
        find_projections(nn.Linear(2, 2))
    t5 = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with torch.device("meta"), pytest.raises(ModelError, match="encoder-decoder"):
        find_projections(T5ForConditionalGeneration(t5))
    bert = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    bert.num_hidden_layers = 7
    with torch.device("meta"), pytest.raises(ModelError, match="no stack of 7"):
        find_projections(
            BertForMaskedLM(BertConfig(**{**bert.to_dict(), "num_hidden_layers": 2})).apply(
                lambda m: setattr(m, "config", bert) if isinstance(m, BertForMaskedLM) else None
            )
        )
