"""An .acttail folder is used only if all of it follows from what it says of its decoder."""

import json
import struct
from dataclasses import asdict, replace

import pytest
import torch
from byte_tokens import byte_tokenizer
from families import FAMILIES as TESTED
from families import build, config
from gguf_files import blocky, write_gguf

from acttail import make_plan
from acttail.engine import Engine
from acttail.engine.config import EngineConfig
from acttail.engine.convert import Conversion
from acttail.engine.describe import describe
from acttail.engine.description import read_layout
from acttail.engine.families import FAMILIES
from acttail.engine.packed_weights import read_sketches, sketches_of, write_sketches
from acttail.engine.source import convert_model
from acttail.engine.store import read_folder
from acttail.errors import ActTailError, PlanError
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan
from acttail.sparse.backends import cpu

native = pytest.mark.skipif(not cpu.status().available, reason="no native library")
OURS = [f for f in TESTED if config(f).model_type in FAMILIES]


def layout_of(family="llama", dtype="int8", plan=None, **named):
    model = build(family)
    return Conversion(
        describe(model), LoadedWeights(model), EngineConfig(dtype, **named), plan=plan
    ).layout


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", OURS)
def test_what_a_conversion_writes_is_read(family, dtype):
    layout = layout_of(family, dtype)
    assert read_layout(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize("named", [{"group": 32}, {"group": 0}, {"head_dtype": "bf16"}])
def test_other_groups_and_heads_are_read(named):
    layout = layout_of(**named)
    assert read_layout(layout.to_dict()) == layout


def test_a_head_by_inputs_is_read():
    model = build("llama")
    plan = make_plan(model, 0.5, allocator="uniform", head=True)
    layout = layout_of(plan=plan)
    assert "head" in layout.segments
    assert read_layout(layout.to_dict()) == layout


def changed(data, path, value):
    """The description with one thing in it another."""
    *above, last = path
    for key in above:
        data = data[key]
    if value is None:
        del data[last]
    else:
        data[last] = value


CHANGES = [
    (("spec", "heads"), 3), (("spec", "heads"), 8), (("spec", "heads"), 2**40), (("spec", "kv_heads"), 3), (("spec", "hidden"), 64),
    (("spec", "head_dim"), 24), (("spec", "intermediate"), 73), (("spec", "vocabulary"), 100), (("spec", "vocabulary"), -1),
    (("spec", "family"), "gpt2"), (("spec", "layer_norm"), True), (("spec", "blocks"), []), (("spec", "blocks", 0, "rope"), 7),
    (("spec", "blocks", 0, "rope"), -1), (("spec", "blocks", 1, "window"), -4), (("spec", "blocks", 1, "projections", "q"), "elsewhere"),
    (("spec", "blocks", 1, "projections", "q"), None), (("spec", "blocks", 1, "norms", "q_norm"), "q"), (("spec", "blocks", 1, "norms", "mlp_norm"), None),
    (("spec", "ropes", 0, 0), [1.0] * 40), (("spec", "norm_eps"), "small"), (("spec", "hue"), 1), (("spec", "embedding"), "x" * 5000),
    (("shapes", "blocks.0.qkv", "rows"), 64), (("shapes", "blocks.0.qkv", "columns"), 512), (("shapes", "blocks.0.qkv", "columns"), 100),
    (("shapes", "blocks.0.qkv", "group"), 7), (("shapes", "blocks.0.qkv", "group"), 0), (("shapes", "blocks.0.qkv", "asymmetric"), True),
    (("shapes", "blocks.0.qkv", "output_major"), True), (("shapes", "blocks.0.qkv", "dtype"), "q4_k"), (("shapes", "blocks.0.qkv", "dtype"), "q9"),
    (("shapes", "blocks.0.qkv"), None), (("shapes", "embedding"), None), (("shapes", "head"), None), (("shapes", "embedding", "rows"), 98),
    (("shapes", "embedding", "columns"), 128), (("shapes", "embedding", "output_major"), False), (("shapes", "more"), {"dtype": "fp32", "rows": 1, "columns": 64, "group": 0}),
    (("segments", "blocks.0.qkv"), []), (("segments", "blocks.0.qkv"), None), (("segments", "blocks.9.qkv"), []),
    (("segments", "blocks.0.qkv", 0, "begin"), 64), (("segments", "blocks.0.qkv", 0, "end"), 128), (("segments", "blocks.0.qkv", 1, "d_out"), 25),
    (("segments", "blocks.0.qkv", 0, "kind"), "v"), (("segments", "blocks.0.qkv", 0, "name"), "x\x1b[2J"), (("segments", "blocks.0.o", 0, "d_out"), 47),
    (("dtype",), "q3"), (("head_dtype",), "q3"), (("source",), ""), (("version",), 99), (("hue",), 1),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), CHANGES)
def test_what_does_not_belong_together_is_refused_in_one_line(path, value):
    data = json.loads(json.dumps(layout_of("llama").to_dict()))
    changed(data, path, value)
    with pytest.raises(ActTailError) as found:
        read_layout(data)
    assert "\n" not in str(found.value)
    assert str(found.value).isprintable()


def test_a_file_s_own_blocks_keep_their_groups():
    """Q4_K and the like: the group is the format's, and its rows whole super-blocks."""
    layout = layout_of("llama")
    shape = layout.shapes["blocks.0.o"]
    for other in (
        replace(shape, dtype="q6_k", group=256, columns=128),
        replace(shape, dtype="q5_0", group=32, columns=128, rows=48),
        replace(shape, dtype="q4_k", group=32, columns=128, asymmetric=True),
    ):
        data = layout.to_dict()
        data["shapes"]["blocks.0.o"] = asdict(other)
        with pytest.raises(ActTailError, match=r"blocks\.0\.o is no matrix of the format q"):
            read_layout(data)


@pytest.mark.parametrize("version", [1, 2])
def test_int4_of_before_super_blocks_is_read(version):
    layout = layout_of("llama", "int4", group=32)
    assert {s.dtype for n, s in layout.shapes.items() if "." in n} == {"int4"}
    assert read_layout(layout.to_dict() | {"version": version}) == layout


@pytest.fixture
def folder(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return convert_model(tmp_path / "model", tmp_path / "packed", dtype="int8")


def rewrite(path, change):
    """Change the header of a safetensors file; the data stay where they are."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


def overlap(header):
    header["final_norm"]["data_offsets"] = header["embedding.scale"]["data_offsets"]


def rename(header):
    header["final_norn"] = header.pop("final_norm")


def widen(header):
    header["final_norm"]["shape"] = [24, 2]


def retype(header):
    header["final_norm"] |= {"dtype": "F16", "shape": [96]}


def empty(header):
    header.clear()


def strange(header):
    header["final_norm"]["dtype"] = "F64"


def negative(header):
    header["final_norm"]["data_offsets"] = [-4, 188]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (overlap, "is damaged at"), (rename, "lacks final_norm"), (widen, r"has shape \[24, 2\]"),
        (retype, "has shape"), (empty, "lacks"), (strange, "dtype is wrong"), (negative, "out of range"),
    ],
)  # fmt: skip
def test_tensors_are_those_of_the_description(folder, change, says):
    rewrite(folder / "weights.safetensors", change)
    with pytest.raises(ActTailError, match=says) as found:
        read_folder(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"nul", b"{}", b'{"version": 2}', b"[" * 5000, b"\xff"]
)
def test_what_is_no_description_is_refused(folder, text):
    (folder / "engine.json").write_bytes(text)
    with pytest.raises(ActTailError, match="cannot read"):
        read_folder(folder)


@native
def test_a_plan_of_other_weights_is_refused(folder, tmp_path):
    own = make_plan(str(tmp_path / "model"), 0.5, allocator="uniform")
    foreign = make_plan(build("llama", seed=1), 0.5, allocator="uniform")
    assert Engine.from_pretrained(folder, own).plan == own
    with pytest.raises(PlanError, match=r"the weights of .* differ"):
        Engine.from_pretrained(folder, foreign)
    sketches = folder / "sketches.json"
    for text in ("[]", "{", '{"x": [1]}', '{"x": [NaN, 1]}', '{"x": ["1", 2]}'):
        sketches.write_text(text)
        with pytest.raises(ActTailError, match=r"sketches\.json is not a file of sketches"):
            Engine.from_pretrained(folder, own)


def test_a_weight_that_is_not_finite_has_no_sketch(tmp_path):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
    write_sketches(tmp_path, sketches_of(LoadedWeights(model)))
    found = read_sketches(tmp_path)
    assert len(found) == 21
    assert "model.layers.1.mlp.up_proj" not in found


@native
def test_the_plan_of_a_gguf_goes_with_what_is_packed_of_it(tmp_path, tokenizer):
    write_gguf(tmp_path / "tiny.gguf", blocky(0), "Q4_0", tokenizer)
    plan = make_plan(str(tmp_path / "tiny.gguf"), 0.5, allocator="uniform")
    for dtype in ("auto", "int4", "bf16"):
        packed = convert_model(tmp_path / "tiny.gguf", tmp_path / dtype, dtype=dtype)
        assert Engine.from_pretrained(packed, plan).plan == plan


@native
def test_an_engine_under_another_plan_knows_its_model(folder, tmp_path, tokenizer):
    write_gguf(tmp_path / "tiny.gguf", blocky(0), "Q4_0", tokenizer)
    model, quantised = build("llama"), str(tmp_path / "tiny.gguf")
    own, foreign = (make_plan(m, 0.5, allocator="uniform") for m in (model, build("llama", seed=1)))
    of_file = make_plan(quantised, 0.5, allocator="uniform")
    other_file = make_plan(blocky(1), 0.5, allocator="uniform")
    engines = {
        "model": Engine.from_model(model, dtype="int4"), "folder": Engine.from_pretrained(folder),
        "checkpoint": Engine.from_pretrained(tmp_path / "model"), "kept": Engine.from_pretrained(tmp_path / "model"),
        "kept, with sketches": Engine.from_pretrained(tmp_path / "model", own), "gguf": Engine.from_pretrained(quantised),
    }  # fmt: skip
    for name, engine in engines.items():
        mine, strange = (of_file, other_file) if name == "gguf" else (own, foreign)
        assert engine.with_plan(None).with_plan(mine).plan == mine, name
        with pytest.raises(PlanError, match=r"the weights of .* differ"):
            engine.with_plan(None).with_plan(strange)


@native
def test_a_folder_of_before_the_sketches_takes_any_plan_that_fits(folder, tmp_path):
    (folder / "sketches.json").unlink()
    plan = make_plan(build("llama", seed=1), 0.5, allocator="uniform")
    engine = Engine.from_pretrained(folder, plan)
    assert isinstance(engine.plan, SparsityPlan)
    assert engine.new_sequence(8).feed(torch.tensor([3])).isfinite().all()
