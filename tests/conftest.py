"""Fixtures: an isolated cache, tiny models on disk, a byte-level tokenizer."""

import sys
from pathlib import Path

import pytest
import torch
from byte_tokens import byte_tokenizer
from families import build, config
from transformers import AutoModelForCausalLM

from acttail import cli

# Test files lend each other their small models; each is to run alone, too.
sys.path += [str(folder) for folder in sorted(Path(__file__).parent.iterdir()) if folder.is_dir()]

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _no_user_cache(tmp_path_factory):
    """Nor does a fixture of a module or of the session, which begins before a test has its own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTTAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_cache(_no_user_cache, tmp_path, monkeypatch):
    """No test reads or writes the user's cache, nor the network."""
    monkeypatch.setenv("ACTTAIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A llama of 260 byte tokens with a tokenizer, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    cfg = config("llama").__class__(**{**config("llama").to_dict(), "vocab_size": 260})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cfg)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["acttail", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def pytest_collection_modifyitems(items):
    """What takes minutes begins first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_configure(config):
    torch.set_num_threads(1)
