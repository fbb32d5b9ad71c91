"""One sequence of the native engine: what has been fed, and the logits of what comes next."""

from collections.abc import Sequence

import torch

from acttail.engine.native import NativeDecoder
from acttail.engine.prefill import Prefill
from acttail.errors import ActTailError
from acttail.sparse.backends import abi
from acttail.sparse.policy import PrefillPolicy

# Prompts go through in pieces, which bounds the attention's scores and the activations.
_PIECE = 512


class NativeSequence:
    """A sequence in the native engine, with a KV cache of its own.

    Args:
        decoder: weights and plan.
        prefill: runs prompts.
        policy: which tokens of a prompt are sparse.
        capacity: positions the KV cache has room for.
        cache: handle of one to go on from; an empty one by default.

    Attributes:
        cache: handle of the KV cache.
        capacity: its positions.
        weights_read: by the last token that was decoded.

    Raises:
        ActTailError: not enough memory for the cache.
    """

    def __init__(
        self, decoder: NativeDecoder, prefill: Prefill, policy: PrefillPolicy, capacity: int,
        cache: int | None = None,
    ) -> None:  # fmt: skip
        self._decoder, self._prefill, self._policy = decoder, prefill, policy
        self.capacity = capacity
        self._short = decoder.packed.layout.prefill_tokens
        self._lib = decoder.lib
        self.cache = decoder.new_cache(capacity) if cache is None else cache
        self._vocabulary = decoder.packed.layout.spec.vocabulary
        self._logits = torch.empty(0)
        self.weights_read = 0

    def __del__(self) -> None:
        if getattr(self, "cache", 0):
            self._lib.acttail_cache_free(self.cache)
            self.cache = 0

    @property
    def length(self) -> int:
        """Positions held."""
        return int(self._lib.acttail_cache_length(self.cache))

    @property
    def bytes(self) -> int:
        """Size of the KV cache, what it shares with others included."""
        return int(self._lib.acttail_cache_bytes(self.cache))

    def bytes_for(self, tokens: int) -> int:
        """See :meth:`acttail.engine.protocol.Sequence.bytes_for`."""
        room = min(tokens, self.capacity - self.length)
        return int(self._lib.acttail_cache_lacks(self.cache, room))

    def fork(self, length: int, capacity: int) -> "NativeSequence":
        """See :meth:`acttail.engine.protocol.Sequence.fork`; the keys and values are shared.

        Raises:
            ActTailError: there are not so many tokens.
        """
        with self._decoder.lock:
            cache = self._decoder.fork_cache(self.cache, length, capacity)
        return NativeSequence(self._decoder, self._prefill, self._policy, capacity, cache)

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on.

        Raises:
            ActTailError: it is longer than the sequence.
        """
        if self._lib.acttail_cache_truncate(self.cache, length):
            raise ActTailError(f"the sequence has {self.length} tokens, not {length}")

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens.

        Args:
            tokens: [n] int64, n >= 1. Several at once are a prompt under the prefill policy, a single
                one is decoded.

        Returns:
            [vocabulary] float32 logits after the last one; valid until the next call.

        Raises:
            ActTailError: the KV cache is full or an id is out of range.
        """
        tokens = self.check(tokens)
        with self._decoder.lock:
            if self.decodes(len(tokens)):
                if not self._logits.numel():
                    self._logits = torch.empty(self._vocabulary)
                decode(self._decoder, [(self, tokens)], [self._logits])
                return self._logits
            prompt, found = NativePrompt(self, tokens), None
            while found is None:
                found = prompt.advance()
            return found

    def all_logits(self, tokens: torch.Tensor, *, decode: bool = False) -> torch.Tensor:
        """As :meth:`feed`, but the logits of every token: [n, vocabulary] float32.

        Args:
            tokens: [n] int64.
            decode: token by token through the decoder's kernels even for a prompt.
        """
        tokens = self.check(tokens)
        with self._decoder.lock:
            if decode:
                out = torch.empty(len(tokens), self._vocabulary)
                self.weights_read = self._decoder.forward(self.cache, tokens, out, every=True)
                return out
            prompt, hidden = NativePrompt(self, tokens), []
            while prompt.left:
                hidden.append(prompt.next_hidden())
            return self._prefill.logits(torch.cat(hidden), prompt.sparse)

    def run_together(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Decode tokens in one pass over the weights; each gets exactly what it would get alone.

        Args:
            tokens: at most :data:`abi.MOST_TOGETHER`.
            logits: [n, vocabulary] float32 to fill.

        Raises:
            ActTailError: the KV cache has no room for them, or an id is out of range.
        """
        with self._decoder.lock:
            if len(tokens) == 1:
                self.weights_read = self._decoder.forward(
                    self.cache, torch.tensor(tokens), logits[0]
                )
            else:
                caches = [self.cache] * len(tokens)
                self.weights_read = self._decoder.step(caches, tokens, list(logits[: len(tokens)]))[
                    -1
                ]

    def set_length(self, length: int) -> None:
        """Hold the first `length` positions; unlike after :meth:`truncate`, those beyond may be held again.

        Only for who knows what was written there last.

        Args:
            length: positions.

        Raises:
            ActTailError: the sequence has no room for so many.
        """
        if self._lib.acttail_cache_set_length(self.cache, length):
            raise ActTailError(f"the sequence has room for {self.capacity} tokens, not {length}")

    def check(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :meth:`acttail.engine.protocol.Sequence.check`."""
        tokens = tokens.to(torch.int64).reshape(-1).contiguous()
        if self.length + len(tokens) > self.capacity:
            raise ActTailError(
                f"{self.length} + {len(tokens)} tokens are more than the sequence's {self.capacity}"
            )
        vocabulary, ids = self._vocabulary, tokens.tolist()
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise ActTailError(f"token ids must be from 0 to {vocabulary - 1}, and at least one")
        return tokens

    def decodes(self, n: int) -> bool:
        """Whether the next n tokens run as the decoder does: few, and sparse wherever the plan is."""
        if n >= self._short:
            return False
        if self._decoder.plan is None:
            return True
        found = self._policy.sparse_rows(1, n, self.length, None)
        return found if isinstance(found, bool) else bool(found.all())

    def run_piece(self, tokens: torch.Tensor, sparse: torch.Tensor | bool) -> torch.Tensor:
        """Append tokens [n] of a prompt, given which are sparse; [n, hidden] of the last norm."""
        start = self.length
        with self._decoder.lock, torch.inference_mode():
            hidden = self._prefill(tokens, sparse, self.cache, start)
            self._lib.acttail_cache_set_length(self.cache, start + len(tokens))
        return hidden

    def logits_of(self, hidden: torch.Tensor, sparse: torch.Tensor | bool) -> torch.Tensor:
        """[n, vocabulary] float32 of what :meth:`run_piece` returns."""
        with self._decoder.lock:
            return self._prefill.logits(hidden, sparse)

    def sparse_rows(self, tokens: int) -> torch.Tensor | bool:
        """Which of the next tokens are sparse if they are a prompt: all, none or [tokens] bool."""
        found = self._policy.sparse_rows(1, tokens, self.length, None)
        return found if isinstance(found, bool) else found[0]


class NativePrompt:
    """See :class:`acttail.engine.protocol.Prompt`.

    Args:
        sequence: that it is fed to, and nothing else until all of it is.
        tokens: [n] int64, checked.

    Attributes:
        sparse: which of them are: True, False or [n] bool.
    """

    def __init__(self, sequence: NativeSequence, tokens: torch.Tensor) -> None:
        self._sequence, self._tokens, self._at = sequence, tokens, 0
        self.sparse = sequence.sparse_rows(len(tokens))

    @property
    def left(self) -> int:
        """Tokens that are not fed yet."""
        return len(self._tokens) - self._at

    def next_hidden(self) -> torch.Tensor:
        """Feed the next piece; [n, hidden] of the last norm."""
        at = slice(self._at, self._at + _PIECE)
        rows = self.sparse if isinstance(self.sparse, bool) else self.sparse[at]
        hidden = self._sequence.run_piece(self._tokens[at], rows)
        self._at += len(hidden)
        return hidden

    def advance(self) -> torch.Tensor | None:
        """See :meth:`acttail.engine.protocol.Prompt.advance`."""
        hidden = self.next_hidden()
        if self.left:
            return None
        last = self.sparse if isinstance(self.sparse, bool) else self.sparse[-1:]
        return self._sequence.logits_of(hidden[-1:], last)[0]


def decode(
    decoder: NativeDecoder,
    batch: Sequence[tuple[NativeSequence, torch.Tensor]],
    logits: Sequence[torch.Tensor],
) -> None:
    """Append checked tokens to sequences, as many at a time as share a pass over the weights.

    Args:
        decoder: of all the sequences; its lock is held.
        batch: (sequence, tokens [n] int64), each sequence once.
        logits: of each sequence, [vocabulary] float32 filled with those after its last token.

    Raises:
        ActTailError: memory runs out.
    """
    rows = [
        (sequence, token, out if i + 1 == len(tokens) else None)
        for (sequence, tokens), out in zip(batch, logits, strict=True)
        for i, token in enumerate(tokens.tolist())
    ]
    for at in range(0, len(rows), abi.MOST_TOGETHER):
        sequences, tokens, outs = zip(*rows[at : at + abi.MOST_TOGETHER], strict=True)
        if len(tokens) == 1:
            read = [decoder.forward(sequences[0].cache, torch.tensor(tokens), outs[0])]
        else:
            read = decoder.step([s.cache for s in sequences], tokens, outs)
        for sequence, weights in zip(sequences, read, strict=True):
            sequence.weights_read = weights
