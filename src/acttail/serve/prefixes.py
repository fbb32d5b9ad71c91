"""KV caches of ended requests, for requests that begin with the same tokens.

A conversation sends all its earlier turns again, and every request of a chat model begins with the same
system message: what an earlier request has left need not be computed twice.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Fewer tokens than these are not worth a cache that another request may continue further.
_WORTH = 8
# Capacities are rounded up to it, so that caches fit later requests.
_ROUND = 512


@dataclass(eq=False)
class _Kept:
    engine: Any
    tokens: torch.Tensor
    sequence: Any


class PrefixCache:
    """Sequences that nobody runs, the most recently used last.

    Args:
        size: sequences kept; 0 for none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: list[_Kept] = []

    def take(self, engine: Any, prompt: torch.Tensor, capacity: int) -> tuple[Any, int]:
        """A sequence for a prompt, and how many of its tokens the sequence holds already.

        Args:
            engine: that will run it.
            prompt: [n] token ids; at least the last one is left to feed.
            capacity: tokens it must have room for.
        """
        best, common = None, 0
        for kept in self._kept:
            if kept.engine is engine and kept.sequence.capacity >= capacity:
                shared = min(_common(kept.tokens, prompt), len(prompt) - 1)
                if shared >= max(_WORTH, common):
                    best, common = kept, shared
        if best is None:
            rounded = min(engine.context, -(-capacity // _ROUND) * _ROUND)
            return engine.new_sequence(rounded if self.size else capacity), 0
        self._kept.remove(best)
        best.sequence.truncate(common)
        return best.sequence, common

    def give(self, engine: Any, prompt: torch.Tensor, generated: list[int], sequence: Any) -> None:
        """Keep the sequence of an ended request.

        Prompts under a policy that treats their tokens unlike decoded ones leave another cache than a
        later prompt would: they are not kept.
        """
        alike = engine.name == "native" and (engine.plan is None or str(engine.policy) == "all")
        if not self.size or not alike or sequence is None:
            return
        tokens = torch.cat([prompt, torch.tensor(generated, dtype=torch.int64)])[: sequence.length]
        self._kept.append(_Kept(engine, tokens, sequence))
        del self._kept[: -self.size]


def _common(a: torch.Tensor, b: torch.Tensor) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n]).nonzero()
    return int(differ[0]) if len(differ) else n
