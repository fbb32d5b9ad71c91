"""What ReLU in the place of a model's activation costs, before and after minutes of `acttail adapt --relu`.

SmolLM2-135M and, with `--model`, any other. Each stage as it is swapped, and after so many steps; beside it a `sensitivity` plan of TopK
with a dense head at the sparsity that the trained ReLU model has, so that both read as many bytes per token, before and after as many steps.
Trained on the text that also calibrates, WikiText-2 validation where it is there; scored on two texts that neither sees.
Appends to relu.csv and skips what is there; a run that was stopped goes on where it was.

    python benchmarks/relu.py [--model M] [--stages stage1,stage2,shifted] [--steps 24] [--topk] [--table-only]
"""

import math

from adapt import Scorer
from common import TEXTS, On, Rows, fill, label, options

import acttail
from acttail.adapt.exact import exact_plan
from acttail.adapt.relu import STAGES, Relu, Swap
from acttail.adapt.run import adapt
from acttail.adapt.settings import Settings
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.text import bos_of, read_text, tokenize, windows
from acttail.model.weights import LoadedWeights
from acttail.sparse.apply import densify_, sparsify_

# Tokens on which zeros are counted before there is a run that holds some out.
COUNTED = 1024


class Bench:
    """One model, its scores and its rows."""

    def __init__(self, args, rows):
        self.args, self.rows = args, rows
        self.text = read_text(args.calibration)
        self.model, self.tokenizer = acttail.load(args.model, dtype="float32")
        self.scorer = Scorer(self.model, self.tokenizer, args.tokens)
        # Keeps the dense model's logits, which the others are held to.
        self.scorer.under(make_plan(self.model, 0.0, allocator="uniform"))
        self.settings = Settings(
            train=tuple(args.train.split(",")), minutes=None, steps=max(args.steps, 1), held_out=2048, evaluations=4,
        )  # fmt: skip

    def fresh(self):
        """The model as loaded."""
        return acttail.load(self.args.model, dtype="float32")[0]

    def swapped(self, stage):
        """Scores of the swap alone, and the sparsity counted."""
        model = self.fresh()
        ids = windows(
            tokenize(self.text, self.tokenizer), 256, COUNTED, None, bos_of(self.tokenizer), self.text.name
        )  # fmt: skip
        Swap(model, Relu(stage), ids)
        sparsify_(model, exact_plan(model, Relu(stage), ids, "swapped alone"), check_contents=False)
        return self.scorer.adapted(model)

    def append(self, way, stage, steps, found, run=None):
        """A row for each text."""
        for name, new in found.items():
            dense = self.scorer.dense[name]
            self.rows.append({
                "corpus": name, "way": way, "stage": stage, "trained": self.args.train if steps else "", "steps": steps,
                "trained_tokens": run.tokens if run else 0, "cpu_seconds": round(run.cpu_seconds) if run else 0,
                "tokens": new.tokens, "window": new.window, "dtype": new.dtype,
                "realised_sparsity": round(new.realised.model, 5), "nll_dense": round(dense.nll, 5),
                "nll": round(new.nll, 5), "kl": round(new.kl, 5), "kl_stderr": round(new.kl_stderr or 0, 5),
                "top1": round(new.top1, 4),
            }, On(label(self.args.model), self.scorer.texts[name].name, self.text.name))  # fmt: skip

    def relu(self, stage, steps):
        """One cell with ReLU."""
        if not steps:
            self.append("relu", stage, 0, self.swapped(stage))
            return
        model = self.fresh()
        run = adapt(
            model, self.tokenizer, None, [self.text], self.settings, relu=Relu(stage), remark=print
        )
        self.append("relu", stage, steps, self.scorer.adapted(model), run)

    def topk(self, stage, steps, sparsity):
        """The cells of TopK beside it, before and after."""
        calibration = Calibration(
            self.model, self.tokenizer, self.text, tokens=self.args.calibration_tokens
        )
        context = AllocationContext(LoadedWeights(self.model), calibration=calibration)
        plan = make_plan(self.model, sparsity, allocator="sensitivity", context=context, head=False)
        self.append("topk", stage, 0, self.scorer.under(plan))
        densify_(self.model)
        model = self.fresh()
        run = adapt(model, self.tokenizer, plan, [self.text], self.settings, remark=print)
        self.append("topk", stage, steps, self.scorer.adapted(model), run)


def measure(args, rows):
    bench = None
    for stage in args.stages.split(","):
        for way, steps in (("relu", 0), ("relu", args.steps), ("topk", args.steps)):
            if way == "topk" and not (args.topk and steps):
                continue
            last = On(
                label(args.model),
                read_text(TEXTS["python-docs"]).name,
                read_text(args.calibration).name,
            )
            if (way, stage, str(steps)) in rows.done(last, "way", "stage", "steps"):
                continue
            bench = bench or Bench(args, rows)
            if way == "relu":
                bench.relu(stage, steps)
            else:
                trained = rows.latest("way", "stage", "steps", "corpus", "text")
                sparsity = next(
                    float(r["realised_sparsity"]) for k, r in trained.items()
                    if k[:4] == ("relu", stage, str(steps), next(iter(TEXTS)))
                )  # fmt: skip
                bench.topk(stage, steps, sparsity)


def table(rows):
    newest = {
        (r["model"], list(STAGES).index(r["stage"]), r["way"], int(r["steps"]), r["corpus"]): r
        for r in rows
    }
    if not newest:
        return "Not measured yet."
    lines = [
        "*Not read* is the share of the weights of all projections that met a zero or were dropped, counted on what was scored.",
        "",
        "| model | stage | | steps | scored on | not read | dense | perplexity | KL to dense | top-1 | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted(newest):
        r = newest[key]
        dense, own = (math.exp(float(r[k])) for k in ("nll_dense", "nll"))
        what = "ReLU" if r["way"] == "relu" else "TopK, as much not read"
        lines.append(
            f"| {r['model']} | {r['stage']} | {what} | {r['steps']} | {r['corpus']} | {float(r['realised_sparsity']):.3f} "
            f"| {dense:.1f} | {own:,.1f} | {float(r['kl']):.3f} | {float(r['top1']):.3f} | {float(r['cpu_seconds']) / 60:.1f} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "calibration", "table", tokens=2048)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--train", default="lora,norm")
    parser.add_argument(
        "--steps", type=int, default=24, help="of 4 windows of 256 tokens; 0 for the swap alone"
    )
    parser.add_argument("--topk", action="store_true", help="beside a plan that reads as much")
    args = parser.parse_args()
    rows = Rows("relu", args.out)
    if not args.table_only:
        measure(args, rows)
    fill(args.out, "docs/results.md", "relu", table(rows.all()))


if __name__ == "__main__":
    main()
