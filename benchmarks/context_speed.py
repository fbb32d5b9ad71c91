"""Decoding after prompts of several lengths: the KV cache is read whole whatever the plan drops.

SmolLM2-135M, int8, two threads, plans of `sensitivity` at S = 0.5 and 0.7, 64 tokens after each prompt, by turns.
Appends to context_speed.csv and fills the table of docs/performance.md.

    python benchmarks/context_speed.py [--lengths 128,1024,4096] [--table-only]
"""

from common import Rows, fill, options
from decoding import SPARSITIES, engines, measured_on, over, plans, prompt, shown

from acttail.engine import Engine
from acttail.evaluate.speed import EngineContestant, bytes_per_token, measure


def run(args, rows):
    model, _, found, calibration = plans(args)
    base = Engine.from_pretrained(args.model, found[0.5], dtype="int8", native=True, threads=2)
    ours = engines(base, found)
    for n in map(int, args.lengths.split(",")):
        contestants = {name: EngineContestant(e) for name, e in ours.items()}
        ids = prompt(n, model.config.vocab_size)
        speed = measure(contestants, ids, new_tokens=args.new_tokens, rounds=args.rounds)
        for name, engine in ours.items():
            rows.append({
                "dtype": "int8", "engine": name, "prompt_tokens": n, "new_tokens": args.new_tokens, "decode_threads": 2,
                "tokens_per_second": round(speed.median(name), 2),
                "bytes_per_token": round(bytes_per_token(engine, n + args.new_tokens // 2)),
                **over(speed, name, ("dense",)), "rounds": args.rounds,
            }, measured_on(args.model, calibration))  # fmt: skip


def table(found):
    names = ["dense", *(f"S={s}" for s in SPARSITIES)]
    lines = [f"| prompt | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for n in dict.fromkeys(key[0] for key in found):
        cells = []
        for name in names:
            r = found.get((n, name))
            if r is None:
                cells.append("–")
                continue
            ratio = "" if name == "dense" else f"{shown(r, 'dense')}, "
            read = f"{float(r['bytes_per_token']) / 1e6:.0f} MB"
            cells.append(f"{ratio}{float(r['tokens_per_second']):.0f} tokens/s, {read}")
        lines.append(f"| {int(n):,} | {' | '.join(cells)} |")
    return "\n".join(lines) if found else "Not measured yet."


def main():
    parser = options(__doc__, "model", "calibration", "table", rounds=7)
    parser.add_argument("--lengths", default="128,1024,4096", help="tokens of the prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    rows = Rows("context_speed", args.out)
    if not args.table_only:
        run(args, rows)
    found = rows.latest("prompt_tokens", "engine")
    fill(args.out, "docs/performance.md", "contexts", table(found))


if __name__ == "__main__":
    main()
