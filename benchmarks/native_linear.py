"""transformers' own decoding with the sparse operator: dense, masked, and with input-major weights.

SmolLM2-135M, S = 0.5 and 0.7, bfloat16 and float32, 64 tokens after a prompt of 64, by turns. Appends to
native_linear.csv.

    python benchmarks/native_linear.py
"""

import common
import torch

import acttail
from acttail.allocate import make_plan
from acttail.evaluate.speed import EagerContestant, measure


def main():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5000, 49152, (64,), generator=generator)
    for dtype in ("bfloat16", "float32"):
        models = {
            n: acttail.load("smollm2-135m", dtype=dtype)[0] for n in ("dense", "masked", "native")
        }
        for sparsity in (0.5, 0.7):
            plan = make_plan(models["dense"], sparsity, allocator="uniform")
            acttail.sparsify_(models["masked"], plan)
            acttail.sparsify_(models["native"], plan, native=True)
            contestants = {n: EagerContestant(m) for n, m in models.items()}
            speed = measure(contestants, prompt, new_tokens=64, rounds=5)
            for name in ("masked", "native"):
                ratio = speed.ratio(name, "dense")
                row = {
                    "model": "smollm2-135m", "dtype": dtype, "sparsity": sparsity, "what": name,
                    "tokens_per_second": round(speed.median(name), 2),
                    "dense_tokens_per_second": round(speed.median("dense"), 2),
                    "over_dense_median": round(ratio.median, 3), "over_dense_low": round(ratio.low, 3),
                    "over_dense_high": round(ratio.high, 3), "rounds": 5,
                }  # fmt: skip
                common.append("native_linear", row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
