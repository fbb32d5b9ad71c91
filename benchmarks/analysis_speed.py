"""How long do the spectra of a whole model take? acttail's against torch.linalg.svdvals, by turns.

Same weights in memory, no cache, two threads for both. Appends to analysis_speed.csv.

    python benchmarks/analysis_speed.py [--rounds 7]
"""

import argparse
import statistics

import common
import torch
from timing import by_turns, ratio

import acttail
from acttail.projections import find_projections, weight_of


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model, _ = acttail.load("smollm2-135m", dtype="float32")
    matrices = [weight_of(model, p) for p in find_projections(model)]
    seconds = by_turns(
        {
            "hill": lambda: acttail.analyze(model, estimator="hill", cache=False),
            "ks": lambda: acttail.analyze(model, estimator="ks", cache=False),
            "checkpoint": lambda: acttail.analyze("smollm2-135m", estimator="hill", cache=False),
            "svdvals": lambda: [torch.linalg.svdvals(w).square() for w in matrices],
        },
        args.rounds,
    )
    for name in ("hill", "ks", "checkpoint"):
        r = ratio(seconds, name, "svdvals")
        median = round(statistics.median(seconds[name]), 2)
        print(name, "median s", median, "over svdvals", r)
        common.append("analysis_speed", {
            "model": "smollm2-135m GGUF Q4_1", "matrices": len(matrices), "what": f"{name} / svdvals",
            **{f"ratio_{k}": v for k, v in r.items()}, "seconds_median": median,
            "svdvals_seconds_median": round(statistics.median(seconds["svdvals"]), 2), "rounds": args.rounds,
        })  # fmt: skip


if __name__ == "__main__":
    main()
