"""The block description: every family that is claimed, and what is refused."""

from dataclasses import asdict

import pytest
from families import FAMILIES as TESTED
from families import build, config
from torch import nn

from acttail.base.schema import SchemaError, checked
from acttail.engine.describe import describe
from acttail.engine.families import FAMILIES
from acttail.engine.spec import DecoderSpec, UnsupportedModelError
from acttail.model.hf import meta_model

OURS = [f for f in TESTED if config(f).model_type in FAMILIES]


def test_every_family_that_is_claimed_is_tested():
    assert {config(f).model_type for f in TESTED} >= set(FAMILIES)


@pytest.mark.parametrize("family", OURS)
def test_a_model_without_weights_is_described_alike(family):
    spec = describe(build(family))
    assert spec == describe(meta_model(config(family)))
    assert checked(DecoderSpec, asdict(spec)) == spec


def test_what_a_family_says_is_what_its_blocks_are():
    starcoder = describe(build("starcoder2"))
    assert starcoder.layer_norm
    assert set(starcoder.blocks[0].projections) == {"q", "k", "v", "o", "fc1", "fc2"}
    assert [b.window for b in starcoder.blocks] == [8, 8, 8]
    assert starcoder.intermediate == 72
    gemma = describe(build("gemma2"))
    assert (gemma.norm_shift, gemma.embedding_scale, gemma.attention_softcap) == (
        1.0,
        48**0.5,
        50.0,
    )
    assert {b.window for b in gemma.blocks} == {0, 8}
    assert set(gemma.blocks[0].norms) == {
        "input_norm", "attention_norm", "mlp_norm", "output_norm"
    }  # fmt: skip
    assert set(describe(build("qwen3")).blocks[0].norms) >= {"q_norm", "k_norm"}


def test_what_a_block_holds_beyond_its_family_is_refused():
    model = build("llama")
    model.model.layers[1].self_attn.q_norm = nn.RMSNorm(12)
    with pytest.raises(UnsupportedModelError, match=r"block 1 has .*q_norm.weight"):
        describe(model)
    model = build("starcoder2")
    model.model.layers[2].input_layernorm = nn.LayerNorm(48, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"block 2 lacks .*input_layernorm.bias"):
        describe(model)
    model = build("llama")
    model.model.layers[0].mlp.extra_proj = nn.Linear(48, 48)
    with pytest.raises(UnsupportedModelError, match=r"does not run a block of .*extra_proj"):
        describe(model)
    model = build("llama")
    model.config.hidden_act = "tanh"
    with pytest.raises(UnsupportedModelError, match="activation tanh"):
        describe(model)
    for family, key, value in (
        ("stablelm", "use_parallel_residual", True), ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("opt", "do_layer_norm_before", False),
    ):  # fmt: skip
        model = build(family)
        setattr(model.config, key, value)
        with pytest.raises(UnsupportedModelError, match=f"{family} models whose {key} is {value}"):
            describe(model)


def test_what_stands_beside_the_blocks_is_described():
    opt = describe(build("opt"))
    assert (opt.positions, opt.first_position) == ("model.decoder.embed_positions.weight", 2)
    assert opt.context == 128
    assert opt.ropes == ()
    phi = describe(build("phi"))
    assert phi.head_bias == "lm_head.bias"
    assert phi.parallel
    granite = describe(build("granite"))
    assert (granite.attention_scale, granite.residual_scale) == (0.4, 0.6)
    assert granite.logit_scale == pytest.approx(1 / 3)
    assert [b.rope for b in describe(build("smollm3")).blocks] == [0, -1, 0]


def test_descriptions_of_older_folders_are_read_and_strange_ones_refused():
    spec = describe(build("llama"))
    data = asdict(spec)
    del data["layer_norm"]
    assert checked(DecoderSpec, data) == spec
    with pytest.raises(SchemaError, match="heads"):
        checked(DecoderSpec, {k: v for k, v in data.items() if k != "heads"})
    with pytest.raises(SchemaError, match="tail"):
        checked(DecoderSpec, data | {"tail": 1})
