"""What a plan and a width cost in quality as the native engine decodes: perplexity, KL and top-1 agreement.

SmolLM2-135M, plans of `sensitivity` at S = 0.5 and 0.7, 4,096 tokens in windows of 1,024; llama.cpp at the same width
on the same windows. Appends to engine_quality.csv, which decode_speed.py reads for its table.

    python benchmarks/engine_quality.py [--widths bf16,int8,int4]
"""

import math
import statistics

from common import On, Rows, label, options
from decoding import SPARSITIES, WIDTHS, engines, plans

from acttail.calibrate.text import read_text, tokenize, windows
from acttail.engine import Engine
from acttail.evaluate.dense_logits import DenseLogits
from acttail.evaluate.native import native_perplexity
from acttail.maths.losses import token_losses
from acttail.model.names import resolve


def run(args, rows):
    size = min(args.window, args.tokens)
    _, tokenizer, found, calibration = plans(args)
    text = read_text(args.text)
    on = On(label(args.model), text.name, calibration)
    source = resolve(args.model)

    def append(dtype, engine, perplexity, error="", kl=None, top1=None):
        rows.append({
            "dtype": dtype, "engine": engine, "tokens": args.tokens, "window": size, "perplexity": perplexity,
            "perplexity_stderr": error, "kl": "" if kl is None else kl, "top1": "" if top1 is None else top1,
        }, on)  # fmt: skip

    for name in args.widths.split(","):
        dtype, head = WIDTHS[name]
        base = Engine.from_pretrained(
            args.model, found[0.5], dtype=dtype, head_dtype=head, native=True, threads=2
        )
        held = DenseLogits()
        ours = engines(base, found)
        for engine in ("dense", *(f"S={s}" for s in SPARSITIES)):
            metrics = ("perplexity",) if engine == "dense" else ("perplexity", "kl", "top1")
            r = native_perplexity(
                ours[engine], text, tokens=args.tokens, window=size, metrics=metrics,
                dense_logits=held,
            )  # fmt: skip
            append(name, engine, r.perplexity, r.perplexity_stderr, r.kl, r.top1)
        del base, ours
        if source.kind != "gguf" or name != dtype:
            continue
        from acttail.evaluate.llama_cpp import LlamaCppContestant, requantised

        llama = LlamaCppContestant(requantised(source.path, dtype), 2, size)
        ids = windows(tokenize(text, tokenizer), size, args.tokens, None, None, text.name)
        losses = [float(token_losses(llama.window_logits(w)[:-1], w[1:]).mean()) for w in ids]
        append(name, "llama.cpp", math.exp(statistics.fmean(losses)))
        llama.close()


def main():
    parser = options(__doc__, "model", "text", "calibration", tokens=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--widths", default=",".join(WIDTHS))
    args = parser.parse_args()
    run(args, Rows("engine_quality", args.out))


if __name__ == "__main__":
    main()
