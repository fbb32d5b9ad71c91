"""Blocks with experts in the native engine: who is chosen, what is read, and what a batch shares."""

import json
from dataclasses import replace

import pytest
import torch
from byte_tokens import byte_tokenizer
from families import MOE, build
from gguf_files import blocky, rewrite_gguf, write_gguf
from test_description import changed
from test_engine import lively, reference, tokens

import acttail
from acttail import make_plan, sparsify_
from acttail.engine import Engine
from acttail.engine.accounting import packed_bytes, projection_bytes, projection_weights
from acttail.engine.config import EngineConfig
from acttail.engine.convert import Conversion, convert_in_memory, dequantised_state
from acttail.engine.describe import describe
from acttail.engine.description import read_layout
from acttail.engine.layout import HEAD_MATRIX
from acttail.engine.source import convert_model
from acttail.engine.spec import UnsupportedModelError
from acttail.engine.uniform import uniform_plan
from acttail.errors import ActTailError, ActTailWarning, ModelError
from acttail.model.opened import open_model
from acttail.model.projections import Projection
from acttail.model.weights import LoadedWeights
from acttail.sparse.backends import cpu

native = pytest.mark.skipif(not cpu.status().available, reason="no native library")
VARIANTS = {
    "mixtral": {"sliding_window": 8},
    "qwen2-moe": {"norm_topk_prob": True, "mlp_only_layers": [1], "num_experts": 5, "num_experts_per_tok": 3},
    "qwen3-moe": {"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": True, "sliding_window": 8},
}  # fmt: skip


def routers(model):
    return [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("TopKRouter")]


def visits(model, ids):
    """Block's path -> [tokens, active] experts that transformers chooses."""
    found = {}
    hooks = [
        m.register_forward_hook(lambda _m, _i, out, n=n: found.__setitem__(n, out[2]))
        for n, m in routers(model)
    ]
    expected = reference(model, None, ids)
    for hook in hooks:
        hook.remove()
    return found, expected


def agree(engine, expected, ids):
    for decode in (True, False):
        got = engine.new_sequence(512).all_logits(ids, decode=decode)
        assert float((got - expected).abs().max()) <= 1e-3, decode


@native
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
@pytest.mark.parametrize("family", MOE)
def test_variants_agree(family, sparsity):
    model = lively(family, **VARIANTS[family])
    plan = make_plan(model, sparsity, allocator="per-type") if sparsity else None
    ids = tokens(model, 60)
    engine = Engine.from_model(model, plan, dtype="fp32", native=True, threads=3)
    agree(engine, reference(model, plan, ids), ids)


@native
@pytest.mark.parametrize("active", [1, 2, 5, 9])
def test_ties_fall_as_torch_has_them(active):
    """A router of zeros: all experts are as likely, and torch.topk says which of them are taken."""
    model = lively(
        "qwen3-moe", num_local_experts=130, num_experts_per_tok=active, decoder_sparse_step=1
    )
    with torch.no_grad():
        for i, (_, router) in enumerate(routers(model)):
            router.weight.zero_()
            if i == 1:  # two groups of equals
                router.weight[::3] = 1.0
    ids = tokens(model, 12)
    engine = Engine.from_model(model, dtype="fp32", native=True, threads=2)
    agree(engine, reference(model, None, ids), ids)


@native
@pytest.mark.parametrize("family", MOE)
def test_the_experts_that_are_chosen_are_read_and_no_others(family):
    model = lively(family)
    ids = tokens(model, 1)
    chosen, _ = visits(model, ids)
    plan = make_plan(model, 0.5)
    plan = replace(
        plan,  # each expert keeps another number
        projections={
            n: replace(e, k=1 + (sum(map(ord, n)) % (e.d_in - 1)))
            for n, e in plan.projections.items()
        },
    )
    engine = Engine.from_model(model, dtype="fp32", native=True, threads=2)
    layout = engine.packed.layout
    head = layout.spec.vocabulary * layout.spec.hidden

    def expected(weights, found):
        return head + sum(
            weights(p)
            for p in LoadedWeights(model).projections
            if p.expert is None
            or p.expert in found[p.module.replace("experts", "gate")][0].tolist()
        )

    dense = engine.new_sequence(8)
    dense.feed(ids)
    assert dense.weights_read == expected(lambda p: p.d_in * p.d_out, chosen)
    assert engine.read_share(dense) == 1.0
    assert projection_weights(layout) == sum(p.cost for p in LoadedWeights(model).projections)
    # What was dropped changes who is chosen further on, so transformers is asked under the plan.
    sparsify_(model, plan, check_contents=False)
    found = {}
    for name, router in routers(model):
        router.register_forward_hook(lambda _m, _i, out, n=name: found.__setitem__(n, out[2]))
    with torch.no_grad():
        model(ids[None])
    acttail.densify_(model)
    sparse = engine.with_plan(plan)
    sequence = sparse.new_sequence(8)
    sequence.feed(ids)
    assert sequence.weights_read == expected(lambda p: plan.projections[p.name].k * p.d_out, found)


@native
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_a_batch_is_each_sequence_alone(family, dtype, sparsity):
    """Lanes that visit one expert share its weights, and none differs by a bit."""
    model = lively(family)
    plan = None if sparsity is None else make_plan(model, sparsity)
    engine = Engine.from_model(model, plan, dtype=dtype, native=True, threads=3)
    pieces = [tokens(model, n, seed=n) for n in (3, 1, 5, 2, 1, 1, 4, 6, 2)]

    def run(together):
        sequences = [engine.new_sequence(16) for _ in pieces]
        if together:
            logits = engine.step(list(zip(sequences, pieces, strict=True))).clone()
        else:
            logits = torch.stack([
                [engine.step([(s, one)])[0].clone() for one in ids.split(1)][-1]
                for s, ids in zip(sequences, pieces, strict=True)
            ])  # fmt: skip
        return logits, [engine.read_share(s) for s in sequences]

    (joint, read), (alone, read_alone) = run(True), run(False)
    assert torch.equal(joint, alone)
    assert read == read_alone


@native
def test_a_prefill_policy_reaches_the_experts():
    model = lively("qwen2-moe")
    plan = make_plan(model, 0.6)
    ids = tokens(model, 30)
    engine = Engine.from_model(model, plan, dtype="fp32", native=True, prefill="first_dense=10")
    sparsify_(model, plan, prefill="first_dense=10")
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    acttail.densify_(model)
    got = engine.new_sequence(64).all_logits(ids)
    assert float((got - expected).abs().max()) <= 1e-3


@native
@pytest.mark.parametrize("family", MOE)
def test_a_uniform_plan_made_of_the_engine(family):
    model = lively(family)
    engine = Engine.from_model(model, dtype="fp32", native=True)
    made, expected = uniform_plan(engine, 0.5), make_plan(model, 0.5, allocator="uniform")
    assert made.projections.keys() == expected.projections.keys()
    assert made.realised_sparsity == pytest.approx(expected.realised_sparsity)
    ids = tokens(model, 20)
    agree(engine.with_own_plan(made), reference(model, expected, ids), ids)


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_bytes_count_the_experts_that_a_token_visits(family, dtype):
    model = build(family)
    held = convert_in_memory(Conversion(describe(model), LoadedWeights(model), EngineConfig(dtype)))
    layout, read = held.layout, packed_bytes(held)
    table = layout.shapes["embedding"]
    everything = sum(t.numel() * t.element_size() for t in held.tensors.values())
    idle = sum(
        shape.bytes * (1 - layout.share(name))
        for name, shape in layout.shapes.items()
        if name in layout.segments
    )
    assert idle > 0
    assert read.dense == everything - table.bytes + table.bytes // table.rows - idle
    assert read.sparse == read.dense
    assert sum(map(sum, projection_bytes(layout).values())) == pytest.approx(read.projections)
    plan = make_plan(model, 0.5, allocator="uniform")
    rows = sum(
        float(layout.share(n)) * s.rows * s.row_bytes
        for n, s in layout.shapes.items()
        if n in layout.segments and n != HEAD_MATRIX
    )
    less = read.dense - packed_bytes(held, plan).sparse
    assert less / rows == pytest.approx(plan.realised_sparsity, abs=0.02)


@native
@pytest.mark.parametrize("family", MOE)
def test_a_folder_is_the_model_for_everybody(family, tmp_path):
    """The engine reads it, plans are made of it, and transformers runs what it holds."""
    model = lively(family, vocab_size=260)
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    plan = make_plan(str(tmp_path / "source"), 0.5)
    convert_model(tmp_path / "source", tmp_path / "packed", dtype="fp32", plan=plan)
    ids = tokens(model, 30)
    engine = Engine.from_pretrained(tmp_path / "packed")
    assert engine.name == "native"
    agree(engine, reference(model, plan, ids), ids)
    packed, source = (
        open_model(tmp_path / "packed").weights,
        open_model(tmp_path / "source").weights,
    )
    for ours, theirs in zip(packed.projections, source.projections, strict=True):
        for field in Projection.__dataclass_fields__:
            mine, other = getattr(ours, field), getattr(theirs, field)
            assert mine == other or set(mine) == set(other), (ours.name, field)
        assert torch.equal(packed.weight(ours), source.weight(theirs).float())
    loaded, _ = acttail.load(tmp_path / "packed", dtype="fp32")
    with torch.no_grad():
        found = loaded(ids[None]).logits[0]
    assert float((found - reference(model, plan, ids)).abs().max()) <= 1e-3


def of_file(family, inner):
    """A model as llama.cpp knows the family: experts in every block, of whole blocks of weights."""
    own = {"shared_expert_intermediate_size": 64} if family == "qwen2-moe" else {"head_dim": 16}
    return lively(
        family, vocab_size=260, hidden_size=64, intermediate_size=96, moe_intermediate_size=inner, decoder_sparse_step=1,
        norm_topk_prob=family == "qwen3-moe", max_position_embeddings=128, **own,
    )  # fmt: skip


@native
@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe"])
def test_a_gguf_file_agrees(family, tmp_path):
    model = of_file(family, 32)
    write_gguf(tmp_path / "m.gguf", model, tokenizer=byte_tokenizer())
    ids = tokens(model, 30)
    plan = make_plan(str(tmp_path / "m.gguf"), 0.5)
    engine = Engine.from_pretrained(tmp_path / "m.gguf", plan, dtype="fp32", native=True)
    for decode in (True, False):
        got = engine.new_sequence(64).all_logits(ids, decode=decode)
        assert float((got - reference(model, plan, ids)).abs().max()) <= 1e-3


@native
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe"])
def test_the_experts_of_a_file_keep_its_numbers(family, kind, tmp_path):
    """Where gate and up are whole blocks of outputs; else they are fitted to int8, and it is said."""
    write_gguf(tmp_path / "m.gguf", of_file(family, 128), kind, tokenizer=byte_tokenizer())
    engine = Engine.from_pretrained(tmp_path / "m.gguf", native=True)
    source = open_model(tmp_path / "m.gguf").stored
    held = dequantised_state(engine.packed)
    for p in source.projections:
        assert torch.equal(held[p.name], source.weight(p)), p.name
    write_gguf(tmp_path / "odd.gguf", of_file(family, 32), kind, tokenizer=byte_tokenizer())
    source = open_model(tmp_path / "odd.gguf").stored
    if kind == "Q4_0":
        with pytest.warns(ActTailWarning, match="Q4_0 become int8"):
            engine = Engine.from_pretrained(tmp_path / "odd.gguf", native=True)
    else:
        engine = Engine.from_pretrained(tmp_path / "odd.gguf", native=True)
    held = dequantised_state(engine.packed)
    for p in source.projections:
        weight = source.weight(p)
        assert float((held[p.name] - weight).abs().max()) <= float(weight.abs().max()) / 127
    expert = engine.packed.layout.shapes["blocks.0.experts.0.gate_up"]
    assert expert.dtype == "int8"


def test_a_mixtral_that_calls_itself_a_llama_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file, blocky(), tokenizer=byte_tokenizer())
    rewrite_gguf(file, {"llama.expert_count": 4, "llama.expert_used_count": 2})
    with pytest.raises(
        ModelError, match="has 4 experts in blocks of llama, which acttail does not run"
    ):
        Engine.from_pretrained(file)


def test_what_is_no_way_to_choose_is_refused():
    model = build("mixtral")
    for wrong in (0, 5):
        model.config.num_experts_per_tok = wrong
        with pytest.raises(UnsupportedModelError, match=f"num_experts_per_tok is {wrong}"):
            describe(model)
    model = build("qwen2-moe")
    model.model.layers[1].mlp.gate.e_score_correction_bias = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedModelError, match=r"block 1 has .*e_score_correction_bias"):
        describe(model)
    model = build("qwen2-moe")
    del model.model.layers[2].mlp.shared_expert
    with pytest.raises(UnsupportedModelError, match=r"does not run a block of .* \(block 2\)"):
        describe(model)
    model = build("llama")
    model.model.layers[0].mlp = build("mixtral").model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match=r"does not run a block of .* \(block 0\)"):
        describe(model)


EXPERTS = ("spec", "blocks", 1, "experts")
CHANGES = [
    ((*EXPERTS, "active"), 5), ((*EXPERTS, "active"), 0), ((*EXPERTS, "active"), 257), ((*EXPERTS, "inner"), 73),
    ((*EXPERTS, "inner"), 25), ((*EXPERTS, "projections"), []), ((*EXPERTS, "projections", 2, "down"), None),
    ((*EXPERTS, "projections", 2, "down"), "model.layers.1.mlp.experts.down_proj.3"), ((*EXPERTS, "router"), ""),
    ((*EXPERTS, "projections", 0, "down"), "0"), ((*EXPERTS, "projections", 2, "gate"), "x.2"),
    ((*EXPERTS, "normalised"), 2), ((*EXPERTS, "shared_gate"), None), (EXPERTS, None), ((*EXPERTS, "hue"), 1),
    (("spec", "blocks", 1, "inner"), 2**31), (("spec", "blocks", 1, "inner"), 41), (("spec", "intermediate"), 24),
    (("spec", "family"), "qwen3"), (("segments", "blocks.1.experts.2.down"), None), (("shapes", "blocks.1.experts.2.down"), None),
    (("segments", "blocks.1.experts.4.down"), []), (("shapes", "blocks.1.experts.2.gate_up", "rows"), 64),
    (("segments", "blocks.1.experts.2.gate_up", 0, "d_out"), 47), (("segments", "blocks.1.experts.2.gate_up", 0, "name"), "q"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), CHANGES)
def test_descriptions_of_experts_that_could_not_be_are_refused(path, value):
    model = build("qwen2-moe")
    layout = Conversion(describe(model), LoadedWeights(model), EngineConfig("int8")).layout
    data = json.loads(json.dumps(layout.to_dict()))
    assert read_layout(json.loads(json.dumps(data))) == layout
    changed(data, path, value)
    with pytest.raises(ActTailError) as found:
        read_layout(data)
    assert "\n" not in str(found.value)
    assert str(found.value).isprintable()
