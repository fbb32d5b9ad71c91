"""KV caches of ended requests, for requests that begin with the same tokens.

A conversation sends all its earlier turns again, and every request of a chat model begins with the same
system message: what an earlier request has left need not be computed twice.
"""

from dataclasses import dataclass

import torch

from acttail.engine.protocol import Sequence, TokenEngine, common_length

# Fewer tokens than these are not worth a cache that another request may continue further.
_WORTH = 8
# Capacities are rounded up to it, so that caches fit later requests.
_ROUND = 512


@dataclass(eq=False)
class _Kept:
    engine: TokenEngine
    client: str
    tokens: torch.Tensor
    sequence: Sequence


class PrefixCache:
    """Sequences that nobody runs, the most recently used last.

    Args:
        size: sequences kept; 0 for none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: list[_Kept] = []

    def take(
        self, engine: TokenEngine, client: str, prompt: torch.Tensor, capacity: int
    ) -> tuple[Sequence, int]:
        """A sequence for a prompt, and how many of its tokens the sequence holds already.

        Args:
            engine: that will run it.
            client: whose it is; how fast an answer comes tells nobody what others have asked.
            prompt: [n] token ids; at least the last one is left to feed.
            capacity: tokens it must have room for.
        """
        best, common = None, 0
        for kept in self._kept:
            mine = kept.engine is engine and kept.client == client
            if mine and kept.sequence.capacity >= capacity:
                shared = min(common_length(kept.tokens, prompt), len(prompt) - 1)
                if shared >= max(_WORTH, common):
                    best, common = kept, shared
        if best is None:
            rounded = min(engine.context, -(-capacity // _ROUND) * _ROUND)
            return engine.new_sequence(rounded if self.size else capacity), 0
        self._kept.remove(best)
        best.sequence.truncate(common)
        return best.sequence, common

    def give(
        self, engine: TokenEngine, client: str, prompt: torch.Tensor, generated: list[int],
        sequence: Sequence,
    ) -> None:  # fmt: skip
        """Keep the sequence of an ended request.

        Nothing is kept where a later prompt would leave another cache.
        """
        if not self.size or not engine.keeps_prefixes:
            return
        tokens = torch.cat([prompt, torch.tensor(generated, dtype=torch.int64)])[: sequence.length]
        self._kept.append(_Kept(engine, client, tokens, sequence))
        del self._kept[: -self.size]
