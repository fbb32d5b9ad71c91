"""An .acttail folder as a model: the weights that its engine runs, under the names that they have in the model."""

import json
from dataclasses import fields, replace

import pytest
import torch
from byte_tokens import byte_tokenizer
from families import build, tempered
from test_file_widths import engine_of, file  # noqa: F401 - a fixture

import acttail
from acttail import make_plan
from acttail.engine import Engine
from acttail.engine.packed_weights import SKETCHES, PackedWeights
from acttail.engine.source import convert_model
from acttail.engine.store import write_packed
from acttail.errors import ActTailError, ModelError, PlanError
from acttail.model.opened import open_model
from acttail.model.projections import Projection
from acttail.plan import fingerprint
from acttail.sparse.backends import cpu
from acttail.sparse.state import sparse_state

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")
FAMILIES = ["llama", "llama-mqa-tied", "llama-odd", "qwen3", "gemma3", "phi3", "starcoder2"]
IDS = torch.arange(3, 25)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Source folder of a family, and what it becomes in a format."""
    root = tmp_path_factory.mktemp("packed")

    def make(family, dtype, **more):
        source = root / family
        if not source.exists():
            build(family).save_pretrained(source)
            byte_tokenizer().save_pretrained(source)
        target = root / f"{family}.{dtype}.acttail"
        if not target.exists() or more:
            convert_model(source, target, dtype=dtype, **more)
        return source, target

    return make


def engine_logits(folder, **arguments):
    return (
        Engine.from_pretrained(folder, native=True, kv_dtype="fp32", **arguments)
        .new_sequence(64)
        .all_logits(IDS)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_lists_the_projections_of_its_source(made, family):
    source, packed = (open_model(m).weights for m in made(family, "fp32"))
    for ours, theirs in zip(
        [*packed.projections, packed.head], [*source.projections, source.head], strict=True
    ):
        for field in fields(Projection):
            mine, other = getattr(ours, field.name), getattr(theirs, field.name)
            assert mine == other or set(mine) == set(other), (ours.name, field.name)
        assert torch.equal(packed.weight(ours), source.weight(theirs).float())
    assert fingerprint(packed.projections) == fingerprint(source.projections)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_runs_what_the_engine_runs(made, family, dtype):
    """Every parameter comes back under its name: norms with their shift, biases, heads that are tied or not."""
    _, folder = made(family, dtype)
    model, tokenizer = acttail.load(folder, dtype="fp32")
    with torch.no_grad():
        found = model(IDS[None]).logits[0]
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    expected = engine_logits(folder)
    tolerance = 1e-5 if dtype == "fp32" else 0.02
    assert float((found - expected).abs().max()) < tolerance * float(
        expected.abs().max().clamp_min(1)
    )


def test_a_file_s_own_blocks_come_back_number_by_number(file, tmp_path):  # noqa: F811
    engine, source = engine_of(file, "auto")
    write_packed(tmp_path / "mixed.acttail", engine.packed)
    packed = open_model(tmp_path / "mixed.acttail").weights
    assert len({shape.dtype for shape in packed.layout.shapes.values()}) > 4
    for p in packed.projections:
        assert torch.equal(packed.weight(p), source.weight(p)), p.name
    index = torch.tensor([0, 7, 300, 256 * 256 - 1])
    p = packed.projections[0]
    assert torch.equal(packed.entries(p, index), source.entries(p, index))


def test_a_tied_head_that_a_plan_made_sparse_stays_tied(tmp_path):
    model = tempered("llama-mqa-tied", 3)
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    plan = make_plan(model, 0.5, allocator="uniform", head=True)
    convert_model(tmp_path / "source", tmp_path / "f", dtype="fp32", plan=plan)
    loaded, _ = acttail.load(tmp_path / "f", dtype="fp32")
    assert sparse_state(loaded).plan.head is not None
    with torch.no_grad():
        found = loaded(IDS[None]).logits[0]
    assert torch.allclose(found, engine_logits(tmp_path / "f"), atol=1e-4)
    # Kept once, it is tied again.
    convert_model(tmp_path / "source", tmp_path / "g", dtype="int8", plan=plan)
    packed = open_model(tmp_path / "g").weights
    loaded, _ = acttail.load(tmp_path / "g", dtype="fp32")
    head, table = loaded.lm_head.weight, loaded.get_input_embeddings().weight
    assert torch.equal(head, packed.weight(packed.head))
    assert torch.equal(table, packed.tensor("model.embed_tokens.weight"))
    assert head.data_ptr() == table.data_ptr()


def test_a_plan_goes_with_the_source_and_with_what_it_became(made):
    """A sketch of int4 weights differs by more than a rounding: the source's is kept."""
    source, folder = made("llama", "int4")
    one, other = (make_plan(str(m), 0.5, allocator="uniform") for m in (source, folder))
    assert one.projections == other.projections
    acttail.sparsify_(acttail.load(folder)[0], one)
    Engine.from_pretrained(folder, one, native=True)
    Engine.from_pretrained(source, other, native=True)
    foreign = make_plan(build("llama", seed=5), 0.5, allocator="uniform")
    for use in (
        lambda: Engine.from_pretrained(folder, foreign, native=True),
        lambda: acttail.sparsify_(acttail.load(folder)[0], foreign),
        lambda: convert_model(folder, folder.parent / "again", plan=foreign),
    ):
        with pytest.raises(
            PlanError, match=r"made for llama|made for LlamaForCausalLM|the weights of"
        ):
            use()


def test_a_checkpoint_saved_from_packed_weights_is_known_by_what_it_holds(made, tmp_path):
    """Four bits are far from the source, whose sketches the plan came with."""
    source, folder = made("llama", "int4")
    plan = make_plan(str(source), 0.5, allocator="uniform")
    model, tokenizer = acttail.load(folder)
    acttail.sparsify_(model, plan)
    own = sparse_state(model).plan
    assert own.projections != plan.projections
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = acttail.load(tmp_path / "saved")
    assert sparse_state(again).plan == own
    acttail.sparsify_(model, own)
    with pytest.raises(PlanError, match="the weights of"):
        acttail.sparsify_(acttail.load(source)[0], own)


def test_the_plan_kept_inside_runs_in_transformers_too(made, tmp_path):
    source, _ = made("llama", "fp32")
    plan = make_plan(str(source), 0.6, allocator="uniform")
    convert_model(source, tmp_path / "f", dtype="fp32", plan=plan)
    loaded, _ = acttail.load(tmp_path / "f")
    assert sparse_state(loaded).plan == plan
    with torch.no_grad():
        found = loaded(IDS[None]).logits[0]
    assert torch.allclose(found, engine_logits(tmp_path / "f"), atol=1e-5)


def test_the_same_weights_get_another_plan(made, tmp_path):
    source, folder = made("llama", "int8")
    plan = make_plan(str(source), 0.5, allocator="uniform")
    convert_model(folder, tmp_path / "f", plan=plan)
    again = PackedWeights("f", tmp_path / "f")
    assert again.plan == plan
    assert again.layout == PackedWeights("x", folder).layout
    assert again.sketches == PackedWeights("x", folder).sketches != {}
    assert torch.equal(engine_logits(tmp_path / "f"), engine_logits(folder, plan=plan))
    with pytest.raises(
        ActTailError, match=r"holds int8 weights .* convert llama again: leave out dtype=int4"
    ):
        convert_model(folder, tmp_path / "g", dtype="int4")
    assert not (tmp_path / "g").exists()


def test_transformers_is_no_stand_in_that_drops_the_plan(made, tmp_path):
    source, _ = made("llama", "fp32")
    plan = replace(make_plan(str(source), 0.5, allocator="uniform"))
    convert_model(source, tmp_path / "f", dtype="fp32", plan=plan)
    engine = Engine.from_pretrained(tmp_path / "f", native=False)
    assert (engine.name, engine.plan) == ("transformers", plan)


def test_a_folder_of_before_configs_were_kept(made):
    """Spectra, plans and the engine need none; what transformers runs names the source."""
    _, folder = made("qwen3", "int8", group=32)
    for name in ("config.json", SKETCHES):
        (folder / name).unlink()
    plan = make_plan(str(folder), 0.5, allocator="acttail")
    assert Engine.from_pretrained(folder, plan, native=True).plan == plan
    with pytest.raises(
        ModelError,
        match=r"qwen3\.int8\.acttail holds packed weights and no config, .* take qwen3, or",
    ):
        acttail.load(folder)


def test_a_damaged_folder_is_one_line(made, tmp_path):
    _, folder = made("llama-odd", "bf16")
    about = json.loads((folder / "engine.json").read_text())
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000])
    with pytest.raises(ModelError, match=r"cannot read .*; convert again"):
        make_plan(str(folder), 0.5, allocator="acttail")
    (folder / "engine.json").write_text(json.dumps(about | {"version": 99}))
    with pytest.raises(ActTailError, match="version 99"):
        make_plan(str(folder), 0.5)
