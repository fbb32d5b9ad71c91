"""What refits without gradients are worth under a plan: weights solved anew for masked inputs, and GPTQ's rounding to int4.

A `sensitivity` plan, exact TopK; block after block, and within one as its projections come, on inputs that the blocks
before give with their new weights. *Refit* is W' = argmin over W' of E[w |W' s - W x|^2] + ridge: s are the kept
entries, x what the projection would see whole ("own") or what it sees in the dense model ("dense"). *gptq* rounds
weights to the engine's int4 one input after the other and puts the error on those to come, by the Hessian of the inputs of
the dense model ("dense"), of the kept ones ("kept"), or of these, each token weighted by the squared gradient of the loss
there ("fisher"). Levels meet scales and minima that the native fit finds for a super-block when its turn comes.

Fitted on the first tokens of WikiText-2 validation; scored on tokens after them, by which a ridge is chosen, and on
WikiText-2 test. Projections alone; the head stays float32 under its own k. Appends to refits.csv, skips what is there, and
fills the table of docs/results.md.

    python benchmarks/refits.py [--model M] [--sparsity 0.5,0.6] [--only NAME,NAME] [--plans FOLDER]
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import On, Rows, fill, label, options

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.probe import probing
from acttail.calibrate.tape import BlockTape, backward_by_block, fisher_objective
from acttail.calibrate.text import Text, bos_of, read_text, tokenize, windows
from acttail.engine.packing import unpack
from acttail.engine.shapes import shape_for
from acttail.engine.transcode import put_floats
from acttail.evaluate.dense_logits import DenseLogits
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan
from acttail.sparse.apply import sparsified
from acttail.sparse.ops import topk_mask

WINDOW = 512
STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
DAMP = 0.01  # of the mean of the Hessian's diagonal, as in GPTQ
SUPER, GROUP = 256, 32  # inputs of a super-block of int4, and of what shares a scale within it


@dataclass(frozen=True)
class Way:
    """One way to make the weights.

    Attributes:
        refit: "" for none, "own" or "dense": what W' s should reproduce W of.
        rounding: "" for float32, "plain" for the native fit, "gptq".
        hessian: of "dense", "kept" or "fisher" inputs.
        ridge: of the refit, in parts of the Hessian's own diagonal.
    """

    refit: str = ""
    rounding: str = ""
    hessian: str = "kept"
    ridge: float = 0.0


WAYS = {
    "fp32": Way(),
    "int4": Way(rounding="plain"),
    "int4 gptq dense": Way(rounding="gptq", hessian="dense"),
    "int4 gptq kept": Way(rounding="gptq"),
    "int4 gptq fisher": Way(rounding="gptq", hessian="fisher"),
    "fp32 refit own 0.1": Way("own", ridge=0.1),
    "fp32 refit own 1": Way("own", ridge=1.0),
    "fp32 refit dense 0.1": Way("dense", ridge=0.1),
    "fp32 refit dense 1": Way("dense", ridge=1.0),
    "fp32 refit dense fisher 1": Way("dense", hessian="fisher", ridge=1.0),
    "int4 refit dense 1": Way("dense", "plain", ridge=1.0),
    "int4 refit dense 1 gptq kept": Way("dense", "gptq", ridge=1.0),
    "int4 refit dense fisher 1 gptq fisher": Way("dense", "gptq", "fisher", 1.0),
}


def fitted(weight):
    """(values [d_in, d_out], scale and minimum [groups, d_out]) of the native int4 fit of float32 [d_in, d_out]."""
    d_in, d_out = weight.shape
    shape = shape_for("q4_k", d_in, d_out)
    tensors = {n: torch.zeros(size, dtype=dtype) for n, (dtype, size) in shape.tensors().items()}
    put_floats(weight.T.contiguous(), shape, tensors)
    groups = -(-d_in // GROUP)
    steps = tensors["sub_minimum"].reshape(-1, shape.columns, 4).transpose(1, 2)
    steps = steps.reshape(-1, shape.columns)[:groups, :d_out].float()

    def of_groups(name):
        return tensors[name].float().repeat_interleave(SUPER // GROUP, 0)[:groups, :d_out]

    scale = of_groups("scale") * tensors["sub_scale"][:, :d_out].float()
    return unpack(tensors, shape)[:d_out].T, scale, of_groups("minimum") * steps


def gptq(weight, hessian):
    """[d_in, d_out] rounded to int4, errors handed on by a Hessian [d_in, d_in] float64 (Frantar et al. 2022)."""
    weight, d = weight.clone(), len(hessian)
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(d, dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    rounded = torch.empty_like(weight)
    for start in range(0, d, SUPER):
        end = min(start + SUPER, d)
        _, scale, minimum = fitted(weight[start:end])
        for first in range(start, end, GROUP):
            last = min(first + GROUP, end)
            s, m = (v[(first - start) // GROUP] for v in (scale, minimum))
            inverse_s = torch.where(s > 0, 1 / s, 0.0)
            errors = torch.empty(last - first, weight.shape[1])
            for i in range(first, last):
                rounded[i] = ((weight[i] + m) * inverse_s).round_().clamp_(0, 15) * s - m
                errors[i - first] = (weight[i] - rounded[i]) / upper[i, i]
                weight[i:last] -= torch.outer(upper[i, i:last], errors[i - first])
            weight[last:] -= upper[first:last, last:].T @ errors
    return rounded


def solved(weight, kept, wanted, token, ridge):
    """Least squares [d_in, d_out]: kept @ W' near wanted @ W, drawn to W by the ridge."""
    rest = (wanted - kept) @ weight
    hessian = (kept.T @ (token * kept)).double() / len(kept)
    diagonal = hessian.diagonal()
    hessian += torch.diag(ridge * diagonal + 1e-6 * diagonal.mean())
    right = (kept.T @ (token * rest)).double() / len(kept)
    return weight + torch.cholesky_solve(right, torch.linalg.cholesky(hessian)).float()


class _Enough(Exception):  # noqa: N818
    """All that a pass was made for has been seen."""


class Bench:
    """One model, its texts and what is measured once."""

    def __init__(self, args):
        self.model, self.tokenizer = acttail.load(args.model, dtype="float32")
        self.text = read_text(args.calibration)
        ids = tokenize(self.text, self.tokenizer)
        bos = bos_of(self.tokenizer)
        self.ids = windows(ids, WINDOW, args.fitted_tokens, None, bos, self.text.name)
        after = self.tokenizer.decode(
            ids[args.fitted_tokens : args.fitted_tokens + 2 * args.tokens]
        )
        self.texts = {
            "held-out": Text(f"{self.text.name}#after", after),
            "scored": read_text(args.text),
        }
        self.tokens = args.tokens
        self.logits = {name: DenseLogits() for name in self.texts}
        weights = LoadedWeights(self.model)
        self.projections = {p.name: p for p in weights.projections}
        self.original = {n: self.linear(n).weight.detach().clone() for n in self.projections}
        self.tape = BlockTape(self.model)
        with self.tape, torch.no_grad():
            self.model.get_decoder()(input_ids=self.ids, use_cache=False)
        self._fisher = None

    def linear(self, name):
        """The module of a projection."""
        return self.model.get_submodule(self.projections[name].module)

    def score(self, plan):
        """Text -> result under a plan with the weights as they are."""
        return self.score_under(sparsified(self.model, plan))

    def score_under(self, running):
        """Text -> result while a context manager says what the model runs under."""
        with running:
            return {
                name: acttail.perplexity(
                    self.model, self.tokenizer, text, tokens=self.tokens, window=WINDOW,
                    metrics=("perplexity", "kl", "top1"), dense_logits=self.logits[name],
                )
                for name, text in self.texts.items()
            }  # fmt: skip

    def dense(self, name):
        """Negative log-likelihood of the model as it is, dense, on a text."""
        result = acttail.perplexity(
            self.model, self.tokenizer, self.texts[name], tokens=self.tokens, window=WINDOW
        )
        return result.nll

    @property
    def fisher(self):
        """Projection -> [tokens, 1]: squared gradient of a sampled log-likelihood at its input, of mean 1."""
        if self._fisher is None:
            parts = {name: [] for name in self.projections}

            def visit(_, seen):
                for name, (_x, gradient) in seen.items():
                    if name in parts:
                        parts[name].append(gradient.square().sum(-1, keepdim=True))

            generator = torch.Generator().manual_seed(0)
            for row in self.ids:
                backward_by_block(self.model, row[None], fisher_objective(generator), visit)
            joined = {name: torch.cat(found) for name, found in parts.items()}
            self._fisher = {name: v / v.mean() for name, v in joined.items()}
        return self._fisher

    def run(self, index, hidden, mask, wanted=()):
        """Block `index` on a stream: (output, projection -> whole input), the output None once all wanted are seen."""
        call, seen = self.tape.calls[index], {}

        def probe(name, x):
            if name in wanted:
                seen[name] = x.flatten(0, -2)
                if len(seen) == len(wanted):
                    raise _Enough
            return mask(name, x)

        dense, call.hidden = call.hidden, hidden
        try:
            with probing(self.model, probe):
                return self.tape.replay(index)[1], seen
        except _Enough:
            return None, seen
        finally:
            call.hidden = dense

    def make(self, way, plan):
        """Give the model the weights of a way."""
        if way.rounding == "plain" and not way.refit:
            for name, weight in self.original.items():
                self.put(name, fitted(weight.T)[0])
        elif way.refit or way.rounding:
            for index in range(len(self.tape.blocks)):
                hidden = self.tape.calls[0].hidden if index == 0 else hidden  # noqa: F821
                hidden = self.block(index, hidden, way, plan)

    def block(self, index, hidden, way, plan):
        """Give one block its weights: the stream behind it."""
        names = {n for n, p in self.projections.items() if p.block == index}
        k = {n: plan.projections[n].k for n in names}
        sparse = way.refit or way.hessian != "dense"

        def mask(name, x):
            return topk_mask(x, k[name]) if sparse and k[name] < x.shape[-1] else x

        dense = {}
        if way.refit == "dense":
            whole = self.tape.calls[index].hidden
            dense = self.run(index, whole, lambda _, x: x, names)[1]
        for kinds in STAGES:
            stage = {n for n in names if self.projections[n].kind in kinds}
            for name, x in self.run(index, hidden, mask, stage)[1].items():
                token = self.fisher[name] if way.hessian == "fisher" else torch.ones(len(x), 1)
                kept, weight = mask(name, x), self.original[name].T
                if way.refit:
                    weight = solved(weight, kept, dense.get(name, x), token, way.ridge)
                if way.rounding == "plain":
                    weight = fitted(weight)[0]
                elif way.rounding == "gptq":
                    weight = gptq(weight, (kept.T @ (token * kept)).double() / len(kept))
                self.put(name, weight)
        return self.run(index, hidden, mask)[0]

    def put(self, name, weight):
        """Give a projection a weight [d_in, d_out]."""
        self.linear(name).weight.copy_(weight.T)

    def restore(self):
        """Give the model its own weights back."""
        for name, weight in self.original.items():
            self.linear(name).weight.copy_(weight)


def planned(bench, args, sparsity):
    """The plan of the folder, or one made now."""
    path = args.plans and args.plans / f"{label(args.model)}-sensitivity-{sparsity}.json"
    if path and path.exists():
        return SparsityPlan.load(path)
    calibration = Calibration(
        bench.model, bench.tokenizer, bench.text, tokens=args.calibration_tokens
    )
    context = AllocationContext(LoadedWeights(bench.model), calibration=calibration)
    return make_plan(bench.model, float(sparsity), allocator="sensitivity", context=context)


def columns(found):
    """What a row says of a result of :meth:`Bench.score`."""
    return {
        "perplexity": round(found.perplexity, 4), "nll": round(found.nll, 5), "kl": round(found.kl, 5),
        "kl_stderr": round(found.kl_stderr or 0, 5), "top1": round(found.top1, 4),
    }  # fmt: skip


def measure(args, rows):
    bench, only = None, args.only.split(",") if args.only else list(WAYS)
    on = On(label(args.model), read_text(args.text).name, read_text(args.calibration).name)
    done = rows.done(on, "sparsity", "way", "fitted_tokens")
    for sparsity in args.sparsity.split(","):
        todo = [w for w in only if (sparsity, w, str(args.fitted_tokens)) not in done]
        if not todo:
            continue
        bench = bench or Bench(args)
        plan = planned(bench, args, sparsity)
        bench.score(plan)  # keeps the dense logits while the weights are the model's own
        for name in todo:
            started = time.process_time()
            with torch.no_grad():
                bench.make(WAYS[name], plan)
            seconds = time.process_time() - started
            for part, found in bench.score(plan).items():
                rows.append({
                    "part": part, "sparsity": sparsity, "way": name, "fitted_tokens": bench.ids.numel(),
                    "cpu_seconds": round(seconds), "tokens": found.tokens, "window": WINDOW,
                    "realised_sparsity": round(found.realised.model, 5), **columns(found),
                }, On(on.model, bench.texts[part].name, on.calibration))  # fmt: skip
            with torch.no_grad():
                bench.restore()


def table(rows):
    newest = {(r["model"], r["sparsity"], r["way"], r["part"]): r for r in rows}
    lines = [
        "| model | S | weights | perplexity | KL to dense | against no refit | on held-out calibration text |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, sparsity, way, part), r in newest.items():
        if part != "scored":
            continue
        change = {}
        for p in ("scored", "held-out"):
            base = newest.get((model, sparsity, way.split()[0], p))
            own = newest.get((model, sparsity, way, p))
            both = base and own
            change[p] = f"{100 * (float(own['kl']) / float(base['kl']) - 1):+.1f} %" if both else ""
        lines.append(
            f"| {model} | {sparsity} | {way} | {math.exp(float(r['nll'])):.2f} | {float(r['kl']):.4f} | {change['scored']} | {change['held-out']} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "text", "calibration", "table", tokens=2048)
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument(
        "--fitted-tokens", type=int, default=4096, help="that weights are fitted on"
    )
    parser.add_argument("--only", default="", help="these of: " + ", ".join(WAYS))
    parser.add_argument("--plans", type=Path, help="folder of plans made before")
    args = parser.parse_args()
    rows = Rows("refits", args.out)
    if not args.table_only:
        measure(args, rows)
    fill(args.out, "docs/results.md", "refits", table(rows.all()))


if __name__ == "__main__":
    main()
