"""Which file llama.cpp is given; what an impossible contest is refused with."""

import types

import pytest

from acttail.engine.config import EngineConfig
from acttail.errors import ActTailError
from acttail.evaluate import bench, llama_cpp


def opened(gguf):
    return types.SimpleNamespace(source=types.SimpleNamespace(gguf=gguf))


@pytest.fixture
def given(monkeypatch):
    """The files that llama.cpp was given; its quantiser's are named for the width."""
    files = []
    monkeypatch.setattr(llama_cpp, "require", lambda: None)
    monkeypatch.setattr(
        llama_cpp, "LlamaCppContestant", lambda path, *rest: files.append(str(path))
    )
    monkeypatch.setattr(llama_cpp, "requantised", lambda path, dtype: f"{path} as {dtype}")
    return files


@pytest.mark.parametrize(
    ("peer_file", "dtype", "expected"),
    [
        (None, "int8", "m.gguf as int8"),
        (None, "auto", "m.gguf"),
        (bench.OWN, "int8", "m.gguf"),
        ("other.gguf", "int8", "other.gguf"),
    ],
)
def test_the_peer_gets_the_file_that_was_asked_for(given, peer_file, dtype, expected):
    bench._llama_cpp(opened("m.gguf"), peer_file, EngineConfig(dtype), 1, 64)
    assert given == [expected]


@pytest.mark.parametrize(("peer_file", "said"), [(None, "--peer-file"), (bench.OWN, "--peer-file"), ("absent.gguf", "no such file")])  # fmt: skip
def test_a_contest_without_a_file_is_refused(given, peer_file, said):
    with pytest.raises(ActTailError, match=said):
        bench.check_llama_cpp(opened(None), peer_file)
