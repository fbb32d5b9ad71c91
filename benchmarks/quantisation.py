"""What the weight formats cost in quality and give in speed: groups of int8 and int4, formats of the head.

SmolLM2-135M dense for quality: KL to fp32 of the kernels that decode, 2,048 tokens of WikiText-2 validation
in windows of 512. Speed at S = 0.5 (uniform), one thread, by turns against the default of the width.
Appends to quantisation.csv, skips widths that are there, and fills the table of docs/performance.md.

    python benchmarks/quantisation.py [--rounds 7] [--table-only]
"""

import statistics

import torch
from common import CALIBRATION, On, Rows, fill, label, options
from timing import ratio

import acttail
from acttail.calibrate.text import read_text, tokenize
from acttail.engine import Engine, Sampling

# (width, group, head); None is the default.
CASES = (
    ("bf16", None, None), ("bf16", None, "bf16"),
    ("int8", None, None), ("int8", 32, None), ("int8", 64, None), ("int8", 192, None),
    ("int4", None, None), ("int4", 64, None), ("int4", 128, None),
)  # fmt: skip
TOKENS, WINDOW, NEW = 2048, 512, 128


def make(model, dtype, group, head, plan=None):
    return Engine.from_pretrained(
        model, plan, dtype=dtype, group=group, head_dtype=head, threads=1 if plan else 2
    )


def log_p(engine, windows):
    found = []
    for window in windows:
        logits = engine.new_sequence(WINDOW).all_logits(window, decode=True)
        found.append(logits[:-1].log_softmax(-1).clone())
    return torch.cat(found)


def measure(args, rows):
    text, rounds = read_text(args.text), args.rounds
    on = On(label(args.model), text.name)
    reference = Engine.from_pretrained(args.model, dtype="fp32", threads=2)
    ids = tokenize(text, reference.tokenizer)[:TOKENS].reshape(-1, WINDOW)
    target = torch.cat([w[1:] for w in ids])[:, None]
    exact = log_p(reference, ids)
    del reference
    plan = acttail.make_plan(args.model, 0.5, allocator="uniform")
    prompt = torch.arange(128) + 500
    torch.set_num_threads(1)
    done = {dtype for (dtype,) in rows.done(on, "dtype")}
    for dtype in ("bf16", "int8", "int4"):
        if dtype in done:
            continue
        cases = [c for c in CASES if c[0] == dtype]
        engines = {c: make(args.model, *c, plan) for c in cases}
        speeds = {c: [] for c in cases}
        for r in range(rounds):
            for case, engine in engines.items() if r % 2 else reversed(engines.items()):
                result = engine.generate(
                    prompt, max_new_tokens=NEW, sampling=Sampling(ignore_eos=True)
                )
                speeds[case].append(1 / result.tokens_per_second)
        for case in cases:
            engine = make(args.model, *case)
            found = log_p(engine, ids)
            shape = engine.packed.layout.shapes["blocks.0.qkv"]
            kl = (exact.exp() * (exact - found)).sum(-1)
            against = ratio({"base": speeds[cases[0]], "own": speeds[case]}, "base", "own")
            rows.append({
                "dtype": dtype, "group": shape.group,
                "head": engine.packed.layout.head_dtype, "tokens": TOKENS, "default": case == cases[0],
                "perplexity": round(float((-found.gather(1, target)).mean().exp()), 4),
                "fp32_perplexity": round(float((-exact.gather(1, target)).mean().exp()), 4),
                "kl": float(f"{float(kl.mean()):.3g}"),
                "top1": round(float((exact.argmax(-1) == found.argmax(-1)).float().mean()), 4),
                "megabytes": round(engine.packed.bytes / 1e6, 1), "rounds": rounds,
                "speed_over_default": against["median"], "speed_low": against["low"], "speed_high": against["high"],
                "tokens_per_second": round(1 / statistics.median(speeds[case]), 1),
            }, on)  # fmt: skip


def table(rows):
    lines = [
        "| width | group | head | MB | perplexity | KL to fp32 | top-1 | speed at S = 0.5 over the default's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        group = r["group"] if int(r["group"]) else "–"
        group = "one per output" if group == "576" else group  # the model's hidden size
        lines.append(
            f"| {r['dtype']}{' (default)' if r['default'] == 'True' else ''} | {group} | {r['head']} | {r['megabytes']} "
            f"| {float(r['perplexity']):.3f} | {float(r['kl']):.5f} | {float(r['top1']):.3f} "
            f"| {float(r['speed_over_default']):.2f} ({float(r['speed_low']):.2f}–{float(r['speed_high']):.2f}) |"
        )
    return f"fp32: {float(rows[0]['fp32_perplexity']):.3f}.\n\n" + "\n".join(lines)


def main():
    parser = options(__doc__, "model", "text", "table", rounds=7)
    # Formats are chosen by this, so it is text that no result is reported on.
    parser.set_defaults(text=CALIBRATION)
    args = parser.parse_args()
    rows = Rows("quantisation", args.out)
    if not args.table_only:
        measure(args, rows)
    found = list(rows.latest("dtype", "group", "head").values())
    fill(args.out, "docs/performance.md", "quantisation", table(found))


if __name__ == "__main__":
    main()
