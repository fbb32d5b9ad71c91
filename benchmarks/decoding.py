"""What the benchmarks of decoding share: plans, engines over one copy of the weights, prompts, ratios."""

from collections.abc import Iterable

import torch
from common import On, label

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.text import read_text
from acttail.model.weights import LoadedWeights

SPARSITIES = (0.5, 0.7)
# Label -> (width, format of the output head). llama.cpp's BF16 file has a bf16 head, its Q8_0 and Q4_0 files an
# 8-bit one.
WIDTHS = {
    "bf16": ("bf16", "int8"), "bf16 with bf16 head": ("bf16", "bf16"), "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
}  # fmt: skip
RANDOM = "random tokens"


def calibrated(args):
    """(model, its tokenizer, what allocators may see of it, the calibration text's name)."""
    model, tokenizer = acttail.load(args.model, dtype="fast")
    text = read_text(args.calibration)
    measured = Calibration(model, tokenizer, text, tokens=args.calibration_tokens)
    return (
        model,
        tokenizer,
        AllocationContext(LoadedWeights(model), calibration=measured),
        text.name,
    )


def plans(args):
    """(model, its tokenizer, sparsity -> plan of `sensitivity`, the calibration text's name)."""
    model, tokenizer, context, text = calibrated(args)
    found = {
        s: make_plan(model, s, allocator="sensitivity", context=context, head=False)
        for s in SPARSITIES
    }
    return model, tokenizer, found, text


def measured_on(model, calibration):
    """What a row of a decoding benchmark is measured on."""
    return On(label(model), RANDOM, calibration)


def engines(base, found):
    """Sparse and dense engines over the packed weights of `base`."""
    return {
        **{f"S={s}": base.with_plan(p) for s, p in found.items()},
        "dense": base.with_plan(None),
    }


def prompt(n, vocabulary):
    """[n] random token ids, beyond the lowest tenth, where tokenizers keep their specials and bytes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary // 10, vocabulary, (n,), generator=generator)


def over(speed, name, others: Iterable[str], *, prefill=False):
    """Columns over_<other>_{median,low,high} of one contestant; empty where the other did not run."""
    rates = speed.prefill if prefill else speed.decode
    row = {}
    for other in others:
        ratio = (
            speed.ratio(name, other, prefill=prefill) if other in rates and other != name else None
        )
        for key in ("median", "low", "high"):
            row[f"over_{other}_{key}"] = round(getattr(ratio, key), 3) if ratio else ""
    return row


def shown(row, other):
    """A ratio of a row as the tables print it."""
    median, low, high = (row.get(f"over_{other}_{k}", "") for k in ("median", "low", "high"))
    return f"**{float(median):.2f}** ({float(low):.2f}–{float(high):.2f})" if median else ""


def reading(engine, threads, tokens_per_second, context=192):
    """Columns on what a token reads and how near memory's own speed that comes."""
    from acttail.evaluate.speed import bandwidth, bytes_per_token

    reads, traffic = bandwidth(threads), bytes_per_token(engine, context)
    return {
        "bytes_per_token": round(traffic), "bandwidth": round(reads / 1e9, 2),
        "bandwidth_share": round(traffic * tokens_per_second / reads, 3),
        "dense_kernel": len(engine.decoder.dense_kernel),
    }  # fmt: skip
