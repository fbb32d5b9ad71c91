"""The rotary embedding of a GGUF is the model's own: both engines against the model it was written from."""

import math

import numpy as np
import pytest
import torch
from families import tempered
from gguf_files import rewrite_gguf, write_gguf

from acttail.engine import Engine
from acttail.errors import ModelError
from acttail.model.load import load
from acttail.model.opened import open_model
from acttail.sparse.backends import cpu

CONTEXT = 128  # of write_gguf


def model_of(family, rope=None, **changes):
    """Tiny, with a context of :data:`CONTEXT` and attention that is far from uniform."""
    settings = {
        "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
        "max_position_embeddings": CONTEXT, **changes,
    }  # fmt: skip
    if rope is not None:
        settings["rope_parameters"] = rope
    return tempered(family, 4, **settings)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def assert_same(place, model):
    ids = torch.randint(3, 260, (CONTEXT,), generator=torch.Generator().manual_seed(1))
    expected = logits(model, ids)
    loaded, _ = load(place)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=2e-4, rtol=1e-4)
    again, _ = load(place)  # the dequantised copy
    torch.testing.assert_close(logits(again, ids), expected, atol=2e-4, rtol=1e-4)
    if cpu.status().available:
        engine = Engine.from_pretrained(place, dtype="fp32", native=True, threads=1)
        found = engine.new_sequence(CONTEXT).all_logits(ids)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def factors_of(model):
    """What llama.cpp's converter keeps of a Llama 3: by how much each frequency is divided."""
    rotary = model.model.rotary_emb
    dim = 2 * len(rotary.inv_freq)
    plain = 1.0 / rotary.config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    return (plain / rotary.inv_freq).numpy()


BASE = {"rope_theta": 500.0}
LLAMA3 = BASE | {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def scaling(kind=None, **fields):
    found = {"llama.rope.freq_base": 500.0} | {
        f"llama.rope.scaling.{k}": v for k, v in fields.items()
    }
    return found if kind is None else found | {"llama.rope.scaling.type": kind}


@pytest.mark.parametrize(
    ("rope", "fields"),
    [
        (BASE | {"rope_type": "default"}, scaling()),
        (BASE | {"rope_type": "default"}, scaling("none", factor=4.0)),
        (BASE | {"rope_type": "linear", "factor": 4.0}, scaling("linear", factor=4.0)),
        (BASE | {"rope_type": "linear", "factor": 4.0}, scaling(factor=4.0)),
        (YARN, scaling("yarn", factor=4.0, original_context_length=32)),
        (
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5 * (1 + 0.1 * math.log(4))},
            scaling("yarn", factor=4.0, original_context_length=32, yarn_beta_fast=16.0, yarn_beta_slow=2.0,
                    attn_factor=1.5),
        ),
    ],
)  # fmt: skip
def test_scaling_of_a_llama(tmp_path, tokenizer, rope, fields):
    model = model_of("llama", dict(rope))
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer)
    rewrite_gguf(tmp_path / "tiny.gguf", fields)
    assert_same(tmp_path / "tiny.gguf", model)


def test_the_factors_of_a_llama_3(tmp_path, tokenizer):
    model = model_of("llama", dict(LLAMA3))
    factors = factors_of(model)
    assert factors.max() > 7.9
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer)
    rewrite_gguf(tmp_path / "tiny.gguf", scaling(), replace={"rope_freqs.weight": factors})
    assert_same(tmp_path / "tiny.gguf", model)


def test_gemmas_factor_is_of_its_global_blocks(tmp_path, tokenizer):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    model = model_of(
        "gemma3", rope, sliding_window=8, num_hidden_layers=6, query_pre_attn_scalar=16,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )  # fmt: skip
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer)
    rewrite_gguf(tmp_path / "tiny.gguf", {
        "gemma3.rope.freq_base": 1000.0, "gemma3.rope.freq_base_swa": 100.0,
        "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0,
    })  # fmt: skip
    assert_same(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize(("depth", "scalar"), [(6, 8), (62, 16)])
def test_what_gemmas_scores_are_divided_by(tmp_path, tokenizer, depth, scalar):
    """No key says it; llama.cpp tells the largest model, which has its own, by its depth."""
    model = model_of(
        "gemma3",
        num_hidden_layers=depth,
        head_dim=8,
        query_pre_attn_scalar=scalar,
        layer_types=None,
    )
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer)
    assert open_model(tmp_path / "tiny.gguf").config.query_pre_attn_scalar == scalar


def test_part_of_a_head_and_two_tables_of_factors(tmp_path, tokenizer):
    short, long = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 6.0, 8.0, 10.0]
    rope = BASE | {
        "rope_type": "longrope", "short_factor": short, "long_factor": long, "partial_rotary_factor": 0.75,
        "attention_factor": 1.2, "original_max_position_embeddings": CONTEXT,
    }  # fmt: skip
    model = model_of("phi3", rope, original_max_position_embeddings=CONTEXT)
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer)
    rewrite_gguf(
        tmp_path / "tiny.gguf",
        {"phi3.rope.freq_base": 500.0, "phi3.rope.dimension_count": 12, "phi3.rope.scaling.attn_factor": 1.2,
         "phi3.rope.scaling.original_context_length": CONTEXT},
        replace={"rope_factors_short.weight": np.array(short), "rope_factors_long.weight": np.array(long)},
    )  # fmt: skip
    assert_same(tmp_path / "tiny.gguf", model)


def test_the_base_of_a_family_whose_base_transformers_leaves_out(tmp_path, tokenizer):
    model = model_of(
        "starcoder2", BASE | {"rope_type": "default"}, head_dim=None, sliding_window=None
    )
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer)
    rewrite_gguf(tmp_path / "tiny.gguf", {"starcoder2.rope.freq_base": 500.0})
    assert_same(tmp_path / "tiny.gguf", model)


def test_heads_of_another_size(tmp_path, tokenizer):
    for family in ("llama", "qwen3"):
        model = model_of(family, head_dim=8)
        write_gguf(tmp_path / f"{family}.gguf", model, tokenizer=tokenizer)
        assert_same(tmp_path / f"{family}.gguf", model)


@pytest.mark.parametrize(
    ("fields", "tensors", "what"),
    [
        ({"llama.rope.dimension_count": 8}, {}, "rope.dimension_count of 8 for heads of 16"),
        ({"llama.attention.value_length": 8}, {}, "values of 8 per head and keys of 16"),
        (scaling("sinusoid"), {}, "rope.scaling.type of sinusoid"),
        (scaling("longrope", factor=2.0), {}, "longrope without rope_factors"),
        (scaling(yarn_ext_factor=0.5), {}, "yarn_ext_factor of 0.5"),
        (scaling("linear", factor=-1.0), {}, "factor of -1.0"),
        (scaling("yarn", factor=2.0), {"rope_freqs.weight": np.ones(8)}, "beside a rope.scaling.type of yarn"),
        ({}, {"rope_freqs.weight": np.ones(5)}, "5 factors of its rope for 8 frequencies"),
        ({}, {"rope_factors_long.weight": np.ones(8)}, "and not the other"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_say_is_refused(tmp_path, tokenizer, fields, tensors, what):
    place = tmp_path / "tiny.gguf"
    write_gguf(place, model_of("llama"), tokenizer=tokenizer)
    rewrite_gguf(place, fields, replace=tensors)
    for way in (open_model, load, lambda p: Engine.from_pretrained(p, native=True)):
        with pytest.raises(ModelError, match=what) as error:
            _ = way(place).config
        assert "\n" not in str(error.value)


def test_ends_of_a_turn_are_the_files(tmp_path, tokenizer):
    place = tmp_path / "tiny.gguf"
    write_gguf(place, model_of("llama"), tokenizer=tokenizer)
    rewrite_gguf(place, {
        "tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 11,
    })  # fmt: skip
    for way in (True, False) if cpu.status().available else (False,):
        # transformers adds tokens of its own behind the vocabulary, which are never drawn.
        eos = Engine.from_pretrained(place, native=way).eos
        assert {i for i in eos if i < 260} == {7, 9, 11}
    assert load(place)[0].generation_config.eos_token_id == [7, 9, 11]
