"""When a generation of a lossless engine goes on by several tokens in a turn: while it is alone.

One alone leaves most of a pass over the weights unused, and drafts fill it. Where several run, their own tokens do,
each of which is sure to be wanted, and a draft is not.
"""

from collections.abc import Iterator, Sequence

from acttail.engine.base import Rounds
from acttail.engine.generation import Piece
from acttail.serve.jobs import Job


def alone(prompts: Sequence[Job], decoding: Sequence[Job]) -> Job | None:
    """The job that may have a round in this turn, None if there is none.

    Args:
        prompts: jobs of one engine that are fed as prompts.
        decoding: its others.
    """
    if prompts or len(decoding) != 1:
        return None
    (job,) = decoding
    # One whose sequence is being made again catches up first, as one that is scored goes token by token.
    ready = not job.scoring and job.result.tokens and len(job.pending) == 1
    return job if ready else None


def rounds_of(job: Job) -> Rounds | None:
    """The rounds of a job that decodes, begun if need be; None where its engine has none."""
    if job.rounds is None and job.sequence is not None:
        job.rounds = job.engine.rounds(job.result, job.sequence)
    return job.rounds


def pieces_of(job: Job, rounds: Rounds) -> Iterator[tuple[Piece, float, int, int]]:
    """The next round of a job, token by token; whoever stops midway may.

    Args:
        job: that is alone.
        rounds: of it.

    Returns:
        (piece, seconds of decoding at the token before it, tokens drafted since then, drafts kept since then).
    """
    pieces = rounds.round()
    while True:
        since, before = job.result.decode_seconds, _counted(job)
        piece = next(pieces, None)
        if piece is None:
            return
        drafted, kept = (now - then for now, then in zip(_counted(job), before, strict=True))
        yield piece, since, drafted, kept


def _counted(job: Job) -> tuple[int, int]:
    drafts = job.result.drafts
    return (0, 0) if drafts is None else (drafts.drafted, drafts.accepted)
