"""What does the exact TopK mask cost in evaluation? Sparse over dense forward, by turns.

One window of 1,024 tokens of SmolLM2-135M per pass, native kernels, the reference, and the naive
`kthvalue` mask that research code uses. Appends to mask_overhead.csv.

    python benchmarks/mask_overhead.py [--rounds 7]
"""

import torch
from common import On, Rows, label, options
from timing import by_turns, ratio

import acttail
from acttail.model.projections import find_projections


def main():
    parser = options(__doc__, "model", rounds=7)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    rows = Rows("mask_overhead", args.out)
    for dtype in ("bfloat16", "float32"):
        dense, _ = acttail.load(args.model, dtype=dtype)
        sparse, _ = acttail.load(args.model, dtype=dtype)
        naive, _ = acttail.load(args.model, dtype=dtype)
        plan = acttail.make_plan(dense, 0.5)
        acttail.sparsify_(sparse, plan)
        for p in find_projections(naive):
            k = plan.projections[p.name].k

            def mask(module, inputs, k=k):
                x = inputs[0]
                magnitude = x.abs().float()
                threshold = magnitude.kthvalue(x.shape[-1] - k + 1, dim=-1, keepdim=True).values
                return (x * (magnitude >= threshold),)

            naive.get_submodule(p.module).register_forward_pre_hook(mask)
        ids = torch.randint(
            0, dense.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0)
        )

        with torch.inference_mode():
            seconds = by_turns(
                {name: (lambda m=m, ids=ids: m(input_ids=ids, use_cache=False))
                 for name, m in (("dense", dense), ("sparse", sparse), ("naive", naive))},
                args.rounds,
            )  # fmt: skip
        for name in ("sparse", "naive"):
            r = ratio(seconds, name, "dense")
            rows.append({
                "dtype": dtype, "tokens": args.tokens, "what": f"{name} / dense",
                **{f"ratio_{k}": v for k, v in r.items()}, "rounds": args.rounds,
                "dense_seconds_median": round(sorted(seconds["dense"])[args.rounds // 2], 3),
            }, On(label(args.model), "random tokens"))  # fmt: skip


if __name__ == "__main__":
    main()
