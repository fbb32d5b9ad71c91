"""Tokens per second against KL to the source model: our plans at every width, and every quantisation of the peers.

Everything starts from one GGUF. KL, top-1 and perplexity are to its weights dequantised to fp32, as each engine really
decodes: 2,048 tokens of WikiText-2 test in windows of 512. Speed is of 128 tokens after a prompt of 128, or as many as asked, by turns
in groups that each hold the same anchor (llama.cpp on the source file as it is); a speed is the group's ratio to the
anchor times the anchor's median over all groups, so that no group profits from a quiet hour. ik_llama.cpp takes
llama.cpp's files and its KL (the weights are the same; its own rounding of activations is not measured).

Quality and speed are rows of their own, so that speed alone needs a quiet machine; what is there of quality is not
measured again. Appends to frontier.csv; draws docs/images/frontier.svg and fills docs/performance.md's tables.

    python benchmarks/frontier.py [--model FILE.gguf] [--gguf-bench PATH/llama-bench] [--parts quality,speed]
        [--widths auto,int8] [--peers Q4_0,Q8_0] [--random] [--table-only]
"""

import statistics
from pathlib import Path

import torch
from common import HERE, On, Rows, fill, label, options
from decoding import calibrated, prompt

import acttail
from acttail.allocate import make_plan
from acttail.base.files import replacing
from acttail.calibrate.text import bos_of, read_text, tokenize, windows
from acttail.engine import Engine
from acttail.errors import ActTailError
from acttail.evaluate.llama_bench import LlamaBenchContestant
from acttail.evaluate.llama_cpp import LlamaCppContestant, quantised
from acttail.evaluate.speed import EngineContestant, measure
from acttail.maths.losses import divergence, token_losses
from acttail.model.names import resolve
from acttail.plan import SparsityPlan

WIDTHS = ("auto", "int8", "int4")
SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6)
ALLOCATORS = "sensitivity,refined"
PEERS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_S", "Q2_K")
AS_IT_IS = "file as it is"
KEYS = ("side", "width", "allocator", "sparsity")
# (side, options): the better of the two layouts is its figure.
LAYOUTS = (("ik_llama.cpp", ()), ("ik_llama.cpp interleaved", ("-rtr", "1")))
WINDOW, NEW, PROMPT = 512, 128, 128


class Quality:
    """KL, top-1 agreement and perplexity against the source's own logits.

    Args:
        source: the GGUF.
        text: that is scored.
        tokens: how many of it.
    """

    def __init__(self, source, text, tokens):
        engine = Engine.from_pretrained(source, dtype="fp32", native=True)
        ids = tokenize(text, engine.tokenizer)
        self.windows = windows(ids, WINDOW, tokens, None, bos_of(engine.tokenizer), text.name)
        self.exact = [engine.new_sequence(WINDOW).all_logits(w)[:-1].clone() for w in self.windows]

    def of(self, logits):
        """Columns of what `logits(window)` ([WINDOW] ids -> [WINDOW, vocabulary]) gives."""
        kl, same, losses = [], [], []
        for window, exact in zip(self.windows, self.exact, strict=True):
            found = logits(window)[:-1]
            a, b = divergence(exact, found)
            kl.append(a.mean()), same.append(b.float().mean())
            losses.append(token_losses(found, window[1:]).mean())
        mean = [float(torch.stack(x).mean()) for x in (kl, same, losses)]
        return {"kl": f"{mean[0]:.5f}", "top1": f"{mean[1]:.4f}", "perplexity": f"{torch.tensor(mean[2]).exp():.3f}"}  # fmt: skip


def plans(args):
    """(allocator, S) -> plan, calibrated on text that is not scored, or kept from before; of random weights `uniform` with the head."""
    if args.random:
        model, _ = acttail.load(args.model, dtype="fast")
        return {
            ("uniform", s): make_plan(model, s, allocator="uniform", head=True) for s in SPARSITIES
        }
    wanted = [(a, s) for a in args.allocators.split(",") for s in SPARSITIES]
    places = (
        {k: args.plans / f"{label(args.model)}-{k[0]}-{k[1]}.json" for k in wanted}
        if args.plans
        else {}
    )
    if places and all(p.exists() for p in places.values()):
        return {k: SparsityPlan.load(p) for k, p in places.items()}
    model, _, context, _ = calibrated(args)
    found = {(a, s): make_plan(model, s, allocator=a, context=context) for a, s in wanted}
    for key, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        found[key].save(place)
    return found


def ours(args, width, found):
    """(side, width, allocator, S) -> engine, all over one copy of the weights."""
    first = next(iter(found.values()))
    base = Engine.from_pretrained(args.model, first, dtype=width, native=True, threads=args.threads)
    plain = {("dense", 0.0): None, **found}
    return {("acttail", width, *key): base.with_plan(plan) for key, plan in plain.items()}


def theirs(args, source):
    """(side, width, allocator, S) -> (contestant, its file), one after the other, so that few are in memory."""
    for kind in args.peers.split(","):
        path = source if kind == AS_IT_IS else quantised(source, f"MOSTLY_{kind}")
        contestant = LlamaCppContestant(path, args.threads, 1024)
        yield ("llama.cpp", kind, "", 0.0), contestant, path
        contestant.close()


def quality(args, rows, on, source, found):
    """Rows of KL, top-1 and perplexity of what has none yet."""
    done = rows.done(on, "part", *KEYS)
    score = Quality(args.model, read_text(args.text), args.tokens)

    def note(key, logits):
        if ("quality", *map(str, key)) not in done:
            rows.append(row_of("quality", key, args, **score.of(logits)), on)

    for width in args.widths.split(","):
        for key, engine in ours(args, width, found).items():
            note(key, lambda w, e=engine: e.new_sequence(WINDOW).all_logits(w, decode=True))
    for key, contestant, _ in theirs(args, source):
        note(key, contestant.window_logits)


def row_of(part, key, args, **values):
    """A row of one part; the columns of the other stay empty."""
    empty = ("kl", "top1", "perplexity", "tokens_per_second", "over_anchor_median", "over_anchor_low", "over_anchor_high")  # fmt: skip
    return {
        "part": part, **dict(zip(KEYS, key, strict=True)), **dict.fromkeys(empty, ""), **values,
        "decode_threads": args.threads, "rounds": args.rounds if part == "speed" else "",
        "new_tokens": args.new_tokens if part == "speed" else "", "tokens": args.tokens if part == "quality" else "",
    }  # fmt: skip


def speed(args, rows, on, source, found):
    """Rows of speed relative to the anchor, by turns within each group; groups that were measured are left out."""
    anchor = LlamaCppContestant(source, args.threads, 1024)
    done = rows.done(on, "part", *KEYS)

    def group(contestants):
        wanted = {k: c for k, c in contestants.items() if ("speed", *map(str, k)) not in done}
        if not wanted:
            return
        ids = prompt(args.prompt_tokens, vocabulary)
        seen = measure(
            {"anchor": anchor, **wanted}, ids, new_tokens=args.new_tokens, rounds=args.rounds
        )
        median = seen.median("anchor")
        for key in wanted:
            ratio = seen.ratio(key, "anchor")
            rows.append(row_of(
                "speed", key, args, tokens_per_second=round(ratio.median * median, 2),
                over_anchor_median=round(ratio.median, 3), over_anchor_low=round(ratio.low, 3),
                over_anchor_high=round(ratio.high, 3),
            ), on)  # fmt: skip

    for width in args.widths.split(","):
        engines = ours(args, width, found)
        vocabulary = next(iter(engines.values())).vocabulary
        group({key: EngineContestant(engine) for key, engine in engines.items()})
        del engines
    for key, contestant, path in theirs(args, source):
        others = {
            (layout, *key[1:]): LlamaBenchContestant(args.gguf_bench, path, args.threads, more)
            for layout, more in LAYOUTS
        } if args.gguf_bench else {}  # fmt: skip
        try:
            group({key: contestant, **others})
        except ActTailError as error:
            if not others:
                raise
            print(f"{key[1]}: {error}; without ik_llama.cpp")
            group({key: contestant})
    anchor.close()


PARTS = {"quality": quality, "speed": speed}


def run(args, rows):
    source = resolve(args.model).gguf
    if source is None:
        raise SystemExit(f"{args.model} is no GGUF: the peers read nothing else")
    torch.set_num_threads(args.threads)
    found = plans(args)
    on = On(label(args.model), "random tokens" if args.random else read_text(args.text).name, read_text(args.calibration).name)  # fmt: skip
    for part in ("speed",) if args.random else args.parts.split(","):
        PARTS[part](args, rows, on, source, found)


def frontier(rows):
    """Those that nothing is both faster and closer than, closest first."""
    best, kept = 0.0, []
    for row in sorted(rows, key=lambda r: (float(r["kl"]), -float(r["tokens_per_second"]))):
        if float(row["tokens_per_second"]) > best:
            best = float(row["tokens_per_second"])
            kept.append(row)
    return kept


def _peer(row):
    return row["side"] != "acttail"


def gains(rows):
    """(row of ours, the peers' fastest at no more KL or None, the ratio) for each of our plans, closest first."""
    peers = [r for r in rows if _peer(r)]
    for row in sorted((r for r in rows if not _peer(r)), key=lambda r: float(r["kl"])):
        near = [p for p in peers if float(p["kl"]) <= float(row["kl"])]
        best = max(near, key=lambda p: float(p["tokens_per_second"]), default=None)
        ratio = float(row["tokens_per_second"]) / float(best["tokens_per_second"]) if best else None
        yield row, best, ratio


def named(row):
    if row["side"] != "acttail":
        return f"{row['side']} {row['width']}"
    plan = "dense" if row["allocator"] == "dense" else f"{row['allocator']} {row['sparsity']}"
    return f"{row['width']}, {plan}"


def table(rows):
    """Markdown: one row for each of our engines, and which peers' quantisations ours do not reach."""
    lines = [
        "| acttail | KL | tokens/s | the peers' fastest at no more KL | its KL | its tokens/s | ours ÷ theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, best, ratio in gains(rows):
        cells = [named(row), f"{float(row['kl']):.4f}", f"{float(row['tokens_per_second']):.0f}"]
        if best is None:
            cells += ["none is as close", "", "", ""]
        else:
            cells += [named(best), f"{float(best['kl']):.4f}", f"{float(best['tokens_per_second']):.0f}", f"**{ratio:.2f}**"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    ahead = [
        p for p in rows if _peer(p)
        and not any(
            float(o["kl"]) <= float(p["kl"]) and float(o["tokens_per_second"]) >= float(p["tokens_per_second"])
            for o in rows if not _peer(o)
        )
    ]  # fmt: skip
    said = "; ".join(f"{named(p)} (KL {float(p['kl']):.4f}, {float(p['tokens_per_second']):.0f} tokens/s)" for p in ahead)  # fmt: skip
    lines += ["", f"Both faster and closer than any plan of ours: {said or 'none of theirs'}."]
    return "\n".join(lines)


def speeds(rows):
    """Markdown: speed alone, where weights are random and KL says nothing."""
    lines = ["| engine | tokens/s | ÷ llama.cpp on the file as it is |", "|---|---|---|"]
    for row in sorted(rows, key=lambda r: -r["tokens_per_second"]):
        over = [float(row[f"over_anchor_{k}"]) for k in ("median", "low", "high")]
        side = "" if _peer(row) else "acttail "
        lines.append(
            f"| {side}{named(row)} | {row['tokens_per_second']:.0f} | **{over[0]:.2f}** ({over[1]:.2f}–{over[2]:.2f}) |"
        )
    return "\n".join(lines)


def draw(models, path):
    """KL against tokens per second, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4.6), layout="constrained", squeeze=False)  # fmt: skip
    colours = {"auto": "#004488", "int8": "#4477aa", "int4": "#66ccee"}
    for axis, (model, rows) in zip(axes[0], models.items(), strict=True):
        floor = 1e-4
        for width, colour in colours.items():
            line = frontier([r for r in rows if r["side"] == "acttail" and r["width"] == width])
            if not line:
                continue
            x, y = zip(*((max(float(r["kl"]), floor), float(r["tokens_per_second"])) for r in line), strict=True)  # fmt: skip
            axis.plot(x, y, "o-", color=colour, label=f"acttail {width}")
        for side, colour, mark in (("llama.cpp", "#bb5566", "s"), ("ik_llama.cpp", "#ddaa33", "^")):
            points = [r for r in rows if r["side"].startswith(side)]
            for r in points:
                x, y = max(float(r["kl"]), floor), float(r["tokens_per_second"])
                axis.plot(x, y, mark, color=colour)
                if side == "llama.cpp":
                    axis.annotate(r["width"], (x, y), fontsize=7, xytext=(3, -9), textcoords="offset points")  # fmt: skip
            if points:
                axis.plot([], [], mark, color=colour, label=side)
        axis.set_xscale("log")
        axis.set_ylim(0)
        axis.set_xlabel("KL to the source model, nats per token (left is better)")
        axis.set_ylabel("decoded tokens per second (up is better)")
        axis.set_title(f"{model}, {rows[0]['decode_threads']} threads", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)


def show(args, rows):
    """Tables and figure from the newest rows of every model.

    A speed is the ratio to the anchor times the anchor's median over all groups.
    """
    scored, pages = {}, []
    for model in dict.fromkeys(r["model"] for r in rows.all()):
        quality, fast = (rows.latest(*KEYS, model=model, part=part) for part in PARTS)
        if not fast:
            continue
        over = {k: float(r["over_anchor_median"]) for k, r in fast.items()}
        anchor = statistics.median(float(fast[k]["tokens_per_second"]) / x for k, x in over.items())
        timed = {
            k: {n: v for n, v in r.items() if v} | {"tokens_per_second": over[k] * anchor}
            for k, r in fast.items()
        }
        if not quality:
            pages.append(f"**{model}**, speed alone\n\n{speeds(list(timed.values()))}")
            continue
        # ik_llama.cpp's rows are of speed alone: it runs llama.cpp's files.
        scored[model] = [
            {**quality[like], **row, "side": key[0]} for key, row in timed.items()
            if (like := key if key in quality else ("llama.cpp", *key[1:])) in quality
        ]  # fmt: skip
        pages.append(f"**{model}**\n\n{table(scored[model])}")
    if not pages:
        return
    fill(args.out, "docs/performance.md", "frontier", "\n\n".join(pages))
    if scored:
        draw(scored, (HERE.parent / "docs" / "images" if args.out == HERE else args.out) / "frontier.svg")  # fmt: skip


def main():
    parser = options(__doc__, "model", "text", "calibration", "table", rounds=7, tokens=2048)
    parser.add_argument("--gguf-bench", help="a llama-bench of ik_llama.cpp; left out without")
    parser.add_argument("--allocators", default=ALLOCATORS)
    parser.add_argument(
        "--plans", type=Path, metavar="FOLDER", help="keeps the plans, which take minutes"
    )
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--peers", default=",".join((AS_IT_IS, *PEERS)), help="their quantisations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=NEW)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--random", action="store_true", help="uniform plans and speed alone: for random weights")  # fmt: skip
    args = parser.parse_args()
    rows = Rows("frontier", args.out)
    if not args.table_only:
        run(args, rows)
    if args.gguf_bench is None and not args.table_only:
        print("ik_llama.cpp is left out: give --gguf-bench PATH to its llama-bench")
    show(args, rows)


if __name__ == "__main__":
    main()
