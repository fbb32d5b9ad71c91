"""Which data-free rule should be the default? Evidence on calibration text only.

Scores every estimator x granularity x scale on text that no result is ever reported on: one half of Python's
documentation and, where it is there, WikiText-2 validation. Appends to choose_default.csv and skips what is
there, so it can be stopped and resumed.

    python benchmarks/choose_default.py [--tokens 8192]
"""

from common import CALIBRATION, On, Rows, label, options

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.text import read_text
from acttail.model.weights import LoadedWeights

PYTHON = "python-docs:calibration"
TEXTS = {"python-docs": PYTHON}
if CALIBRATION != PYTHON:
    TEXTS = {"wikitext-validation": CALIBRATION, **TEXTS}


def candidates():
    yield "uniform", {}
    for estimator in ("hill", "farms", "ks", "peak"):
        base = {"estimator": estimator}
        for epsilon in (0.1, 0.15, 0.2):
            yield "acttail", {**base, "granularity": "within-block", "epsilon": epsilon}
        for epsilon, within in ((0.05, 0.1), (0.05, 0.15), (0.1, 0.15)):
            yield (
                "acttail",
                {**base, "granularity": "two-level", "epsilon": epsilon, "epsilon_within": within},
            )
        yield "acttail", {**base, "granularity": "block", "epsilon": 0.1}
        yield "acttail", {**base, "granularity": "projection", "epsilon": -0.1}
        yield "acttail", {**base, "granularity": "projection", "epsilon": 0.1}
        yield "acttail", {**base, "granularity": "type-normalised", "epsilon": 0.1}
        yield "theory", {**base, "sign": "capacity"}
        yield "theory", {**base, "sign": "importance"}
    yield "energy", {}
    for epsilon in (0.05, 0.1, 0.15, -0.1):
        yield "depth", {"epsilon": epsilon}
    for epsilon in (-0.1, -0.15, 0.1):
        yield "per-type", {"epsilon": epsilon}
    for seed in range(3):
        yield "permuted", {"seed": seed, "granularity": "within-block", "epsilon": 0.15}
    yield "reversed", {"granularity": "within-block", "epsilon": 0.15}


def main():
    args = options(__doc__, "model", tokens=8192).parse_args()
    rows = Rows("choose_default", args.out)
    model, tokenizer = acttail.load(args.model, dtype="bfloat16")
    context = AllocationContext(LoadedWeights(model))
    for sparsity in (0.6, 0.7):
        for corpus, place in TEXTS.items():
            text = read_text(place)
            on = On(label(args.model), text.name)
            done = rows.done(on, "allocator", "arguments", "sparsity")
            for allocator, arguments in candidates():
                if (allocator, str(arguments), str(sparsity)) in done:
                    continue
                plan = make_plan(
                    model, sparsity, allocator=allocator, arguments=arguments, context=context
                )
                acttail.sparsify_(model, plan, check_contents=False)
                result = acttail.perplexity(model, tokenizer, text, tokens=args.tokens)
                acttail.densify_(model)
                rows.append({
                    "corpus": corpus, "allocator": allocator, "arguments": str(arguments), "sparsity": sparsity,
                    "realised_sparsity": round(result.realised.model, 5),
                    "perplexity": round(result.perplexity, 4),
                    "perplexity_stderr": round(result.perplexity_stderr, 4),
                    "tokens": result.tokens, "window": result.window, "dtype": result.dtype,
                }, on)  # fmt: skip


if __name__ == "__main__":
    main()
