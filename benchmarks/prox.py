"""Prox's mask for MLPs against TopK at equal bytes: a cheap pass says which intermediate channels are computed exactly.

Every block's MLP may read as many bytes as the `sensitivity` plan gives it in int8 (8 bits a weight), and attention and the head are
that plan's in all rows. Prox (arXiv 2607.27591) spends a share of them on a proxy: the largest entries of x through a
four-bit copy of gate and up (the engine's int4, 4.63 bits), or through an imagined one of two bits (groups of 32, 2.63
bits, fitted here by their range). The channels of largest |up * act(gate)| are then computed from all of x, by int8 gate and up, and
only they enter down. The oracle ranks by the exact channels and pays nothing for it, which bounds what a proxy can give.
`wina` ranks by |x| times the weight's column norm, each projection keeping as many as under TopK.

The proxy's share is chosen on tokens of the calibration text; WikiText-2 test is scored beside. Appends to
prox.csv, skips what is there, and fills the table of docs/results.md.

    python benchmarks/prox.py [--model M] [--sparsity 0.6] [--plans FOLDER]
"""

from pathlib import Path

import torch
from common import On, Rows, fill, label, options
from refits import GROUP, WINDOW, Bench, columns, fitted, planned

from acttail.calibrate.probe import probing
from acttail.calibrate.text import read_text
from acttail.engine.packing import pack, unpack
from acttail.engine.shapes import shape_for
from acttail.model.projections import gated_mlps
from acttail.sparse.ops import topk_mask
from acttail.sparse.rules.cats import activation_of

# Bits of a proxy's weight, scales and minima included, by its levels' bits.
BITS = {4: 4.625, 2: 2.625}
# Name -> (bits of the proxy's levels, its share of the MLP's bytes, share of x that the exact gate and up read).
PROX = {
    "oracle": (0, 0.0, 1.0),
    "oracle, half of x": (0, 0.0, 0.5),
    "prox int4 0.15": (4, 0.15, 1.0),
    "prox int4 0.25": (4, 0.25, 1.0),
    "prox int4 0.35": (4, 0.35, 1.0),
    "prox int4 0.5": (4, 0.5, 1.0),
    "prox int4 0.25, half of x": (4, 0.25, 0.5),
    "prox two bits 0.25": (2, 0.25, 1.0),
    "prox two bits 0.5": (2, 0.5, 1.0),
    "prox two bits 0.25, half of x": (2, 0.25, 0.5),
}


def eight_bits(weight):
    """[d_out, d_in] float32 as the engine's int8 stands for it."""
    shape = shape_for("int8", weight.shape[1], weight.shape[0])
    return unpack(pack(weight, shape), shape)[: len(weight)]


def two_bits(weight):
    """[d_in, d_out] on four levels from the least to the largest of each 32 inputs."""
    parts = weight.split(GROUP)
    found = []
    for part in parts:
        low, high = part.amin(0), part.amax(0)
        step = ((high - low) / 3).clamp_min(1e-30)
        found.append(((part - low) / step).round() * step + low)
    return torch.cat(found)


class Mask:
    """Probe of a model whose MLPs follow Prox and whose other projections follow a plan."""

    def __init__(self, bench, plan, bits, share, inputs):
        self.k = {n: p.k for n, p in plan.projections.items()}
        self.bits, self.bench, self.share, self.inputs = bits, bench, share, inputs
        self.mlps, self.downs, self.ups, self.kept = {}, {}, set(), {}
        for gate, up, down in gated_mlps(list(bench.projections.values())):
            budget = sum(self.k[p.name] * p.d_out for p in (gate, up, down))
            pair = [bench.linear(p.name).weight.T for p in (gate, up)]
            seen, entries = [], gate.d_in
            if bits:
                entries = round(share * budget / (2 * gate.d_out * BITS[bits] / 8))
                entries = max(1, min(entries, gate.d_in))
                seen = [fitted(w)[0] if bits == 4 else two_bits(w) for w in pair]
                budget -= entries * 2 * gate.d_out * BITS[bits] / 8
            exact = round(inputs * gate.d_in)
            channels = min(gate.d_out, int(budget / (2 * exact + down.d_out)))
            act = activation_of(bench.model.get_submodule(gate.module.rpartition(".")[0]))
            self.mlps[gate.name] = (down.name, seen or pair, entries if bits else exact, channels, exact, act)  # fmt: skip
            self.ups.add(up.name)
            self.downs[down.name] = gate.name
            self.kept[up.name] = exact

    def __call__(self, name, x):
        """What a projection is given."""
        if name in self.mlps:
            down, (gate, up), entries, channels, exact, act = self.mlps[name]
            part = topk_mask(x, entries) if entries < x.shape[-1] else x
            score = act(part @ gate) * (part @ up)
            self.kept[down] = topk_mask(score, channels) != 0
            return topk_mask(x, exact) if exact < x.shape[-1] else x
        if name in self.ups:
            return topk_mask(x, self.kept[name]) if self.kept[name] < x.shape[-1] else x
        if name in self.downs:
            return x * self.kept[name]
        return topk_mask(x, self.k[name]) if self.k[name] < x.shape[-1] else x


class Wina:
    """Probe: the plan's number of entries, of the largest |x| times column norm."""

    def __init__(self, bench, plan):
        self.k = {n: p.k for n, p in plan.projections.items()}
        self.norms = {n: bench.linear(n).weight.norm(dim=0) for n in bench.projections}

    def __call__(self, name, x):
        """What a projection is given."""
        if self.k[name] >= x.shape[-1]:
            return x
        if name not in self.norms:  # the head
            return topk_mask(x, self.k[name])
        return x * (topk_mask(x * self.norms[name], self.k[name]) != 0)


def measure(args, rows):
    only = args.only.split(";") if args.only else ["topk", "wina", *PROX]
    on = On(label(args.model), read_text(args.text).name, read_text(args.calibration).name)
    done, bench = rows.done(on, "sparsity", "mask"), None
    for sparsity in args.sparsity.split(","):
        todo = [name for name in only if (sparsity, name) not in done]
        if not todo:
            continue
        bench = bench or Bench(args)
        plan = planned(bench, args, sparsity)
        bench.score(plan)  # keeps the logits of the dense model in float32
        dense = {name: bench.dense(name) for name in bench.texts}
        with torch.no_grad():
            for name, weight in bench.original.items():
                bench.put(name, eight_bits(weight).T)
        for name in todo:
            if name == "topk":
                result = bench.score(plan)
            elif name == "wina":
                result = bench.score_under(probing(bench.model, Wina(bench, plan), head=True))
            else:
                with torch.no_grad():
                    mask = Mask(bench, plan, *PROX[name])
                result = bench.score_under(probing(bench.model, mask, head=True))
            for part, found in result.items():
                rows.append({
                    "part": part, "sparsity": sparsity, "mask": name, "tokens": found.tokens, "window": WINDOW,
                    "nll_dense": round(dense[part], 5), **columns(found),
                }, On(on.model, bench.texts[part].name, on.calibration))  # fmt: skip
        with torch.no_grad():
            bench.restore()


def table(rows):
    newest = {(r["model"], r["sparsity"], r["mask"], r["part"]): r for r in rows}
    lines = [
        "| model | S | mask | perplexity | KL to dense | excess over TopK's | the same on held-out calibration text |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, sparsity, name, part), r in newest.items():
        if part != "scored":
            continue
        over = {}
        for p in ("scored", "held-out"):
            own, base = (newest.get((model, sparsity, n, p)) for n in (name, "topk"))
            rise = [float(v["nll"]) - float(v["nll_dense"]) for v in (own, base) if v]
            over[p] = f"{rise[0] / rise[1]:.2f}" if len(rise) == 2 else ""
        lines.append(
            f"| {model} | {sparsity} | {name} | {float(r['perplexity']):.2f} | {float(r['kl']):.4f} | {over['scored']} | {over['held-out']} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "text", "calibration", "table", tokens=2048)
    parser.add_argument("--sparsity", default="0.6")
    parser.add_argument("--only", default="", help="these, with semicolons between: " + "; ".join(PROX))  # fmt: skip
    parser.add_argument("--plans", type=Path, help="folder of plans made before")
    parser.set_defaults(fitted_tokens=WINDOW)
    args = parser.parse_args()
    rows = Rows("prox", args.out)
    if not args.table_only:
        measure(args, rows)
    fill(args.out, "docs/results.md", "prox", table(rows.all()))


if __name__ == "__main__":
    main()
