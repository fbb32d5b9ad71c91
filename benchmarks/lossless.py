"""Lossless decoding against plain dense decoding of the same engine, by turns.

"real": plans of `sensitivity` draft on real models, g adapted, on prompts of 64 tokens from the scored text: acceptance
and speed, greedy; by the plan alone, by n-grams alone, by both. "forced": weights are random and drafts cost what they
cost, but each is made right with a given chance: at which acceptance three drafts a pass pay. Text of every lossless
run is compared with dense decoding's. Appends to lossless.csv and fills the tables of docs/performance.md.

    python benchmarks/lossless.py [--model NAME] [--widths auto,int8,int4] [--sparsity 0.3,0.5,0.6] [--threads 2]
        [--forced FILE.gguf] [--plans FOLDER] [--table-only]
"""

import random
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from common import On, Rows, fill, label, options
from decoding import RANDOM, calibrated, prompt
from timing import by_turns, ratio

from acttail.allocate import make_plan
from acttail.base.files import cache_dir
from acttail.calibrate.text import read_text, tokenize
from acttail.engine import Engine, Sampling
from acttail.engine.distribution import Proposal
from acttail.engine.lossless import LosslessEngine, Speculation
from acttail.engine.speculation import Pace
from acttail.engine.uniform import uniform_plan
from acttail.model.opened import open_model
from acttail.plan import SparsityPlan
from acttail.sparse.backends import cpu

GREEDY = Sampling(ignore_eos=True)
DRAFTS = 3
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9, 0.95)
PROMPTS, PROMPT_TOKENS = 3, 64
FORCED_TOKENS = 8  # of the prompt: decoded, for a 1.5B model's prefill would take most of the time
KEYS = ("model", "width", "sparsity", "drafter", "forced")


class Forced(Speculation):
    """Drafts that are right with a given chance, whatever the sparse engine says; its passes are run."""

    def propose(self, logits):
        """See :meth:`Speculation.propose`."""
        found = super().propose(logits)
        generation, rights = self._generation, self._engine.rights
        at = len(generation.tokens)
        if at != self._engine.at:
            self._engine.at, self._engine.made = at, 0
        right = rights[at + self._engine.made]
        self._engine.made += 1
        good = self._engine.random.random() < self._engine.chance
        return Proposal(right if good else (right + 1) % logits.numel(), None, found.confidence)


class ForcedEngine(LosslessEngine):
    """A lossless engine whose drafts are right with a given chance."""

    def __init__(self, engine, chance, rights):
        super().__init__(engine, pace=Pace(fixed=DRAFTS), ngrams=False)
        self.chance, self.rights, self.random = chance, rights, random.Random(0)
        self.at = self.made = -1

    def rounds(self, generation, sequence):
        """See :meth:`LosslessEngine.speculation`."""
        return Forced(self, generation, sequence)


def contestants(engines, prompts, new, results):
    """Name -> a function that generates after every prompt, and notes what came out."""

    def run(name):
        results[name] = [
            engines[name].generate(p, max_new_tokens=new + 1, sampling=GREEDY) for p in prompts
        ]

    return {name: lambda name=name: run(name) for name in engines}


def timed(engines, prompts, new, rounds):
    """(name -> seconds of decoding in every round, name -> the last round's generations)."""
    results, seconds = {}, {name: [] for name in engines}
    things = contestants(engines, prompts, new, results)

    def noting(name):
        def call():
            things[name]()
            seconds[name].append(sum(r.decode_seconds for r in results[name]))

        return call

    by_turns({name: noting(name) for name in engines}, rounds)
    # The first round of each was the warm-up.
    return {name: values[1:] for name, values in seconds.items()}, results


def append(rows, on, engine, width, seconds, results, new, rounds, more):
    """A row of each contestant."""
    same = [r.tokens for r in results["dense"]]
    tokens = new * len(same)
    for name, values in seconds.items():
        over = ratio(seconds, "dense", name)
        drafts = [r.drafts for r in results[name] if r.drafts is not None]
        drafted, accepted = sum(d.drafted for d in drafts), sum(d.accepted for d in drafts)
        lossless = bool(drafts)
        if lossless and [r.tokens for r in results[name]] != same:
            raise SystemExit(f"{name}: not the text of dense decoding")
        rows.append({
            "width": width, "drafter": name, **more(name),
            "drafted": drafted, "accepted": accepted,
            "acceptance": round(accepted / drafted, 3) if drafted else "",
            "passes": sum(d.rounds for d in drafts), "plain": sum(d.plain for d in drafts),
            "tokens_per_second": round(tokens / statistics.median(values), 2),
            **{f"over_dense_{key}": value for key, value in over.items()},
            "new_tokens": new, "rounds": rounds, "isa": cpu.status().isa, "decode_threads": engine.threads,
        }, on)  # fmt: skip


def plan_of(args, sparsity):
    """The plan of a model at a sparsity; kept as a file, for curves take a minute."""

    def kept(s):
        return Path(args.plans) / f"{label(args.model).replace(' ', '-')}-{s}.json"

    if not kept(sparsity).exists():
        model, _, context, _ = calibrated(args)
        kept(sparsity).parent.mkdir(parents=True, exist_ok=True)
        for s in args.sparsities:
            made = make_plan(model, s, allocator="sensitivity", context=context, head=False)
            made.save(str(kept(s)))
    return SparsityPlan.load(str(kept(sparsity)))


def real(args, rows):
    opened = open_model(args.model)
    plans = {s: plan_of(args, s) for s in args.sparsities}
    text = read_text(args.text)
    for width in args.widths.split(","):
        base = Engine.from_pretrained(opened, dtype=width, threads=args.threads, native=True)
        # Characters of which some 64 tokens are the beginning; the whole text would take a minute.
        at = [i * len(text.content) // PROMPTS for i in range(PROMPTS)]
        parts = [replace(text, content=text.content[i : i + 16 * PROMPT_TOKENS]) for i in at]
        prompts = [tokenize(part, base.tokenizer)[:PROMPT_TOKENS] for part in parts]
        on = On(label(args.model), f"{text.name}, {PROMPTS} prompts", args.calibration_name)
        for sparsity, plan in plans.items():
            sparse = base.with_plan(plan)
            engines = {
                "dense": base, "sparse": sparse, "plan": sparse.lossless(ngrams=False),
                "n-grams": base.lossless(), "both": LosslessEngine(sparse, pace=Pace()),
            }  # fmt: skip
            seconds, results = timed(engines, prompts, args.new_tokens, args.rounds)
            append(
                rows, on, base, width, seconds, results, args.new_tokens, args.rounds,
                lambda name, s=sparsity: {"sparsity": 0.0 if name in ("dense", "n-grams") else s, "forced": ""},
            )  # fmt: skip


def forced(args, rows):
    opened = open_model(args.forced)
    for width in args.widths.split(","):
        base = Engine.from_pretrained(opened, dtype=width, threads=args.threads, native=True)
        one = prompt(FORCED_TOKENS, base.vocabulary)
        rights = base.generate(one, max_new_tokens=args.new_tokens + 9, sampling=GREEDY).tokens
        for sparsity in args.sparsities:
            sparse = base.with_own_plan(uniform_plan(base, sparsity))
            engines = {"dense": base, "sparse": sparse}
            engines |= {f"forced {a}": ForcedEngine(sparse, a, rights) for a in ACCEPTANCES}
            seconds, results = timed(engines, [one], args.new_tokens, args.rounds)
            append(
                rows, On(label(args.forced), RANDOM), base, width, seconds, results, args.new_tokens, args.rounds,
                lambda name, s=sparsity: {
                    "sparsity": 0.0 if name == "dense" else s, "forced": name.partition(" ")[2],
                },
            )  # fmt: skip


def table_real(rows):
    found = {tuple(r[k] for k in KEYS): r for r in rows.all() if not is_forced(r)}
    if not any(r["drafter"] == "plan" for r in found.values()):
        return "Not measured yet."
    lines = [
        "| model | width | S of the drafts | who drafts | acceptance | tokens a pass | tokens/s | ÷ dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found.values():
        if r["drafter"] in ("dense", "sparse"):
            continue
        total = PROMPTS * int(r["new_tokens"])
        passes = int(r["passes"]) + int(r["plain"])
        lines.append(
            f"| {r['model']} | {r['width']} | {r['sparsity'] if r['drafter'] != 'n-grams' else ''} | {r['drafter']} "
            f"| {percent(r['acceptance'])} | {total / passes:.2f} | {float(r['tokens_per_second']):.0f} | {over(r)} |"
        )
    return "\n".join(lines)


def table_forced(rows):
    found = {}
    for r in rows.all():
        if is_forced(r):
            found.setdefault((r["model"], r["width"], r["sparsity"], r["isa"]), {})[
                r["drafter"]
            ] = r
    if not found:
        return "Not measured yet."
    lines = [
        "| model | width | S | kernels | sparse alone | "
        + " | ".join(f"acceptance {a}" for a in ACCEPTANCES)
        + " |",
        "|---" * (5 + len(ACCEPTANCES)) + "|",
    ]
    for (model, width, sparsity, isa), each in found.items():
        if sparsity == "0.0":
            continue
        cells = [over(each[f"forced {a}"]) for a in ACCEPTANCES]
        lines.append(
            f"| {model} | {width} | {sparsity} | {isa} | {over(each['sparse'])} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def is_forced(row):
    return row["text"] == RANDOM


def percent(share):
    return f"{100 * float(share):.0f} %" if share else ""


def over(r):
    """Speed over dense decoding's."""
    median, low, high = (float(r[f"over_dense_{k}"]) for k in ("median", "low", "high"))
    return f"**{median:.2f}** ({low:.2f}–{high:.2f})"


def main():
    parser = options(__doc__, "model", "text", "calibration", "table", rounds=3)
    parser.add_argument("--widths", default="int8,int4")
    parser.add_argument("--sparsity", default="0.3,0.5,0.6")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument(
        "--forced", metavar="GGUF", help="random weights: force acceptances instead"
    )
    parser.add_argument("--plans", default=str(cache_dir() / "lossless-plans"), metavar="FOLDER")
    args = parser.parse_args()
    args.sparsities = [float(s) for s in args.sparsity.split(",")]
    args.calibration_name = read_text(args.calibration).name
    torch.set_num_threads(args.threads)
    rows = Rows("lossless", args.out)
    if not args.table_only:
        (forced if args.forced else real)(args, rows)
    fill(args.out, "docs/performance.md", "lossless", table_real(rows))
    fill(args.out, "docs/performance.md", "forced", table_forced(rows))


if __name__ == "__main__":
    main()
