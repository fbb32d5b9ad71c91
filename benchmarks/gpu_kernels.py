"""Sparse products on a GPU, one projection of a 7B or 8B model at a time.

Each projection alone, as one CUDA graph of calls over weights that no cache holds: time and share of the memory's
bandwidth against a dense product, the masked product of a prompt against a dense one, and TEAL's kernel if its
repository is at hand (--teal DIR). Appends to gpu_kernels.csv. Needs one CUDA or ROCm device and Triton.

    python benchmarks/gpu_kernels.py [--shapes llama-3-8b --teal ../TEAL]
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import Rows
from gpu import SHAPES, arguments, device, device_name, on

from acttail.evaluate.gpu import read_bandwidth
from acttail.sparse.backends import triton
from acttail.sparse.ops import topk_mask

# Copies of a projection fill this much, many times what a GPU's caches hold.
SPREAD_BYTES = 2 << 30


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The calls of `run` recorded, after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int):
    """Per call, in every round, all by turns."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(rounds):
        for name in list(graphs)[:: 1 if i % 2 == 0 else -1]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            found[name].append(1000 * begin.elapsed_time(end) / calls)
    return found


def times_of(weights, rows: int, sparsity: float, rounds: int, teal) -> dict[str, list[float]]:
    """Microseconds per product of each contestant, in every round.

    Args:
        weights: copies of one projection, [d_in, d_out] each.
        rows: vectors at once.
        sparsity: of the input.
        rounds: of each contestant.
        teal: TEAL's kernel or None.
    """
    d_in, dtype = weights[0].shape[0], weights[0].dtype
    k = max(1, round((1 - sparsity) * d_in))
    x = torch.randn(rows, d_in, device=weights[0].device, dtype=dtype)
    prompt = torch.randn(512, d_in, device=weights[0].device, dtype=dtype)
    calls: dict[str, Callable[[torch.Tensor], object]] = {
        "sparse": lambda w: triton.sparse_linear(x, w.T, None, k),
        "dense": lambda w: x @ w,
        "selection": lambda w: triton.select(x, (k,)),
        "prompt masked": lambda w: topk_mask(prompt, k) @ w,
        "prompt dense": lambda w: prompt @ w,
    }
    if teal is not None and rows == 1 and dtype == torch.float16:
        threshold = float(x.abs().flatten().sort().values[d_in - k])
        calls["TEAL"] = lambda w: teal(x[None], w.T, threshold, round(10 * sparsity))
    graphs = {
        name: graph_of(lambda call=call: [call(w) for w in weights]) for name, call in calls.items()
    }
    return microseconds(graphs, len(weights), rounds)


def run(args, rows, device, dtype):
    reads = read_bandwidth(device)
    teal = teal_kernel(args.teal)
    for name in args.shapes:
        hidden, intermediate, heads, kv_heads, _, _ = SHAPES[name]
        width = hidden // heads
        projections = {
            "qkv": (hidden, hidden + 2 * kv_heads * width), "o": (hidden, hidden),
            "gate_up": (hidden, 2 * intermediate), "down": (intermediate, hidden),
        }  # fmt: skip
        for kind, (d_in, d_out) in projections.items():
            one = d_in * d_out * dtype.itemsize
            weights = [
                torch.randn(d_in, d_out, device=device, dtype=dtype) / d_in**0.5
                for _ in range(max(2, SPREAD_BYTES // one))
            ]
            for vectors, sparsity in itertools.product(args.vectors, args.sparsities):
                times = times_of(weights, vectors, sparsity, args.rounds, teal)
                # What a product reads: the kept share, of one row exactly.
                read = {"dense": one}
                if vectors == 1:
                    read["sparse"] = read["TEAL"] = (
                        one * max(1, round((1 - sparsity) * d_in)) / d_in
                    )
                for who, values in times.items():
                    base = times["prompt dense" if who.startswith("prompt") else "dense"]
                    ratio = [b / a for a, b in zip(values, base, strict=True)]
                    middle = statistics.median(values)
                    row = {
                        "shapes": name, "kind": kind, "d_in": d_in, "d_out": d_out, "rows": vectors,
                        "device": device_name(device), "dtype": args.dtype, "sparsity": sparsity,
                        "what": who, "microseconds": round(middle, 2),
                        "over_dense": round(statistics.median(ratio), 3),
                        "over_dense_low": round(min(ratio), 3), "over_dense_high": round(max(ratio), 3),
                        "share_of_bandwidth": round(read[who] / middle * 1e6 / reads, 3)
                        if who in read else None,
                        "bandwidth": round(reads / 1e9, 1), "rounds": args.rounds,
                    }  # fmt: skip
                    rows.append(row, on(name))
            del weights
            torch.cuda.empty_cache()


def teal_kernel(folder: Path | None):
    """TEAL's sparse GEMV (x [1, 1, d_in] float16, weight column-major), None if it is not at hand."""
    if folder is None:
        return None
    sys.path.insert(0, str(folder / "kernels"))
    from sparse_gemv import splitk_sparse_gemv

    return splitk_sparse_gemv


def main():
    parser = arguments(__doc__)
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 4, 8], dest="vectors", help="vectors at once"
    )
    parser.add_argument(
        "--teal", type=Path, help="a checkout of TEAL (use it with --dtype float16)"
    )
    args = parser.parse_args()
    run(args, Rows("gpu_kernels", args.out), device(), getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
