"""Who decodes next: one thread gives every running generation a token by turns.

Requests wait in one line per client; slots go round the clients, so that one client with a hundred
requests does not keep another with one waiting. It knows nothing of HTTP.
"""

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from acttail.engine.generation import Generation, Piece
from acttail.engine.sampling import Sampling
from acttail.errors import ActTailError
from acttail.serve.prefixes import PrefixCache

Outcome = Literal["done", "failed", "expired"]


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
        result: filled as it goes.
        error: what went wrong, after the outcome ``failed``.
        held: tokens of the prompt that an earlier request had left in a KV cache.
        read_share: mean share of the projections' weights that decoding read, NaN until known.
    """

    engine: Any
    prompt: torch.Tensor
    emit: Callable[["Piece | Outcome"], None]
    client: str = ""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    result: Generation = field(default_factory=Generation)
    error: Exception | None = None
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    _cancelled: bool = False
    _steps: Any = None
    _sequence: Any = None
    held: int = 0
    _read: float = 0.0
    _reads: int = 0

    def cancel(self) -> None:
        """Stop at the next token, from any thread."""
        self._cancelled = True

    @property
    def read_share(self) -> float:
        """Mean share of the projections' weights read per decoded token; NaN before the second."""
        return self._read / self._reads if self._reads else float("nan")


class Scheduler:
    """Runs jobs, a token of each in turn.

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
            if self._stopping or waiting + len(jobs) > self.queue + free:
                return False
            for job in jobs:
                self._waiting.setdefault(job.client, deque()).append(job)
            self._condition.notify()
        return True

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
            for job in expired:
                job.emit("expired")
            for job in list(self._active):
                outcome = self._step(job)
                if outcome is not None:
                    with self._condition:
                        self._active.remove(job)
                    # The KV cache is given back before the client hears of the end.
                    self._kept.give(job.engine, job.prompt, job.result.tokens, job._sequence)
                    job._steps = job._sequence = None
                    job.emit(outcome)

    def _admit(self) -> list[Job]:
        """Give free slots to the clients in turn; returns jobs that are not to run any more."""
        now, gone = time.monotonic(), []
        for client, line in list(self._waiting.items()):
            kept = deque(
                j for j in line if not j._cancelled and now - j.submitted <= self.wait_seconds
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

    def _step(self, job: Job) -> Outcome | None:
        """One token of a job; its outcome once it has ended."""
        try:
            if job._steps is None:
                job.started = time.monotonic()
                self._open(job)
            before = job.result.decode_seconds if job.result.tokens else None
            piece = next(job._steps, None)
            if piece is None:
                return "done"
            if piece.token >= 0:
                self._note(job, before)
            job.emit(piece)
        except Exception as error:
            job.error = error
            return "failed"
        return None

    def _open(self, job: Job) -> None:
        started = time.monotonic()
        size = min(job.engine.context, len(job.prompt) + job.max_new_tokens)
        job._sequence, job.held = self._kept.take(job.engine, job.prompt, size)
        job._steps = job.engine.stream(
            job.prompt, job.result, max_new_tokens=job.max_new_tokens, sampling=job.sampling, stop=job.stop,
            logprobs=job.logprobs, sequence=job._sequence, held=job.held,
            cancelled=lambda: job._cancelled or time.monotonic() - started > self.run_seconds,
        )  # fmt: skip

    def _note(self, job: Job, before: float | None) -> None:
        if before is None:
            job.first_token = time.monotonic()
        else:
            share = job.engine.read_share(job._sequence)
            job._read, job._reads = job._read + share, job._reads + 1
        if self._on_token is not None:
            gap = None if before is None else job.result.decode_seconds - before
            self._on_token(job, gap)


def check_room(engine: Any, tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for the answer.

    Raises:
        ActTailError: prompt and answer are more than the context.
    """
    if tokens + max_new_tokens > engine.context:
        raise ActTailError(
            f"{tokens} prompt tokens and {max_new_tokens} new ones are more than the context of "
            f"{engine.context} tokens"
        )
