"""A sparse output head in the native engine: transformers' logits, and what a token reads of it."""

import json
from dataclasses import replace

import pytest
import torch
from byte_tokens import byte_tokenizer
from families import tempered

from acttail import densify_, make_plan, sparsify_
from acttail.engine import Engine
from acttail.engine.accounting import packed_bytes
from acttail.engine.convert import dequantised_state
from acttail.engine.layout import VERSION
from acttail.engine.native_engine import NativeEngine
from acttail.engine.packing import unpack
from acttail.engine.source import convert_model
from acttail.engine.uniform import uniform_plan
from acttail.maths.losses import divergence
from acttail.plan import SparsityPlan
from acttail.sparse.backends import cpu
from acttail.sparse.counting import counting

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")
FAMILIES = [
    "llama", "llama-mqa-tied", "llama-odd", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "phi3", "starcoder2", "phi", "granite", "gpt2", "opt",
]  # fmt: skip


def lively(family, **changes):
    """A tiny random model whose outputs are far from uniform."""
    return tempered(family, 3, **changes)


def tokens(n=40):
    return torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(1))


def plan_for(model, head=0.5, rest=0.5, **arguments):
    """Uniform on the blocks, the head at a sparsity of its own."""
    plan = make_plan(model, rest, allocator="uniform", head=True, **arguments)
    name, entry = plan.head
    k = round(entry.d_in * (1 - head))
    changed = replace(entry, k=k, sparsity=1 - k / entry.d_in)
    return replace(plan, projections={**plan.projections, name: changed})


def reference(model, plan, ids, prefill="all"):
    sparsify_(model, plan, check_contents=False, prefill=prefill)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].float()
    densify_(model)
    return logits


def agree(engine, expected, ids, tolerance=1e-3):
    decoded = engine.new_sequence(128).all_logits(ids, decode=True)
    assert float((decoded - expected).abs().max()) <= tolerance
    prefilled = engine.new_sequence(128).all_logits(ids)
    assert float((prefilled - expected).abs().max()) <= tolerance
    last = engine.new_sequence(128).feed(ids)
    assert float((last - expected[-1]).abs().max()) <= tolerance


def from_folder(model, plan, path):
    """The engine of a model that was converted under a plan: path / "model" to path / "packed"."""
    model.save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    convert_model(path / "model", path / "packed", dtype="fp32", plan=plan)
    engine = Engine.from_pretrained(path / "packed")
    assert isinstance(engine, NativeEngine)
    return engine


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_agree(family, threads):
    model, ids = lively(family), tokens()
    plan = plan_for(model)
    expected = reference(model, plan, ids)
    engine = Engine.from_model(model, plan, dtype="fp32", native=True, threads=threads)
    assert not engine.packed.layout.head_shape.output_major
    agree(engine, expected, ids)


def test_many_outputs_are_taken_a_piece_at_a_time():
    model, ids = lively("llama", vocab_size=40_013), tokens(12)
    plan = plan_for(model, head=0.7)
    engine = Engine.from_model(model, plan, dtype="fp32", native=True, threads=2)
    agree(engine, reference(model, plan, ids), ids)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_plan_runs_on_either_layout(family):
    """What the weights were laid out for decides speed alone."""
    model, ids = lively(family), tokens()
    plans = {
        "sparse head": plan_for(model), "sparser head": plan_for(model, head=0.75),
        "dense head": make_plan(model, 0.5, allocator="uniform"), "dense": None,
    }  # fmt: skip
    for converted in ("sparse head", "dense head"):
        engine = Engine.from_model(model, plans[converted], dtype="fp32", native=True, threads=2)
        assert engine.packed.layout.head_shape.output_major == (converted == "dense head")
        for plan in plans.values():
            none = plan or make_plan(model, 0.0, allocator="uniform")
            agree(engine.with_plan(plan), reference(model, none, ids), ids)


@pytest.mark.parametrize("head", ["bf16", "int8", "int4"])
def test_formats_agree_with_their_own_dequantised_weights(head):
    model, ids = lively("llama"), tokens()
    plan = plan_for(model)
    engine = Engine.from_model(
        model, plan, dtype="fp32", head_dtype=head, native=True, threads=2, kv_dtype="fp32"
    )
    packed = engine.packed
    table = unpack(packed.matrix("embedding"), packed.layout.shapes["embedding"])
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(table[:, :48])
        model.lm_head.weight.copy_(dequantised_state(packed)["lm_head"])
    expected = reference(model, plan, ids)
    got = engine.new_sequence(64).all_logits(ids, decode=True)
    assert float(divergence(expected, got)[0].mean()) <= 2e-3


@pytest.mark.parametrize("head", ["fp32", "bf16", "int8", "int4"])
def test_the_end_of_a_prompt_is_the_last_of_all_its_tokens(head, monkeypatch):
    """One row is a product with the rows that it keeps, many are one of matrices; both in pieces of the outputs."""
    monkeypatch.setattr("acttail.engine.prefill._HEAD_COLUMNS", 128)
    model, ids = lively("llama", vocab_size=1_013), tokens()
    for plan in (plan_for(model), plan_for(model, head=0.0)):
        engine = Engine.from_model(model, plan, dtype="fp32", head_dtype=head, native=True)
        last = engine.new_sequence(64).feed(ids)
        rest = engine.new_sequence(64).all_logits(ids)[-1]
        # Whole numbers take the input in 15 bits.
        torch.testing.assert_close(last, rest, atol=1e-3 * float(rest.abs().max()), rtol=0)


@pytest.mark.parametrize("rule", ["wina", "threshold"])
@pytest.mark.parametrize("family", ["llama", "llama-mqa-tied"])
def test_every_native_rule(family, rule):
    model, ids = lively(family), tokens()
    plan = replace(plan_for(model), rule=rule)
    if rule == "threshold":
        entries = {n: replace(e, threshold=0.4) for n, e in plan.projections.items()}
        plan = replace(plan, projections=entries)
    expected = reference(model, plan, ids)
    laid_out = Engine.from_model(model, plan, dtype="fp32", native=True, threads=2)
    agree(laid_out, expected, ids)
    by_outputs = Engine.from_model(model, dtype="fp32", native=True, threads=2)
    agree(by_outputs.with_plan(plan), expected, ids)


def test_a_prefill_policy_covers_the_head():
    model, ids = lively("llama"), tokens()
    plan = plan_for(model)
    expected = reference(model, plan, ids, prefill="first_dense=10")
    engine = Engine.from_model(model, plan, dtype="fp32", native=True, prefill="first_dense=10")
    prefilled = engine.new_sequence(64).all_logits(ids)
    assert float((prefilled - expected).abs().max()) <= 1e-3
    dense = Engine.from_model(model, plan, dtype="fp32", native=True, prefill="decode_only")
    none = make_plan(model, 0.0, allocator="uniform")
    agreed = dense.new_sequence(64).feed(ids)
    assert float((agreed - reference(model, none, ids)[-1]).abs().max()) <= 1e-3


def test_what_a_token_reads():
    model, ids = lively("llama"), tokens(1)
    plan = plan_for(model, head=0.75)
    engine = Engine.from_model(model, plan, dtype="fp32", native=True, threads=2)
    sequence = engine.new_sequence(8)
    sequence.feed(ids)
    assert sequence.weights_read == sum(e.k * e.d_out for e in plan.projections.values())
    with counting(sparsify_(model, plan)) as counter:
        model(ids[None])
    assert 1 - engine.read_share(sequence) == pytest.approx(counter.realised().model)
    read = packed_bytes(engine.packed, plan)
    rest = packed_bytes(engine.packed, replace(plan, projections={
        n: e for n, e in plan.projections.items() if n != "lm_head"
    }))  # fmt: skip
    assert read.dense == rest.dense == read.projections + read.lm_head + read.other
    assert rest.sparse - read.sparse == pytest.approx(0.75 * read.lm_head, abs=1)
    whole = engine.with_plan(None).new_sequence(8)
    whole.feed(ids)
    assert engine.with_plan(None).read_share(whole) == 1.0
    flat = uniform_plan(engine, 0.5)
    assert flat.head is not None
    assert flat.head[1].k == 24


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_acttail_folder_keeps_the_layout(family, tmp_path):
    model, ids = lively(family), tokens()
    plan = plan_for(model)
    engine = from_folder(model, plan, tmp_path)
    assert engine.plan == SparsityPlan.from_dict(plan.to_dict())
    agree(engine, reference(model, plan, ids), ids)
    description = json.loads((tmp_path / "packed" / "engine.json").read_text())
    assert description["version"] == VERSION
    assert description["shapes"]["head"]["output_major"] is False
