"""What does calibrating on text sampled from the model itself lose against real text?

SmolLM2-135M; curves from 4,096 sampled tokens, from Python's documentation, and from WikiText-2
validation; perplexity on the first 16,384 tokens of WikiText-2 test. Appends to self_calibration.csv.

    python benchmarks/self_calibration.py
"""

import common

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate import Calibration
from acttail.checkpoint import LoadedWeights
from acttail.selftext import sample_text
from acttail.text import read_text


def main():
    model, tokenizer = acttail.load("smollm2-135m", dtype="bfloat16")
    texts = {
        "self": sample_text(model, tokenizer, tokens=4096),
        "python-docs": read_text("python-docs:calibration"),
        "wikitext-validation": read_text(common.WIKITEXT_VALIDATION),
    }
    scored = read_text(common.WIKITEXT_TEST)
    for name, text in texts.items():
        context = AllocationContext(
            LoadedWeights(model), calibration=Calibration(model, tokenizer, text, tokens=4096)
        )
        for sparsity in (0.5, 0.6):
            plan = make_plan(model, sparsity, allocator="sensitivity", context=context)
            acttail.sparsify_(model, plan, check_contents=False)
            result = acttail.perplexity(model, tokenizer, scored, tokens=16384)
            acttail.densify_(model)
            print(name, sparsity, round(result.perplexity, 2), flush=True)
            common.append("self_calibration", {
                "model": "smollm2-135m GGUF Q4_1", "calibration": text.name, "kind": name, "tokens": 4096,
                "scored": scored.name, "scored_tokens": result.tokens, "dtype": result.dtype,
                "sparsity": sparsity, "realised_sparsity": round(result.realised.model, 5),
                "perplexity": round(result.perplexity, 4),
                "perplexity_stderr": round(result.perplexity_stderr, 4),
            })  # fmt: skip


if __name__ == "__main__":
    main()
