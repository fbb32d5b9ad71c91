"""Format rows: both spellings, and a model whose matrices do not share one format."""

import json
from dataclasses import replace

import pytest
import torch
from families import build

import acttail
from acttail import densify_, make_plan, sparsify_
from acttail.engine import Engine, NativeEngine
from acttail.engine.config import EngineConfig
from acttail.engine.convert import Conversion, convert_in_memory, dequantised_state
from acttail.engine.describe import describe
from acttail.engine.formats import FORMATS, KV_FORMATS, kv_format, weight_format
from acttail.engine.source import convert_model
from acttail.engine.store import Packed, read_folder
from acttail.errors import ActTailError, ModelError
from acttail.model.weights import LoadedWeights
from acttail.sparse.backends import cpu


def test_both_spellings_name_one_row():
    assert weight_format("bfloat16") is weight_format("bf16") is FORMATS["bf16"]
    assert weight_format("float32") is FORMATS["fp32"]
    assert kv_format("bfloat16") is KV_FORMATS["bf16"]


@pytest.mark.parametrize("name", ["fp8", "float16", ""])
def test_an_unknown_format_is_named_with_the_known_ones(name):
    with pytest.raises(ActTailError, match=f"{name!r}: use fp32, bf16, int8, int4"):
        weight_format(name)
    with pytest.raises(ActTailError, match=f"{name!r}: use fp32, bf16, int8$"):
        kv_format(name)


def test_rows_name_rows():
    """What a row points to by name exists, and numbers are told apart."""
    for row in FORMATS.values():
        assert row.head in FORMATS
        assert row.kv in KV_FORMATS
    for rows in (FORMATS, KV_FORMATS):
        assert len({row.number for row in rows.values()}) == len(rows)


@pytest.mark.parametrize("names", [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_load_takes_both_spellings(tiny_folder, names):
    found = {acttail.load(str(tiny_folder), dtype=name)[0].dtype for name in names}
    assert found == {getattr(torch, names[0])}


def test_load_names_an_unknown_dtype(tiny_folder):
    with pytest.raises(ModelError, match="unknown dtype 'fp8': use auto, fast, float32"):
        acttail.load(str(tiny_folder), dtype="fp8")


def test_a_folder_of_an_unknown_format_is_refused(tiny_folder, tmp_path):
    folder = convert_model(str(tiny_folder), tmp_path / "packed", dtype="bf16")
    description = json.loads((folder / "engine.json").read_text())
    description["shapes"]["blocks.0.o"]["dtype"] = "q3_k"
    (folder / "engine.json").write_text(json.dumps(description))
    with pytest.raises(ActTailError, match="'q3_k'"):
        read_folder(folder)


def mixed(model, plan, names=("bf16", "int8", "int4", "fp32")):
    """A packed model whose matrices take the formats in turn; the first is the default."""
    whole = {
        name: convert_in_memory(
            Conversion(describe(model), LoadedWeights(model), EngineConfig(name), plan=plan)
        )
        for name in names
    }
    base = whole[names[0]]
    shapes, tensors = dict(base.layout.shapes), dict(base.tensors)
    for i, name in enumerate(base.layout.segments):
        other = whole[names[i % len(names)]]
        shapes[name] = other.layout.shapes[name]
        for suffix in base.layout.shapes[name].tensors():
            del tensors[f"{name}.{suffix}"]
        tensors |= {f"{name}.{suffix}": t for suffix, t in other.matrix(name).items()}
    arenas = [packed.arena for packed in whole.values()]
    return Packed(replace(base.layout, shapes=shapes), tensors, plan, arenas)


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_every_matrix_may_have_its_own_format(sparsity):
    """Against transformers in float32, on the very weights the engine reads."""
    model = build("llama")
    plan = make_plan(model, sparsity) if sparsity else None
    packed = mixed(model, plan, ("fp32", "int8", "int4", "bf16"))
    engine = NativeEngine(packed, plan, EngineConfig(threads=1, kv_dtype="fp32"))
    with torch.no_grad():
        for name, weight in dequantised_state(packed).items():
            model.get_submodule(name).weight.copy_(weight)
    if plan is not None:
        sparsify_(model, plan, check_contents=False)
    ids = torch.arange(3, 43)
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0].float()
    densify_(model)
    # VNNI takes activations in 15 bits; a prompt's products are float32 on decoded weights.
    decoded = engine.new_sequence(64).all_logits(ids, decode=True)
    prompt = engine.new_sequence(64).all_logits(ids)
    assert float((decoded - expected).abs().max()) <= 5e-3
    assert float((prompt - expected).abs().max()) <= 5e-3


def test_the_limit_of_short_prompts_weighs_the_formats_of_a_model():
    model = build("llama")
    uniform = {
        name: Conversion(
            describe(model), LoadedWeights(model), EngineConfig(name)
        ).layout.prefill_tokens
        for name in FORMATS
    }
    assert uniform == {name: row.prefill_tokens for name, row in FORMATS.items()}
    limit = mixed(model, None).layout.prefill_tokens
    assert min(uniform.values()) < limit < max(uniform.values())


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
@pytest.mark.parametrize("name", ["bfloat16", "bf16"])
def test_engines_take_both_spellings(name):
    engine = Engine.from_model(
        build("llama"), dtype=name, head_dtype=name, kv_dtype=name, native=True
    )
    assert engine.dtype == "bf16"
    assert engine.packed.layout.head_dtype == "bf16"
    assert engine.decoder.kv_dtype == "bf16"
