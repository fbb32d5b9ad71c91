"""Who decodes next: one thread takes every running generation a token further in each turn.

A turn decodes all that run in as few passes over the weights as an engine's batch allows, or several tokens of one
that is alone with a lossless engine, and takes prompts a bounded part further, so that nobody waits for another's
whole prompt. It knows nothing of HTTP.
"""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from acttail.engine.generation import Piece
from acttail.engine.protocol import Sequence, TokenEngine
from acttail.errors import ActTailError
from acttail.serve.batches import Batch, batches, by_engine, is_long
from acttail.serve.jobs import Job, Outcome
from acttail.serve.line import Line
from acttail.serve.memory import KvMemory
from acttail.serve.prefixes import PrefixCache
from acttail.serve.rounds import alone, pieces_of, rounds_of

# Sequences kept for each slot: one that its prompt leaves, and one of a conversation that may go on.
_KEPT = 2


class Scheduler:
    """Runs jobs, a token of each in every turn.

    Args:
        slots: generations that run at once.
        queue: jobs that may wait.
        per_client: jobs a client may have waiting or running.
        wait_seconds: longest wait for a slot.
        run_seconds: longest run; what is there by then is the answer.
        keep_prefixes: go on from the KV cache of an earlier request that began alike.
        memory: of KV caches; no limit by default. Who finds none free waits; where those that run need more, the
            one that began last gives its own up, waits, and is computed again.
        threads: of torch's operators; torch's own number by default.
        on_token: called with (job, seconds since its token before, or None for the first).
        on_preempted: called with a job that gave its memory up.
        on_drafts: called with (tokens drafted, of them kept), where a lossless engine drafts.
        on_events: called after jobs have emitted something, once for all that come of a pass.
    """

    def __init__(
        self, *, slots: int = 8, queue: int = 128, per_client: int = 128, wait_seconds: float = 300,
        run_seconds: float = 600, threads: int | None = None, keep_prefixes: bool = True,
        memory: KvMemory | None = None, on_token: Callable[[Job, float | None], None] | None = None,
        on_preempted: Callable[[Job], None] | None = None,
        on_drafts: Callable[[int, int], None] | None = None,
        on_events: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._threads = threads
        self._kept = PrefixCache(_KEPT * slots if keep_prefixes else 0)
        self._memory = memory or KvMemory(None, lambda: 0)
        self.slots, self.queue, self.per_client = slots, queue, per_client
        self.wait_seconds, self.run_seconds = wait_seconds, run_seconds
        self._on_token, self._on_preempted, self._on_drafts = on_token, on_preempted, on_drafts
        self._on_events = on_events
        self._waiting = Line()
        # Those that run, in the order of their first start.
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
            return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs with a slot."""
        return len(self._active)

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def held(self, client: str) -> int:
        """Jobs of a client, waiting or running."""
        with self._condition:
            return sum(job.client == client for job in self._active) + self._waiting.of(client)

    def submit(self, jobs: list[Job]) -> bool:
        """Take jobs of one client, all or none; False if the queue has no room for them."""
        with self._condition:
            waiting = len(self._waiting)
            free = max(0, self.slots - len(self._active) - waiting)
            if self.closing or waiting + len(jobs) > self.queue + free:
                return False
            for job in jobs:
                self._waiting.add(job)
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
            for job in itertools.chain(self._active, self._waiting):
                job.cancel()
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of this thread: prompts and sampling
        while True:
            with self._condition:
                while not (self._active or len(self._waiting) or self._stopping):
                    self._condition.wait()
                if self._stopping and not (self._active or len(self._waiting)):
                    return
                gone = self._waiting.remove(self._not_to_run)
                outcome: Outcome = "expired" if self._closes_at is None else "closed"
            for job in gone:
                self._give_up(job, outcome)
            self._admit()
            self._turn()
            self._on_events()

    def _not_to_run(self, job: Job) -> bool:
        if job.cancelled or self._closes_at is not None:
            return True
        now = time.monotonic()
        if job.started is not None:  # it ran before
            return now - job.started > self.run_seconds
        return now - job.submitted > self.wait_seconds

    def _give_up(self, job: Job, outcome: Outcome) -> None:
        """End a job that waits; one that ran before keeps what it has."""
        if job.started is not None and outcome != "closed":
            rest, outcome = job.result.cancel(), "done"
            if rest is not None:
                job.emit(rest)
        job.emit(outcome)

    def _admit(self) -> None:
        """Give free slots, and the memory they need, to the clients in turn."""
        while len(self._active) < self.slots:
            with self._condition:
                if not len(self._waiting):
                    return
                job = self._waiting.take()
                self._active.append(job)
                self._active.sort(key=lambda j: j.started or float("inf"))
            try:
                job.sequence = self._sequence(job)
                others = [j for j in self._active if j is not job]
                if not self._is_free(self._memory.admits, job, others):
                    self._put_back(job)
                    return
                if job.started is None:
                    job.started = time.monotonic()
                    job.held = job.sequence.length
                    if not job.scoring:
                        self._begin(job, job.held)
            except Exception as error:
                self._end(job, error)

    def _is_free(self, enough: Callable[..., bool], *asked: Any) -> bool:
        """Whether there is memory for something, once all is forgotten that nobody runs."""
        while not enough(*asked):
            if not self._kept.drop():
                return False
        return True

    def _put_back(self, job: Job) -> None:
        """Take a job's slot and its memory; it is the next to get them."""
        job.drop_sequence()
        with self._condition:
            self._active.remove(job)
            self._waiting.add_first(job)

    def _sequence(self, job: Job) -> Sequence:
        """A sequence for a job, with what is kept of its prompt's beginning."""
        size = min(job.engine.context, len(job.prompt) + job.max_new_tokens)
        if job.scored:  # what a cache holds already would not be scored
            return job.engine.new_sequence(size)
        return self._kept.take(job.engine, job.client, job.prompt, size)

    def _begin(self, job: Job, held: int) -> None:
        job.sequence = job.engine.start(
            job.result, job.prompt, max_new_tokens=job.max_new_tokens, sampling=job.sampling, stop=job.stop,
            logprobs=job.logprobs, sequence=job.sequence, held=held, constraint=job.constraint,
        )  # fmt: skip

    def _turn(self) -> None:
        """A token for every job with a slot, and a part of the prompts."""
        long: list[Job] = []
        for engine, jobs in by_engine(self._active):
            prompts: list[Job] = []
            decoding: list[Job] = []
            for job in jobs:
                if self._stopped(job):
                    continue
                if job.result.finished and not job.scoring:  # no token was asked for
                    self._end(job)
                elif job.in_prompt:
                    prompts.append(job)
                else:
                    decoding.append(job)
            lone = alone(prompts, decoding)
            if lone is not None and self._round(lone):
                continue
            for batch in batches(engine, prompts, decoding, self._kept):
                self._step(engine, batch)
                self._on_events()
            long += [job for job in prompts if job.in_prompt and is_long(job)]
        # One piece of one prompt, whoever else waits: first come, first served.
        if long:
            self._feed(min(long, key=lambda j: j.started or 0.0))

    def _round(self, job: Job) -> bool:
        """Several tokens of a job that is alone with its engine; False where it can have one only."""
        rounds = rounds_of(job)
        # Nobody gives its own up for what may come to nothing.
        if rounds is None or not self._is_free(self._memory.has_room, job, rounds.width):
            return False
        found = pieces_of(job, rounds)
        while True:
            try:
                noted = next(found, None)
                if noted is not None:
                    self._note(job, *noted)
                    self._on_events()
            except Exception as error:
                self._end(job, error)
                return True
            if noted is None:
                return True
            if job.result.finished:
                self._end(job)
                return True
            if self._stopped(job):
                return True

    def _step(self, engine: TokenEngine, batch: Batch) -> None:
        """One step of an engine, and what each job makes of its logits."""
        batch = self._affordable(batch)
        if not batch:
            return
        lengths = [j.sequence.length for j, _ in batch if j.sequence is not None]
        try:
            logits = engine.step([(j.sequence, t) for j, t in batch if j.sequence is not None])
        except Exception as error:
            for (job, tokens), length in zip(batch, lengths, strict=True):
                # Whose fault it was shows when each is alone.
                whole = job.sequence is not None and job.sequence.length == length
                if whole and len(batch) > 1:
                    self._step(engine, [(job, tokens)])
                else:
                    self._end(job, error)
            return
        for (job, _), row in zip(batch, logits, strict=True):
            self._advance(job, row)

    def _feed(self, job: Job) -> None:
        """A piece of a long prompt."""
        if not self._affordable([(job, job.pending)]) or job.sequence is None:
            return
        try:
            if job.feeding is None:
                job.feeding = job.engine.prompt(job.sequence, job.pending)
            logits = job.feeding.advance()
        except Exception as error:
            self._end(job, error)
            return
        if logits is not None:
            job.feeding = None
            self._advance(job, logits)

    def _affordable(self, batch: Batch) -> Batch:
        """What of a batch there is memory for, once the jobs that began last have given theirs up."""
        while True:
            batch = [(job, tokens) for job, tokens in batch if job.sequence is not None]
            if self._is_free(self._memory.holds, batch):
                return batch
            if len(self._active) == 1:
                error = ActTailError(
                    "the KV memory does not hold this generation alone; give the server more, or ask for less"
                )
                self._end(self._active[0], error)
                return []
            last = self._active[-1]
            if self._on_preempted is not None:
                self._on_preempted(last)
            self._put_back(last)

    def _stopped(self, job: Job) -> bool:
        """Whether a job was to stop: cancelled, or its time is over. It has ended then."""
        now = time.monotonic()
        late = job.started is not None and now - job.started > self.run_seconds
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
            self._keep(job, job.sequence)
            job.drop_sequence()
        job.error = error
        job.emit(outcome if error is None else "failed")

    def _keep(self, job: Job, sequence: Sequence) -> None:
        if job.rounds is not None:  # drafts may have taken a page behind its end
            sequence.truncate(sequence.length)
        tokens = torch.cat([job.prompt, torch.tensor(job.result.tokens, dtype=torch.int64)])
        self._kept.give(job.engine, job.client, tokens[: sequence.length], sequence)

    def _advance(self, job: Job, logits: torch.Tensor) -> None:
        """Make something of a job's logits, if they are the wanted ones."""
        if not job.due or job.sequence is None:
            return
        try:
            self._take(job, logits)
        except Exception as error:
            self._end(job, error)
            return
        if job.result.finished and not job.scoring:
            self._end(job)

    def _take(self, job: Job, logits: torch.Tensor) -> None:
        assert job.sequence is not None  # noqa: S101
        if job.scoring:
            if job.note_score(logits):
                self._begin(job, len(job.prompt) - 1)
            return
        before = job.result.decode_seconds if job.result.tokens else None
        piece = job.result.advance(logits)
        if before is not None and job.result.drafts is not None:
            job.result.drafts.plain += 1
        self._note(job, piece, before)

    def _note(
        self, job: Job, piece: Piece, before: float | None, drafted: int = 0, kept: int = 0
    ) -> None:
        """Count a token and hand it on.

        Args:
            job: whose it is.
            piece: what it says.
            before: seconds of decoding at the token before it, None for the first.
            drafted: tokens that were drafted since then.
            kept: drafts that were kept since then.
        """
        assert job.sequence is not None  # noqa: S101
        if before is None:
            job.first_token = time.monotonic()
            self._share(job, job.sequence)
        else:
            job.note_read(job.engine.read_share(job.sequence))
        if self._on_token is not None:
            self._on_token(job, None if before is None else job.result.decode_seconds - before)
        if self._on_drafts is not None and (drafted or kept):
            self._on_drafts(drafted, kept)
        job.emit(piece)

    def _share(self, job: Job, sequence: Sequence) -> None:
        """Let those that come while a job still runs begin with its prompt."""
        if self._kept.size and job.engine.keeps_prefixes:
            self._kept.give(
                job.engine, job.client, job.prompt, sequence.fork(len(job.prompt), len(job.prompt))
            )
