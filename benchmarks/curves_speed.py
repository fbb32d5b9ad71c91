"""How long do sensitivity curves take? One backward pass and a sort, against a matmul per grid point.

SmolLM2-135M, 1,024 calibration tokens per turn (the naive version takes minutes for 4,096), by turns;
then the fast version once on 4,096 tokens. Appends to curves_speed.csv.

    python benchmarks/curves_speed.py [--rounds 3]
"""

import argparse
import time

import common
import torch
from timing import by_turns, ratio

import acttail
from acttail.budget import kept_entries
from acttail.calibrate import Calibration, fisher_objective
from acttail.curves import GRID, measure
from acttail.ops import topk_mask
from acttail.projections import find_projections, weight_of
from acttail.text import read_text


def naive(model, ids):
    """The formula as written: g from one backward pass, then W (x - TopK(x)) at every grid point."""
    recorded, handles = {}, []
    projections = find_projections(model)
    for p in projections:

        def hook(module, inputs, output, name=p.name):
            output.retain_grad()
            recorded[name] = (inputs[0].detach(), output)

        handles.append(model.get_submodule(p.module).register_forward_hook(hook))
    logits = model(input_ids=ids, use_cache=False).logits
    _, upstream = fisher_objective(torch.Generator().manual_seed(0))(logits.detach())
    logits.backward(upstream)
    for handle in handles:
        handle.remove()
    curves = {}
    with torch.no_grad():
        for p in projections:
            x, z = recorded[p.name]
            g = z.grad[0].float()
            weight = weight_of(model, p)
            curves[p.name] = [
                float(
                    0.5
                    * (((x[0] - topk_mask(x[0], kept_entries(s, p.d_in))) @ weight.T).float() * g)
                    .sum(-1)
                    .square()
                    .mean()
                )
                for s in GRID
            ]
    model.zero_grad(set_to_none=True)
    return curves


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = acttail.load("smollm2-135m", dtype="bfloat16")
    text = read_text("python-docs:calibration")
    short = Calibration(model, tokenizer, text, tokens=1024)
    ids = short.batches()
    seconds = by_turns(
        {"fast": lambda: measure(short, resume=False), "naive": lambda: naive(model, ids)},
        args.rounds,
    )
    r = ratio(seconds, "naive", "fast")
    started = time.perf_counter()
    measure(Calibration(model, tokenizer, text, tokens=4096), resume=False)
    whole = time.perf_counter() - started
    print("naive over fast", r, "fast, 4,096 tokens, s:", round(whole, 1))
    common.append("curves_speed", {
        "model": "smollm2-135m GGUF Q4_1", "dtype": "bfloat16", "grid_points": len(GRID), "tokens": 1024,
        **{f"naive_over_fast_{k}": v for k, v in r.items()}, "rounds": args.rounds,
        "fast_seconds_4096_tokens": round(whole, 1),
    })  # fmt: skip


if __name__ == "__main__":
    main()
