"""Weights read one matrix at a time equal those of the loaded model; damage is named."""

import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, build
from gguf_files import write_gguf

from acttail.errors import ActTailError, ModelError, SpectrumError
from acttail.model.load import load
from acttail.model.names import resolve
from acttail.model.opened import as_weights
from acttail.model.weights import LoadedWeights
from acttail.spectrum.analysis import analyze, spectra


def first_line_only(error) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors_equal_the_loaded_model(family, tmp_path):
    """Mixtral's experts are saved apart (w1, w2, w3) and merged on load: the reader merges alike."""
    model = build(family)
    model.save_pretrained(tmp_path)
    weights, loaded = as_weights(tmp_path), LoadedWeights(model)
    assert weights.projections == loaded.projections
    for p in weights.projections:
        assert torch.equal(weights.weight(p), loaded.weight(p)), p.name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights, loaded = as_weights(tmp_path), LoadedWeights(model)
    for p in weights.projections:
        assert torch.equal(weights.weight(p), loaded.weight(p))


def test_base_model_checkpoint_without_prefix(tmp_path):
    """GPT-2's Hub checkpoint names its tensors h.0..., not transformer.h.0..."""
    from safetensors.torch import load_file, save_file

    model = build("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    weights, loaded = as_weights(tmp_path), LoadedWeights(model)
    for p in weights.projections:
        assert torch.equal(weights.weight(p), loaded.weight(p))


def test_gguf_equals_the_model(tmp_path):
    model = build("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    weights, loaded = as_weights(tmp_path / "tiny.gguf"), LoadedWeights(model)
    assert weights.projections == loaded.projections
    for p in weights.projections:
        torch.testing.assert_close(weights.weight(p), loaded.weight(p))
    # A folder with one GGUF in it names that GGUF.
    assert resolve(tmp_path).kind == "gguf"


def test_truncated_gguf(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", build("llama"))
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for size in (3, 30, 900, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        for way in (as_weights, load):
            with pytest.raises(ModelError, match=r"cut\.gguf") as error:
                way(tmp_path / "cut.gguf")
            assert first_line_only(error)


def test_truncated_safetensors(tmp_path, tokenizer):
    build("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    for way in (as_weights, load):
        with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors") as error:
            way(tmp_path)
        assert first_line_only(error)


def test_index_that_points_outside(tmp_path):
    build("llama").save_pretrained(tmp_path / "m", max_shard_size="60KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], "../../etc/passwd")
    index.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="points outside"):
        as_weights(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("./absent", "no such file or folder"),
        ("/absent/model", "no such file or folder"),
        ("absent.gguf", "no such file or folder"),
    ],
)
def test_unknown_paths(name, match):
    with pytest.raises(ModelError, match=match):
        resolve(name)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ModelError, match="holds no model: no config"):
        resolve(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="is not a model"):
        resolve(tmp_path / "notes.txt")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="2 GGUF files"):
        resolve(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "t5", "unknown", "garbage"])
def test_models_that_are_not_decoders(tmp_path, kind):
    config = {
        "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        "unknown": {"model_type": "nonesuch"},
    }
    text = "{" if kind == "garbage" else json.dumps(config[kind])
    (tmp_path / "config.json").write_text(text)
    for way in (lambda: load(tmp_path), lambda: as_weights(tmp_path)):
        with pytest.raises(ModelError) as error:
            way()
        assert first_line_only(error)
        if kind in ("bert", "t5"):
            assert "not a decoder" in str(error.value)


def test_spectra_are_cached_by_content(tmp_path, monkeypatch):
    import acttail.spectrum.cache

    model = build("llama")
    first = spectra(LoadedWeights(model))
    calls = []
    real = acttail.spectrum.cache.esd
    monkeypatch.setattr(acttail.spectrum.cache, "esd", lambda w: calls.append(1) or real(w))
    again = spectra(LoadedWeights(model))
    assert not calls
    assert all(torch.equal(first[k], again[k]) for k in first)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    spectra(LoadedWeights(model))
    assert len(calls) == 1
    spectra(LoadedWeights(model), cache=False)
    assert len(calls) == 22


def test_a_damaged_cache_entry_is_computed_again(tmp_path):
    model = build("llama")
    first = spectra(LoadedWeights(model))
    for file in (tmp_path / "cache" / "spectra").glob("*.safetensors"):
        file.write_bytes(b"broken")
    again = spectra(LoadedWeights(model))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_threads_do_not_change_the_spectra():
    threads = torch.get_num_threads()
    model = build("qwen2-moe")
    alone = spectra(LoadedWeights(model), cache=False)
    torch.set_num_threads(2)
    try:
        together = spectra(LoadedWeights(model), cache=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.allclose(alone[k], together[k]) for k in alone)


def test_nan_weights_name_the_projection():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(SpectrumError, match=r"model\.layers\.1\.mlp\.up_proj: the weight has NaN"):
        analyze(model)
    with pytest.raises(ActTailError, match="unknown estimator"):
        analyze(model, estimator="guess")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_bounded_by_one_matrix(tmp_path):
    """A checkpoint of 1.4 GB is analysed within 1 GB + 4 x its largest matrix (64 MB)."""
    code = f"""
import resource, torch
from transformers import AutoModelForCausalLM, LlamaConfig
cfg = LlamaConfig(vocab_size=64, hidden_size=2048, intermediate_size=8192, num_hidden_layers=5,
                  num_attention_heads=16, num_key_value_heads=4)
AutoModelForCausalLM.from_config(cfg).save_pretrained({str(tmp_path)!r}, max_shard_size="400MB")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    measure = f"""
from acttail import analyze
fits = analyze({str(tmp_path)!r}, cache=False)
assert len(fits) == 35
# Not ru_maxrss, which a process inherits from the one that started it.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", measure], check=True, capture_output=True, text=True
    )
    largest = 2048 * 8192 * 4
    assert int(done.stdout) <= (1 << 30) + 4 * largest
