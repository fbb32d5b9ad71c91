"""What a few minutes of `acttail adapt` are worth, by what is trained: perplexity and KL before and after.

SmolLM2-135M and, with `--model`, any other; `sensitivity` plans with a dense head. Trained on the text that also
calibrates the plan, WikiText-2 validation where it is there; scored on two texts that neither step sees: WikiText-2
test, of the kind that was trained on, and Python's documentation, which is not. A run is so many steps long, not
minutes, so that it can be repeated on a busy machine. Appends to adapt.csv and skips what is there; a run that was
stopped goes on where it was.

    python benchmarks/adapt.py [--model M] [--sparsity 0.6,0.5] [--train lora,all,norm,bias] [--table-only]
"""

import json
import math

import torch
from common import TEXTS, On, Rows, fill, label, options

import acttail
from acttail.adapt.run import adapt
from acttail.adapt.settings import Settings
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.text import read_text
from acttail.evaluate.dense_logits import DenseLogits
from acttail.evaluate.tasks import paired_interval
from acttail.model.weights import LoadedWeights
from acttail.sparse.apply import sparsified

TRAINED = ("bias", "norm", "lora", "lora,norm", "all")
WINDOW = 512


class Scorer:
    """A model as loaded, scored on each text; what the dense one says is computed once."""

    def __init__(self, model, tokenizer, tokens):
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.texts = {name: read_text(place) for name, place in TEXTS.items()}
        self.logits = {name: DenseLogits() for name in TEXTS}
        self.dense = {name: self.one(name, ("perplexity",)) for name in TEXTS}

    def one(self, name, metrics):
        """The model as it is now on one text."""
        return acttail.perplexity(
            self.model, self.tokenizer, self.texts[name], tokens=self.tokens, window=WINDOW,
            metrics=metrics, dense_logits=self.logits[name],
        )  # fmt: skip

    def under(self, plan):
        """Text -> result of the model under a plan; dense again afterwards."""
        with sparsified(self.model, plan):
            return {name: self.one(name, ("perplexity", "kl", "top1")) for name in TEXTS}

    def adapted(self, model):
        """Text -> result of an adapted model against the one that was loaded.

        The logits of the dense original are kept, so the adapted weights are scored against those.
        """
        original, self.model = self.model, model
        try:
            return {name: self.one(name, ("perplexity", "kl", "top1")) for name in TEXTS}
        finally:
            self.model = original


def windows(result):
    return json.dumps([round(float(v), 5) for v in torch.nanmean(result.token_nll, 1)])


def measure(args, rows):
    text = read_text(args.calibration)
    wanted = [(s, t) for s in args.sparsity.split(",") for t in args.train.split(";")]
    last = On(label(args.model), read_text(TEXTS["python-docs"]).name, text.name)
    done = rows.done(last, "sparsity", "trained", "steps")
    todo = [(s, t) for s, t in wanted if (s, t, str(args.steps)) not in done]
    if not todo:
        return
    model, tokenizer = acttail.load(args.model, dtype="float32")
    scorer = Scorer(model, tokenizer, args.tokens)
    calibration = Calibration(model, tokenizer, text, tokens=args.calibration_tokens)
    context = AllocationContext(LoadedWeights(model), calibration=calibration)
    before, uniform, plans = {}, {}, {}
    for sparsity, trained in todo:
        if sparsity not in plans:
            flat = make_plan(model, float(sparsity), allocator="uniform", context=context)
            plans[sparsity] = make_plan(
                model, float(sparsity), allocator="sensitivity", context=context, head=False
            )
            uniform[sparsity], before[sparsity] = map(scorer.under, (flat, plans[sparsity]))
        settings = Settings(
            train=tuple(trained.split(",")), minutes=None, steps=args.steps, held_out=2048, evaluations=4,
        )  # fmt: skip
        other, _ = acttail.load(args.model, dtype="float32")
        run = adapt(other, tokenizer, plans[sparsity], [text], settings, remark=print)
        after = scorer.adapted(other)
        del other
        for name in TEXTS:
            dense, flat, old, new = (
                r[name] for r in (scorer.dense, uniform[sparsity], before[sparsity], after)
            )
            rows.append({
                "corpus": name, "allocator": "sensitivity", "sparsity": sparsity, "trained": trained,
                "steps": args.steps, "steps_taken": run.steps, "trained_tokens": run.tokens,
                "parameters": run.parameters, "seconds": round(run.seconds), "cpu_seconds": round(run.cpu_seconds),
                "held_out_kl_before": round(run.kl_before, 5), "held_out_kl_after": round(run.kl_after, 5),
                "tokens": new.tokens, "window": new.window, "dtype": new.dtype, "prefill": new.prefill,
                "realised_sparsity": round(new.realised.model, 6), "nll_dense": round(dense.nll, 5),
                "nll_uniform": round(flat.nll, 5), "nll_before": round(old.nll, 5), "nll": round(new.nll, 5),
                "kl_before": round(old.kl, 5), "kl": round(new.kl, 5), "kl_stderr": round(new.kl_stderr, 5),
                "top1_before": round(old.top1, 4), "top1": round(new.top1, 4),
                "nll_by_window_before": windows(old), "nll_by_window": windows(new),
            }, On(label(args.model), scorer.texts[name].name, text.name))  # fmt: skip


def excess(row, which):
    """Log-perplexity above the dense model's, over uniform's."""
    dense = float(row["nll_dense"])
    return (float(row[which]) - dense) / (float(row["nll_uniform"]) - dense)


def line(row):
    d, low, high = paired_interval(
        json.loads(row["nll_by_window"]), json.loads(row["nll_by_window_before"])
    )
    perplexities = (
        f"{math.exp(float(row[k])):.1f}" for k in ("nll_dense", "nll_uniform", "nll_before", "nll")
    )
    return (
        f"| {row['model']} | {row['sparsity']} | {row['corpus']} | `{row['trained']}` | {' | '.join(perplexities)} "
        f"| {d:+.3f} ({low:+.3f}, {high:+.3f}) | {excess(row, 'nll_before'):.2f} → {excess(row, 'nll'):.2f} "
        f"| {float(row['kl_before']):.3f} → {float(row['kl']):.3f} "
        f"| {float(row['top1_before']):.3f} → {float(row['top1']):.3f} "
        f"| {int(row['trained_tokens']):,} | {float(row['cpu_seconds']) / 60:.1f} |"
    )


def table(rows):
    newest = {(r["model"], r["sparsity"], r["corpus"], r["trained"]): r for r in rows}
    if not newest:
        return "Not measured yet."

    def place(key):
        model, sparsity, corpus, trained = key
        return model, float(sparsity), list(TEXTS).index(corpus), TRAINED.index(trained)

    lines = [
        "*Excess* is log(perplexity / dense) over uniform's at the same sparsity; *change* is of log-perplexity, with "
        "its paired 95 % bootstrap interval over windows; minutes are of one processor, training and validation.",
        "",
        "| model | S | scored on | trained | dense | uniform | before | after | change | excess | KL to dense | top-1 "
        "| tokens | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    known = [k for k in newest if k[2] in TEXTS and k[3] in TRAINED]
    return "\n".join(lines + [line(newest[k]) for k in sorted(known, key=place)])


def main():
    parser = options(__doc__, "model", "calibration", "table", tokens=4096)
    parser.add_argument("--sparsity", default="0.6,0.5")
    parser.add_argument("--train", default="lora;all;norm;bias", help="what is trained, by turns")
    parser.add_argument("--steps", type=int, default=48, help="of 4 windows of 256 tokens")
    args = parser.parse_args()
    rows = Rows("adapt", args.out)
    if not args.table_only:
        measure(args, rows)
    fill(args.out, "docs/results.md", "adapt", table(rows.all()))


if __name__ == "__main__":
    main()
