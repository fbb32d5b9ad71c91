"""A tied embedding beside an input-major head: one matrix, of which a token's embedding is a column."""

import ctypes
import json
from dataclasses import asdict, replace

import pytest
import torch
from gguf_files import blocky, write_gguf
from instruction_sets import OTHERS, passes
from test_sparse_head import agree, from_folder, lively, plan_for, reference, tokens

import acttail
from acttail import make_plan
from acttail.engine import Engine
from acttail.engine.accounting import packed_bytes
from acttail.engine.convert import dequantised_state
from acttail.engine.description import read_layout
from acttail.engine.layout import EMBEDDING, HEAD_MATRIX
from acttail.engine.native import library
from acttail.engine.store import write_packed
from acttail.engine.transcode import matrix_struct
from acttail.errors import ActTailError
from acttail.maths.losses import divergence
from acttail.model.opened import open_model
from acttail.sparse.backends import abi, cpu

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")
TIED = ["llama-mqa-tied", "gemma", "gemma2", "gemma3", "gpt2", "opt"]
FORMATS = ["fp32", "bf16", "int8", "int4"]


def engine_for(model, plan, **arguments):
    asked = {"dtype": "fp32", "native": True, "threads": 2, "kv_dtype": "fp32"} | arguments
    return Engine.from_model(model, plan, **asked)


def every_id(engine):
    return engine.decoder.embeddings(torch.arange(engine.vocabulary))


def with_table(engine, dense):
    """The packed weights of an engine with the table of another beside them, as they were packed before."""
    layout = engine.packed.layout
    shapes = {EMBEDDING: dense.packed.layout.shapes[EMBEDDING]} | layout.shapes
    table = {f"{EMBEDDING}.{k}": t for k, t in dense.packed.matrix(EMBEDDING).items()}
    return replace(
        engine.packed, layout=replace(layout, shapes=shapes), tensors=table | engine.packed.tensors
    )


@pytest.mark.parametrize("head", FORMATS)
@pytest.mark.parametrize("family", TIED)
def test_every_token_s_embedding_is_its_row_of_the_head(family, head):
    """Of odd vocabularies the last one, beside which there is only padding, too."""
    model = lively(family)
    engine = engine_for(model, plan_for(model), head_dtype=head)
    dense = engine_for(model, None, head_dtype=head)
    layout = engine.packed.layout
    assert layout.gathered
    assert EMBEDDING not in layout.shapes
    assert not dense.packed.layout.gathered
    (rows,) = (v for n, v in dequantised_state(engine.packed).items() if n == "lm_head")
    assert torch.equal(every_id(engine), rows)
    # What a group's scale covers is the same by inputs and by outputs, but for padding to whole columns.
    if head != "int4":
        assert torch.equal(every_id(engine), every_id(dense))
    whole = sum(t.nbytes for t in with_table(engine, dense).tensors.values())
    assert engine.packed.bytes == whole - dense.packed.layout.shapes[EMBEDDING].bytes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", TIED)
def test_logits_are_those_of_transformers(family, threads):
    model, ids = lively(family), tokens()
    plan = plan_for(model)
    agree(engine_for(model, plan, threads=threads), reference(model, plan, ids), ids)


@pytest.mark.parametrize("family", ["llama-mqa-tied", "gemma3"])
@pytest.mark.parametrize("head", FORMATS)
def test_logits_are_those_of_the_dequantised_weights(family, head):
    model, ids = lively(family), tokens()
    plan = plan_for(model)
    engine = engine_for(model, plan, head_dtype=head)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(dequantised_state(engine.packed)["lm_head"])
    assert (
        model.get_input_embeddings().weight.data_ptr()
        == model.get_output_embeddings().weight.data_ptr()
    )
    expected = reference(model, plan, ids)
    for decode in (True, False):
        got = engine.new_sequence(64).all_logits(ids, decode=decode)
        assert float(divergence(expected, got)[0].mean()) <= 2e-3


@pytest.mark.parametrize("head", FORMATS)
def test_tokens_of_a_pass_get_what_each_gets_alone(head):
    model = lively("llama-mqa-tied")
    engine = engine_for(model, plan_for(model), head_dtype=head)
    ids = torch.tensor([engine.vocabulary - 1, 0, 5, 64])
    alone = [engine.new_sequence(8).feed(i[None]).clone() for i in ids]
    together = engine.step([(engine.new_sequence(8), i[None]) for i in ids])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_1"])
def test_a_file_s_own_numbers_are_gathered(tmp_path, tokenizer, kind):
    model = blocky()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    write_gguf(tmp_path / "tiny.gguf", model, kind, tokenizer)
    opened = open_model(tmp_path / "tiny.gguf")
    plan = make_plan(str(tmp_path / "tiny.gguf"), 0.5, allocator="uniform", head=True)
    engine = Engine.from_pretrained(opened, plan, native=True)
    assert engine.packed.layout.gathered
    file = opened.stored.tensor(engine.packed.layout.spec.embedding).float()
    assert torch.equal(every_id(engine), file)


def test_what_a_token_reads_of_it():
    model = lively("llama-mqa-tied")
    plan = plan_for(model)
    for head in ("fp32", "int8"):
        engine = engine_for(model, plan, head_dtype=head)
        dense = engine_for(model, None, head_dtype=head)
        table = dense.packed.layout.shapes[EMBEDDING]
        scales = {"fp32": 0, "int8": 2}[head]  # 48 inputs in groups of 32
        more = packed_bytes(engine.packed).other - packed_bytes(dense.packed).other
        assert more == 64 * (48 + scales) - table.bytes // table.rows


def test_an_acttail_folder_keeps_it_once(tmp_path):
    model, ids = lively("gemma3"), tokens()
    plan = plan_for(model)
    engine = from_folder(model, plan, tmp_path)
    assert engine.packed.layout.gathered
    agree(engine, reference(model, plan, ids), ids)
    # As weights, it is one parameter under two names, as in the model that it was made from.
    weights, source = (open_model(tmp_path / n).weights for n in ("packed", "model"))
    table = weights.tensor(engine.packed.layout.spec.embedding)
    assert torch.equal(table, model.get_input_embeddings().weight)
    assert weights.head.tied == source.head.tied
    loaded, _ = acttail.load(tmp_path / "packed", dtype="fp32")
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


@pytest.mark.parametrize("family", ["llama-mqa-tied", "gemma3"])
def test_folders_of_before_are_read(family, tmp_path):
    """Version 5 has both: the table is read, and nothing gathered."""
    model, ids = lively(family), tokens()
    plan = plan_for(model)
    engine = engine_for(model, plan)
    write_packed(tmp_path, with_table(engine, engine_for(model, None)))
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 5}))
    old = Engine.from_pretrained(tmp_path, native=True, kv_dtype="fp32", threads=2)
    assert not old.packed.layout.gathered
    agree(old, reference(model, plan, ids), ids)
    got, same = (e.new_sequence(64).all_logits(ids, decode=True) for e in (engine, old))
    assert torch.equal(got, same)


def test_a_description_without_a_table_needs_a_tied_input_major_head():
    model = lively("llama-mqa-tied")
    data = engine_for(model, plan_for(model)).packed.layout.to_dict()
    assert read_layout(json.loads(json.dumps(data))).gathered
    apart = json.loads(json.dumps(data))
    apart["spec"]["head"] = "lm_head.weight"
    by_outputs = json.loads(json.dumps(data))
    del by_outputs["segments"][HEAD_MATRIX]
    by_outputs["shapes"][HEAD_MATRIX] = asdict(
        engine_for(model, None).packed.layout.shapes[EMBEDDING]
    )
    neither = json.loads(json.dumps(by_outputs))
    del neither["shapes"][HEAD_MATRIX]
    for wrong in (apart, by_outputs, neither):
        with pytest.raises(ActTailError, match="it lacks embedding"):
            read_layout(wrong)


def test_no_column_beyond_the_last_is_gathered():
    model = lively("llama-mqa-tied")
    packed = engine_for(model, plan_for(model)).packed
    shape = packed.layout.shapes[HEAD_MATRIX]
    struct, out = matrix_struct(packed.matrix(HEAD_MATRIX), shape), torch.zeros(2, shape.rows)

    def gather(columns, count=None, threads=1):
        ids = torch.tensor(columns)
        count = len(columns) if count is None else count
        return library().acttail_gather_columns(
            ctypes.byref(struct), ids.data_ptr(), count, out.data_ptr(), threads
        )

    for wrong in ([0, shape.columns], [-1, 0], [1 << 40]):
        assert gather(wrong) == abi.BAD_ARGUMENT
    assert gather([0], count=-1) == gather([0], threads=0) == abi.BAD_ARGUMENT
    assert not out.any()
    assert gather([1, shape.columns - 1], threads=3) == 0
    assert out[0].any()
    assert not out[1].any()  # padding


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_other_instruction_sets(isa):
    passes(isa, __file__)
