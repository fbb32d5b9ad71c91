"""Decoding and prefill speed, by turns: ours sparse and dense, llama.cpp, transformers.

SmolLM2-135M at three widths, plans of `sensitivity` at S = 0.5 and 0.7; 128 tokens after a prompt of 128,
medians of 7 rounds, one and two threads. Then four blocks of an 8B model's shapes with random weights, and int8
after longer prompts.
Every row carries the perplexity and KL of that plan and width, as the native engine decodes it.
Appends to decode_speed.csv; writes docs/performance.md's tables.

    python benchmarks/decode_speed.py [--only speed,quality,large,prefill,contexts] [--table-only]
"""

import argparse
import math
import statistics

import common
import torch

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate import Calibration
from acttail.checkpoint import LoadedWeights
from acttail.engine import Engine, NativeEngine
from acttail.evaluate.llama_cpp import LlamaCppContestant, requantised
from acttail.evaluate.native import native_perplexity
from acttail.evaluate.perplexity import DenseLogits, token_losses
from acttail.evaluate.speed import (
    EagerContestant,
    EngineContestant,
    bandwidth,
    bytes_per_token,
    measure,
)
from acttail.models import resolve
from acttail.text import read_text, tokenize, windows

MODEL = "smollm2-135m"
SPARSITIES = (0.5, 0.7)
TOKENS = 4096
# Label -> (width, format of the output head). llama.cpp's BF16 file has a bf16 head, its Q8_0 and Q4_0 files an
# 8-bit one.
WIDTHS = {
    "bf16": ("bf16", "int8"), "bf16 with bf16 head": ("bf16", "bf16"), "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
}  # fmt: skip


def plans():
    model, tokenizer = acttail.load(MODEL, dtype="bfloat16")
    text = read_text(common.WIKITEXT_VALIDATION)
    calibration = Calibration(model, tokenizer, text, tokens=16384)
    context = AllocationContext(LoadedWeights(model), calibration=calibration)
    return model, {
        s: make_plan(model, s, allocator="sensitivity", context=context) for s in SPARSITIES
    }


def engines(packed_engine, found, threads):
    """Sparse and dense engines over the same packed weights."""
    base = packed_engine
    kv = base.decoder.kv_dtype

    def make(plan):
        return NativeEngine(base.packed, plan, base.tokenizer, threads, "all", kv, base._eos)

    return {**{f"S={s}": make(p) for s, p in found.items()}, "dense": make(None)}


def prompt(n, vocabulary):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary // 10, vocabulary, (n,), generator=generator)


def rows_of(what, dtype, threads, speed, ours, others, extra):
    reads = bandwidth(threads)
    for name, engine in ours.items():
        traffic = bytes_per_token(engine, 192)
        row = {
            "what": what, "dtype": dtype, "threads": threads, "engine": name,
            "tokens_per_second": round(speed.median(name), 2), "bytes_per_token": round(traffic),
            "bandwidth": round(reads / 1e9, 2), "bandwidth_share": round(traffic * speed.median(name) / reads, 3),
            "dense_kernel": len(engine.decoder.dense_kernel), "rounds": len(speed.decode[name]),
        }  # fmt: skip
        for other in ("dense", "llama.cpp", "hf"):
            ratio = speed.ratio(name, other) if other in speed.decode and other != name else None
            for key in ("median", "low", "high"):
                row[f"over_{other}_{key}"] = round(getattr(ratio, key), 3) if ratio else ""
        common.append("decode_speed", {**row, **extra})
        print(row, flush=True)
    for name in others:
        print(what, dtype, threads, name, round(speed.median(name), 1), flush=True)


def small(widths=tuple(WIDTHS)):
    model, found = plans()
    gguf = resolve(MODEL).path
    for label in widths:
        dtype, head = WIDTHS[label]
        base = Engine.from_pretrained(
            MODEL, found[0.5], dtype=dtype, head_dtype=head, native=True, threads=1
        )
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = engines(base, found, threads)
            contestants = {n: EngineContestant(e) for n, e in ours.items()}
            llama = LlamaCppContestant(requantised(gguf, dtype), threads, 512)
            contestants["llama.cpp"] = llama
            if dtype == "bf16":
                contestants["hf"] = EagerContestant(model)
            speed = measure(contestants, prompt(128, 49152), new_tokens=128, rounds=7)
            rows_of(
                MODEL,
                label,
                threads,
                speed,
                ours,
                [n for n in contestants if n not in ours],
                {},
            )
            llama.close()
    torch.set_num_threads(2)


def large():
    """Shapes of an 8B model, four blocks, random weights, a small vocabulary."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found = {s: make_plan(model, s, allocator="uniform") for s in SPARSITIES}
    for dtype in ("bf16", "int8"):
        base = Engine.from_model(model, found[0.5], dtype=dtype, native=True, threads=1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = engines(base, found, threads)
            contestants = {n: EngineContestant(e) for n, e in ours.items()}
            speed = measure(contestants, prompt(32, 1024), new_tokens=24, rounds=7)
            rows_of("8B shapes, 4 blocks", dtype, threads, speed, ours, [], {})
        del base, ours, contestants


def contexts():
    """int8 after prompts of several lengths: the KV cache is read whole whatever the plan drops."""
    _, found = plans()
    base = Engine.from_pretrained(MODEL, found[0.5], dtype="int8", native=True, threads=2)
    ours = engines(base, found, 2)
    for n in (128, 1024, 4096):
        contestants = {name: EngineContestant(e) for name, e in ours.items()}
        speed = measure(contestants, prompt(n, 49152), new_tokens=64, rounds=7)
        for name, engine in ours.items():
            ratio = speed.ratio(name, "dense")
            row = {
                "dtype": "int8", "engine": name, "prompt_tokens": n, "new_tokens": 64, "decode_threads": 2,
                "tokens_per_second": round(speed.median(name), 2),
                "bytes_per_token": round(bytes_per_token(engine, n + 32)),
                "over_dense_median": round(ratio.median, 3), "over_dense_low": round(ratio.low, 3),
                "over_dense_high": round(ratio.high, 3), "rounds": 7,
            }  # fmt: skip
            common.append("context_speed", row)
            print(row, flush=True)


def prefill():
    """512 tokens against torch's own bf16 prefill."""
    model, _ = acttail.load(MODEL, dtype="bfloat16")
    eager = EagerContestant(model)
    for dtype in ("bf16", "int8", "int4", "fp32"):
        engine = Engine.from_pretrained(MODEL, dtype=dtype, native=True, threads=2)
        speed = measure(
            {"ours": EngineContestant(engine), "hf": eager},
            prompt(512, 49152),
            new_tokens=1,
            rounds=7,
        )
        ratio = speed.ratio("ours", "hf", prefill=True)
        row = {
            "dtype": dtype, "prompt_tokens": 512, "threads": 2,
            "tokens_per_second": round(speed.median("ours", prefill=True), 1),
            "hf_tokens_per_second": round(speed.median("hf", prefill=True), 1),
            "over_hf_median": round(ratio.median, 3), "over_hf_low": round(ratio.low, 3),
            "over_hf_high": round(ratio.high, 3), "rounds": 7,
        }  # fmt: skip
        common.append("prefill_speed", row)
        print(row, flush=True)


def quality():
    """Perplexity and KL of every width and plan, on WikiText-2 test."""
    _, found = plans()
    text = read_text(common.WIKITEXT_TEST)
    gguf = resolve(MODEL).path
    for label, (dtype, head) in WIDTHS.items():
        base = Engine.from_pretrained(
            MODEL, found[0.5], dtype=dtype, head_dtype=head, native=True, threads=2
        )
        held = DenseLogits()
        ours = engines(base, found, 2)
        for name in ("dense", *(f"S={s}" for s in SPARSITIES)):
            metrics = ("perplexity",) if name == "dense" else ("perplexity", "kl", "top1")
            result = native_perplexity(
                ours[name], text, tokens=TOKENS, metrics=metrics, dense_logits=held
            )
            append_quality(
                label, name, result.perplexity, result.perplexity_stderr, result.kl, result.top1
            )
        del base, ours
        if label not in ("bf16", "int8", "int4"):
            continue
        llama = LlamaCppContestant(requantised(gguf, dtype), 2, 1024)
        ids = windows(tokenize(text, acttail.load(MODEL)[1]), 1024, TOKENS, None, None, text.name)
        losses = [float(token_losses(llama.window_logits(w)[:-1], w[1:]).mean()) for w in ids]
        append_quality(dtype, "llama.cpp", math.exp(statistics.fmean(losses)), "", None, None)
        llama.close()


def append_quality(dtype, name, perplexity, error, kl, top1):
    row = {
        "model": MODEL, "dtype": dtype, "engine": name, "text": "WikiText-2 test", "tokens": TOKENS, "window": 1024,
        "perplexity": perplexity, "perplexity_stderr": error, "kl": "" if kl is None else kl,
        "top1": "" if top1 is None else top1,
    }  # fmt: skip
    common.append("engine_quality", row)
    print(row, flush=True)


def latest(name, *keys):
    return {tuple(r[k] for k in keys): r for r in common.rows(name)}


def speed_table():
    found = latest("decode_speed", "what", "dtype", "threads", "engine")
    if not found:
        return "Not measured yet."
    good = latest("engine_quality", "dtype", "engine")
    lines = [
        "Medians of 7 rounds by turns, lowest and highest round in brackets. Absolute tokens/s illustrate only.",
        "",
        "| model | width | threads | engine | tokens/s | ÷ llama.cpp | ÷ transformers eager | ÷ our dense | read per token | of memory's speed | dense kernels | perplexity | KL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def ratio(r, other):
        if not r[f"over_{other}_median"]:
            return ""
        return f"**{float(r[f'over_{other}_median']):.2f}** ({float(r[f'over_{other}_low']):.2f}–{float(r[f'over_{other}_high']):.2f})"

    for r in found.values():
        q = good.get((r["dtype"], r["engine"])) if r["what"] == MODEL else None
        cells = [
            r["what"], r["dtype"], r["threads"], r["engine"], f"{float(r['tokens_per_second']):.1f}",
            ratio(r, "llama.cpp"), ratio(r, "hf"), ratio(r, "dense"),
            f"{float(r['bytes_per_token']) / 1e6:.0f} MB", f"{100 * float(r['bandwidth_share']):.0f} %",
            r["dense_kernel"], f"{float(q['perplexity']):.1f}" if q else "–",
            f"{float(q['kl']):.3f}" if q and q["kl"] else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    llama = [r for (_, name), r in good.items() if name == "llama.cpp"]
    if llama:
        said = ", ".join(f"{r['dtype']} {float(r['perplexity']):.2f}" for r in llama)
        lines += ["", f"llama.cpp's perplexity on the same windows: {said}."]
    return "\n".join(lines)


def readme_table():
    found = latest("decode_speed", "what", "dtype", "threads", "engine")
    if not found:
        return "Not measured yet."
    lines = [
        "| decoding against llama.cpp at the same width | threads | our dense | S = 0.5 | S = 0.7 |",
        "|---|---|---|---|---|",
    ]
    files = {"bf16": "BF16", "bf16 with bf16 head": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
    for dtype, file in files.items():
        for threads in ("1", "2"):
            row = [found.get((MODEL, dtype, threads, n)) for n in ("dense", "S=0.5", "S=0.7")]
            if None in row:
                continue
            cells = [
                f"{float(r['over_llama.cpp_median']):.2f} × ({float(r['tokens_per_second']):.0f})"
                for r in row
            ]
            lines.append(f"| {dtype} ÷ {file} | {threads} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prefill_table():
    found = latest("prefill_speed", "dtype")
    if not found:
        return "Not measured yet."
    lines = ["| width | tokens/s | ÷ transformers eager bf16 |", "|---|---|---|"]
    for r in found.values():
        lines.append(
            f"| {r['dtype']} | {float(r['tokens_per_second']):.0f} | **{float(r['over_hf_median']):.2f}** "
            f"({float(r['over_hf_low']):.2f}–{float(r['over_hf_high']):.2f}) |"
        )
    return "\n".join(lines)


def context_table():
    found = latest("context_speed", "prompt_tokens", "engine")
    lengths = list(dict.fromkeys(key[0] for key in found))
    names = ["dense", *(f"S={s}" for s in SPARSITIES)]
    lines = [f"| prompt | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for n in lengths:
        cells = []
        for name in names:
            r = found[n, name]
            ratio = f"**{float(r['over_dense_median']):.2f}** ({float(r['over_dense_low']):.2f}–{float(r['over_dense_high']):.2f}), "
            read = f"{float(r['bytes_per_token']) / 1e6:.0f} MB"
            cells.append(
                ("" if name == "dense" else ratio)
                + f"{float(r['tokens_per_second']):.0f} tokens/s, {read}"
            )
        lines.append(f"| {int(n):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="speed,large,prefill,quality,contexts")
    parser.add_argument("--widths", default=",".join(WIDTHS), help="of the part `speed`")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        for part in args.only.split(","):
            if part == "speed":
                small(args.widths.split(","))
            else:
                {"large": large, "prefill": prefill, "quality": quality, "contexts": contexts}[
                    part
                ]()
    common.fill("docs/performance.md", "decode", speed_table())
    common.fill("docs/performance.md", "prefill", prefill_table())
    common.fill("docs/performance.md", "contexts", context_table())
    common.fill("README.md", "speed", readme_table())


if __name__ == "__main__":
    main()
