"""Decoding with AVX2 alone, as most people's processors have it, against llama.cpp built for AVX2 alone, by turns.

One GGUF, dense and under uniform plans with the output head; llama.cpp by a `llama-bench` that was configured with
`-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON` and reads the file as it is and as Q4_0, whose rows it
interleaves. 64 tokens after a prompt of 32. Appends to avx2.csv and fills the table of docs/performance.md.

    ACTTAIL_ISA=avx2 python benchmarks/avx2.py --model FILE.gguf --gguf-bench PATH/llama-bench [--widths auto,int4]
        [--threads 1,2] [--table-only]
"""

import torch
from common import On, Rows, fill, label, options
from decoding import RANDOM, SPARSITIES, over, prompt, shown

from acttail.engine import Engine
from acttail.engine.uniform import uniform_plan
from acttail.evaluate.llama_bench import LlamaBenchContestant
from acttail.evaluate.llama_cpp import quantised
from acttail.evaluate.speed import EngineContestant, measure
from acttail.model.names import resolve
from acttail.sparse.backends import cpu

PEERS = {"as it is": None, "Q4_0": "MOSTLY_Q4_0"}
AGAINST = ("dense", *PEERS)


def run(args, rows):
    if cpu.status().isa != "avx2":
        raise SystemExit(f"this is for avx2, not {cpu.status().isa}: set ACTTAIL_ISA=avx2")
    source = resolve(args.model).gguf
    on = On(label(args.model), RANDOM)
    files = {
        name: source if kind is None else quantised(source, kind) for name, kind in PEERS.items()
    }
    for threads in (int(t) for t in args.threads.split(",")):
        torch.set_num_threads(threads)
        for width in args.widths.split(","):
            base = Engine.from_pretrained(args.model, dtype=width, native=True, threads=threads)
            ours = {"dense": base} | {
                f"S={s}": base.with_own_plan(uniform_plan(base, s)) for s in SPARSITIES
            }
            peers = {n: LlamaBenchContestant(args.gguf_bench, f, threads) for n, f in files.items()}
            speed = measure(
                {n: EngineContestant(e) for n, e in ours.items()} | peers, prompt(32, base.vocabulary),
                new_tokens=64, rounds=args.rounds,
            )  # fmt: skip
            for name in speed.decode:
                rows.append({
                    "width": width, "threads": threads, "engine": name,
                    "tokens_per_second": round(speed.median(name), 2), "rounds": args.rounds,
                    **over(speed, name, AGAINST),
                }, on)  # fmt: skip
            del base, ours, peers


def table(found):
    if not found:
        return "Not measured yet."
    lines = [
        "| model | threads | beside | engine | tokens/s | ÷ our dense | ÷ llama.cpp, the file as it is | ÷ its Q4_0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found.values():
        name = f"llama.cpp, {r['engine']}" if r["engine"] in PEERS else r["engine"]
        ratios = " | ".join(shown(r, other) for other in AGAINST)
        lines.append(
            f"| {r['model']} | {r['threads']} | {r['width']} | {name} | {float(r['tokens_per_second']):.1f} | {ratios} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "table", rounds=7)
    parser.add_argument("--gguf-bench", help="llama.cpp's llama-bench, built for AVX2 alone")
    parser.add_argument("--widths", default="auto,int4")
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    rows = Rows("avx2", args.out)
    if not args.table_only:
        if args.gguf_bench is None:
            raise SystemExit("--gguf-bench names the llama-bench to compare with")
        run(args, rows)
    keys = ("model", "threads", "width", "engine")
    fill(args.out, "docs/performance.md", "avx2", table(dict(sorted(rows.latest(*keys).items()))))


if __name__ == "__main__":
    main()
