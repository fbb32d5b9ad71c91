"""transformers' own decoding with the sparse operator: dense, masked, and with input-major weights.

SmolLM2-135M, S = 0.5 and 0.7, bfloat16 and float32, 64 tokens after a prompt of 64, by turns. Appends to
native_linear.csv.

    python benchmarks/native_linear.py
"""

from common import On, Rows, label, options
from decoding import RANDOM, over, prompt

import acttail
from acttail.allocate import make_plan
from acttail.evaluate.speed import EagerContestant, measure


def main():
    parser = options(__doc__, "model", rounds=5)
    parser.add_argument(
        "--tokens", type=int, default=64, help="of the prompt, and decoded after it"
    )
    args = parser.parse_args()
    rows = Rows("native_linear", args.out)
    for dtype in ("bfloat16", "float32"):
        models = {
            n: acttail.load(args.model, dtype=dtype)[0] for n in ("dense", "masked", "native")
        }
        for sparsity in (0.5, 0.7):
            plan = make_plan(models["dense"], sparsity, allocator="uniform")
            acttail.sparsify_(models["masked"], plan)
            acttail.sparsify_(models["native"], plan, native=True)
            contestants = {n: EagerContestant(m) for n, m in models.items()}
            ids = prompt(args.tokens, models["dense"].config.vocab_size)
            speed = measure(contestants, ids, new_tokens=args.tokens, rounds=args.rounds)
            for name in ("masked", "native"):
                rows.append({
                    "dtype": dtype, "sparsity": sparsity, "what": name,
                    "tokens_per_second": round(speed.median(name), 2),
                    "dense_tokens_per_second": round(speed.median("dense"), 2),
                    **over(speed, name, ("dense",)), "rounds": args.rounds,
                }, On(label(args.model), RANDOM))  # fmt: skip


if __name__ == "__main__":
    main()
