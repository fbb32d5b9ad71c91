"""How long do the spectra of a whole model take? acttail's against torch.linalg.svdvals, by turns.

Same weights in memory, no cache, two threads for both. Appends to analysis_speed.csv.

    python benchmarks/analysis_speed.py [--rounds 7]
"""

import statistics

import torch
from common import On, Rows, label, options
from timing import by_turns, ratio

import acttail
from acttail.model.projections import find_projections, weight_of


def main():
    args = options(__doc__, "model", rounds=7).parse_args()
    rows = Rows("analysis_speed", args.out)
    model, _ = acttail.load(args.model, dtype="float32")
    matrices = [weight_of(model, p) for p in find_projections(model)]
    seconds = by_turns(
        {
            "hill": lambda: acttail.analyze(model, estimator="hill", cache=False),
            "ks": lambda: acttail.analyze(model, estimator="ks", cache=False),
            "checkpoint": lambda: acttail.analyze(args.model, estimator="hill", cache=False),
            "svdvals": lambda: [torch.linalg.svdvals(w).square() for w in matrices],
        },
        args.rounds,
    )
    for name in ("hill", "ks", "checkpoint"):
        r = ratio(seconds, name, "svdvals")
        median = round(statistics.median(seconds[name]), 2)
        rows.append({
            "matrices": len(matrices), "what": f"{name} / svdvals",
            **{f"ratio_{k}": v for k, v in r.items()}, "seconds_median": median,
            "svdvals_seconds_median": round(statistics.median(seconds["svdvals"]), 2), "rounds": args.rounds,
        }, On(label(args.model)))  # fmt: skip


if __name__ == "__main__":
    main()
