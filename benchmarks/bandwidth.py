"""What memory gives: plain reading on huge and on ordinary pages, and the sparse kernels over rows of many lengths.

The second part is the limit of sparse decoding on one core: a kept row is a run of memory, and short runs end
before the hardware has begun to read ahead. Each matrix is spread over 512 MB, so that no cache helps.
Appends to bandwidth.csv and fills the table of docs/performance.md.

    python benchmarks/bandwidth.py [--table-only]
"""

import ctypes
import mmap
import statistics
import time

import torch
from common import On, Rows, fill, options

from acttail.engine.native import library
from acttail.engine.shapes import shape_for
from acttail.engine.tune import spread
from acttail.evaluate.speed import bandwidth

SPREAD = 512 << 20
ROUNDS = 7
# (inputs, outputs): o, q/k/v, gate/up and down of SmolLM2-135M; gate/up of an 8B model.
SHAPES = ((576, 576), (576, 960), (576, 3072), (1536, 576), (4096, 28672))
DENSITIES = (1.0, 0.5, 0.3)


def ordinary(threads):
    """Bytes per second of plain reading on pages of 4 KiB."""
    arena = mmap.mmap(-1, SPREAD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    arena.madvise(mmap.MADV_NOHUGEPAGE)
    buffer = torch.frombuffer(arena, dtype=torch.uint8)
    buffer.fill_(1)
    return SPREAD / library().acttail_read_seconds(buffer.data_ptr(), SPREAD // 8, threads)


def plain(rows):
    for threads in (1, 2):
        pairs = [(bandwidth(threads, rounds=1), ordinary(threads)) for _ in range(ROUNDS)]
        ratios = [h / o for h, o in pairs]
        rows.append({
            "what": "plain reading", "dtype": "", "inputs": "", "outputs": "", "density": "", "reading_threads": threads,
            "gigabytes_per_second": round(statistics.median(h for h, _ in pairs) / 1e9, 2),
            "over": "ordinary pages", "ratio_median": round(statistics.median(ratios), 3),
            "ratio_low": round(min(ratios), 3), "ratio_high": round(max(ratios), 3), "rounds": ROUNDS,
        }, On())  # fmt: skip


def kept_rows(rows, dtype, inputs, outputs):
    """Weight bytes per second of one thread at each density, over plain reading in the same round."""
    shape = shape_for(dtype, inputs, outputs)
    structs, _memory = spread(shape, SPREAD)
    y = torch.zeros(shape.columns)
    generator = torch.Generator().manual_seed(0)
    found = {d: [] for d in DENSITIES}
    for _ in range(ROUNDS):
        reference = bandwidth(1, rounds=1)
        for density in DENSITIES:
            count = max(1, round(density * inputs))
            kept = torch.randperm(inputs, generator=generator)[:count].sort().values
            index, x = kept.to(torch.int32), torch.randn(count, generator=generator)
            started = time.perf_counter()
            for struct in structs:
                library().acttail_add_rows(
                    ctypes.byref(struct), index.data_ptr() if density < 1 else None, x.data_ptr(), count,
                    0, shape.columns, y.data_ptr(), 1, 0,
                )  # fmt: skip
            read = len(structs) * count * shape.row_bytes / (time.perf_counter() - started)
            found[density].append((read, read / reference))
    for density, pairs in found.items():
        shares = [s for _, s in pairs]
        rows.append({
            "what": "kept rows", "dtype": dtype, "inputs": inputs, "outputs": outputs, "density": density,
            "reading_threads": 1, "gigabytes_per_second": round(statistics.median(r for r, _ in pairs) / 1e9, 2),
            "over": "plain reading", "ratio_median": round(statistics.median(shares), 3),
            "ratio_low": round(min(shares), 3), "ratio_high": round(max(shares), 3), "rounds": ROUNDS,
        }, On())  # fmt: skip


def table(latest):
    lines = [
        "Weight bytes per second of one thread (scales not counted), in brackets the share of what plain reading gave "
        f"in the same round; medians of {ROUNDS} rounds.",
        "",
        "| width | inputs x outputs | bytes per row | all rows | density 0.5 | density 0.3 |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in ("bf16", "int8", "int4"):
        for inputs, outputs in SHAPES:
            cells = [
                latest.get(("kept rows", dtype, str(inputs), str(outputs), str(d), "1"))
                for d in DENSITIES
            ]
            if None in cells:
                continue
            shown = " | ".join(
                f"{float(r['gigabytes_per_second']):.1f} GB/s ({100 * float(r['ratio_median']):.0f} %)"
                for r in cells
            )
            size = shape_for(dtype, inputs, outputs).row_bytes
            lines.append(f"| {dtype} | {inputs:,} x {outputs:,} | {size:,} | {shown} |")
    for threads in ("1", "2"):
        row = latest.get(("plain reading", "", "", "", "", threads))
        if row:
            lines += [
                "",
                f"Plain reading, {threads} thread{'s' if threads == '2' else ''}: {row['gigabytes_per_second']} GB/s on huge "
                f"pages, {row['ratio_median']} ({row['ratio_low']}–{row['ratio_high']}) times what ordinary ones give.",
            ]
    return "\n".join(lines)


def main():
    args = options(__doc__, "table").parse_args()
    rows = Rows("bandwidth", args.out)
    if not args.table_only:
        plain(rows)
        for dtype in ("bf16", "int8", "int4"):
            for inputs, outputs in SHAPES:
                kept_rows(rows, dtype, inputs, outputs)
    latest = rows.latest("what", "dtype", "inputs", "outputs", "density", "reading_threads")
    fill(args.out, "docs/performance.md", "bandwidth", table(latest))


if __name__ == "__main__":
    main()
