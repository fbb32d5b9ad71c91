"""How long do sensitivity curves take? One backward pass and a sort, against a matmul per grid point.

SmolLM2-135M, 1,024 calibration tokens per turn (the naive version takes minutes for 4,096), by turns;
then the fast version once on 4,096 tokens. Appends to curves_speed.csv.

    python benchmarks/curves_speed.py [--rounds 3]
"""

import time

import torch
from common import On, Rows, label, options
from timing import by_turns, ratio

import acttail
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.losses import GRID
from acttail.calibrate.measure import measure
from acttail.calibrate.tape import fisher_objective
from acttail.calibrate.text import read_text
from acttail.maths.budget import kept_entries
from acttail.model.projections import find_projections, weight_of
from acttail.sparse.ops import topk_mask


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
    args = options(__doc__, "model", rounds=3).parse_args()
    model, tokenizer = acttail.load(args.model, dtype="bfloat16")
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
    Rows("curves_speed", args.out).append({
        "dtype": "bfloat16", "grid_points": len(GRID), "tokens": 1024,
        **{f"naive_over_fast_{k}": v for k, v in r.items()}, "rounds": args.rounds,
        "fast_seconds_4096_tokens": round(whole, 1),
    }, On(label(args.model), calibration=text.name))  # fmt: skip


if __name__ == "__main__":
    main()
