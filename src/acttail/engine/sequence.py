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
        capacity: positions of the KV cache.

    Attributes:
        cache: handle of the KV cache.
        capacity: its positions.
        weights_read: by the last token that was decoded.

    Raises:
        ActTailError: not enough memory for the cache.
    """

    def __init__(
        self, decoder: NativeDecoder, prefill: Prefill, policy: PrefillPolicy, capacity: int
    ) -> None:
        self._decoder, self._prefill, self._policy = decoder, prefill, policy
        self.capacity = capacity
        self._short = decoder.packed.layout.prefill_tokens
        self._lib = decoder.lib
        self.cache = decoder.new_cache(capacity)
        self._logits = torch.empty(decoder.packed.layout.spec.vocabulary)
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
        """Size of the KV cache."""
        return int(self._lib.acttail_cache_bytes(self.cache))

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
                decode(self._decoder, [(self, tokens)], [self._logits])
                return self._logits
            hidden, sparse = self._prompt(tokens)
            last = sparse if isinstance(sparse, bool) else sparse[-1:]
            return self._prefill.logits(hidden[-1:], last)[0]

    def all_logits(self, tokens: torch.Tensor, *, decode: bool = False) -> torch.Tensor:
        """As :meth:`feed`, but the logits of every token: [n, vocabulary] float32.

        Args:
            tokens: [n] int64.
            decode: token by token through the decoder's kernels even for a prompt.
        """
        tokens = self.check(tokens)
        with self._decoder.lock:
            if decode:
                out = torch.empty(len(tokens), self._logits.numel())
                self.weights_read = self._decoder.forward(self.cache, tokens, out, every=True)
                return out
            return self._prefill.logits(*self._prompt(tokens))

    def check(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :meth:`acttail.engine.protocol.Sequence.check`."""
        tokens = tokens.to(torch.int64).reshape(-1).contiguous()
        if self.length + len(tokens) > self.capacity:
            raise ActTailError(
                f"{self.length} + {len(tokens)} tokens are more than the sequence's {self.capacity}"
            )
        vocabulary = self._logits.numel()
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise ActTailError(f"token ids must be from 0 to {vocabulary - 1}, and at least one")
        return tokens

    def decodes(self, n: int) -> bool:
        """Whether the next n tokens run as the decoder does: few, and sparse wherever the plan is."""
        if n >= self._short:
            return False
        if self._decoder.plan is None:
            return True
        return bool(torch.as_tensor(self._policy.sparse_rows(1, n, self.length, None)).all())

    def _prompt(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | bool]:
        """[n, hidden] of the last norm, and which of the tokens are sparse: True, False or [n] bool."""
        start, total = self.length, len(tokens)
        sparse = self._policy.sparse_rows(1, total, start, None)
        pieces = []
        with torch.inference_mode():
            for at in range(0, total, _PIECE):
                piece = tokens[at : at + _PIECE]
                rows = sparse if isinstance(sparse, bool) else sparse[0, at : at + _PIECE]
                pieces.append(self._prefill(piece, rows, self.cache, start + at))
                self._lib.acttail_cache_set_length(self.cache, start + at + len(piece))
        return torch.cat(pieces), sparse if isinstance(sparse, bool) else sparse[0]


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
        (sequence, int(token), out if i + 1 == len(tokens) else None)
        for (sequence, tokens), out in zip(batch, logits, strict=True)
        for i, token in enumerate(tokens)
    ]
    for at in range(0, len(rows), abi.MOST_TOGETHER):
        sequences, tokens, outs = zip(*rows[at : at + abi.MOST_TOGETHER], strict=True)
        if len(tokens) == 1:
            read = [decoder.forward(sequences[0].cache, torch.tensor(tokens), outs[0])]
        else:
            read = decoder.step([s.cache for s in sequences], tokens, outs)
        for sequence, weights in zip(sequences, read, strict=True):
            sequence.weights_read = weights
