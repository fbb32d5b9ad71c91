"""Every allocator at equal sparsity: perplexity, KL and top-1 agreement.

SmolLM2-135M, 32,768 tokens of WikiText-2 test in windows of 1,024, all sparse; calibrated rules see 16,384 tokens of
the validation split. A second scored text, Python's documentation, shows whether a rule is over-fitted; where there
is no WikiText-2 it is the only one. Other models are scored on fewer tokens and by fewer rules, as asked. Appends to calibrated.csv and skips what is there; losses per window are kept for paired comparison.

    python benchmarks/calibrated.py [--model M] [--corpus wikitext|python-docs] [--sparsity 0.5,0.6,0.7]
        [--tokens 8192] [--rules uniform,sensitivity] [--table-only]
"""

import dataclasses
import json
import math
import time

import torch
from common import FITTED, TEXTS, On, Rows, fill, label, options

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.allocate.sensitivity import curves_for
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.text import read_text
from acttail.errors import BudgetError
from acttail.evaluate.dense_logits import DenseLogits
from acttail.evaluate.tasks import paired_interval
from acttail.model.weights import LoadedWeights

TOKENS = {"wikitext": 32768, "python-docs": 16384}
# (allocator, rule), best first. A threshold's sparsity drifts on text it was not set on, so each such cell
# is measured at two requests and read off at the wanted realised sparsity.
RULES = (
    ("uniform", "topk"), ("refined", "threshold"), ("sensitivity", "topk"), ("greedy", "topk"),
    ("greedy", "threshold"), ("wina", "wina"), ("acttail", "topk"), ("depth", "topk"),
    ("uniform", "threshold"), ("larosa", "topk"), ("ffn-only", "threshold"), ("cats", "cats"),
    ("permuted", "topk"), ("reversed", "topk"), ("per-type", "topk"), ("energy", "topk"),
    ("theory-capacity", "topk"), ("theory-importance", "topk"),
)  # fmt: skip
# Measured at S = 0.6 only (docs/results.md has their other sparsities on half of the tokens).
HOPELESS = {"energy", "theory-capacity", "theory-importance", "reversed", "per-type", "permuted"}
VARIANTS = {("greedy", "threshold"), ("uniform", "threshold")}


class Bench:
    """One model, one text, one calibration; cells are appended to the CSV as they are measured."""

    def __init__(self, args, rows):
        self.which, self.rows, self.tokens = args.corpus, rows, args.tokens or TOKENS[args.corpus]
        self.model, self.tokenizer = acttail.load(args.model, dtype="bfloat16")
        self.text = read_text(TEXTS[args.corpus])
        self.calibration = Calibration(
            self.model, self.tokenizer, read_text(args.calibration), tokens=args.calibration_tokens
        )
        self.on = On(label(args.model), self.text.name, self.calibration.text.name)
        self.done = rows.done(self.on, "allocator", "rule", "sparsity")
        # Quantiles need less text than curves do.
        self.short = dataclasses.replace(self.calibration, tokens=4096)
        self.context = AllocationContext(LoadedWeights(self.model), calibration=self.calibration)
        self.dense_logits = DenseLogits()

    def score(self, name, rule, request):
        """(result, seconds to plan) of one allocator at one request."""
        started = time.perf_counter()
        if name != "dense":
            if name in ("sensitivity", "refined"):
                self.context.curves = curves_for(self.context, {"loss": "fisher"})
            measures = rule in ("threshold", "cats") and name != "greedy"
            self.context.calibration = self.short if measures else self.calibration
            if name == "greedy":
                make_plan(
                    self.model,
                    request,
                    allocator=name,
                    rule="topk",
                    context=self.context,
                    head=False,
                )
                self.context.calibration = self.short if rule == "threshold" else self.calibration
            plan = make_plan(
                self.model, request, allocator=name, arguments=FITTED.get(name), rule=rule, context=self.context,
                head=False,
            )  # fmt: skip
            acttail.sparsify_(self.model, plan, check_contents=False)
        seconds = time.perf_counter() - started
        metrics = ("perplexity",) if name == "dense" else ("perplexity", "kl", "top1")
        result = acttail.perplexity(
            self.model, self.tokenizer, self.text, tokens=self.tokens, window=1024,
            metrics=metrics, dense_logits=self.dense_logits,
        )  # fmt: skip
        acttail.densify_(self.model)
        return result, seconds

    def cell(self, name, rule, sparsity):
        """Measure one cell and append it, unless it is there."""
        if (name, rule, str(sparsity)) in self.done:
            return
        try:
            result, seconds = self.score(name, rule, sparsity)
        except BudgetError as error:
            self.append(name, rule, sparsity, {"note": str(error)})
            return
        realised = result.realised.model if result.realised else 0.0
        values = figures(result)
        note = ""
        if rule in ("threshold", "cats") and abs(realised - sparsity) > 2e-4:
            # A second request beyond the target, then a straight line between the two.
            other, _ = self.score(name, rule, min(sparsity + 1.5 * (sparsity - realised), 0.99))
            share = (sparsity - realised) / (other.realised.model - realised)
            note = f"read off between realised {realised:.4f} and {other.realised.model:.4f}"
            values = mixed(values, figures(other), share)
            realised = sparsity
        self.append(name, rule, sparsity, {
            "dtype": result.dtype, "prefill": result.prefill, "tokens": result.tokens,
            "realised_sparsity": round(realised, 6), "plan_seconds": round(seconds, 1), "note": note,
            "perplexity_stderr": math.exp(values["nll"]) * result.nll_stderr, **values,
        })  # fmt: skip

    def append(self, name, rule, sparsity, values):
        """Append one row; what a cell lacks stays empty."""
        columns = (
            "tokens", "dtype", "prefill", "realised_sparsity", "perplexity", "perplexity_stderr", "nll", "kl",
            "kl_stderr", "top1", "top1_stderr", "plan_seconds", "nll_by_window", "note",
        )  # fmt: skip
        self.rows.append({
            "corpus": self.which, "window": 1024, "allocator": name, "rule": rule, "calibration_tokens": self.calibration.tokens, "sparsity": sparsity,
            **{c: values.get(c, "") for c in columns},
        }, self.on)  # fmt: skip


def figures(result):
    windows = [round(float(v), 5) for v in torch.nanmean(result.token_nll, 1)]
    return {
        "perplexity": result.perplexity, "nll": result.nll, "kl": result.kl, "kl_stderr": result.kl_stderr,
        "top1": result.top1, "top1_stderr": result.top1_stderr, "nll_by_window": json.dumps(windows),
    }  # fmt: skip


def mixed(a, b, share):
    """Figures on the line between two measurements; log-perplexity, not perplexity, is mixed."""

    def mix(x, y):
        return x + share * (y - x)

    out = {k: mix(a[k], b[k]) for k in ("nll", "kl", "kl_stderr", "top1", "top1_stderr")}
    pairs = zip(json.loads(a["nll_by_window"]), json.loads(b["nll_by_window"]), strict=True)
    windows = [round(mix(x, y), 5) for x, y in pairs]
    return out | {"perplexity": math.exp(out["nll"]), "nll_by_window": json.dumps(windows)}


def measure(args, rows):
    bench = Bench(args, rows)
    bench.cell("dense", "topk", 0)
    for sparsity in map(float, args.sparsity.split(",")):
        for name, rule in RULES:
            if args.rules and name not in args.rules.split(","):
                continue
            main = args.corpus == "wikitext" and sparsity == 0.6
            if (name in HOPELESS and not main) or (
                (name, rule) in VARIANTS and not main and sparsity not in (0.5, 0.7)
            ):
                continue
            bench.cell(name, rule, sparsity)


def paired(a, b):
    """Mean difference of log-perplexity of two rows, and its 95 % bootstrap interval over windows."""
    return paired_interval(json.loads(a["nll_by_window"]), json.loads(b["nll_by_window"]))


def table(latest):
    if ("dense", "topk", 0.0) not in latest:
        return "Not measured yet."
    dense = float(latest["dense", "topk", 0.0]["perplexity"])
    lines = [
        f"Dense: {dense:.2f}. *Excess* is log(perplexity / dense) over uniform's; *against refined* is the paired "
        "difference in log-perplexity from `refined`, with its 95 % bootstrap interval over windows.",
        "",
        "| S | allocator | rule | realised | perplexity | excess | KL to dense | top-1 | against refined | plan, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in sorted({k[2] for k in latest} - {0.0}):
        uniform = latest.get(("uniform", "topk", s))
        best = latest.get(("refined", "threshold", s))
        for name, rule in RULES:
            r = latest.get((name, rule, s))
            if r is None or uniform is None:
                continue
            if not r["perplexity"]:
                lines.append(f"| {s} | `{name}` | {rule} | – | null: {r['note']} | | | | | |")
                continue
            p = float(r["perplexity"])
            excess = math.log(p / dense) / math.log(float(uniform["perplexity"]) / dense)
            against = ""
            if best is not None and r is not best:
                d, low, high = paired(r, best)
                against = f"{d:+.3f} ({low:+.3f}, {high:+.3f})"
            lines.append(
                f"| {s} | `{name}` | {rule} | {float(r['realised_sparsity']):.4f} | {p:.1f} ± "
                f"{float(r['perplexity_stderr']):.1f} | {excess:.2f} | {float(r['kl']):.3f} ± {float(r['kl_stderr']):.3f} "
                f"| {float(r['top1']):.3f} | {against} | {float(r['plan_seconds']):.0f} |"
            )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "calibration", "table")
    parser.add_argument("--corpus", choices=list(TEXTS), default=next(iter(TEXTS)))
    parser.add_argument("--sparsity", default="0.6,0.5,0.7")
    parser.add_argument(
        "--tokens", type=int, help="that are scored, where the text's own number is too many"
    )
    parser.add_argument("--rules", help="allocators, all by default")
    args = parser.parse_args()
    rows = Rows("calibrated", args.out)
    if not args.table_only:
        measure(args, rows)
    for which in ("wikitext", "python-docs"):
        models = {}
        for (model, _, name, rule, s), r in rows.latest(
            "model", "cpu", "allocator", "rule", "sparsity", corpus=which
        ).items():
            models.setdefault(model, {})[name, rule, float(s)] = r
        tables = [f"**{model}.** {table(latest)}" for model, latest in models.items()]
        fill(args.out, "docs/results.md", f"calibrated {which}", "\n\n".join(tables))


if __name__ == "__main__":
    main()
