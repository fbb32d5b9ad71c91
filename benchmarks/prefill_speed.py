"""The prompt: 512 tokens through the native engine, dense, against torch's own bf16 prefill, by turns.

SmolLM2-135M, two threads. Appends to prefill_speed.csv and fills the table of docs/performance.md.

    python benchmarks/prefill_speed.py [--table-only]
"""

from common import On, Rows, fill, label, options
from decoding import RANDOM, over, prompt, shown

import acttail
from acttail.engine import Engine
from acttail.evaluate.speed import EagerContestant, EngineContestant, measure


def run(args, rows):
    model, _ = acttail.load(args.model, dtype="bfloat16")
    eager = EagerContestant(model)
    ids = prompt(args.tokens, model.config.vocab_size)
    for dtype in ("bf16", "int8", "int4", "fp32"):
        engine = Engine.from_pretrained(args.model, dtype=dtype, native=True, threads=2)
        speed = measure(
            {"ours": EngineContestant(engine), "hf": eager}, ids, new_tokens=1, rounds=args.rounds
        )
        rows.append({
            "dtype": dtype, "prompt_tokens": args.tokens, "threads": 2,
            "tokens_per_second": round(speed.median("ours", prefill=True), 1),
            "hf_tokens_per_second": round(speed.median("hf", prefill=True), 1),
            **over(speed, "ours", ("hf",), prefill=True), "rounds": args.rounds,
        }, On(label(args.model), RANDOM))  # fmt: skip


def table(found):
    if not found:
        return "Not measured yet."
    lines = ["| width | tokens/s | ÷ transformers eager bf16 |", "|---|---|---|"]
    for r in found.values():
        lines.append(f"| {r['dtype']} | {float(r['tokens_per_second']):.0f} | {shown(r, 'hf')} |")
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "table", rounds=7)
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    args = parser.parse_args()
    rows = Rows("prefill_speed", args.out)
    if not args.table_only:
        run(args, rows)
    fill(args.out, "docs/performance.md", "prefill", table(rows.latest("dtype")))


if __name__ == "__main__":
    main()
