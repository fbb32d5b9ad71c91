"""What does calibrating on text sampled from the model itself lose against real text?

SmolLM2-135M; curves from 4,096 sampled tokens, from Python's documentation, and from WikiText-2 validation where
it is there; perplexity on the first 16,384 tokens of the scored text. Appends to self_calibration.csv.

    python benchmarks/self_calibration.py
"""

from common import CALIBRATION, On, Rows, label, options

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.selftext import sample_text
from acttail.calibrate.text import read_text
from acttail.model.weights import LoadedWeights


def main():
    args = options(__doc__, "model", "text", tokens=16384).parse_args()
    rows = Rows("self_calibration", args.out)
    model, tokenizer = acttail.load(args.model, dtype="bfloat16")
    texts = {
        "self": sample_text(model, tokenizer, tokens=4096),
        "python-docs": read_text("python-docs:calibration"),
    }
    if CALIBRATION != "python-docs:calibration":
        texts["wikitext-validation"] = read_text(CALIBRATION)
    scored = read_text(args.text)
    for name, text in texts.items():
        context = AllocationContext(
            LoadedWeights(model), calibration=Calibration(model, tokenizer, text, tokens=4096)
        )
        for sparsity in (0.5, 0.6):
            plan = make_plan(model, sparsity, allocator="sensitivity", context=context, head=False)
            acttail.sparsify_(model, plan, check_contents=False)
            result = acttail.perplexity(model, tokenizer, scored, tokens=args.tokens)
            acttail.densify_(model)
            rows.append({
                "kind": name, "tokens": 4096, "scored_tokens": result.tokens, "dtype": result.dtype,
                "sparsity": sparsity, "realised_sparsity": round(result.realised.model, 5),
                "perplexity": round(result.perplexity, 4),
                "perplexity_stderr": round(result.perplexity_stderr, 4),
            }, On(label(args.model), scored.name, text.name))  # fmt: skip


if __name__ == "__main__":
    main()
