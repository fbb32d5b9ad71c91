"""A checkpoint fills its model, or is refused by the first name: the same line whoever opens it."""

import json
import re

import pytest
import torch
from families import build
from gguf_files import blocky, rewrite_gguf, write_gguf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from acttail.base.files import cache_dir
from acttail.cli import app
from acttail.engine import Engine
from acttail.engine.source import convert_model
from acttail.errors import ActTailWarning, ModelError
from acttail.model.load import load
from acttail.model.opened import as_weights
from acttail.spectrum.analysis import analyze

WAYS = {
    "analyze": analyze,
    "load": load,
    "native": lambda place: Engine.from_pretrained(place, native=True),
    "transformers": lambda place: Engine.from_pretrained(place, native=False),
    "convert": lambda place: convert_model(place, place.parent / "packed"),
}


def refused(place, pattern):
    """Every way, with one and the same line."""
    lines = set()
    for way in WAYS.values():
        with pytest.raises(ModelError, match=pattern) as error:
            way(place)
        lines.add(str(error.value))
    assert len(lines) == 1
    assert "\n" not in lines.pop()
    assert not (place.parent / "packed").exists()
    assert not list((cache_dir() / "gguf").glob("*"))


@pytest.fixture
def folder(tmp_path, tokenizer):
    blocky().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


LOST = [
    "model.norm.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", LOST)
def test_a_tensor_that_is_missing(folder, name):
    change(folder, lambda t: t.pop(name))
    refused(folder, rf"has no tensor for {re.escape(name)};.* fetch")


def test_one_shard_of_several(tmp_path, tokenizer):
    folder = tmp_path / "m"
    blocky().save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    whole = index.read_text()
    shards[1].unlink()
    refused(folder, rf"cannot read .*{shards[1].name}")
    kept = json.loads(whole)
    kept["weight_map"] = {k: v for k, v in kept["weight_map"].items() if v != shards[1].name}
    index.write_text(json.dumps(kept))
    refused(folder, "has no tensor for .* and .* more")


def test_names_with_a_prefix(folder):
    def prefix(tensors):
        for name in list(tensors):
            tensors[f"student.{name}"] = tensors.pop(name)

    change(folder, prefix)
    refused(
        folder, r"has no tensor for .* \(it holds student\.lm_head\.weight, which nothing reads\)"
    )


def test_a_shape_that_is_wrong(folder):
    change(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 32)}))
    refused(
        folder, r"model\.layers\.2\.mlp\.up_proj\.weight has shape \[96, 32\] .* not \[96, 64\]"
    )


def test_what_the_model_would_not_compute_is_refused_and_what_is_beside_it_named(folder):
    change(folder, lambda t: t.update({"visual.patch.weight": torch.zeros(2)}))
    with pytest.warns(ActTailWarning, match=r"1 tensors of m .* not read: visual\.patch\.weight"):
        as_weights(folder)
    change(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(folder, r"holds model\.layers\.0\.self_attn\.q_proj\.bias, for which")


def test_buffers_of_older_checkpoints_are_no_matter(tmp_path, recwarn):
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda t: t.update({
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.zeros(())
    }))  # fmt: skip
    as_weights(tmp_path)
    build("llama").save_pretrained(tmp_path / "l")
    change(
        tmp_path / "l",
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}),
    )
    as_weights(tmp_path / "l")
    assert not [w for w in recwarn if issubclass(w.category, ActTailWarning)]


def test_an_expert_that_is_missing(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    change(tmp_path, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(ModelError, match=r"only 3 of the 4 experts of model\.layers\.1\.mlp"):
        as_weights(tmp_path)


def test_pickle_is_refused_by_one_line(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, r"^m holds no safetensors .* convert the checkpoint")


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.ffn_up.weight", "token_embd.weight"])
def test_a_gguf_without_a_tensor(tmp_path, tokenizer, name):
    place = tmp_path / "tiny.gguf"
    write_gguf(place, blocky(), "Q8_0", tokenizer)
    rewrite_gguf(place, lose=[name])
    refused(place, r"the checkpoint of tiny\.gguf has no tensor for model\.")


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blk.1.ffn_up.weight", [80, 64], [96, 64]),
        ("blk.1.ffn_down.weight", [64, 64], [64, 96]),
        ("blk.0.attn_k.weight", [16, 64], [32, 64]),
        ("blk.2.attn_norm.weight", [48], [64]),
        ("token_embd.weight", [250, 64], [260, 64]),
    ],
)
def test_a_gguf_with_a_wrong_shape(tmp_path, tokenizer, name, shape, wanted):
    place = tmp_path / "tiny.gguf"
    write_gguf(place, blocky(), "F32", tokenizer)
    rewrite_gguf(place, replace={name: torch.zeros(shape).numpy()})
    refused(place, rf"has shape {re.escape(str(shape))} .*, not {re.escape(str(wanted))}")


def test_a_gguf_with_a_tensor_that_nothing_reads(tmp_path, tokenizer):
    place = tmp_path / "tiny.gguf"
    write_gguf(place, blocky(), "F32", tokenizer)
    rewrite_gguf(place, replace={"blk.0.attn_q.bias": torch.ones(64).numpy()})
    refused(place, r"holds blk\.0\.attn_q\.bias, for which")


@pytest.fixture
def cached(tmp_path, monkeypatch, folder):
    """The same model as the Hub's client keeps it, without a network."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--m"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    folder.rename(snapshot)
    return snapshot


def test_the_hubs_cache_is_judged_alike(cached):
    def everywhere(pattern):
        for name, way in WAYS.items():
            if name != "convert":
                with pytest.raises(ModelError, match=pattern):
                    way("org/m")

    load("org/m")
    change(cached, lambda t: t.pop("model.norm.weight"))
    everywhere(r"checkpoint of org/m has no tensor for model\.norm\.weight;")
    change(cached, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    everywhere(r"model\.norm\.weight has shape \[3\]")
    (cached / "model.safetensors").rename(cached / "pytorch_model.bin")
    everywhere(r"^org/m holds no safetensors")


def test_the_command_line_says_so_too(folder):
    change(folder, lambda t: t.pop("model.norm.weight"))
    for command in (
        ["eval", "--text", "python-docs:score"], ["plan", "--sparsity", "0.5"], ["analyze"],
        ["generate", "--prompt", "a"], ["convert", "-o", str(folder.parent / "packed")],
    ):  # fmt: skip
        result = CliRunner().invoke(app, [command[0], str(folder), *command[1:]])
        assert isinstance(result.exception, ModelError), command
        assert "has no tensor for model.norm.weight;" in str(result.exception)
