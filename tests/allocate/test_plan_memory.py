"""Plans and spectra of packed models: one matrix dequantised at a time, measured in processes of their own."""

import json
import subprocess
import sys

import pytest
import torch
from byte_tokens import byte_tokenizer
from gguf_files import blocky, write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig

from acttail.engine.source import convert_model
from acttail.model.opened import open_model
from acttail.sparse.backends import cpu

# What is left over once a small model has made everything that is made once: buffers of LAPACK, a matrix of 3 MB and
# its copies.
ROOM = 40 << 20
PEAK = """
import json, resource, sys, torch
torch.set_num_threads(1)
from acttail import analyze, make_plan
def work(model):
    if sys.argv[3] == "analyze":
        analyze(model, cache=False)
    else:
        make_plan(model, 0.5, allocator=sys.argv[3])
work(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
work(sys.argv[2])
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A GGUF of 12 blocks and what it is converted to; 41 million weights in matrices of 0.8 million at most."""
    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=260, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, head_dim=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
    write_gguf(root / "large.gguf", model, "Q4_0", byte_tokenizer())
    write_gguf(root / "small.gguf", blocky(), "Q4_0", byte_tokenizer())
    found = {"gguf": (root / "small.gguf", root / "large.gguf")}
    if cpu.status().available:
        found["acttail"] = tuple(
            convert_model(file, file.with_suffix(".acttail")) for file in found["gguf"]
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("work", ["analyze", "acttail"])
@pytest.mark.parametrize("form", ["gguf", "acttail"])
def test_one_matrix_is_dequantised_at_a_time(large, form, work, tmp_path):
    if form not in large:
        pytest.skip("no native library")
    small, model = large[form]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(model), work],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grew = json.loads(done.stdout)
    weights = sum(p.d_in * p.d_out for p in open_model(model).weights.projections)
    packed = sum(
        f.stat().st_size for f in ([model] if model.is_file() else model.glob("weights.*"))
    )
    # Pages of the file that were read count as the process's; the system takes them back when it wants them.
    assert packed + ROOM < 2 * weights, "the test would not see the model in bfloat16"
    assert grew < packed + ROOM
