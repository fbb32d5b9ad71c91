"""A config is refused by the name of its field, before modules are built of it."""

import json

import pytest
from byte_tokens import byte_tokenizer
from families import FAMILIES, build, config

from acttail.errors import ModelError
from acttail.model.config_fields import check_fields
from acttail.model.opened import open_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configs_of_all_families_pass(family):
    check_fields(family, config(family).to_dict())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


WRONG = [
    ("num_hidden_layers", 10**12), ("num_hidden_layers", 0), ("num_hidden_layers", "x"), ("num_hidden_layers", 2.5),
    ("num_hidden_layers", [1]), ("hidden_size", -48), ("hidden_size", 2**62), ("head_dim", 0), ("head_dim", -1), ("vocab_size", {}),
    ("num_attention_heads", 0), ("num_attention_heads", True), ("intermediate_size", -1), ("max_position_embeddings", 0),
    ("rms_norm_eps", "small"), ("rms_norm_eps", -1.0), ("rms_norm_eps", float("nan")), ("hidden_act", 3), ("hidden_act", "x"),
    ("architectures", 7), ("architectures", "LlamaForCausalLM"), ("dtype", 7), ("dtype", {}), ("eos_token_id", "</s>"), ("eos_token_id", [-1]),
    ("eos_token_id", 2**63), ("rope_parameters", [1]), ("rope_parameters", {"rope_type": "none such"}), ("model_type", "x\x1b[2J"),
    ("model_type", "no_such_family"), ("layer_types", ["full_attention"]), ("num_experts", 10**6), ("text_config", {"head_dim": 0}),
    ("quantization_config", "gptq"), ("auto_map", "x"), ("tie_word_embeddings", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_that_no_model_has_so(saved, tmp_path, field, value):
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(data | {field: value}))
    with pytest.raises(ModelError) as found:
        _ = open_model(tmp_path).weights
    assert "\n" not in str(found.value)
    assert str(found.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "nul", "[" * 10_000, '"x"', "\udcff"])
def test_what_is_no_config(saved, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError) as found:
        _ = open_model(tmp_path).config
    assert "\n" not in str(found.value)


def test_blocks_full_of_experts_are_counted_together():
    with pytest.raises(ModelError, match="4096 experts in each of 512 blocks"):
        check_fields("x", {"num_hidden_layers": 512, "num_experts": 4096})
