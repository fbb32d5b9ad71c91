"""Decoding at the same width, by turns: ours sparse and dense, llama.cpp, transformers.

SmolLM2-135M at three widths, plans of `sensitivity` at S = 0.5 and 0.7; 128 tokens after a prompt of 128,
medians of 7 rounds, one and two threads. Appends to decode_speed.csv; fills the table of docs/performance.md, with
the perplexity and KL of engine_quality.csv beside each row, and the README's.

    python benchmarks/decode_speed.py [--widths bf16,int8,int4] [--table-only]
"""

import torch
from common import HERE, Rows, fill, options
from decoding import WIDTHS, engines, measured_on, over, plans, prompt, reading, shown

from acttail.engine import Engine
from acttail.evaluate.speed import EagerContestant, EngineContestant, measure
from acttail.model.names import resolve

OTHERS = ("dense", "llama.cpp", "hf")


def run(args, rows):
    model, _, found, calibration = plans(args)
    source = resolve(args.model)
    for name in args.widths.split(","):
        dtype, head = WIDTHS[name]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            base = Engine.from_pretrained(
                args.model, found[0.5], dtype=dtype, head_dtype=head, native=True, threads=threads
            )
            ours = engines(base, found)
            contestants = {n: EngineContestant(e) for n, e in ours.items()}
            llama = None
            if source.kind == "gguf":  # llama.cpp reads nothing else
                from acttail.evaluate.llama_cpp import LlamaCppContestant, requantised

                llama = LlamaCppContestant(requantised(source.path, dtype), threads, 512)
                contestants["llama.cpp"] = llama
            if dtype == "bf16":
                contestants["hf"] = EagerContestant(model)
            ids = prompt(128, model.config.vocab_size)
            speed = measure(contestants, ids, new_tokens=128, rounds=args.rounds)
            for engine in ours:
                tokens = speed.median(engine)
                rows.append({
                    "dtype": name, "threads": threads, "engine": engine, "tokens_per_second": round(tokens, 2),
                    **reading(ours[engine], threads, tokens), "rounds": args.rounds, **over(speed, engine, OTHERS),
                }, measured_on(args.model, calibration))  # fmt: skip
            if llama is not None:
                llama.close()


def table(found, quality):
    if not found:
        return "Not measured yet."
    lines = [
        "Medians of 7 rounds by turns, lowest and highest round in brackets. Absolute tokens/s illustrate only.",
        "",
        "| width | threads | engine | tokens/s | ÷ llama.cpp | ÷ transformers eager | ÷ our dense | read per token | of memory's speed | dense kernels | perplexity | KL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found.values():
        q = quality.get((r["dtype"], r["engine"]))
        cells = [
            r["dtype"], r["threads"], r["engine"], f"{float(r['tokens_per_second']):.1f}",
            shown(r, "llama.cpp"), shown(r, "hf"), shown(r, "dense"),
            f"{float(r['bytes_per_token']) / 1e6:.0f} MB", f"{100 * float(r['bandwidth_share']):.0f} %",
            r["dense_kernel"], f"{float(q['perplexity']):.1f}" if q else "–",
            f"{float(q['kl']):.3f}" if q and q["kl"] else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    llama = [r for (_, name), r in quality.items() if name == "llama.cpp"]
    if llama:
        said = ", ".join(f"{r['dtype']} {float(r['perplexity']):.2f}" for r in llama)
        lines += ["", f"llama.cpp's perplexity on the same windows: {said}."]
    return "\n".join(lines)


def readme_table(found):
    lines = [
        "| decoding against llama.cpp at the same width | threads | our dense | S = 0.5 | S = 0.7 |",
        "|---|---|---|---|---|",
    ]
    files = {"bf16": "BF16", "bf16 with bf16 head": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
    for dtype, file in files.items():
        for threads in ("1", "2"):
            row = [found.get((dtype, threads, n)) for n in ("dense", "S=0.5", "S=0.7")]
            if None in row or not all(r["over_llama.cpp_median"] for r in row):
                continue
            cells = [
                f"{float(r['over_llama.cpp_median']):.2f} × ({float(r['tokens_per_second']):.0f})"
                for r in row
            ]
            lines.append(f"| {dtype} ÷ {file} | {threads} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def main():
    parser = options(__doc__, "model", "calibration", "table", rounds=7)
    parser.add_argument("--widths", default=",".join(WIDTHS))
    args = parser.parse_args()
    rows = Rows("decode_speed", args.out)
    if not args.table_only:
        run(args, rows)
    found = rows.latest("dtype", "threads", "engine")
    quality = Rows("engine_quality", HERE).latest("dtype", "engine")
    fill(args.out, "docs/performance.md", "decode", table(found, quality))
    fill(args.out, "README.md", "speed", readme_table(found))


if __name__ == "__main__":
    main()
