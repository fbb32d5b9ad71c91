"""Who decodes next: one thread takes every running generation a token further in each turn.

Those that decode form one batch per engine; prompts go one by one after them. Requests wait in one line
per client; slots go round the clients, so that one client with a hundred requests does not keep another
with one waiting. It knows nothing of HTTP.
"""

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from acttail.engine import Engine
from acttail.engine.generation import Constraint, Generation, Piece, detail
from acttail.engine.protocol import Sequence, TokenEngine
from acttail.engine.sampling import Sampling
from acttail.errors import ActTailError
from acttail.serve.prefixes import PrefixCache

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
    held: int = 0
    _cancelled: bool = False
    _read: float = 0.0
    _reads: int = 0

    @property
    def scoring(self) -> bool:
        """Whether the prompt is still being scored."""
        return self.scored and len(self.scores) < len(self.prompt) - 1

    @property
    def next_tokens(self) -> torch.Tensor:
        """[n] ids to feed next."""
        at = len(self.scores)
        return self.prompt[at : at + 1] if self.scoring else self.result.next_tokens

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


class Scheduler:
    """Runs jobs, a token of each in every turn.

    Args:
        slots: generations that run at once, each with a KV cache of its own.
        queue: jobs that may wait.
        per_client: jobs a client may have waiting or running.
        wait_seconds: longest wait for a slot.
        run_seconds: longest run; what is there by then is the answer.
        keep_prefixes: go on from the KV cache of an earlier request that began alike.
        threads: of torch's operators; torch's own number by default.
        on_token: called with (job, seconds since its token before, or None for the first).
    """

    def __init__(
        self, *, slots: int = 8, queue: int = 128, per_client: int = 128, wait_seconds: float = 300,
        run_seconds: float = 600, threads: int | None = None, keep_prefixes: bool = True,
        on_token: Callable[[Job, float | None], None] | None = None,
    ) -> None:  # fmt: skip
        self._threads = threads
        self._kept = PrefixCache(slots if keep_prefixes else 0)
        self.slots, self.queue, self.per_client = slots, queue, per_client
        self.wait_seconds, self.run_seconds = wait_seconds, run_seconds
        self._on_token = on_token
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._active: list[Job] = []
        self._condition = threading.Condition()
        self._stopping = False
        self._closes_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="acttail-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs without a slot."""
        with self._condition:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Jobs with a slot."""
        return len(self._active)

    def held(self, client: str) -> int:
        """Jobs of a client, waiting or running."""
        with self._condition:
            running = sum(job.client == client for job in self._active)
            return running + len(self._waiting.get(client, ()))

    def submit(self, jobs: list[Job]) -> bool:
        """Take jobs of one client, all or none; False if the queue has no room for them."""
        with self._condition:
            waiting = sum(map(len, self._waiting.values()))
            free = max(0, self.slots - len(self._active) - waiting)
            if self.closing or waiting + len(jobs) > self.queue + free:
                return False
            for job in jobs:
                self._waiting.setdefault(job.client, deque()).append(job)
            self._condition.notify()
        return True

    @property
    def closing(self) -> bool:
        """Whether no more jobs are taken."""
        return self._stopping or self._closes_at is not None

    def close(self, seconds: float) -> None:
        """Take no more jobs and give up those that wait; those that run may go on for so long.

        Args:
            seconds: after which a running job ends with the outcome ``closed``.
        """
        with self._condition:
            self._closes_at = time.monotonic() + seconds
            self._condition.notify()

    def stop(self) -> None:
        """Cancel everything and end the thread."""
        with self._condition:
            self._stopping = True
            for job in itertools.chain(self._active, *self._waiting.values()):
                job.cancel()
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of this thread: prompts and sampling
        while True:
            with self._condition:
                while not (self._active or self._waiting or self._stopping):
                    self._condition.wait()
                if self._stopping and not (self._active or self._waiting):
                    return
                expired = self._admit()
                outcome: Outcome = "expired" if self._closes_at is None else "closed"
            for job in expired:
                job.emit(outcome)
            self._turn()

    def _admit(self) -> list[Job]:
        """Give free slots to the clients in turn; returns jobs that are not to run any more."""
        now, gone = time.monotonic(), []
        for client, line in list(self._waiting.items()):
            kept = deque(
                j
                for j in line
                if not j.cancelled
                and now - j.submitted <= self.wait_seconds
                and self._closes_at is None
            )
            gone += [j for j in line if j not in kept]
            if kept:
                self._waiting[client] = kept
            else:
                del self._waiting[client]
        while self._waiting and len(self._active) < self.slots:
            client, line = next(iter(self._waiting.items()))
            self._active.append(line.popleft())
            if line:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
        return gone

    def _turn(self) -> None:
        """A token for every job with a slot."""
        decoding: dict[TokenEngine, list[Job]] = {}
        fresh = []
        for job in self._active:
            if job.sequence is None:
                fresh.append(job)
            else:
                decoding.setdefault(job.engine, []).append(job)
        for engine, jobs in decoding.items():
            self._step(engine, jobs)
        for job in fresh:
            try:
                self._open(job)
            except Exception as error:
                self._end(job, error)
                continue
            if job.result.finished and not job.scoring:  # no token was asked for
                self._end(job)
            else:
                self._step(job.engine, [job])

    def _step(self, engine: TokenEngine, jobs: list[Job]) -> None:
        """One step of an engine, and what each job makes of its logits."""
        jobs = [job for job in jobs if not self._stopped(job)]
        if not jobs:
            return
        try:
            logits = engine.step(
                [(j.sequence, j.next_tokens) for j in jobs if j.sequence is not None]
            )
        except Exception as error:
            for job in jobs:
                self._end(job, error)
            return
        for job, row in zip(jobs, logits, strict=True):
            try:
                self._advance(job, row)
            except Exception as error:
                self._end(job, error)

    def _stopped(self, job: Job) -> bool:
        """Whether a job was to stop: cancelled, or its time is over. It has ended then."""
        now = time.monotonic()
        late = job.started is None or now - job.started > self.run_seconds
        closed = self._closes_at is not None and now > self._closes_at
        if not (job.cancelled or late or closed):
            return False
        if closed:
            job.result.cancel()
            self._end(job, outcome="closed")
            return True
        if job.scoring and not job.cancelled:
            self._end(
                job, ActTailError(f"the prompt was not scored in {self.run_seconds:g} s; send less")
            )
            return True
        rest = job.result.cancel()
        if rest is not None:
            job.emit(rest)
        self._end(job)
        return True

    def _end(self, job: Job, error: Exception | None = None, *, outcome: Outcome = "done") -> None:
        """Free a job's slot and tell its client."""
        with self._condition:
            self._active.remove(job)
        # The KV cache is given back before the client hears of the end.
        if job.sequence is not None:
            self._kept.give(job.engine, job.client, job.prompt, job.result.tokens, job.sequence)
            job.sequence = None
        job.error = error
        job.emit(outcome if error is None else "failed")

    def _open(self, job: Job) -> None:
        job.started = time.monotonic()
        size = min(job.engine.context, len(job.prompt) + job.max_new_tokens)
        if job.scored and len(job.prompt) > 1:
            # What a cache holds already would not be scored.
            job.sequence, job.held = job.engine.new_sequence(size), 0
            return
        sequence, job.held = self._kept.take(job.engine, job.client, job.prompt, size)
        self._begin(job, sequence, job.held)

    def _begin(self, job: Job, sequence: Sequence, held: int) -> None:
        job.sequence = job.engine.start(
            job.result, job.prompt, max_new_tokens=job.max_new_tokens, sampling=job.sampling, stop=job.stop,
            logprobs=job.logprobs, sequence=sequence, held=held, constraint=job.constraint,
        )  # fmt: skip

    def _advance(self, job: Job, logits: torch.Tensor) -> None:
        if job.scoring and job.sequence is not None:
            if job.note_score(logits):
                self._begin(job, job.sequence, len(job.prompt) - 1)
                if job.result.finished:  # the scores were all that was asked for
                    self._end(job)
            return
        before = job.result.decode_seconds if job.result.tokens else None
        piece = job.result.advance(logits)
        if before is None:
            job.first_token = time.monotonic()
        elif job.sequence is not None:
            job.note_read(job.engine.read_share(job.sequence))
        if self._on_token is not None:
            self._on_token(job, None if before is None else job.result.decode_seconds - before)
        job.emit(piece)
        if job.result.finished:
            self._end(job)


def check_room(engine: TokenEngine, tokens: int) -> int:
    """New tokens that there is room for after a prompt.

    Raises:
        ActTailError: the prompt fills the context.
    """
    if tokens >= engine.context:
        raise ActTailError(
            f"{tokens} prompt tokens leave no room in the context of {engine.context} tokens; send less"
        )
    return engine.context - tokens
