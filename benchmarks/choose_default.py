"""Which data-free rule should be the default? Evidence on calibration text only, of several families of models.

Scores estimator x granularity x scale on text that no result is ever reported on: one half of Python's
documentation and, where it is there, WikiText-2 validation. Appends to choose_default.csv and skips what is
there, so it can be stopped and resumed.

    python benchmarks/choose_default.py [--model smollm2-135m,gemma.gguf] [--sparsity 0.4,0.6] [--tokens 8192]
    python benchmarks/choose_default.py --few    # the candidates that a second family is asked about
"""

from common import CALIBRATION, On, Rows, label, options

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.text import read_text
from acttail.evaluate.dense_logits import DenseLogits
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


def few():
    """What was worth asking a second family: uniform, and the rules that were near the best of the first."""
    yield "uniform", {}
    for estimator, scales in (
        ("ks", (0.15, 0.1, 0.05, 0.2)), ("hill", (0.1, 0.05, 0.15)), ("farms", (0.1, 0.05)), ("peak", (0.1,)),
    ):  # fmt: skip
        for epsilon in scales:
            yield (
                "acttail",
                {"estimator": estimator, "granularity": "within-block", "epsilon": epsilon},
            )
    for estimator in ("ks", "hill"):
        yield "acttail", {"estimator": estimator, "granularity": "projection", "epsilon": -0.1}


def main():
    parser = options(__doc__, "model", tokens=8192)
    parser.add_argument("--sparsity", default="0.6,0.7")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--few", action="store_true", help="fewer candidates")
    args = parser.parse_args()
    rows = Rows("choose_default", args.out)
    for name in args.model.split(","):
        measure(name, args, rows)


def measure(name, args, rows):
    model, tokenizer = acttail.load(name, dtype="bfloat16")
    context = AllocationContext(LoadedWeights(model))
    for corpus, place in TEXTS.items():
        text = read_text(place)
        on = On(label(name), text.name)
        protocol = (str(args.tokens // args.window * args.window), str(args.window))
        keys = ("allocator", "arguments", "sparsity", "tokens", "window")
        done = rows.done(on, *keys)
        dense = DenseLogits()
        for sparsity in map(float, args.sparsity.split(",")):
            for allocator, arguments in few() if args.few else candidates():
                if (allocator, str(arguments), str(sparsity), *protocol) in done:
                    continue
                plan = make_plan(
                    model, sparsity, allocator=allocator, arguments=arguments, context=context
                )
                acttail.sparsify_(model, plan, check_contents=False)
                result = acttail.perplexity(
                    model, tokenizer, text, tokens=args.tokens, window=args.window,
                    metrics=("perplexity", "kl"), dense_logits=dense,
                )  # fmt: skip
                acttail.densify_(model)
                rows.append({
                    "corpus": corpus, "allocator": allocator, "arguments": str(arguments), "sparsity": sparsity,
                    "realised_sparsity": round(result.realised.model, 5),
                    "perplexity": round(result.perplexity, 4),
                    "perplexity_stderr": round(result.perplexity_stderr, 4),
                    "kl": round(result.kl, 5), "kl_stderr": round(result.kl_stderr, 5),
                    "tokens": result.tokens, "window": result.window, "dtype": result.dtype,
                }, on)  # fmt: skip


if __name__ == "__main__":
    main()
