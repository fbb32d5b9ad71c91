"""What every engine is: token ids in, logits out. Knows no text, no file and no particular engine."""

import collections.abc
from abc import ABC, abstractmethod
from typing import Protocol

import torch

from acttail.errors import ActTailError
from acttail.plan import SparsityPlan


class Sequence(Protocol):
    """A sequence of any engine: what has been fed, with a KV cache of its own.

    Attributes:
        capacity: tokens it may hold.
    """

    capacity: int

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    def check(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens [n] as int64, if they can be fed.

        Raises:
            ActTailError: there are none, the sequence has no room for them, or an id is not in the
                vocabulary.
        """
        ...

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [n], as :meth:`check` takes them.

        Returns:
            [vocabulary] float32 logits after the last one; valid until the sequence is fed again.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        ...

    def fork(self, length: int, capacity: int) -> "Sequence":
        """Another sequence of `capacity` that begins with the first `length` tokens of this one."""
        ...

    def bytes_for(self, tokens: int) -> int:
        """Bytes of memory that so many further tokens take; 0 where nobody counts."""
        ...


class Prompt(Protocol):
    """A prompt on its way into a sequence, so that others need not wait for all of it."""

    def advance(self) -> torch.Tensor | None:
        """Feed the next piece.

        Returns:
            None, or after the last piece what :meth:`Sequence.feed` returns for all of them.
        """
        ...


class WholePrompt:
    """A prompt in one piece.

    Args:
        sequence: that it is fed to.
        tokens: [n], as :meth:`Sequence.check` takes them.
    """

    def __init__(self, sequence: Sequence, tokens: torch.Tensor) -> None:
        self._sequence, self._tokens = sequence, tokens

    def advance(self) -> torch.Tensor | None:
        """See :meth:`Prompt.advance`."""
        return self._sequence.feed(self._tokens)


# What a step is made of: sequences of one engine, each with the tokens [n] that come next in it.
Batch = collections.abc.Sequence[tuple[Sequence, torch.Tensor]]


# Tokens whose keys and values take memory together.
PAGE = 32


def common_length(a: torch.Tensor, b: torch.Tensor) -> int:
    """Length of the common beginning of two runs of tokens [n] and [m]."""
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


class TokenEngine(ABC):
    """A model that continues token ids.

    Attributes:
        name: ``native`` or ``transformers``: what runs.
        reason: why it is not the native one, None if it is.
        plan: in use, None for dense.
        dtype: of the weights.
        context: longest sequence, in tokens.
        vocabulary: ids there are, and logits of a token.
        source: name of the model.
        eos: ids that end a sequence.
        threads: that decode, None if the engine leaves that to torch.
        together: tokens that a step decodes in one pass over the weights.
        counts_memory: whether :attr:`kv_bytes` and :meth:`Sequence.bytes_for` are known.
    """

    name: str
    reason: str | None = None
    plan: SparsityPlan | None
    dtype: str
    context: int
    vocabulary: int
    source: str
    eos: frozenset[int]
    threads: int | None = None
    together: int = 1
    counts_memory: bool = False

    @abstractmethod
    def new_sequence(self, capacity: int | None = None) -> Sequence:
        """An empty sequence, independent of all others.

        Args:
            capacity: tokens it may hold; the model's context (at most 8,192) by default.
        """

    @property
    def keeps_prefixes(self) -> bool:
        """Whether a sequence that one request has left is what another would compute for its beginning."""
        return False

    @property
    def kv_bytes(self) -> int:
        """Bytes that the keys and values of all sequences of these weights take now, what is shared once."""
        return 0

    def prompt(self, sequence: Sequence, tokens: torch.Tensor) -> Prompt:
        """A prompt [n] that is fed piece by piece; to the same end, to the bit, as at once."""
        return WholePrompt(sequence, tokens)

    def decodes(self, sequence: Sequence, tokens: int) -> bool:
        """Whether so many further tokens of a sequence run as decoded ones do, in a pass with those of others."""
        return tokens == 1

    @property
    def replayed(self) -> int:
        """Tokens a step takes of one sequence, to the same end, to the bit, as if each had been decoded alone."""
        return 1

    def step(self, batch: Batch) -> torch.Tensor:
        """Append tokens to sequences, and say what comes next in each.

        Args:
            batch: (sequence, tokens [n]), each sequence once. Several tokens are a prompt, one is
                decoded.

        Returns:
            [sequences, vocabulary] float32 logits after the last token of each; valid until one of
            the sequences is fed again.

        Raises:
            ActTailError: some tokens cannot be fed (see :meth:`Sequence.check`), a sequence is there
                twice, or there is none; no sequence has changed then.
        """
        if len({id(sequence) for sequence, _ in batch}) != len(batch) or not batch:
            raise ActTailError("a step takes at least one sequence, and each of them once")
        if len(batch) == 1:
            ((sequence, tokens),) = batch
            return sequence.feed(tokens)[None]
        return self._append([(sequence, sequence.check(tokens)) for sequence, tokens in batch])

    def _append(self, batch: Batch) -> torch.Tensor:
        """A step of several sequences, their tokens checked.

        Here one after the other; an engine that can read its weights once for all of them says so by a
        method of its own.
        """
        return torch.stack([sequence.feed(tokens) for sequence, tokens in batch])

    def read_share(self, sequence: Sequence) -> float:
        """Share of the projections' weights that the last token decoded in a sequence read.

        Args:
            sequence: of this engine.
        """
        return 1.0 if self.plan is None else 1.0 - self.plan.realised_sparsity
