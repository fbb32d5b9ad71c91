"""The table of docs/results.md: data-free allocators and controls on WikiText-2 test.

SmolLM2-135M, the first 16,384 tokens, windows of 1,024, every token sparse. Appends to data_free.csv
and skips what is there, so it can be stopped and resumed; then rewrites the table in
docs/results.md.

    python benchmarks/data_free.py [--table-only]
"""

import math

import torch
from common import FITTED, HERE, On, Rows, fill, label, options

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.text import read_text
from acttail.maths.losses import clustered_mean
from acttail.model.weights import LoadedWeights

SPARSITIES = (0.4, 0.5, 0.6, 0.7)
DEFAULT = "acttail, default fit"
ALLOCATORS = (
    "uniform", "acttail", DEFAULT, "theory-capacity", "theory-importance", "depth", "permuted", "reversed",
    "per-type", "energy",
)  # fmt: skip


def measure(args, rows):
    text = read_text(args.text)
    on = On(label(args.model), text.name)
    done = rows.done(on, "allocator", "sparsity")
    model, tokenizer = acttail.load(args.model, dtype="bfloat16")
    context = AllocationContext(LoadedWeights(model))

    def run(name, sparsity, uniform):
        result = acttail.perplexity(model, tokenizer, text, tokens=args.tokens, window=args.window)
        paired = (None, None)
        if uniform is not None:
            difference = result.token_nll - uniform.token_nll
            paired = clustered_mean(difference, torch.isfinite(difference))
        rows.append({
            "tokens": result.tokens, "window": result.window,
            "dtype": result.dtype, "prefill": result.prefill, "bos": result.bos, "allocator": name,
            "arguments": "" if name == "dense" else str(plan.arguments), "sparsity": sparsity,
            "realised_sparsity": round(result.realised.model, 6) if result.realised else 0.0,
            "perplexity": round(result.perplexity, 4), "perplexity_stderr": round(result.perplexity_stderr, 4),
            "nll": round(result.nll, 6), "nll_minus_uniform": paired[0] and round(paired[0], 5),
            "nll_minus_uniform_stderr": paired[1] and round(paired[1], 5),
        }, on)  # fmt: skip
        return result

    if ("dense", "0") not in done:
        run("dense", 0, None)
    for sparsity in SPARSITIES:
        uniform = None
        for name in ALLOCATORS:
            if (name, str(sparsity)) in done:
                continue
            allocator = name.partition(",")[0]
            plan = make_plan(
                model, sparsity, allocator=allocator, arguments=FITTED.get(name), context=context
            )
            if uniform is None and name != "uniform":
                flat = make_plan(model, sparsity, allocator="uniform", context=context)
                acttail.sparsify_(model, flat, check_contents=False)
                uniform = acttail.perplexity(
                    model, tokenizer, text, tokens=args.tokens, window=args.window
                )
            acttail.sparsify_(model, plan, check_contents=False)
            result = run(name, sparsity, uniform)
            uniform = result if name == "uniform" else uniform
            acttail.densify_(model)


def table(latest) -> str:
    dense = latest["dense", 0.0]
    lines = [
        f"Dense: {float(dense['perplexity']):.2f} ± {float(dense['perplexity_stderr']):.2f}. "
        "Each cell: perplexity ± standard error (realised sparsity); in brackets the change against "
        "uniform, with its paired standard error, in per cent of perplexity.",
        "",
        "| allocator | " + " | ".join(f"S = {s}" for s in SPARSITIES) + " |",
        "|---" * (len(SPARSITIES) + 1) + "|",
    ]
    for name in ALLOCATORS:
        cells = []
        for s in SPARSITIES:
            r = latest.get((name, s))
            if r is None:
                cells.append("–")
                continue
            p, e = float(r["perplexity"]), float(r["perplexity_stderr"])
            digits = 1 if p < 1000 else 0
            cell = f"{p:,.{digits}f} ± {e:,.{digits}f} ({float(r['realised_sparsity']):.4f})"
            if r["nll_minus_uniform"]:
                d, de = float(r["nll_minus_uniform"]), float(r["nll_minus_uniform_stderr"])
                change = 100 * (math.exp(d) - 1)
                spread = 100 * math.exp(d) * de
                cell += (
                    f" [{change:+,.0f} ± {spread:,.0f} %]"
                    if abs(change) > 100
                    else f" [{change:+.1f} ± {spread:.1f} %]"
                )
            cells.append(cell)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    verdicts = []
    for s in SPARSITIES:
        a, d = latest.get(("acttail", s)), latest.get(("depth", s))
        if a and d:
            x, y = float(a["perplexity"]), float(d["perplexity"])
            verdicts.append(
                f"at {s} it {'beats' if x < y else 'loses to'} `depth` ({x:.1f} against {y:.1f})"
            )
    lines += ["", "Does `acttail` beat the `depth` control? " + "; ".join(verdicts) + "."]
    return "\n".join(lines)


def readme_table(latest) -> str:
    def cell(name, s):
        r = latest[name, s]
        return f"{float(r['perplexity']):.1f} ± {float(r['perplexity_stderr']):.1f}"

    lines = [
        "| | " + " | ".join(f"S = {s}" for s in SPARSITIES) + " |",
        "|---" * (len(SPARSITIES) + 1) + "|",
    ]
    for name, shown in (
        ("uniform", "uniform TopK"),
        ("acttail", "acttail (`ks`, ε = 0.15)"),
        ("depth", "control: depth"),
    ):
        lines.append(f"| {shown} | " + " | ".join(cell(name, s) for s in SPARSITIES) + " |")
    dense = latest["dense", 0.0]
    lines.append("")
    lines.append(
        f"Dense: {float(dense['perplexity']):.1f} ± {float(dense['perplexity_stderr']):.1f}. The errors are mostly common to a column: "
        "paired, acttail is below uniform by "
        + ", ".join(
            f"{100 * (1 - math.exp(float(latest['acttail', s]['nll_minus_uniform']))):.1f} ± "
            f"{100 * float(latest['acttail', s]['nll_minus_uniform_stderr']):.1f}"
            for s in SPARSITIES
        )
        + " %."
    )
    return "\n".join(lines)


def picture(latest) -> None:
    """docs/images/data_free.svg: perplexity against realised sparsity."""
    from acttail.report.charts import line_chart

    series = {
        name: [
            (float(latest[name, s]["realised_sparsity"]), float(latest[name, s]["perplexity"]),
             float(latest[name, s]["perplexity_stderr"]))
            for s in SPARSITIES
        ]
        for name in ("uniform", "acttail", "depth", "permuted")
    }  # fmt: skip
    svg = line_chart(
        series, title="Perplexity of SmolLM2-135M on WikiText-2 against realised sparsity",
        x_label="realised sparsity", y_label="perplexity (log scale)",
        reference=("dense", float(latest["dense", 0.0]["perplexity"])),
    )  # fmt: skip
    style = (
        "<style>text{font-family:system-ui,sans-serif;font-size:12px}text:not(.series){fill:#5b6774}.series{font-weight:600}"
        ".grid{stroke:#d8dee5}.reference{stroke:#5b6774;stroke-dasharray:5 4}</style>"
        '<rect width="100%" height="100%" fill="#fff"/>'
    )
    head, rest = svg.split(">", 1)
    path = HERE.parent / "docs" / "images" / "data_free.svg"
    path.write_text(f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n')


def main():
    parser = options(__doc__, "model", "text", "table", tokens=16384)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    rows = Rows("data_free", args.out)
    if not args.table_only:
        measure(args, rows)
    latest = {(n, float(s)): r for (n, s), r in rows.latest("allocator", "sparsity").items()}
    if args.out == HERE:
        picture(latest)
    fill(args.out, "docs/results.md", "data_free", table(latest))
    fill(args.out, "README.md", "data_free", readme_table(latest))


if __name__ == "__main__":
    main()
