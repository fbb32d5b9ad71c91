"""How far the speed that `--speedup` forecasts is from the speed that is measured.

For each speedup that is asked for a plan of `sensitivity` is made, its kernels and the engine timed for the forecast, and
then decoded by turns with the dense engine: 128 tokens after a prompt of 128, as `acttail bench` does. Appends to
forecast.csv and fills the table of docs/performance.md.

    python benchmarks/forecast.py [--model smollm2-135m] [--widths int8,auto] [--threads 1,2] [--speedups 1.2,1.4,1.6]
"""

from common import On, Rows, fill, label, options
from decoding import RANDOM

from acttail.calibrate.text import read_text
from acttail.engine.config import EngineConfig
from acttail.evaluate.bench import run_bench
from acttail.evaluate.forecast import forecast_of
from acttail.evaluate.request import PlanRequest, requested
from acttail.model.opened import open_model
from acttail.sparse.backends import cpu

KEYS = ("model", "width", "decode_threads", "asked")


def run(args, rows):
    opened, text = open_model(args.model), read_text(args.calibration)
    on = On(label(args.model), RANDOM, text.name)
    for width in args.widths.split(","):
        for threads in (int(n) for n in args.threads.split(",")):
            for asked in (float(x) for x in args.speedups.split(",")):
                request = PlanRequest(
                    speedup=asked, allocator="sensitivity", text=text, tokens=args.calibration_tokens,
                    engine=EngineConfig(width, threads=threads),
                )  # fmt: skip
                plan = requested(opened, request).plan
                found = run_bench(
                    opened, plan=plan, dtype=width, threads=threads, rounds=args.rounds
                )
                measured = found["ratios"]["dense"]
                forecast = forecast_of(plan)
                rows.append({
                    "width": width, "isa": cpu.status().isa, "decode_threads": threads, "asked": asked,
                    "sparsity": round(plan.sparsity, 4), "forecast": round(forecast, 4),
                    **{f"measured_{k}": round(v, 4) for k, v in measured.items()},
                    "error": round(forecast / measured["median"] - 1, 4), "rounds": args.rounds,
                }, on)  # fmt: skip


def table(found):
    if not found:
        return "Not measured yet."
    lines = [
        "| model | width | threads | asked | sparsity of the blocks | forecast | measured | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found.values():
        measured = f"{float(r['measured_median']):.2f} ({float(r['measured_low']):.2f}–{float(r['measured_high']):.2f})"
        lines.append(
            f"| {r['model']} | {r['width']} | {r['decode_threads']} | {r['asked']} | {float(r['sparsity']):.2f} "
            f"| {float(r['forecast']):.2f} | {measured} | {100 * float(r['error']):+.1f} % |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "calibration", "table", rounds=7)
    parser.add_argument("--widths", default="int8,auto")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--speedups", default="1.2,1.4,1.6")
    args = parser.parse_args()
    rows = Rows("forecast", args.out)
    if not args.table_only:
        run(args, rows)
    fill(args.out, "docs/performance.md", "forecast", table(rows.latest(*KEYS)))


if __name__ == "__main__":
    main()
