"""Decoding speed, measured by turns: every contestant once a round, and ratios of the same round.

Absolute speeds drift with whatever else the machine does; two runs that follow each other see the same
machine, so the ratio is what is reported, with its spread over rounds.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from acttail.base.progress import Progress
from acttail.engine import Engine, NativeEngine, Sampling
from acttail.engine.accounting import kv_bytes, packed_bytes, read_share
from acttail.engine.formats import kv_format
from acttail.engine.native import library
from acttail.engine.speculation import Drafts
from acttail.engine.store import allocate
from acttail.errors import ActTailError


class Contestant(Protocol):
    """Something that decodes."""

    def round(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """(seconds of the prefill, seconds of decoding new_tokens more), greedily, never stopping."""
        ...


class EngineContestant:
    """One of acttail's engines.

    Attributes:
        engine: that decodes.
        drafts: what became of the last round's drafts, None if it is not speculative.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.drafts: Drafts | None = None

    def round(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """See :class:`Contestant`."""
        result = self.engine.generate(
            prompt, max_new_tokens=new_tokens + 1, sampling=Sampling(ignore_eos=True)
        )
        self.drafts = result.drafts
        return result.prefill_seconds, result.decode_seconds


class EagerContestant:
    """transformers' own eager decoding of the dense model, through its forward pass and cache."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def round(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """See :class:`Contestant`."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            started = time.perf_counter()
            out = self.model(
                input_ids=prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = out.logits[0, -1:].argmax(-1, keepdim=True)
            prefilled = time.perf_counter()
            for _ in range(new_tokens):
                out = self.model(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[0, -1:].argmax(-1, keepdim=True)
        return prefilled - started, time.perf_counter() - prefilled


@dataclass(frozen=True)
class Ratio:
    """A ratio over rounds.

    Attributes:
        median: of the rounds.
        low: smallest.
        high: largest.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        decode: name -> tokens per second of every round.
        prefill: name -> tokens per second of every round.
    """

    decode: dict[str, list[float]]
    prefill: dict[str, list[float]]

    def ratio(self, a: str, b: str, *, prefill: bool = False) -> Ratio:
        """Speed of a over b, round by round."""
        rates = self.prefill if prefill else self.decode
        values = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
        return Ratio(statistics.median(values), min(values), max(values))

    def median(self, name: str, *, prefill: bool = False) -> float:
        """Median tokens per second."""
        return statistics.median((self.prefill if prefill else self.decode)[name])


def measure(
    contestants: Mapping[str, Contestant],
    prompt: torch.Tensor,
    *,
    new_tokens: int = 128,
    rounds: int = 7,
    progress: Progress | None = None,
) -> Speed:
    """Run every contestant once per round, one round of warm-up first.

    Args:
        contestants: name -> contestant.
        prompt: [n] token ids.
        new_tokens: decoded after the prompt and its first token.
        rounds: measured rounds.
        progress: called with (runs done, runs).
    """
    decode: dict[str, list[float]] = {name: [] for name in contestants}
    prefill: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    done = 0
    for index in range(rounds + 1):
        # Every other round goes backwards, so that a drift within rounds favours nobody.
        for name in names if index % 2 else reversed(names):
            first, rest = contestants[name].round(prompt, new_tokens)
            if index:
                prefill[name].append(len(prompt) / first)
                decode[name].append(new_tokens / rest)
            done += 1
            if progress is not None:
                progress(done, (rounds + 1) * len(names))
    return Speed(decode, prefill)


def bandwidth(threads: int, *, size: int = 1 << 29, rounds: int = 5) -> float:
    """Bytes per second that `threads` threads read from memory on huge pages; the best of the rounds.

    Args:
        threads: reading together.
        size: bytes of the buffer; far beyond every cache.
        rounds: how often.

    Raises:
        ActTailError: no native library.
    """
    tensors, _arena = allocate({"buffer": (torch.uint8, (size,))})
    tensors["buffer"].fill_(1)
    lib = library()
    seconds = [
        lib.acttail_read_seconds(tensors["buffer"].data_ptr(), size // 8, threads)
        for _ in range(rounds)
    ]
    return float(size / min(seconds))


def bytes_per_token(engine: NativeEngine, context: int) -> float:
    """Bytes of weights, scales and KV cache that one token at this context reads.

    Counted by the engine while it decodes one token, so thresholds are counted as they fall.

    Args:
        engine: a native engine.
        context: positions in the cache.
    """
    spec = engine.packed.layout.spec
    read = packed_bytes(
        engine.packed, engine.plan, dense_kernel=engine.decoder.dense_kernel, share=share_read(engine, context)
    )  # fmt: skip
    kv = kv_bytes(spec, kv_format(engine.decoder.kv_dtype), context)
    return float(read.sparse + kv)


def share_read(engine: NativeEngine, context: int) -> float:
    """Share of the projections' weights that one token at this context reads, as the kernels count.

    Args:
        engine: a native engine.
        context: positions in the cache.
    """
    spec, layout = engine.packed.layout.spec, engine.packed.layout
    sequence = engine.new_sequence(context + 2)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, spec.vocabulary, (max(1, context),), generator=generator)
    sequence.feed(prompt)
    sequence.feed(prompt[-1:])
    return read_share(layout, sequence.weights_read)


def check_rounds(rounds: int, new_tokens: int, prompt_tokens: int) -> None:
    """Refuse a benchmark that says nothing.

    Raises:
        ActTailError: a count below 1.
    """
    if min(rounds, new_tokens, prompt_tokens) < 1:
        raise ActTailError("bench needs at least one round, one prompt token and one new token")
