"""Some entries of a matrix are those of the whole matrix, however the file keeps it."""

import pytest
import torch
from families import FAMILIES, build
from gguf_files import blocky, write_gguf

from acttail.errors import ModelError
from acttail.model.opened import as_weights
from acttail.model.weights import LoadedWeights
from acttail.plan import sketch, sketch_of


def some(projection, n=200):
    generator = torch.Generator().manual_seed(projection.d_in)
    return torch.randint(projection.d_in * projection.d_out, (n,), generator=generator)


def assert_entries_agree(weights):
    for p in weights.projections:
        index = some(p)
        whole = weights.weight(p)
        found = weights.entries(p, index)
        assert found.dtype == whole.dtype
        assert torch.equal(found, whole.flatten()[index]), p.name
        assert sketch_of(weights, p) == sketch(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors(family, tmp_path):
    """Mixtral's parts, GPT-2's transposed matrices and bfloat16 among them."""
    model = build(family)
    (model.bfloat16() if family == "llama" else model).save_pretrained(tmp_path)
    assert_entries_agree(as_weights(tmp_path))
    assert_entries_agree(LoadedWeights(model))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_gguf(kind, tmp_path):
    """llama.cpp keeps q and k with their rows in another order."""
    write_gguf(tmp_path / "tiny.gguf", blocky(), kind)
    assert_entries_agree(as_weights(tmp_path / "tiny.gguf"))


def test_a_matrix_of_another_shape_is_named(tmp_path):
    from safetensors.torch import save_file

    build("llama").save_pretrained(tmp_path)
    weights = as_weights(tmp_path)
    projection = weights.projections[0]
    wrong = {projection.parameter_name: torch.zeros(3, 3)}
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not belong together"):
        weights.entries(projection, some(projection))


def test_rows_in_another_order_are_found_once_for_all_blocks(tmp_path, monkeypatch):
    from acttail.model.hf import GgufNames

    write_gguf(tmp_path / "tiny.gguf", blocky(), "Q8_0")
    weights = as_weights(tmp_path / "tiny.gguf")
    asked = []
    real = GgufNames.arranged
    monkeypatch.setattr(
        GgufNames, "arranged", lambda self, v, name: asked.append(name) or real(self, v, name)
    )
    for p in weights.projections:
        weights.entries(p, some(p))
    kinds = {name.split(".", 2)[2] for name in asked}
    assert len(asked) == 2 * len(kinds), "one look at rows and one at columns for each kind"
