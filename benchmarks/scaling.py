"""What the spectra of large models cost: per-matrix times, the fitted d^3 and d^2 terms, real shapes of 8B and 70B.

Times single matrices of random weights, fits seconds = gram n^2 m + cubic n^3 + square n^2, adds the
fit up over published configurations, and checks it by `acttail analyze` on checkpoints of real shapes
with random weights (peak memory too). Appends to scaling.csv and scaling_models.csv, and fills docs/scaling.md.

    python benchmarks/scaling.py [--largest] [--table-only]
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import On, Rows, fill, options

from acttail.base.progress import spoken_seconds
from acttail.spectrum.estimate import Rates, fit, matrix_bytes

# (n, m) of projections that models of these sizes have.
SHAPES = (
    (576, 576),
    (576, 1536),
    (2048, 2048),
    (1024, 4096),
    (4096, 4096),
    (4096, 14336),
    (8192, 8192),
    (8192, 28672),
)
LARGEST = ((16384, 16384),)
# name -> (hidden, intermediate, blocks, heads, kv heads)
MODELS = {
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 8),
}  # fmt: skip
# Blocks of the checkpoints that are really analysed.
CHECKED = {"Llama-3.1-8B": 2, "Llama-3.1-70B": 1}


def shapes_of(name):
    hidden, intermediate, blocks, heads, kv = MODELS[name]
    width = hidden // heads * kv
    one = (
        [(hidden, hidden)] * 2
        + [(width, hidden)] * 2
        + [(intermediate, hidden)] * 2
        + [(hidden, intermediate)]
    )
    return one, blocks


def time_matrix(n, m):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, m, generator=generator) * 0.02).bfloat16()
    started = time.perf_counter()
    array = weight.double().numpy()
    gram = array @ array.T
    middle = time.perf_counter()
    del array
    np.linalg.eigvalsh(gram)
    return middle - started, time.perf_counter() - middle


def measure_matrices(rows, shapes):
    done = rows.done(On(), "n", "m")
    for n, m in shapes:
        if (str(n), str(m)) in done:
            continue
        rounds = 3 if n <= 4096 else 1
        times = [time_matrix(n, m) for _ in range(rounds)]
        gram, eigen = (min(t[i] for t in times) for i in (0, 1))
        rows.append({
            "n": n, "m": m, "gram_seconds": round(gram, 4), "eigen_seconds": round(eigen, 4), "rounds": rounds,
            "gigabytes": round(matrix_bytes(m, n) / 1e9, 3),
        }, On())  # fmt: skip


def fitted(measured):
    large = [r for r in measured if int(r["n"]) >= 512]
    n = [int(r["n"]) for r in large]
    cubic, square = fit(n, [float(r["eigen_seconds"]) for r in large])
    work = np.array([int(r["n"]) ** 2 * int(r["m"]) for r in large], dtype=float)
    seconds = np.array([float(r["gram_seconds"]) for r in large])
    # Relative least squares, as for the eigenvalues.
    gram = float((work / seconds).sum() / ((work / seconds) ** 2).sum())
    return Rates(gram, cubic, square, torch.get_num_threads())


def checkpoint(name, blocks, folder):
    """A checkpoint of real shapes with random weights; embeddings kept small, they are not analysed."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, intermediate, _, heads, kv = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    width = hidden // heads * kv
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (width, hidden), "self_attn.v_proj": (width, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    where = {}
    for block in range(blocks):
        tensors = {
            f"model.layers.{block}.{k}.weight": torch.empty(s, dtype=torch.bfloat16).normal_(
                0, 0.02
            )
            for k, s in sizes.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(
                hidden, dtype=torch.bfloat16
            )
        if block == 0:
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[key] = torch.zeros(256, hidden, dtype=torch.bfloat16)
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )


def measure_models(rows, rates):
    for name, blocks in CHECKED.items():
        if rows.done(On(name), "blocks"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            checkpoint(name, blocks, Path(folder))
            started = time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "acttail",
                "analyze",
                folder,
                "--no-cache",
                "--json",
                "--estimator",
                "ks",
            ]
            process = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - started
        fits = json.loads(process.stdout)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        one, _ = shapes_of(name)
        expected = blocks * sum(rates.seconds(*s) for s in one)
        alphas = [f["alpha"] for f in fits if f["alpha"] is not None]
        rows.append({
            "blocks": blocks, "matrices": len(fits), "seconds": round(seconds, 1),
            "expected_seconds": round(expected, 1), "peak_gigabytes": round(peak / 1e9, 2),
            "largest_matrix_gigabytes": round(max(matrix_bytes(*s) for s in one) / 1e9, 2),
            "mean_alpha": round(sum(alphas) / len(alphas), 2) if alphas else "",
        }, On(name))  # fmt: skip


def tables(measured, checked):
    rates = fitted(measured)
    lines = [
        f"Fitted on {measured[0]['cpu']}, {rates.threads} threads: Gram matrix "
        f"{rates.gram * 1e12:.1f} ps per n²m, eigenvalues {rates.cubic * 1e12:.1f} ps per n³ + "
        f"{rates.square * 1e9:.0f} ns per n².",
        "",
        "| n × m | Gram, s | eigenvalues, s | fitted, s | memory, GB |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(measured, key=lambda r: (int(r["n"]), int(r["m"]))):
        n, m = int(r["n"]), int(r["m"])
        lines.append(
            f"| {n:,} × {m:,} | {float(r['gram_seconds']):.2f} | {float(r['eigen_seconds']):.2f} "
            f"| {rates.seconds(n, m):.2f} | {float(r['gigabytes']):.2f} |"
        )
    lines += [
        "",
        "| model | matrices | this machine | 16 of them | memory of one matrix, GB |",
        "|---|---|---|---|---|",
    ]
    for name in MODELS:
        one, blocks = shapes_of(name)
        seconds = blocks * sum(rates.seconds(*s) for s in one)
        largest = max(rates.seconds(*s) for s in one)
        lines.append(
            f"| {name} | {7 * blocks} | {spoken_seconds(seconds)} | {spoken_seconds(max(seconds / 16, largest))} "
            f"| {max(matrix_bytes(*s) for s in one) / 1e9:.1f} |"
        )
    lines += [
        "",
        "Checked by `acttail analyze` on real shapes with random weights:",
        "",
        "| shapes of | blocks | seconds | expected | peak memory of the process, GB | one matrix, GB | mean alpha |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in checked:
        lines.append(
            f"| {r['model']} | {r['blocks']} | {float(r['seconds']):.0f} | {float(r['expected_seconds']):.0f} "
            f"| {r['peak_gigabytes']} | {r['largest_matrix_gigabytes']} | {r['mean_alpha']} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "table")
    parser.add_argument(
        "--largest", action="store_true", help="also 16,384 x 16,384 (minutes, 7 GB)"
    )
    args = parser.parse_args()
    matrices, models = Rows("scaling", args.out), Rows("scaling_models", args.out)
    if not args.table_only:
        measure_matrices(matrices, SHAPES + (LARGEST if args.largest else ()))
        measure_models(models, fitted(list(matrices.latest("n", "m").values())))
    measured = list(matrices.latest("n", "m").values())
    fill(args.out, "docs/scaling.md", "scaling", tables(measured, models.latest("model").values()))


if __name__ == "__main__":
    main()
