"""What was tried to refine `sensitivity`: each variant's perplexity at equal bytes on held-out calibration text.

SmolLM2-135M; calibration on the first 8,192 tokens of the calibration text's first half, scored on 8,192 tokens of
its second half; no text of docs/results.md is read. Appends to refinements.csv.

    python benchmarks/refinements.py [--sparsity 0.6,0.7] [--only NAME,NAME]
"""

import functools
from collections import defaultdict

import numpy as np
import torch
from common import On, Rows, label, options

import acttail
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.measure import measure
from acttail.calibrate.probe import probing
from acttail.calibrate.tape import backward_by_block, fisher_objective
from acttail.calibrate.text import Text, read_text
from acttail.calibrate.thresholds import thresholds
from acttail.maths.budget import kept_entries
from acttail.maths.curves import minimise
from acttail.model.weights import LoadedWeights
from acttail.sparse.ops import topk_mask


class Study:
    """Model, texts and everything measured once."""

    def __init__(self, model, text, tokens):
        self.model, self.tokenizer = acttail.load(model, dtype="bfloat16")
        content, half = text.content, len(text.content) // 2
        self.calibration = Calibration(
            self.model,
            self.tokenizer,
            Text(f"{text.name}, first half", content[:half]),
            tokens=tokens,
        )
        self.held_out = Text(f"{text.name}, second half", content[half:])
        self.weights = LoadedWeights(self.model)
        self.projections = {p.name: p for p in self.weights.projections}
        self.cost = {n: p.cost for n, p in self.projections.items()}
        self._curves = {}

    def curves(self, loss="fisher", selection="topk", tokens=None):
        """Curves on the calibration half, measured once."""
        tokens = self.calibration.tokens if tokens is None else tokens
        key = loss, selection, tokens
        if key not in self._curves:
            calibration = Calibration(
                self.model,
                self.tokenizer,
                self.calibration.text,
                tokens=tokens,
                window=min(tokens, 1024),
            )
            self._curves[key] = measure(calibration, loss=loss, selection=selection)
        return self._curves[key]

    def solve(self, curves, sparsity):
        """Sparsities of least predicted loss."""
        blocks = {
            n: curves.curves[n] for n in self.cost
        }  # the head is measured, and stays dense here
        return minimise(blocks, curves.grid, self.cost, sparsity)

    def score(self, probe):
        """Perplexity on the held-out text with every projection's input replaced by the probe."""
        with probing(self.model, probe):
            return acttail.perplexity(self.model, self.tokenizer, self.held_out, tokens=8192)

    def topk(self, sparsities):
        """Score under TopK at these sparsities."""
        k = {n: kept_entries(s, self.projections[n].d_in) for n, s in sparsities.items()}
        return self.score(lambda name, x: topk_mask(x, k[name]) if k[name] < x.shape[-1] else x)

    def threshold(self, sparsities):
        """Under thresholds, with the sparsity that was realised on the held-out text."""
        found = thresholds(self.calibration, sparsities)
        seen = defaultdict(lambda: [0, 0])

        def probe(name, x):
            if not found[name]:
                return x
            drop = x.abs() <= found[name]["threshold"]
            seen[name][0] += int(drop.sum())
            seen[name][1] += x.numel()
            return x.masked_fill(drop, 0)

        result = self.score(probe)
        dropped = sum(self.cost[n] * a / b for n, (a, b) in seen.items() if b)
        return result, dropped / sum(self.cost.values())


def interactions(study, curves, sparsity, rounds=3):
    """Re-solve under the second-order loss with the measured cross terms of all pairs of projections.

    KL = 1/2 E[(sum_i d_i)^2] with d_i = g_i . W_i (x - TopK(x)); the plain budget keeps only i = j.
    """
    solved = study.solve(curves, sparsity)
    for _ in range(rounds):
        gram = cross_terms(study, solved)
        weight = gram.sum(1) / np.maximum(np.diag(gram), 1e-30)
        weight = np.clip(weight, 0.25, 4.0)
        scaled = {n: curves.curves[n] * w for n, w in zip(study.cost, weight, strict=True)}
        new = minimise(scaled, curves.grid, study.cost, sparsity)
        # Half a step: the weights were measured at the old point.
        solved = {n: 0.5 * (solved[n] + new[n]) for n in solved}
    return solved


def cross_terms(study, sparsities):
    """[P, P] mean over tokens of d_i d_j at these sparsities."""
    names = list(study.projections)
    k = {n: kept_entries(s, study.projections[n].d_in) for n, s in sparsities.items()}
    total = np.zeros((len(names), len(names)))
    for index, ids in enumerate(study.calibration.batches()):
        d = torch.zeros(len(names), ids.numel())

        def visit(_, seen, d=d):
            for name, (x, v) in seen.items():
                d[names.index(name)] = ((x - topk_mask(x, k[name])) * v).float().sum(-1)

        generator = torch.Generator().manual_seed(7_000 + index)
        backward_by_block(study.model, ids[None], fisher_objective(generator), visit)
        total += (d.double() @ d.double().T).numpy() / ids.numel()
    return total / len(study.calibration.batches())


def low_rank(study, sparsities, rank, source):
    """A path for what is dropped: y = W TopK(x) + (rank-r part of W) (x - TopK(x)), k lowered so that the bytes stay the same.

    With V the top right singular vectors, W V V^T is the best rank-r part of W, and adding V V^T e to the
    kept input gives the same output; so the study needs no second path. `residual` takes V from the
    covariance of what is dropped instead.
    """
    k, basis, rest = {}, {}, None
    for name, s in sparsities.items():
        p = study.projections[name]
        full = kept_entries(s, p.d_in)
        k[name] = full - round(rank * (p.d_in + p.d_out) / p.d_out)
        if k[name] < 1 or s == 0:
            k[name], rank_here = full, 0
        else:
            rank_here = rank
        if source == "weight" and rank_here:
            w = study.weights.weight(p).float()
            basis[name] = torch.linalg.eigh(w.T @ w).eigenvectors[:, -rank_here:].to(torch.bfloat16)
    if source == "residual":
        rest = {n: torch.zeros(p.d_in, p.d_in) for n, p in study.projections.items()}

        def gather(name, x):
            kept = topk_mask(x, k[name])
            e = (x - kept).flatten(0, -2).float()
            rest[name] += e.T @ e
            return kept

        with torch.inference_mode(), probing(study.model, gather):
            for ids in study.calibration.batches():
                study.model(input_ids=ids[None], use_cache=False)
        for name, s in sparsities.items():
            if s > 0 and k[name] < kept_entries(s, study.projections[name].d_in):
                basis[name] = (
                    torch.linalg.eigh(rest[name]).eigenvectors[:, -rank:].to(torch.bfloat16)
                )

    def probe(name, x):
        kept = topk_mask(x, k[name])
        if name not in basis:
            return kept
        v = basis[name]
        return kept + ((x - kept) @ v) @ v.T

    return study.score(probe)


def output_scale(study, sparsities):
    """One least-squares factor per projection on its output: y = c W TopK(x)."""
    k = {n: kept_entries(s, study.projections[n].d_in) for n, s in sparsities.items()}
    sums = {n: [0.0, 0.0] for n in k}

    def gather(name, x):
        kept = topk_mask(x, k[name])
        w = study.weights.weight(study.projections[name])
        full, part = (x @ w.T).float(), (kept @ w.T).float()
        sums[name][0] += float((full * part).sum())
        sums[name][1] += float(part.square().sum())
        return kept

    with torch.inference_mode(), probing(study.model, gather):
        for ids in study.calibration.batches():
            study.model(input_ids=ids[None], use_cache=False)
    factor = {n: a / b for n, (a, b) in sums.items()}
    return study.score(lambda name, x: topk_mask(x, k[name]) * factor[name])


def sparse_head(study, curves, sparsity, head_sparsity):
    """TopK on the head's input as well, the projections made denser so that the bytes stay the same."""
    head = study.model.get_output_embeddings()
    total = sum(study.cost.values())
    lower = sparsity - head_sparsity * head.weight.numel() / total
    solved = study.solve(curves, lower)
    k = kept_entries(head_sparsity, head.weight.shape[1])
    handle = head.register_forward_pre_hook(lambda module, args: (topk_mask(args[0], k),))
    try:
        return study.topk(solved)
    finally:
        handle.remove()


def variants(study, s):
    """Name -> function that gives a result, or (result, realised sparsity)."""
    fisher = study.curves()
    solved = study.solve(fisher, s)
    by_threshold = functools.cache(lambda: study.solve(study.curves(selection="threshold"), s))
    crossed = functools.cache(lambda: interactions(study, fisher, s))
    return {
        "topk, fisher curves (sensitivity)": lambda: study.topk(solved),
        "topk, output-error curves": lambda: study.topk(study.solve(study.curves("output"), s)),
        "topk, KL curves (512 tokens)": lambda: study.topk(study.solve(study.curves("kl", tokens=512), s)),
        "topk, fisher curves (512 tokens)": lambda: study.topk(study.solve(study.curves(tokens=512), s)),
        "threshold, topk curves": lambda: study.threshold(solved),
        "threshold, threshold curves": lambda: study.threshold(by_threshold()),
        "topk, interactions": lambda: study.topk(crossed()),
        "threshold, interactions": lambda: study.threshold(crossed()),
        "low rank 8 of W (R-Sparse)": lambda: low_rank(study, solved, 8, "weight"),
        "low rank 32 of W (R-Sparse)": lambda: low_rank(study, solved, 32, "weight"),
        "low rank 8 of the residual": lambda: low_rank(study, solved, 8, "residual"),
        "output scale": lambda: output_scale(study, solved),
        "lm_head 0.3 sparse": lambda: sparse_head(study, fisher, s, 0.3),
        "lm_head 0.5 sparse": lambda: sparse_head(study, fisher, s, 0.5),
    }  # fmt: skip


def main():
    parser = options(__doc__, "model", "calibration")
    parser.set_defaults(calibration_tokens=8192)
    parser.add_argument("--sparsity", default="0.6,0.7")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    rows = Rows("refinements", args.out)
    study = Study(args.model, read_text(args.calibration), args.calibration_tokens)
    on = On(label(args.model), study.held_out.name, study.calibration.text.name)
    done = rows.done(on, "variant", "sparsity")
    wanted = set(filter(None, args.only.split(",")))
    for s in map(float, args.sparsity.split(",")):
        for name, run in variants(study, s).items():
            if (name, str(s)) in done or (wanted and not any(w in name for w in wanted)):
                continue
            found = run()
            result, realised = found if isinstance(found, tuple) else (found, s)
            rows.append({
                "variant": name, "sparsity": s, "realised_sparsity": round(realised, 5),
                "perplexity": result.perplexity, "perplexity_stderr": result.perplexity_stderr, "nll": result.nll,
                "tokens": result.tokens, "calibration_tokens": args.calibration_tokens,
                "dtype": result.dtype,
            }, on)  # fmt: skip


if __name__ == "__main__":
    main()
