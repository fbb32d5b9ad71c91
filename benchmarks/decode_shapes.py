"""Decoding at the shapes of an 8B model, sparse against dense, by turns.

Four blocks of random weights and a small vocabulary, uniform plans at S = 0.5 and 0.7; 24 tokens after a prompt of
32, one and two threads. Appends to decode_shapes.csv and fills the table of docs/performance.md.

    python benchmarks/decode_shapes.py [--table-only]
"""

import torch
from common import On, Rows, fill, options
from decoding import RANDOM, SPARSITIES, engines, over, prompt, reading, shown

from acttail.allocate import make_plan
from acttail.engine import Engine
from acttail.evaluate.speed import EngineContestant, measure

SHAPES = "8B shapes, 4 blocks, random weights"


def run(args, rows):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found = {s: make_plan(model, s, allocator="uniform") for s in SPARSITIES}
    for dtype in ("bf16", "int8"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            base = Engine.from_model(model, found[0.5], dtype=dtype, native=True, threads=threads)
            ours = engines(base, found)
            contestants = {n: EngineContestant(e) for n, e in ours.items()}
            speed = measure(contestants, prompt(32, 1024), new_tokens=24, rounds=args.rounds)
            for engine in ours:
                tokens = speed.median(engine)
                rows.append({
                    "dtype": dtype, "threads": threads, "engine": engine, "tokens_per_second": round(tokens, 2),
                    **reading(ours[engine], threads, tokens), "rounds": args.rounds, **over(speed, engine, ("dense",)),
                }, On(SHAPES, RANDOM))  # fmt: skip
            del base, ours, contestants


def table(found):
    if not found:
        return "Not measured yet."
    lines = [
        "| width | threads | engine | tokens/s | ÷ our dense | read per token | of memory's speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found.values():
        lines.append(
            f"| {r['dtype']} | {r['threads']} | {r['engine']} | {float(r['tokens_per_second']):.1f} | {shown(r, 'dense')} "
            f"| {float(r['bytes_per_token']) / 1e6:.0f} MB | {100 * float(r['bandwidth_share']):.0f} % |"
        )
    return "\n".join(lines)


def main():
    args = options(__doc__, "table", rounds=7).parse_args()
    rows = Rows("decode_shapes", args.out)
    if not args.table_only:
        run(args, rows)
    fill(
        args.out, "docs/performance.md", "shapes", table(rows.latest("dtype", "threads", "engine"))
    )


if __name__ == "__main__":
    main()
