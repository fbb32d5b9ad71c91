"""A llama-bench binary as a contestant: what it prints is read, what goes wrong is one line."""

import json

import pytest
import torch

from acttail.errors import ActTailError
from acttail.evaluate.llama_bench import LlamaBenchContestant, seconds

PRINTED = [
    {"n_prompt": 128, "n_gen": 0, "avg_ns": 500_000_000},
    {"n_prompt": 0, "n_gen": 64, "avg_ns": 2_000_000_000},
]


def a_binary(tmp_path, body):
    path = tmp_path / "llama-bench"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_round_passes_the_options_on_and_reads_both_times(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    script = (
        f"echo \"$@\" > {tmp_path}/asked; echo warming up; cat <<'EOF'\n{json.dumps(PRINTED)}\nEOF"
    )
    peer = LlamaBenchContestant(a_binary(tmp_path, script), model, 2, ("-rtr", "1"))
    assert peer.round(torch.arange(128), 64) == (0.5, 2.0)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:2] == ["-m", str(model)]
    assert asked[-2:] == ["-rtr", "1"]
    pairs = dict(zip(asked[::2], asked[1::2], strict=True))
    assert (pairs["-p"], pairs["-n"], pairs["-t"], pairs["-o"]) == ("128", "64", "2", "json")


def test_a_failure_is_named_by_its_last_line(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    peer = LlamaBenchContestant(a_binary(tmp_path, "echo a >&2; echo no such type >&2; exit 3"), model, 1)  # fmt: skip
    with pytest.raises(ActTailError, match=r"status 3.*no such type"):
        peer.round(torch.arange(4), 4)


@pytest.mark.parametrize("printed", ["", "[", "[1]", "[{}]", "{}", json.dumps(PRINTED[:1])])
def test_other_output_is_refused(printed):
    with pytest.raises(ActTailError, match="no results"):
        seconds(printed, "it")


def test_what_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(ActTailError, match="is no program"):
        LlamaBenchContestant(tmp_path / "none", tmp_path / "m.gguf", 1)
    binary = a_binary(tmp_path, "exit 0")
    with pytest.raises(ActTailError, match="no such file"):
        LlamaBenchContestant(binary, tmp_path / "m.gguf", 1)
