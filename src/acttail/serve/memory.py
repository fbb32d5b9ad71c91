"""What KV caches may take of memory together."""

from collections.abc import Callable, Iterable, Sequence

import torch

from acttail.engine.protocol import PAGE, TokenEngine
from acttail.errors import ActTailError
from acttail.serve.jobs import Job

# Tokens beyond a prompt that there is to be memory for before a job starts, and for each that runs, lest whoever
# starts be sent back at once.
_AHEAD = PAGE


class KvMemory:
    """A limit and what is taken of it.

    Args:
        limit: bytes; None for no limit.
        used: tells the bytes that all KV caches take now, what several share counted once.
    """

    def __init__(self, limit: int | None, used: Callable[[], int]) -> None:
        self.limit, self._used = limit, used

    @property
    def used(self) -> int:
        """Bytes taken now."""
        return self._used()

    def holds(self, batch: Sequence[tuple[Job, torch.Tensor]]) -> bool:
        """Whether what these jobs are to be fed next is free."""
        return self.limit is None or self._free(
            j.sequence.bytes_for(len(t)) for j, t in batch if j.sequence is not None
        )

    def has_room(self, job: Job, tokens: int) -> bool:
        """Whether so many further tokens of a job are free."""
        return (
            self.limit is None
            or job.sequence is None
            or self._free([job.sequence.bytes_for(tokens)])
        )

    def admits(self, job: Job, others: Sequence[Job]) -> bool:
        """Whether a job can start beside those that run; one that would run alone always can."""
        return self.limit is None or not others or self._free(map(_need, (job, *others)))

    def _free(self, needs: Iterable[int]) -> bool:
        need = sum(needs)
        return not need or self._used() + need <= (self.limit or 0)


def _need(job: Job) -> int:
    """Bytes that a job's next tokens take."""
    return 0 if job.sequence is None else job.sequence.bytes_for(len(job.pending) + _AHEAD)


def tokens_within(engine: TokenEngine, limit: int | None) -> int:
    """Tokens of one sequence that a limit holds, the engine's context at most."""
    if limit is None or not engine.counts_memory:
        return engine.context
    page = engine.new_sequence(engine.context).bytes_for(1)
    return min(engine.context, limit // page * PAGE)


def check_room(engine: TokenEngine, tokens: int, most: int) -> int:
    """New tokens that there is room for after a prompt.

    Args:
        engine: that is to run it.
        tokens: of the prompt.
        most: tokens that the memory holds.

    Raises:
        ActTailError: the prompt fills the context, or the memory.
    """
    context = min(engine.context, most)
    if tokens >= context:
        why = (
            f"context of {context} tokens"
            if context == engine.context
            else f"memory for {context} tokens"
        )
        raise ActTailError(f"{tokens} prompt tokens leave no room in the {why}; send less")
    return context - tokens
