"""Code of a model's repository runs when the user says so, and at no other time; nothing is asked on stdin."""

import json
import sys

import pytest
from gguf_files import blocky

from acttail.engine import Engine, light_tokenizer
from acttail.engine.source import convert_model, folder_tokenizer
from acttail.errors import ActTailError
from acttail.model.load import load
from acttail.model.opened import open_model


class _Nobody:
    """A stdin that must not be read; it says yes, were it asked."""

    def __init__(self):
        self.asked = False

    def readline(self, *_):
        self.asked = True
        return "y\n"

    read = readline

    def isatty(self):
        return True

    def fileno(self):
        raise OSError


@pytest.fixture
def stdin(monkeypatch):
    found = _Nobody()
    monkeypatch.setattr(sys, "stdin", found)
    monkeypatch.setattr("builtins.input", lambda *_: found.readline())
    yield found
    assert not found.asked


def poison(folder, ran):
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast, LlamaConfig, LlamaForCausalLM\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
        "class EvilConfig(LlamaConfig): model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM): config_class = EvilConfig\n"
    )


def edit(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.fixture
def folder(tmp_path, tokenizer):
    blocky().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    poison(tmp_path / "m", tmp_path / "ran")
    return tmp_path / "m"


def test_a_tokenizers_code(folder, tmp_path, stdin):
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil",
    )  # fmt: skip
    for way in (
        lambda: open_model(folder).tokenizer, lambda: load(folder), lambda: Engine.from_pretrained(folder),
        lambda: convert_model(folder, tmp_path / "packed"),
    ):  # fmt: skip
        with pytest.raises(ActTailError, match=r"code.*--trust-remote-code") as error:
            way()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert type(open_model(folder, trust_remote_code=True).tokenizer).__name__ == "Evil"
    assert (tmp_path / "ran").exists()


def test_code_of_an_acttail_folder_is_never_run(folder, tmp_path, stdin):
    packed = convert_model(folder, tmp_path / "packed")
    poison(packed, tmp_path / "ran")
    edit(
        packed / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil",
    )  # fmt: skip
    # What is kept for a start without transformers names no code; without it transformers is asked, and refuses.
    folder_tokenizer(packed)
    (packed / light_tokenizer.FILE).unlink()
    with pytest.raises(ActTailError, match="tokenizer"):
        folder_tokenizer(packed)
    assert not (tmp_path / "ran").exists()


def test_a_models_code(folder, tmp_path, stdin):
    edit(
        folder / "config.json", model_type="evil",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    )  # fmt: skip
    for way in (lambda: open_model(folder).config, lambda: load(folder)):
        with pytest.raises(ActTailError, match=r"code.*--trust-remote-code") as error:
            way()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    model, _ = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "EvilModel"
