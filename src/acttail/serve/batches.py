"""What goes through the weights together: the tokens of a turn, in batches that fill passes."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from acttail.engine.protocol import TokenEngine, common_length
from acttail.serve.jobs import Job
from acttail.serve.prefixes import WORTH, PrefixCache

# Tokens of short prompts in a turn, where others decode, or as many as those decode.
_PROMPT_TOKENS = 32
# Jobs of one engine, each with the tokens [n] that it is fed.
Batch = list[tuple[Job, torch.Tensor]]


def by_engine(jobs: Iterable[Job]) -> list[tuple[TokenEngine, list[Job]]]:
    """Jobs by the engine that runs them, both in the order they come in."""
    found: dict[TokenEngine, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.engine, []).append(job)
    return list(found.items())


def is_long(job: Job) -> bool:
    """Whether a prompt is fed in pieces: it is being, or the rest is too long for a pass with others."""
    if job.feeding is not None:
        return True
    return job.sequence is not None and not job.engine.decodes(job.sequence, len(job.pending))


def batches(
    engine: TokenEngine, prompts: list[Job], decoding: list[Job], kept: PrefixCache
) -> Iterator[Batch]:
    """What is fed in a turn: short prompts are filled up with decoded tokens.

    A prompt that is long for that is left to be fed in pieces.

    Args:
        engine: of all the jobs.
        prompts: jobs that are fed as prompts.
        decoding: the others.
        kept: is asked for the beginning of a prompt before any of it is fed.
    """
    rows = deque((job, job.pending[: engine.replayed]) for job in decoding)
    left, full = max(_PROMPT_TOKENS, len(rows)) if rows else 1 << 62, engine.together
    batch: Batch = []
    for job in prompts:
        if job.feeding is not None or job.sequence is None:
            continue
        _look_again(job, kept)
        if left <= 0 or is_long(job):
            continue
        if batch and (_width(batch) + len(job.pending) > full or _begins_alike(job, batch)):
            yield _filled(batch, rows, full)
            batch = []
            _look_again(job, kept)
        tokens = job.pending
        left -= len(tokens)
        batch.append((job, tokens))
    if batch:
        yield _filled(batch, rows, full)
    while rows:
        yield _filled([rows.popleft()], rows, full)


def _width(batch: Batch) -> int:
    return sum(len(tokens) for _, tokens in batch)


def _filled(batch: Batch, rows: "deque[tuple[Job, torch.Tensor]]", full: int) -> Batch:
    """A batch with as many of the rows that are decoded as it has room for."""
    width = _width(batch)
    while rows and width + len(rows[0][1]) <= full:
        width += len(rows[0][1])
        batch.append(rows.popleft())
    return batch


def _begins_alike(job: Job, batch: Batch) -> bool:
    """Whether a prompt could share what one of a batch computes, and so had better wait for it."""
    held = 0 if job.sequence is None else job.sequence.length
    return any(common_length(job.prompt, other.prompt) - held >= WORTH for other, _ in batch)


def _look_again(job: Job, kept: PrefixCache) -> None:
    """Take what is kept of a prompt's beginning since its job started, before any of it is fed.

    Of many that come at once and begin alike, one computes the beginning.
    """
    sequence = job.sequence
    if sequence is None or sequence.length > job.held or job.looked == kept.given:
        return
    job.looked = kept.given
    found = kept.take(job.engine, job.client, job.prompt, sequence.capacity, sequence)
    job.sequence, job.held = found, found.length
