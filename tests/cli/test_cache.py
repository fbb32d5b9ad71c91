"""`acttail cache` and --no-cache, in the process that a person starts."""

import json

import pytest
from test_kept import write_model

from acttail.cli import main
from acttail.engine import Engine, kept


@pytest.fixture
def model_file(tmp_path, tokenizer):
    return write_model(tmp_path / "tiny.gguf", tokenizer)


@pytest.fixture
def acttail(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["acttail", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        said = capsys.readouterr()
        return done.value.code, said.out, said.err

    return run


def test_what_is_kept_is_listed_and_thrown_away(acttail, model_file):
    code, out, err = acttail("cache")
    assert (code, out) == (0, "")
    assert "0 models" in err
    Engine.from_pretrained(model_file, native=True)
    entry = kept.entries()[0]
    code, out, err = acttail("cache")
    assert code == 0
    assert out.split()[0] == entry.folder.name[:8]
    assert out.split()[-1] == "tiny.gguf"
    (listed,) = json.loads(acttail("cache", "--json")[1])
    assert (listed["model"], listed["bytes"], listed["dtype"]) == ("tiny.gguf", entry.bytes, "int8")
    assert acttail("cache", "clear", "other.gguf")[0] == 2
    assert acttail("cache", "clear", entry.folder.name[:8])[0] == 0
    assert kept.entries() == []
    assert acttail("cache", "throw")[0] == 2


def test_the_plans_of_a_model_go_with_it(acttail, model_file, tiny_folder):
    for model in (model_file, tiny_folder):
        command = ("generate", model, "--prompt", "ab", "--max-new-tokens", 2, "--sparsity", 0.4)
        assert acttail(*command)[0] == 0
    assert "2 models" in acttail("cache")[2]
    assert "and 2 plans in" in acttail("cache")[2]
    assert "and 1 plan thrown away" in acttail("cache", "clear", "tiny.gguf")[2]
    assert "and 1 plan thrown away" in acttail("cache", "clear")[2]


def test_no_cache_keeps_nothing(acttail, model_file, monkeypatch):
    monkeypatch.setenv(kept.LIMIT, "1GB")  # taken back after the test
    arguments = ("generate", model_file, "--prompt", "ab", "--max-new-tokens", 2)
    assert acttail(*arguments, "--no-cache")[0] == 0
    assert kept.entries() == []
    monkeypatch.setenv(kept.LIMIT, "1GB")
    assert acttail(*arguments)[0] == 0
    assert len(kept.entries()) == 1
