"""Decoding one token each of several sequences in one pass, against one sequence, by turns.

Four blocks of random weights in the shapes of Qwen2-1.5B and a small vocabulary, packed as for decode_shapes.py; dense
and under a uniform plan; one and two threads. A round times every number of sequences. Appends to small_batches.csv and fills the table of
docs/performance.md.

    python benchmarks/small_batches.py [--widths bf16,int8,int4,q4_k] [--threads 1,2] [--table-only]
"""

import statistics

import torch
from common import On, Rows, fill, options
from decode_shapes import SHAPES, WIDTHS, packed, random_model
from decoding import RANDOM
from timing import by_turns, ratio

from acttail.engine.uniform import uniform_plan
from acttail.sparse.backends import cpu

NAME = "1.5B"
COUNTS = (1, 2, 4, 8)
STEPS = 4
SPARSITIES = (0.0, 0.5)


def contestants(engine):
    """Name of each number of sequences -> a function that decodes some tokens in all of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (max(COUNTS), 32), generator=generator)
    sequences = [engine.new_sequence(1024) for _ in ids]
    for sequence, prompt in zip(sequences, ids, strict=True):
        sequence.feed(prompt)

    def run(n):
        for i in range(STEPS):
            engine.step([(sequences[b], ids[b, i : i + 1]) for b in range(n)])

    return {str(n): lambda n=n: run(n) for n in COUNTS}


def measure(args, rows):
    shape, model = SHAPES[NAME], random_model(SHAPES[NAME])
    on = On(f"{NAME} shapes, {shape.blocks} blocks, random weights", RANDOM)
    for dtype in args.widths.split(","):
        for threads in (int(t) for t in args.threads.split(",")):
            torch.set_num_threads(threads)
            base = packed(shape, dtype, model, threads)
            for sparsity in SPARSITIES:
                engine = base.with_own_plan(uniform_plan(base, sparsity)) if sparsity else base
                seconds = by_turns(contestants(engine), args.rounds)
                for n in COUNTS:
                    over = ratio(seconds, str(n), "1")
                    rows.append({
                        "dtype": dtype, "isa": cpu.status().isa, "decode_threads": threads, "sparsity": sparsity,
                        "sequences": n,
                        "tokens_per_second": round(n * STEPS / statistics.median(seconds[str(n)]), 2),
                        **{f"over_one_{key}": value for key, value in over.items()}, "rounds": args.rounds,
                    }, on)  # fmt: skip


def table(found):
    if not found:
        return "Not measured yet."
    lines = [
        "| width | instructions | threads | S | one sequence, tokens/s | time of 2 ÷ 1 | 4 ÷ 1 | 8 ÷ 1 | eight, tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for what in dict.fromkeys(key[:4] for key in found):
        each = {n: found[(*what, str(n))] for n in COUNTS}
        ratios = " | ".join(
            f"**{float(each[n]['over_one_median']):.2f}** ({float(each[n]['over_one_low']):.2f}–"
            f"{float(each[n]['over_one_high']):.2f})"
            for n in COUNTS[1:]
        )
        lines.append(
            f"| {' | '.join(what)} | {float(each[1]['tokens_per_second']):.0f} | {ratios} "
            f"| {float(each[8]['tokens_per_second']):.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "table", rounds=7)
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    rows = Rows("small_batches", args.out)
    if not args.table_only:
        measure(args, rows)
    keys = ("dtype", "isa", "decode_threads", "sparsity", "sequences")
    fill(args.out, "docs/performance.md", "batches", table(rows.latest(*keys)))


if __name__ == "__main__":
    main()
