"""An outline from a GGUF's header is transformers' config, skeleton and names, as far as an engine asks."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from families import tempered
from gguf_files import rewrite_gguf, write_gguf

from acttail.engine.describe import describe
from acttail.model.gguf import GgufWeights
from acttail.model.gguf_file import open_gguf
from acttail.model.gguf_outline import OutlineNames, outline
from acttail.model.hf import GgufNames
from acttail.model.opened import open_model
from acttail.model.projections import find_head, find_projections
from acttail.sparse.backends import cpu

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
FACTORS = np.linspace(1, 8, 8, dtype=np.float32)
# Of a header, by its architecture.
CHANGES = {
    "as written": {},
    "no head size": {"{}.attention.key_length": None, "{}.attention.value_length": None},
    "theta": {"{}.rope.freq_base": 500.0, "{}.rope.freq_base_swa": 700.0},
    "linear": {"{}.rope.scaling.type": "linear", "{}.rope.scaling.factor": 4.0},
    "window": {"{}.attention.sliding_window": 7},
    "caps": {"{}.attn_logit_softcapping": 20.0, "{}.final_logit_softcapping": 10.0},
    "ends": {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.bos_token_id": None},
    "more ends": {"tokenizer.ggml.eot_token_id": 7},
    "vocabulary of its tokens": {"{}.vocab_size": None},
}


def written(tmp_path, tokenizer, family, changes=(), tensors=None, **settings):
    """A tiny file of a family, its header changed."""
    place = tmp_path / "tiny.gguf"
    model = tempered(
        family, 4, vocab_size=260, hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=128,
        **settings,
    )  # fmt: skip
    write_gguf(place, model, tokenizer=tokenizer)
    if changes or tensors:
        fields = {key.format(family): value for key, value in dict(changes).items()}
        rewrite_gguf(place, fields, replace=tensors)
    return place


def assert_equal(place):
    opened = open_model(place)
    mine, theirs = outline(open_gguf(place), opened.name), opened.skeleton
    assert mine is not None
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (mine, theirs)]
    assert shapes[0] == shapes[1]
    assert describe(mine) == describe(theirs)
    assert find_projections(mine) == find_projections(theirs)
    assert find_head(mine) == find_head(theirs)
    for key in ("eos_token_id", "bos_token_id", "vocab_size", "max_position_embeddings"):
        assert getattr(mine.config, key) == getattr(opened.config, key), key
    architecture = open_gguf(place).get("general.architecture")
    names, others = OutlineNames(mine), GgufNames(architecture, opened.config, theirs)
    one = GgufWeights("m", place, mine.config, mine)
    other = GgufWeights("m", place, opened.config, theirs)
    assert one._sources == other._sources
    assert names.parameters.keys() >= {s for found in other._sources.values() for s in found}
    for parameter, stored in other._sources.items():
        assert torch.equal(one.tensor(parameter), other.tensor(parameter)), parameter
        values = open_gguf(place)
        tensor = next(t for t in values.tensors if t.name == stored[0])
        assert np.array_equal(
            names.arranged(tensor.data, stored[0]), others.arranged(tensor.data, stored[0])
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_an_outline_is_the_skeleton(tmp_path, tokenizer, family, changes):
    assert_equal(written(tmp_path, tokenizer, family, changes))


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f != "gemma2"]
)  # it has none in gguf's tables
def test_a_head_of_its_own_and_one_that_is_the_embedding(tmp_path, tokenizer, family):
    for tied in (True, False):
        assert_equal(written(tmp_path, tokenizer, family, tie_word_embeddings=tied))


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_the_frequencies(tmp_path, tokenizer, family):
    assert_equal(written(tmp_path, tokenizer, family, tensors={"rope_freqs.weight": FACTORS}))


@pytest.mark.parametrize(("blocks", "family"), [(46, "gemma2"), (62, "gemma3")])
def test_the_widest_gemmas(tmp_path, tokenizer, blocks, family):
    assert_equal(written(tmp_path, tokenizer, family, num_hidden_layers=blocks, layer_types=None))


@pytest.mark.parametrize("changes", [
    {"{}.rope.scaling.type": "yarn", "{}.rope.scaling.factor": 4.0, "{}.rope.scaling.original_context_length": 32},
    {"{}.attention.head_count_kv": [2, 2, 2]},
    {"general.name": "mistral"},
    {"{}.attention.layer_norm_rms_epsilon": None},
])  # fmt: skip
def test_what_a_header_does_not_say_so_is_left_to_transformers(tmp_path, tokenizer, changes):
    place = written(tmp_path, tokenizer, "llama", changes)
    assert outline(open_gguf(place), "tiny") is None


def test_another_architecture_is_left_to_transformers(tmp_path, tokenizer):
    place = written(tmp_path, tokenizer, "starcoder2")
    assert outline(open_gguf(place), "tiny") is None


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_first_start_imports_no_transformers(tmp_path, tokenizer, family):
    place = written(tmp_path, tokenizer, family)
    script = (
        "import sys; from acttail.engine import Engine\n"
        "e = Engine.from_pretrained(sys.argv[1], native=True); e.generate('ab', max_new_tokens=2)\n"
        "print('transformers' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(place)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
