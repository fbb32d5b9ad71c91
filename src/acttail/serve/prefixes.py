"""What ended requests have left in KV caches, for requests that begin with the same tokens.

A conversation sends all its earlier turns again, and every request of a chat model begins with the same
system message: what an earlier request has left need not be computed twice. Whoever begins alike shares the
keys and values; nothing is copied but the page in which they part.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from acttail.engine.protocol import Sequence, TokenEngine

# Fewer tokens than these are not worth a cache that another request may continue further.
WORTH = 8


@dataclass(eq=False)
class _Kept:
    engine: TokenEngine
    client: str
    tokens: Any  # [n] of numpy: comparing costs a tenth of what it does in torch
    sequence: Sequence

    def common(self, tokens: Any) -> int:
        """Length of the common beginning with other tokens [m]."""
        n = min(len(self.tokens), len(tokens))
        differ = self.tokens[:n] != tokens[:n]
        return int(differ.argmax()) if differ.any() else n


class PrefixCache:
    """Sequences that nobody runs, the most recently used last.

    Args:
        size: sequences kept; 0 for none.

    Attributes:
        given: how many it was ever given.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.given = 0
        self._kept: list[_Kept] = []

    def take(
        self, engine: TokenEngine, client: str, prompt: torch.Tensor, capacity: int,
        own: Sequence | None = None,
    ) -> Sequence:  # fmt: skip
        """A sequence for a prompt; it may hold some of its tokens already.

        Args:
            engine: that will run it.
            client: whose it is; how fast an answer comes tells nobody what others have asked.
            prompt: [n] token ids; at least the last one is left to feed.
            capacity: tokens it must have room for.
            own: a sequence that there is already, to be had back unless what is kept goes further.
        """
        best, common, ids = None, 0 if own is None else own.length + 1, prompt.numpy()
        for kept in self._kept:
            if kept.engine is engine and kept.client == client:
                shared = min(kept.common(ids), len(ids) - 1)
                if shared >= max(WORTH, common):
                    best, common = kept, shared
        if best is None:
            return engine.new_sequence(capacity) if own is None else own
        self._kept.remove(best)
        self._kept.append(best)
        return best.sequence.fork(common, capacity)

    def give(
        self, engine: TokenEngine, client: str, tokens: torch.Tensor, sequence: Sequence
    ) -> None:
        """Keep a sequence that nobody runs any more.

        Nothing is kept where a later prompt would leave another cache. What the new one goes on from is dropped.

        Args:
            engine: that ran it.
            client: whose it is.
            tokens: [n] ids that it holds.
            sequence: that holds them.
        """
        if not self.size or not engine.keeps_prefixes:
            return
        ids = tokens.numpy()
        self.given += 1
        self._kept = [
            kept
            for kept in self._kept
            if kept.engine is not engine
            or kept.client != client
            or not np.array_equal(kept.tokens, ids[: len(kept.tokens)])
        ]
        self._kept.append(_Kept(engine, client, ids, sequence))
        del self._kept[: -self.size]

    def drop(self) -> bool:
        """Forget the one that was used the longest time ago; False if there is none."""
        if not self._kept:
            return False
        del self._kept[0]
        return True
