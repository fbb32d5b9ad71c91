"""The generation loop every engine shares: tokens in, text out, piece by piece."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from acttail.engine.sampling import Sampler, Sampling
from acttail.engine.sequence import Sequence as EngineSequence
from acttail.errors import ActTailError

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """What one step adds.

    Attributes:
        token: id of the token.
        text: characters that became final with it; may be empty while a character or a possible stop
            string is incomplete.
        logprob: natural logarithm of the token's probability, if asked for.
        top: [(id, logprob)] of the likeliest tokens, if asked for.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Generation:
    """A finished (or stopped) generation.

    Attributes:
        text: without stop strings.
        tokens: ids, an end-of-sequence token included.
        finish: ``stop`` (end of sequence or a stop string), ``length`` or ``cancelled``.
        prompt_tokens: tokens of the prompt.
        prefill_seconds: until the first logits.
        decode_seconds: from there to the end.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Finish = "length"
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second; the first one belongs to the prefill."""
        return (
            max(0, len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0
        )


class TextStream:
    """Turns ids into text as they come, never half a character and never a part of a stop string.

    Args:
        tokenizer: of transformers.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids: list[int] = []
        self._offset = 0  # ids before it are settled
        self._settled = ""
        self.text = ""
        self._sent = 0
        self.stopped = False

    def push(self, token: int, *, last: bool = False) -> str:
        """Add a token; returns what may be shown now."""
        self._ids.append(token)
        return self._advance(last=last)

    def finish(self) -> str:
        """What was held back."""
        return self._advance(last=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _advance(self, *, last: bool) -> str:
        if self.stopped:
            return ""
        # Decode from a few tokens back, for a token's text may depend on the one before it.
        start = max(0, self._offset - 4)
        before, now = self._decode(self._ids[start : self._offset]), self._decode(self._ids[start:])
        if now.endswith("�") and not last:
            return ""
        self.text += now[len(before) :]
        self._offset = len(self._ids)
        for stop in self._stop:
            at = self.text.find(stop, max(0, self._sent - len(stop)))
            if at >= 0:
                self.text, self.stopped = self.text[:at], True
        end = len(self.text)
        if not (last or self.stopped):
            end -= self._possible_stop()
        piece = self.text[self._sent : max(end, self._sent)]
        self._sent = max(end, self._sent)
        return piece

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that could begin a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(stop[:n]):
                    longest = max(longest, n)
                    break
        return longest


def stream(
    sequence: EngineSequence,
    tokenizer: Any,
    prompt: torch.Tensor,
    result: Generation,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    eos: frozenset[int] = frozenset(),
    logprobs: int | None = None,
    cancelled: Callable[[], bool] | None = None,
    held: int = 0,
) -> Iterator[Piece]:
    """Generate, yielding each token as it is drawn.

    Args:
        sequence: a sequence of any engine; the prompt, less what is held, is appended.
        tokenizer: of the model; None if only ids are wanted.
        prompt: [n] int64.
        held: tokens of the prompt that the sequence already ends with; at least one is left to feed.
        result: filled as the generation goes.
        max_new_tokens: tokens at most.
        sampling: how they are drawn.
        stop: strings that end the text.
        eos: ids that end the sequence.
        logprobs: give the log-probability of each token and of so many likeliest ones.
        cancelled: asked before every token.

    Raises:
        ActTailError: the prompt is empty or too long.
    """
    if not prompt.numel():
        raise ActTailError("the prompt is empty")
    sampler, text = (
        Sampler(sampling),
        TextStream(tokenizer, stop) if tokenizer is not None else None,
    )
    result.prompt_tokens = prompt.numel()
    started = time.perf_counter()
    logits = sequence.feed(prompt[held:])
    sampler.see(prompt, logits.numel(), generated=False)
    result.prefill_seconds = time.perf_counter() - started
    started = time.perf_counter()
    for i in range(max_new_tokens):
        if cancelled is not None and cancelled():
            result.finish = "cancelled"
            break
        token = sampler.draw(logits)
        detail = _detail(logits, token, logprobs)
        result.tokens.append(token)
        ended = token in eos and not sampling.ignore_eos
        piece = text.push(token) if text and not ended else ""
        result.text = text.text if text else ""
        result.decode_seconds = time.perf_counter() - started
        yield Piece(token, piece, *detail)
        if ended or (text is not None and text.stopped):
            result.finish = "stop"
            break
        if i + 1 < max_new_tokens:
            one = torch.tensor([token])
            sampler.see(one, logits.numel())
            logits = sequence.feed(one)
    result.decode_seconds = time.perf_counter() - started
    if text is not None:
        rest = text.finish()
        result.text = text.text
        if rest:
            yield Piece(-1, rest)


def _detail(
    logits: torch.Tensor, token: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if count is None:
        return None, ()
    total = torch.logsumexp(logits, 0)
    values, index = (
        torch.topk(logits, min(count, logits.numel())) if count else (logits[:0], logits[:0])
    )
    top = tuple(
        (int(i), float(v - total)) for i, v in zip(index.tolist(), values.tolist(), strict=True)
    )
    return float(logits[token] - total), top
