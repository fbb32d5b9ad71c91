"""What conversion and a loaded engine hold, measured in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from acttail.sparse.backends import cpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cpu.status().available, reason="no native library"),
]

MAKE = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
cfg = LlamaConfig(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
                  num_attention_heads=16, num_key_value_heads=4)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(cfg, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from byte_tokens import byte_tokenizer
byte_tokenizer().save_pretrained(sys.argv[1])
"""
CONVERT = """
import json, resource, sys
from acttail.engine.source import convert_model
import acttail.engine.convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert_model(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
print(json.dumps({"grew": peak() - before}))
"""
# Private pages: what is mapped from a file can be dropped at any time and is not the engine's.
RUN = """
import json, sys, torch
def private():
    fields = (line.split() for line in open("/proc/self/smaps_rollup"))
    return 1024 * sum(int(f[1]) for f in fields if f[0] in ("Private_Dirty:", "Anonymous:")) // 2
from acttail.engine import Engine, Sampling
import acttail.engine.native, acttail.engine.store
torch.set_num_threads(1)
from acttail.engine.native import library
library()
before = private()
engine = Engine.from_pretrained(sys.argv[1], threads=1)
sequence = engine.new_sequence(64)
sequence.feed(torch.tensor([5]))
sequence.feed(torch.tensor([6]))
print(json.dumps({"grew": private() - before, "bytes": engine.packed.bytes, "kv": sequence.bytes}))
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of 520 MB in bfloat16 whose largest matrix has 8 MB."""
    found = tmp_path_factory.mktemp("large") / "model"
    run(MAKE, found, Path(__file__).parents[1])
    return found


# What torch loads on first use, and a fused matrix in float32 a few times over; int4 tries several scales at
# once. The whole model has 520 MB.
@pytest.mark.parametrize(("dtype", "limit"), [("int8", 300 << 20), ("int4", 450 << 20)])
def test_conversion_streams_and_the_engine_holds_its_weights_once(folder, tmp_path, dtype, limit):
    grew = run(CONVERT, folder, tmp_path / "out", dtype)["grew"]
    assert grew < limit
    size = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert size > 100 << 20
    if sys.platform.startswith("linux"):  # reads /proc
        told = run(RUN, tmp_path / "out")
        assert told["grew"] <= 1.1 * told["bytes"] + told["kv"] + (24 << 20)
        assert told["bytes"] > 100 << 20
