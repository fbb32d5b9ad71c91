"""What a token reads: shares, weights and bytes, on models whose sizes fill no block of 64."""

from dataclasses import replace

import pytest
import torch
from families import build

import acttail
from acttail import make_plan
from acttail.calibrate.text import Text
from acttail.engine import Engine
from acttail.engine.accounting import (
    kv_bytes,
    loaded_bytes,
    packed_bytes,
    planned_weights,
    projection_weights,
    read_share,
)
from acttail.engine.config import EngineConfig
from acttail.engine.convert import Conversion, convert_in_memory
from acttail.engine.describe import describe
from acttail.engine.formats import FORMATS, KV_FORMATS
from acttail.engine.native import NativeDecoder
from acttail.evaluate.native import native_perplexity
from acttail.evaluate.record import native_record
from acttail.evaluate.speed import bytes_per_token
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan
from acttail.sparse.backends import cpu

native = pytest.mark.skipif(not cpu.status().available, reason="no native library")
ODD = "llama-odd"  # 44 features, 67 inside, heads of 10


def thresholds(model, value):
    data = make_plan(model, 0.5, allocator="uniform").to_dict() | {"rule": "threshold"}
    for entry in data["projections"].values():
        entry["threshold"] = value
    return SparsityPlan.from_dict(data)


def decoded(engine):
    sequence = engine.new_sequence(64)
    sequence.feed(torch.tensor([5, 6, 7]))
    sequence.feed(torch.tensor([9]))
    return sequence


@native
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rule", ["dense", "topk", "threshold", "dense kernel"])
def test_the_share_that_is_read(dtype, rule):
    model = build(ODD)
    plan = {
        "dense": None, "topk": make_plan(model, 0.6), "threshold": thresholds(model, 0.05),
        "dense kernel": make_plan(model, 0.6),
    }[rule]  # fmt: skip
    engine = Engine.from_model(model, plan, dtype=dtype, native=True)
    if rule == "dense kernel":
        everything = frozenset(plan.projections)
        engine.decoder = NativeDecoder(engine.packed, plan, 1, "fp32", everything)
    share = engine.read_share(decoded(engine))
    if rule in ("dense", "dense kernel"):
        assert share == 1.0
    elif rule == "topk":
        assert share == pytest.approx(1 - plan.realised_sparsity, abs=1e-12)
    else:
        assert 0 < share < 1
    # Nothing is dropped at a threshold that no entry is below.
    if rule == "threshold":
        assert engine.read_share(decoded(engine.with_plan(thresholds(model, 0.0)))) == 1.0


def packed(model, dtype="bf16", plan=None):
    config = EngineConfig(dtype)
    return convert_in_memory(Conversion(describe(model), LoadedWeights(model), config, plan=plan))


@pytest.mark.parametrize("family", [ODD, "llama-mqa-tied", "qwen2"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_bytes_are_those_that_lie_in_memory(dtype, family):
    """Every tensor once, but for the embedding's table, of which a token meets one row."""
    model = build(family)
    held = packed(model, dtype)
    layout = held.layout
    read = packed_bytes(held)
    table = layout.shapes["embedding"]
    everything = sum(t.numel() * t.element_size() for t in held.tensors.values())
    twice = 0 if "head" in layout.shapes else table.bytes  # tied: as the head it is read whole
    assert read.dense == everything - table.bytes + twice + table.bytes // table.rows
    assert read.sparse == read.dense
    assert read.dense == read.projections + read.lm_head + read.other


def test_a_plan_takes_rows_away_and_leaves_scales_head_and_norms():
    model = build("llama")
    plan = make_plan(model, 0.5, allocator="uniform")
    for dtype in FORMATS:
        held = packed(model, dtype, plan)
        read = packed_bytes(held, plan)
        rows = sum(s.rows * s.row_bytes for n, s in held.layout.shapes.items() if "." in n)
        dropped = (read.dense - read.sparse) / rows
        # Columns of 64 hold 48, 72 or fewer outputs, so projections do not weigh as in the plan.
        assert dropped == pytest.approx(plan.realised_sparsity, abs=0.02)
        every = packed_bytes(held, plan, dense_kernel=frozenset(plan.projections))
        assert every.sparse == every.dense
        counted = packed_bytes(held, plan, share=0.25)
        assert (counted.dense - counted.sparse) / rows == pytest.approx(0.75, abs=0.02)


def test_matrices_of_other_formats_weigh_what_they_are():
    model = build("llama")
    wide, narrow = packed(model, "fp32"), packed(model, "int8")
    name = "blocks.1.down"
    shapes = dict(wide.layout.shapes) | {name: narrow.layout.shapes[name]}
    tensors = {n: t for n, t in wide.tensors.items() if not n.startswith(f"{name}.")}
    tensors |= {f"{name}.{suffix}": t for suffix, t in narrow.matrix(name).items()}
    mixed = replace(wide, layout=replace(wide.layout, shapes=shapes), tensors=tensors)
    less = wide.layout.shapes[name].bytes - narrow.layout.shapes[name].bytes
    assert less > 0
    assert packed_bytes(mixed).dense == packed_bytes(wide).dense - less
    plan = make_plan(model, 0.5)
    whole = packed_bytes(mixed, plan)
    share = sum(planned_weights(mixed.layout, plan).values()) / projection_weights(mixed.layout)
    assert packed_bytes(mixed, plan, share=share) == whole  # counted is what was planned


def test_the_head_is_not_taken_for_projections():
    layout = packed(build(ODD)).layout
    head = layout.spec.vocabulary * layout.spec.hidden
    assert read_share(layout, 0) == 0.0
    assert read_share(layout, head) == 0.0
    assert read_share(layout, head + projection_weights(layout)) == 1.0


@native
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_kv_bytes_are_those_of_the_cache(kv):
    """Of so many positions; the cache itself pads its heads."""
    engine = Engine.from_model(build("llama"), dtype="fp32", kv_dtype=kv, native=True)
    spec = engine.packed.layout.spec
    row = KV_FORMATS[kv]
    counted = kv_bytes(spec, row, 100)
    assert counted == 100 * 2 * 3 * spec.kv_heads * (spec.head_dim * row.bytes + row.scale_bytes)
    assert counted <= engine.new_sequence(100).bytes_for(100)
    longer = bytes_per_token(engine, 40) - bytes_per_token(engine, 20)
    assert longer == kv_bytes(spec, row, 20)


@native
@pytest.mark.parametrize("rule", ["dense", "topk", "threshold"])
def test_a_record_and_a_benchmark_count_alike(rule, tiny_folder):
    """But for the KV cache, which a record leaves out, and for what thresholds meet in other tokens."""
    model, _ = acttail.load(str(tiny_folder), dtype="float32")
    plan = {"dense": None, "topk": make_plan(model, 0.5), "threshold": thresholds(model, 0.05)}[
        rule
    ]
    engine = Engine.from_pretrained(tiny_folder, plan, dtype="int8", native=True)
    text = Text("words", "a few words are as good as any others here " * 8)
    row = native_record(engine, native_perplexity(engine, text, window=64))
    recorded = row["bytes_per_token"]
    assert recorded["dense"] == packed_bytes(engine.packed).dense
    measured = bytes_per_token(engine, 20) - kv_bytes(
        engine.packed.layout.spec, KV_FORMATS["bf16"], 20
    )
    if rule == "threshold":
        share = 1 - row["realised_sparsity"]
        assert 0 < share < 1
        assert recorded["sparse"] == packed_bytes(engine.packed, plan, share=share).sparse
        assert recorded["sparse"] == pytest.approx(measured, rel=0.2)
    else:
        assert recorded["sparse"] == measured


def test_transformers_counts_the_model_as_it_is_loaded():
    model = build("llama")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    table = model.get_input_embeddings().weight
    read = loaded_bytes(model)
    assert read.dense == size - (table.shape[0] - 1) * table.shape[1] * 4
    assert read.sparse == read.dense
    plan = make_plan(model, 0.5)
    sparse = loaded_bytes(model, plan)
    expected = read.projections * (1 - plan.realised_sparsity)
    assert sparse.sparse == pytest.approx(expected + read.lm_head + read.other, abs=1)
