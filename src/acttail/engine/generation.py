"""One generation as a plain state machine: logits in, a piece of text out. Whoever has logits drives it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from acttail.engine.distribution import Proposal
from acttail.engine.sampling import Sampler, Sampling
from acttail.engine.speculation import Drafts
from acttail.engine.text import TextStream
from acttail.errors import ActTailError

Finish = Literal["stop", "length", "cancelled"]


class Constraint(Protocol):
    """What a text is held to, one generation long."""

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocabulary] with -inf for tokens that may not come next."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the text is complete with it."""
        ...


@dataclass(frozen=True)
class Piece:
    """What one step adds.

    Attributes:
        token: id of the token; -1 if only text came that had been held back.
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
    """A generation: empty until it is begun, advanced by logits, finished in the end.

    Attributes:
        text: without stop strings.
        tokens: ids, an end-of-sequence token included.
        finish: ``stop`` (end of sequence or a stop string), ``length`` or ``cancelled``.
        prompt_tokens: tokens of the prompt.
        prefill_seconds: until the first logits.
        decode_seconds: from there to the end.
        drafts: what became of drafted tokens, None if the generation is not speculative.
        finished: whether nothing more comes.
        next_tokens: [n] int64 ids to feed for the logits that :meth:`advance` takes: the prompt, then
            the token drawn last.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Finish = "length"
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafts: Drafts | None = None
    finished: bool = field(default=False, init=False)
    next_tokens: torch.Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64),
        init=False,
        repr=False,
        compare=False,
    )
    _run: "_Run | None" = field(default=None, init=False, repr=False, compare=False)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second; the first one belongs to the prefill."""
        return (
            max(0, len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0
        )

    @property
    def prompt(self) -> torch.Tensor:
        """[n] int64 ids that the generation was begun with; none before that."""
        return self.next_tokens if self._run is None else self._run.prompt

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return 0 if self._run is None else self._run.limit - len(self.tokens)

    def begin(
        self, prompt: torch.Tensor, *, max_new_tokens: int, sampling: Sampling, tokenizer: Any = None,
        stop: Sequence[str] = (), eos: frozenset[int] = frozenset(), logprobs: int | None = None,
        held: int = 0, constraint: Constraint | None = None,
    ) -> None:  # fmt: skip
        """Start the clock; the prompt is to be fed next.

        Args:
            prompt: [n] int64.
            max_new_tokens: tokens at most.
            sampling: how they are drawn.
            tokenizer: of the model; None if only ids are wanted.
            stop: strings that end the text.
            eos: ids that end the sequence.
            logprobs: give the log-probability of each token and of so many likeliest ones.
            held: tokens of the prompt that the sequence already ends with; at least one is left to feed.
            constraint: what the text is held to; it ends where that is complete.

        Raises:
            ActTailError: the prompt is empty, or this generation has been begun before.
        """
        if self._run is not None:
            raise ActTailError("a generation is begun once; make another")
        if not prompt.numel():
            raise ActTailError("the prompt is empty")
        self.prompt_tokens, self.next_tokens = prompt.numel(), prompt[held:]
        self._run = _Run(
            prompt, max_new_tokens, Sampler(sampling), frozenset() if sampling.ignore_eos else eos,
            logprobs, TextStream(tokenizer, stop) if tokenizer is not None else None, constraint,
        )  # fmt: skip
        self.finished = max_new_tokens < 1

    def propose(self, logits: torch.Tensor) -> Proposal:
        """A draft of the next token, drawn as the token itself will be, from another model's logits.

        Args:
            logits: [vocabulary] float32; not kept.

        Raises:
            ActTailError: the generation is not under way, or the logits are not finite.
        """
        if self._run is None or self.finished:
            raise ActTailError("only a generation that is begun and not finished takes drafts")
        return self._run.sampler.propose(logits)

    def advance(self, logits: torch.Tensor, proposal: Proposal | None = None) -> Piece:
        """Draw the next token; what was held back of the text comes with the last one.

        Args:
            logits: [vocabulary] float32 after :attr:`next_tokens`; not kept.
            proposal: a draft of it, taken where that leaves the token's distribution as it is.

        Raises:
            ActTailError: the generation is not under way, or the logits are not finite.
        """
        run = self._run
        if run is None or self.finished:
            raise ActTailError("only a generation that is begun and not finished can advance")
        if not self.tokens:
            run.sampler.see(run.prompt, logits.numel(), generated=False)
            run.decoding = time.perf_counter()
            self.prefill_seconds = run.decoding - run.started
        allowed = logits if run.constraint is None else run.constraint.masked(logits)
        token = run.sampler.draw(allowed, proposal)
        complete = run.constraint is not None and run.constraint.accept(token)
        logprob, top = detail(logits, token, run.logprobs)
        self.tokens.append(token)
        ended = token in run.eos
        last = ended or len(self.tokens) >= run.limit
        shown = ""
        if run.text is not None:
            shown = run.text.finish() if ended else run.text.push(token, last=last)
            self.text = run.text.text
            ended = ended or run.text.stopped
        if complete and not ended:
            ended = True
            if run.text is not None:
                shown += run.text.finish()
                self.text = run.text.text
        if ended or last:
            self.finish, self.finished = "stop" if ended else "length", True
        else:
            self.next_tokens = torch.tensor([token])
            run.sampler.see(self.next_tokens, logits.numel())
        self.decode_seconds = time.perf_counter() - run.decoding
        return Piece(token, shown, logprob, top)

    def cancel(self) -> Piece | None:
        """End it here; returns the text that was held back, None without any."""
        if self.finished:
            return None
        self.finish, self.finished = "cancelled", True
        run = self._run
        if run is None or not self.tokens:
            return None
        self.decode_seconds = time.perf_counter() - run.decoding
        rest = run.text.finish() if run.text is not None else ""
        self.text = run.text.text if run.text is not None else ""
        return Piece(-1, rest) if rest else None


@dataclass(eq=False)
class _Run:
    """What a generation needs while it is under way."""

    prompt: torch.Tensor
    limit: int
    sampler: Sampler
    eos: frozenset[int]
    logprobs: int | None
    text: TextStream | None
    constraint: Constraint | None = None
    started: float = field(default_factory=time.perf_counter)
    decoding: float = 0.0


def detail(
    logits: torch.Tensor, token: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """A token's log-probability, and [(id, logprob)] of the likeliest ones; nothing for a `count` of None.

    Args:
        logits: [vocabulary] float32.
        token: id.
        count: likeliest tokens wanted.
    """
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
