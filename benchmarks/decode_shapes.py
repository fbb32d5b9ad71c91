"""Decoding at the shapes of larger models, sparse against dense, by turns.

Four blocks of random weights and a small vocabulary, uniform plans at S = 0.5 and 0.7; 24 tokens after a prompt of
32, one and two threads. "q4_k" is a GGUF of Q4_K blocks as it is; the other widths are packed from bf16. The
instruction set is the one that ACTTAIL_ISA allows. Appends to decode_shapes.csv and fills the table of
docs/performance.md.

    python benchmarks/decode_shapes.py [--shapes 1.5B,8B] [--widths bf16,int8,int4,q4_k] [--threads 1,2] [--table-only]
"""

import tempfile
from pathlib import Path

import torch
from common import On, Rows, fill, options
from decoding import RANDOM, SPARSITIES, over, prompt, reading, shown
from random_gguf import Shape, write

from acttail.engine import Engine
from acttail.engine.uniform import uniform_plan
from acttail.evaluate.speed import EngineContestant, measure
from acttail.model.names import resolve
from acttail.sparse.backends import cpu

VOCABULARY = 1024
SHAPES = {
    "1.5B": Shape(4, 1536, 8960, 12, 2, VOCABULARY, mixed=False),
    "8B": Shape(4, 4096, 14336, 32, 8, VOCABULARY, mixed=False),
}
FROM_FILE = "q4_k"
WIDTHS = ("bf16", "int8", "int4", FROM_FILE)


def random_model(shape):
    """A model of transformers of that shape, random weights in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def packed(shape, width, model, threads):
    """The dense engine of one width."""
    if width != FROM_FILE:
        return Engine.from_model(model, dtype=width, native=True, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write(path, resolve("smollm2-135m").gguf, shape=shape)
        return Engine.from_pretrained(path, dtype="auto", native=True, threads=threads)


def run(args, rows):
    for name in args.shapes.split(","):
        shape, widths = SHAPES[name], args.widths.split(",")
        model = random_model(shape) if set(widths) - {FROM_FILE} else None
        on = On(f"{name} shapes, {shape.blocks} blocks, random weights", RANDOM)
        for width in widths:
            for threads in (int(t) for t in args.threads.split(",")):
                torch.set_num_threads(threads)
                base = packed(shape, width, model, threads)
                sparse = {f"S={s}": base.with_own_plan(uniform_plan(base, s)) for s in SPARSITIES}
                ours = {**sparse, "dense": base}
                contestants = {n: EngineContestant(e) for n, e in ours.items()}
                speed = measure(
                    contestants, prompt(32, VOCABULARY), new_tokens=24, rounds=args.rounds
                )
                for engine in ours:
                    tokens = speed.median(engine)
                    rows.append({
                        "dtype": width, "isa": cpu.status().isa, "threads": threads, "engine": engine,
                        "tokens_per_second": round(tokens, 2), **reading(ours[engine], threads, tokens),
                        "rounds": args.rounds, **over(speed, engine, ("dense",)),
                    }, on)  # fmt: skip
                del base, ours, contestants


def table(found):
    if not found:
        return "Not measured yet."
    lines = [
        "| shapes | width | instructions | threads | engine | tokens/s | ÷ our dense | read per token | of memory's speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found.values():
        lines.append(
            f"| {r['model'].split(' ')[0]} | {r['dtype']} | {r['isa']} | {r['threads']} | {r['engine']} "
            f"| {float(r['tokens_per_second']):.1f} | {shown(r, 'dense')} "
            f"| {float(r['bytes_per_token']) / 1e6:.0f} MB | {100 * float(r['bandwidth_share']):.0f} % |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "table", rounds=7)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    rows = Rows("decode_shapes", args.out)
    if not args.table_only:
        run(args, rows)
    keys = ("model", "dtype", "isa", "threads", "engine")
    fill(args.out, "docs/performance.md", "shapes", table(dict(sorted(rows.latest(*keys).items()))))


if __name__ == "__main__":
    main()
