"""Every allocator at equal sparsity: perplexity, KL and top-1 agreement on WikiText-2 test.

SmolLM2-135M, 32,768 tokens in windows of 1,024, all sparse; calibrated rules see 16,384 tokens of the
validation split. A second scored text, Python's documentation, shows whether a rule is over-fitted.
Appends to calibrated.csv and skips what is there; losses per window are kept for paired comparison.

    python benchmarks/calibrated.py [--text wikitext|python-docs] [--sparsity 0.5,0.6,0.7] [--table-only]
"""

import argparse
import json
import math
import time

import common
import torch

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate import Calibration
from acttail.checkpoint import LoadedWeights
from acttail.evaluate.tasks import paired_interval
from acttail.text import read_text

TOKENS = {"wikitext": 32768, "python-docs": 16384}
TEXTS = {"wikitext": str(common.WIKITEXT_TEST), "python-docs": "python-docs:score"}
RULES = (
    ("uniform", "topk"), ("refined", "threshold"), ("sensitivity", "topk"), ("greedy", "topk"),
    ("greedy", "threshold"), ("wina", "wina"), ("acttail", "topk"), ("depth", "topk"),
    ("uniform", "threshold"),
)  # fmt: skip


def measure(which, sparsities):
    done = {
        (r["text"], r["allocator"], r["rule"], r["sparsity"]) for r in common.rows("calibrated")
    }
    model, tokenizer = acttail.load("smollm2-135m", dtype="bfloat16")
    text = read_text(TEXTS[which])
    calibration = Calibration(model, tokenizer, read_text(common.WIKITEXT_VALIDATION), tokens=16384)
    context = AllocationContext(LoadedWeights(model), calibration=calibration)

    def run(name, rule, sparsity):
        if (which, name, rule, str(sparsity)) in done:
            return
        started = time.perf_counter()
        if name != "dense":
            plan = make_plan(model, sparsity, allocator=name, rule=rule, context=context)
            acttail.sparsify_(model, plan, check_contents=False)
        seconds = time.perf_counter() - started
        metrics = ("perplexity",) if name == "dense" else ("perplexity", "kl", "top1")
        result = acttail.perplexity(
            model, tokenizer, text, tokens=TOKENS[which], window=1024, metrics=metrics
        )
        acttail.densify_(model)
        common.append("calibrated", {
            "text": which, "text_name": text.name, "model": "smollm2-135m GGUF Q4_1", "tokens": result.tokens,
            "window": 1024, "dtype": result.dtype, "prefill": result.prefill, "allocator": name, "rule": rule,
            "calibration": calibration.text.name, "calibration_tokens": calibration.tokens,
            "sparsity": sparsity, "realised_sparsity": round(result.realised.model, 6) if result.realised else 0,
            "perplexity": result.perplexity, "perplexity_stderr": result.perplexity_stderr, "nll": result.nll,
            "kl": result.kl, "kl_stderr": result.kl_stderr, "top1": result.top1, "top1_stderr": result.top1_stderr,
            "plan_seconds": round(seconds, 1),
            "nll_by_window": json.dumps([round(float(v), 5) for v in torch.nanmean(result.token_nll, 1)]),
        })  # fmt: skip
        print(which, name, rule, sparsity, round(result.perplexity, 2), flush=True)

    run("dense", "topk", 0)
    for sparsity in sparsities:
        for name, rule in RULES:
            run(name, rule, sparsity)


def paired(a, b):
    """Mean difference of log-perplexity of two rows, and its 95 % bootstrap interval over windows."""
    return paired_interval(json.loads(a["nll_by_window"]), json.loads(b["nll_by_window"]))


def table(which):
    latest = {
        (r["allocator"], r["rule"], float(r["sparsity"])): r
        for r in common.rows("calibrated")
        if r["text"] == which
    }
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", choices=list(TEXTS), default="wikitext")
    parser.add_argument("--sparsity", default="0.6,0.5,0.7")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        measure(args.text, [float(s) for s in args.sparsity.split(",")])
    path = common.HERE.parent / "docs" / "results.md"
    page = path.read_text()
    for which in TEXTS:
        begin, end = f"<!-- calibrated {which}: begin -->", f"<!-- calibrated {which}: end -->"
        page = f"{page.split(begin)[0]}{begin}\n{table(which)}\n{end}{page.split(end)[1]}"
    path.write_text(page)


if __name__ == "__main__":
    main()
