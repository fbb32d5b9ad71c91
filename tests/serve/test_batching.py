"""Many generations at once: full passes, prompts in pieces, a limit of memory, and nobody's tokens change."""

import itertools
import threading

import pytest
import torch

from acttail.cli.sizes import parsed_bytes
from acttail.engine import Sampling
from acttail.engine import sequence as sequences
from acttail.errors import ActTailError
from acttail.serve.jobs import Job
from acttail.serve.line import Line
from acttail.serve.memory import KvMemory, tokens_within
from acttail.serve.scheduler import Scheduler
from acttail.serve.server import Options, Server


def prompt(n, seed):
    return torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(seed))


def run(jobs, **options):
    """Run jobs to their ends; the events of each."""
    ended, events = threading.Semaphore(0), [[] for _ in jobs]
    for job, into in zip(jobs, events, strict=True):
        job.emit = lambda event, into=into: (
            into.append(event) or (isinstance(event, str) and ended.release())
        )
    scheduler = Scheduler(**options)
    for job in jobs:
        assert scheduler.submit([job])
    for _ in jobs:
        assert ended.acquire(timeout=120)
    scheduler.stop()
    return events


def job(engine, ids, n, **fields):
    return Job(engine=engine, prompt=ids, emit=print, max_new_tokens=n, **fields)


@pytest.fixture
def widths(engine, monkeypatch):
    """Tokens of each sequence in each step of the engine, in order; a piece of a long prompt is its length alone."""
    found, step, piece = [], engine.step, sequences.NativeSequence.run_piece
    monkeypatch.setattr(
        engine, "step", lambda batch: found.append([len(t) for _, t in batch]) or step(batch)
    )
    monkeypatch.setattr(
        sequences.NativeSequence, "run_piece",
        lambda self, tokens, rows: found.append(len(tokens)) or piece(self, tokens, rows),
    )  # fmt: skip
    return found


def test_passes_are_full_and_tokens_are_those_of_each_alone(engine, widths):
    prompts = [prompt(3 + i % 4, i) for i in range(20)]
    sampling = [Sampling(temperature=0.9 * (i % 2), seed=i) for i in range(20)]
    alone = [
        engine.generate(p, max_new_tokens=12, sampling=s).tokens
        for p, s in zip(prompts, sampling, strict=True)
    ]
    widths.clear()
    jobs = [job(engine, p, 12, sampling=s) for p, s in zip(prompts, sampling, strict=True)]
    events = run(jobs, slots=20, keep_prefixes=False)
    assert [j.result.tokens for j in jobs] == alone
    assert [[p.token for p in e[:-1]] for e in events] == alone
    assert all(e[-1] == "done" for e in events)
    # However the jobs come in, a turn is one pass: of a token of each that decodes and the prompts beside them.
    passes = sum(-(-sum(w) // engine.together) for w in widths)
    assert passes <= 11 + 20


def test_a_long_prompt_is_fed_in_pieces_between_the_steps_of_others(engine, monkeypatch, widths):
    monkeypatch.setattr(sequences, "_PIECE", 32)
    short, long = prompt(5, 1), prompt(300, 2)
    alone = [engine.generate(p, max_new_tokens=n).tokens for p, n in ((short, 60), (long, 5))]
    widths.clear()
    jobs = [job(engine, short, 60), job(engine, long, 5)]
    run(jobs, slots=2, keep_prefixes=False)
    assert [j.result.tokens for j in jobs] == alone
    pieces = [i for i, w in enumerate(widths) if isinstance(w, int)]
    assert [widths[i] for i in pieces] == [32] * 9 + [12]
    # The other stream has a token between any two pieces.
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(pieces))


def test_who_fails_fails_alone(engine):
    ids = [
        prompt(9, 1),
        torch.tensor([10**6]),
        prompt(4, 2),
        prompt(20, 3),
        torch.arange(10**6, 10**6 + 40),
    ]
    alone = [engine.generate(ids[i], max_new_tokens=6).tokens for i in (0, 3)]
    jobs = [job(engine, p, 6) for p in ids]
    jobs[2].sampling = Sampling(bias=((10**6, 1.0),))
    events = run(jobs, slots=8, keep_prefixes=False)
    assert [e[-1] for e in events] == ["done", "failed", "failed", "done", "failed"]
    assert "token ids" in str(jobs[1].error)
    assert "bias" in str(jobs[2].error)
    assert "token ids" in str(jobs[4].error)
    assert [jobs[i].result.tokens for i in (0, 3)] == alone


class Watched(KvMemory):
    """A limit that remembers the most that was taken under it."""

    most = 0

    def holds(self, batch):
        self.most = max(self.most, self.used)
        return super().holds(batch)


@pytest.mark.parametrize("kept", [True, False])
def test_who_finds_no_memory_waits_or_starts_again_and_says_the_same(engine, kept):
    before = engine.kv_bytes
    page = engine.new_sequence(64).bytes_for(1)
    prompts = [prompt(20 + 9 * i, i) for i in range(8)]
    alone = [engine.generate(p, max_new_tokens=100).tokens for p in prompts]
    scored, scores = (
        job(engine, prompts[3], 50, scored=True),
        job(engine, prompts[3], 50, scored=True),
    )
    run([scores], keep_prefixes=False)
    memory, gone = Watched(before + 9 * page, lambda: engine.kv_bytes), []
    jobs = [job(engine, p, 100) for p in prompts]
    events = run(
        [*jobs, scored], slots=9, keep_prefixes=kept, memory=memory, on_preempted=gone.append
    )
    assert all(e[-1] == "done" for e in events)
    assert gone
    assert memory.most <= memory.limit
    assert [j.result.tokens for j in jobs] == alone
    assert [[p.token for p in e[:-1]] for e in events[:-1]] == alone
    assert scored.scores == scores.scores
    assert scored.result.tokens == scores.result.tokens


def test_a_generation_that_memory_never_holds_fails_with_a_reason(engine):
    page = engine.new_sequence(64).bytes_for(1)
    only = job(engine, prompt(5, 1), 100)
    events = run(
        [only],
        keep_prefixes=False,
        memory=KvMemory(engine.kv_bytes + page, lambda: engine.kv_bytes),
    )
    assert events[0][-1] == "failed"
    assert "KV memory" in str(only.error)
    assert 20 < len(only.result.tokens) < 40


def test_prefixes_are_shared_and_parted_by_the_page(engine):
    ids, before = prompt(100, 1), engine.kv_bytes
    one = engine.new_sequence(300)
    one.feed(ids)
    page = engine.new_sequence(64).bytes_for(1)
    assert engine.kv_bytes - before == 4 * page == one.bytes
    other = one.fork(90, 300)
    assert engine.kv_bytes - before == 4 * page
    assert (other.length, other.bytes, other.bytes_for(1), other.bytes_for(7)) == (
        90,
        3 * page,
        page,
        2 * page,
    )
    expected = engine.new_sequence(300)
    expected.feed(ids[:90])
    after = [s.feed(torch.tensor([7])).clone() for s in (other, expected)]
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-4)
    # The first one is what it was.
    alone = engine.new_sequence(300)
    alone.feed(ids)
    assert torch.equal(one.feed(torch.tensor([9])).clone(), alone.feed(torch.tensor([9])))
    del expected, alone
    assert engine.kv_bytes - before == 5 * page
    one.truncate(10)
    assert engine.kv_bytes - before == 3 * page
    del one, other
    assert engine.kv_bytes == before
    with pytest.raises(ActTailError, match="shares 5 tokens"):
        engine.new_sequence(64).fork(5, 64)


def test_those_who_come_while_another_runs_share_its_prompt(engine):
    system = prompt(60, 1)
    first = job(engine, torch.cat([system, prompt(5, 2)]), 200)
    second = job(engine, torch.cat([system, prompt(5, 3)]), 5)
    came = threading.Event()
    ended = threading.Semaphore(0)
    first.emit = lambda e: came.set() or (isinstance(e, str) and ended.release())
    second.emit = lambda e: isinstance(e, str) and ended.release()
    scheduler = Scheduler(slots=2)
    assert scheduler.submit([first])
    assert came.wait(60)
    assert scheduler.submit([second])
    for _ in range(2):
        assert ended.acquire(timeout=60)
    scheduler.stop()
    assert (first.held, second.held) == (0, 60)


def test_of_those_who_come_at_once_and_begin_alike_one_computes_the_beginning(engine, widths):
    system = prompt(60, 1)
    jobs = [job(engine, torch.cat([system, prompt(5, i)]), 3) for i in range(4)]
    blocker = job(engine, prompt(3, 9), 40)
    run([blocker, *jobs], slots=5)
    assert [j.held for j in jobs] == [0, 60, 60, 60]
    assert [w for w in widths if isinstance(w, int)] == [65]


def test_turns_of_the_line():
    line, jobs = Line(), [job(None, prompt(1, 0), 1, client=c) for c in "aaab"]
    for one in jobs:
        line.add(one)
    assert (len(line), line.of("a"), line.of("c")) == (4, 3, 0)
    assert [line.take(), line.take()] == [jobs[0], jobs[3]]
    line.add_first(jobs[3])
    assert list(line) == [jobs[3], jobs[1], jobs[2]]
    assert line.remove(lambda j: j is jobs[1]) == [jobs[1]]
    assert [line.take(), line.take(), len(line)] == [jobs[3], jobs[2], 0]


def test_sizes_and_what_they_hold(engine):
    assert [parsed_bytes(s, "--x") for s in ("2G", "1.5k", "512MiB", "77", "3 gb")] == [
        2 << 30, 1536, 512 << 20, 77, 3 << 30,
    ]  # fmt: skip
    for wrong in ("", "-1", "G", "2X", "0", "1e9"):
        with pytest.raises(ActTailError, match="--x takes a size"):
            parsed_bytes(wrong, "--x")
    page = engine.new_sequence(64).bytes_for(1)
    assert tokens_within(engine, 3 * page + 1) == 96
    assert tokens_within(engine, None) == tokens_within(engine, 1 << 40) == engine.context
    with pytest.raises(ActTailError, match="--kv-memory"):
        Server(engine, Options(kv_bytes=page), None)
