"""One generation from its request to its end. It knows nothing of who runs it, nor of HTTP."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from acttail.engine import Engine
from acttail.engine.base import Rounds
from acttail.engine.generation import Constraint, Generation, Piece, detail
from acttail.engine.protocol import Prompt, Sequence
from acttail.engine.sampling import Sampling

Outcome = Literal["done", "failed", "expired", "closed"]
Score = tuple[float | None, tuple[tuple[int, float], ...]]


@dataclass(eq=False)
class Job:
    """One generation, from its request to its end.

    Attributes:
        engine: that runs it.
        prompt: [n] token ids.
        emit: called from the scheduler's thread with a Piece, then once with an Outcome.
        client: whom a turn is counted for.
        max_new_tokens: tokens at most.
        sampling: how they are drawn.
        stop: strings that end the text.
        logprobs: as of :meth:`acttail.engine.Engine.stream`.
        scored: whether the prompt's tokens are scored, too: each is then fed by itself, as if decoded.
        scores: (log-probability, likeliest) of each token of a scored prompt but the first, as in a Piece.
        constraint: what the text is held to.
        result: filled as it goes.
        error: what went wrong, after the outcome ``failed``.
        sequence: that it runs in, while it has a slot.
        looked: how many sequences had been kept when one was last looked for that begins alike.
        feeding: the prompt on its way into the sequence piece by piece, if it is.
        rounds: of the sequence, once it has had any.
        held: tokens of the prompt that an earlier request had left in a KV cache.
        read_share: mean share of the projections' weights that decoding read, NaN until known.
    """

    engine: Engine
    prompt: torch.Tensor
    emit: Callable[["Piece | Outcome"], None]
    client: str = ""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    scored: bool = False
    scores: list[Score] = field(default_factory=list)
    constraint: Constraint | None = None
    result: Generation = field(default_factory=Generation)
    error: Exception | None = None
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    sequence: Sequence | None = None
    feeding: Prompt | None = None
    rounds: Rounds | None = None
    looked: int = 0
    held: int = 0
    _cancelled: bool = False
    _read: float = 0.0
    _reads: int = 0

    @property
    def scoring(self) -> bool:
        """Whether the prompt is still being scored."""
        return self.scored and len(self.scores) < len(self.prompt) - 1

    @property
    def length(self) -> int:
        """Tokens whose logits are wanted next, or were: of the prompt and what was generated."""
        if self.scoring:
            return len(self.scores) + 1
        return len(self.prompt) + len(self.result.tokens)

    @property
    def pending(self) -> torch.Tensor:
        """[n] ids that the sequence lacks until logits are wanted.

        The prompt's before any others; one that was generated, and more of them where a sequence that was given up
        is made again.
        """
        assert self.sequence is not None  # noqa: S101
        at, prompt = self.sequence.length, len(self.prompt)
        if self.scoring:
            return self.prompt[at : self.length]
        if at < prompt:
            return self.prompt[at:]
        return torch.tensor(self.result.tokens[at - prompt :])

    @property
    def in_prompt(self) -> bool:
        """Whether what is pending is fed as a prompt, not as what is decoded."""
        return (
            not self.scored
            and self.sequence is not None
            and self.sequence.length < len(self.prompt)
        )

    @property
    def due(self) -> bool:
        """Whether all is fed, and the last logits are the wanted ones."""
        return self.sequence is not None and self.sequence.length == self.length

    def drop_sequence(self) -> None:
        """Give the sequence up, with all that goes on in it."""
        self.sequence = self.feeding = self.rounds = None

    def cancel(self) -> None:
        """Stop at the next token, from any thread."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether it is to stop."""
        return self._cancelled

    def note_score(self, logits: torch.Tensor) -> bool:
        """Score the next token of the prompt; whether it was the last."""
        following = int(self.prompt[len(self.scores) + 1])
        self.scores.append(detail(logits, following, self.logprobs or 0))
        return not self.scoring

    def note_read(self, share: float) -> None:
        """Count a decoded token that read this share of the projections' weights."""
        self._read, self._reads = self._read + share, self._reads + 1

    @property
    def read_share(self) -> float:
        """Mean share of the projections' weights read per decoded token; NaN before the second."""
        return self._read / self._reads if self._reads else float("nan")
