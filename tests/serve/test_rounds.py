"""Under a lossless engine every text is the dense model's: alone by drafts, with others by plain passes."""

import itertools
import json
import threading

import httpx
import pytest
from browser import needs_browser, page_of
from serving import MESSAGES, NAME, error_of, post, serving
from test_batching import job, prompt, run

from acttail.engine import Generation, Sampling
from acttail.engine.lossless import LosslessEngine, Speculation
from acttail.engine.speculation import Drafts, Pace
from acttail.serve.grammars import Grammars, grammar_of_schema
from acttail.serve.memory import KvMemory
from acttail.serve.scheduler import Scheduler

HOT = {"temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module")
def dense(engine):
    return engine.dense


def speaker(engine, fixed=3, *, ngrams=False):
    """Drafts always so many tokens, so that rounds are there whatever they bring."""
    return LosslessEngine(engine, pace=Pace(fixed=fixed), ngrams=ngrams)


def generated(dense, ids, n, **fields):
    return dense.generate(ids, max_new_tokens=n, **fields).tokens


def tokens_of(events):
    return [piece.token for piece in events if not isinstance(piece, str)]


@pytest.mark.parametrize("ngrams", [False, True])
@pytest.mark.parametrize("fixed", [1, 7, None])
def test_who_is_alone_is_drafted_for(engine, dense, fixed, ngrams):
    only, rounds = job(speaker(engine, fixed, ngrams=ngrams), prompt(20, 1), 120), []
    (events,) = run([only], on_drafts=lambda *counted: rounds.append(counted))
    assert only.result.tokens == tokens_of(events) == generated(dense, only.prompt, 120)
    assert events[-1] == "done"
    drafts = only.result.drafts
    assert drafts.rounds + drafts.plain + drafts.accepted == 119
    assert [sum(c) for c in zip(*rounds, strict=True)] == [drafts.drafted, drafts.accepted]
    if fixed is not None:
        assert 0 < drafts.accepted < drafts.drafted


def test_nobody_notices_who_comes_and_goes(engine, dense):
    """One decodes alone, beside others, and alone again; so does another that is left."""
    speaking, seen, scheduler = speaker(engine), [], Scheduler(slots=8)
    kinds = [{}, {}, HOT | {"seed": 7, "repeatable": True}, {"repetition_penalty": 1.2}]
    jobs = [
        job(speaking, prompt(9 + 20 * i, i), n, sampling=Sampling(**kind))
        for i, (n, kind) in enumerate(zip((200, 30, 40, 50), kinds, strict=True))
    ]
    ended, came = threading.Semaphore(0), itertools.count(1)

    def emit(event, which):
        drafts = jobs[0].result.drafts
        if isinstance(event, str):
            seen.append((drafts.rounds, drafts.plain))
            ended.release()
        elif which == 0 and next(came) == 20:
            seen.append((drafts.rounds, drafts.plain))
            assert scheduler.submit(jobs[1:])

    for i, one in enumerate(jobs):
        one.emit = lambda event, i=i: emit(event, i)
    assert scheduler.submit(jobs[:1])
    for _ in jobs:
        assert ended.acquire(timeout=120)
    scheduler.stop()
    for one in jobs:
        assert one.result.tokens == generated(
            dense, one.prompt, one.max_new_tokens, sampling=one.sampling
        )
    (alone, plain), *_, (last, beside), (end, rest) = seen
    assert plain == 0 < alone <= last < end
    # Alone again it drafts, but for its last token where that is the only one left: there is no room for a draft.
    assert 20 < beside <= rest <= beside + 1


def test_many_at_once_take_plain_passes(engine, dense):
    speaking = speaker(engine)
    jobs = [job(speaking, prompt(3 + i % 4, i), 12) for i in range(20)]
    ended = threading.Semaphore(0)
    for one in jobs:
        one.emit = lambda event: isinstance(event, str) and ended.release()
    scheduler = Scheduler(slots=20)
    assert scheduler.submit(jobs)  # all begin, and end, in the same turn
    for _ in jobs:
        assert ended.acquire(timeout=60)
    scheduler.stop()
    for one in jobs:
        assert one.result.tokens == generated(dense, one.prompt, 12)
        assert one.result.drafts == Drafts(plain=11)


@pytest.mark.parametrize("ngrams", [False, True])
def test_a_seed_gives_the_same_text_with_drafts_and_without(engine, dense, ngrams):
    sampling = Sampling(**HOT, seed=11, repeatable=True)
    only = job(speaker(engine, ngrams=ngrams), prompt(20, 2), 150, sampling=sampling)
    run([only])
    assert only.result.tokens == generated(dense, only.prompt, 150, sampling=sampling)
    assert 0 < only.result.drafts.accepted < only.result.drafts.drafted
    # Without a seed every text is another one.
    free = [
        job(speaker(engine), prompt(20, 2), 60, sampling=Sampling(**HOT, repeatable=True))
        for _ in range(2)
    ]
    for one in free:
        run([one])
    assert free[0].result.tokens != free[1].result.tokens
    assert all(one.result.drafts.accepted for one in free)


def test_stops_and_log_probabilities_hold_within_a_round(engine, dense):
    ids = prompt(20, 3)
    text = dense.generate(ids, max_new_tokens=60).text
    for stop in (text[20:23], text[31:33], text[8:9]):
        only = job(speaker(engine, 7), ids, 60, stop=(stop,), logprobs=2)
        (events,) = run([only])
        result = Generation()
        plain = list(dense.stream(ids, result, max_new_tokens=60, stop=(stop,), logprobs=2))
        assert events == [*plain, "done"]
        assert (only.result.text, only.result.finish) == (result.text, "stop")
    ended = job(speaker(engine, 7), ids, 33)
    run([ended])
    assert len(ended.result.tokens) == 33
    assert ended.result.finish == "length"


def test_a_schema_holds_within_a_round(engine, dense):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["fox", "dog"]}, "legs": {"type": "integer"}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    matcher = Grammars(engine).matcher(grammar_of_schema(schema))
    jobs = [job(e, prompt(20, 4), 60, constraint=matcher.copy()) for e in (dense, speaker(engine))]
    for one in jobs:
        run([one])
    assert jobs[0].result.tokens == jobs[1].result.tokens
    assert json.loads(jobs[1].result.text)["name"] in ("fox", "dog")
    assert jobs[1].result.drafts.drafted > 0


@pytest.mark.parametrize("count", [12, 13, 14, 15])
def test_who_is_cancelled_within_a_round_leaves_a_whole_cache(engine, dense, count):
    """What is kept is what plain decoding would have left, to the token; a conversation goes on from it."""
    texts = []
    for one in (dense, speaker(engine, 7)):
        first = job(one, prompt(20, 5), 60)
        after = job(one, first.prompt, 40)
        ended = threading.Semaphore(0)

        def emit(event, first=first, ended=ended):
            if isinstance(event, str):
                ended.release()
            elif len(first.result.tokens) == count:
                first.cancel()

        first.emit = emit
        after.emit = lambda event, ended=ended: isinstance(event, str) and ended.release()
        scheduler = Scheduler()
        assert scheduler.submit([first])
        assert ended.acquire(timeout=60)
        after.prompt = prompt(len(first.prompt) + count + 5, 6)
        after.prompt[: len(first.prompt)] = first.prompt
        after.prompt[len(first.prompt) : -5] = first.prompt.new_tensor(first.result.tokens)
        assert scheduler.submit([after])
        assert ended.acquire(timeout=60)
        scheduler.stop()
        assert first.result.finish == "cancelled"
        assert len(first.result.tokens) == count
        assert after.held == len(first.prompt) + count - 1
        texts.append((first.result.tokens, after.result.tokens))
    assert texts[0] == texts[1]


def test_time_is_up_within_a_round(engine, dense):
    only = job(speaker(engine, 7), prompt(20, 7), 2000)
    (events,) = run([only], run_seconds=0.2)
    assert events[-1] == "done"
    assert only.result.finish == "cancelled"
    got = only.result.tokens
    assert got == generated(dense, only.prompt, len(got))


def test_what_fails_while_it_drafts_leaves_nothing_sparse(engine, dense, monkeypatch):
    calls, propose = itertools.count(1), Speculation.propose

    def failing(self, logits):
        if next(calls) == 11:
            raise RuntimeError("of this test")
        return propose(self, logits)

    monkeypatch.setattr(Speculation, "propose", failing)
    speaking, ended = speaker(engine, 3), threading.Semaphore(0)
    first = job(speaking, prompt(20, 8), 60)
    first.emit = lambda event: isinstance(event, str) and ended.release()
    scheduler = Scheduler()
    assert scheduler.submit([first])
    assert ended.acquire(timeout=60)
    assert str(first.error) == "of this test"
    got = first.result.tokens
    assert 1 < len(got) < 60
    ids = prompt(len(first.prompt) + len(got) + 4, 9)
    ids[:20], ids[20:-4] = first.prompt, first.prompt.new_tensor(got)
    second = job(speaking, ids, 40)
    second.emit = first.emit
    assert scheduler.submit([second])
    assert ended.acquire(timeout=60)
    scheduler.stop()
    assert second.held == 20 + len(got) - 1
    # Over the keys and values of plain decoding.
    sequence = dense.new_sequence(200)
    for part in (ids[:20], *ids[20 : second.held].split(1)):
        sequence.feed(part)
    expected = dense.generate(ids, max_new_tokens=40, sequence=sequence, held=second.held)
    assert second.result.tokens == expected.tokens


def bounded(engine, pages):
    """A limit of so many pages more than are taken, and the most that was ever seen taken."""
    before, page, most = engine.kv_bytes, engine.new_sequence(64).bytes_for(1), []

    def used():
        most.append(engine.kv_bytes)
        return most[-1]

    return KvMemory(before + pages * page, used), most


@pytest.mark.parametrize("kept", [True, False])
def test_memory_is_kept_to_and_who_gives_it_up_says_the_same(engine, dense, kept):
    speaking, gone = speaker(engine, 7), []
    jobs = [job(speaking, prompt(20 + 9 * i, i), 100) for i in range(8)]
    memory, most = bounded(engine, 9)
    rounds = []
    events = run(
        jobs, slots=8, keep_prefixes=kept, memory=memory, on_preempted=gone.append,
        on_drafts=lambda drafted, _: rounds.append(drafted * bool(memory.used)),
    )  # fmt: skip
    assert all(e[-1] == "done" for e in events)
    assert gone
    assert sum(rounds) > 0, "the last one was alone"
    assert max(most) <= memory.limit
    for one in jobs:
        assert one.result.tokens == generated(dense, one.prompt, 100)


def test_memory_that_holds_a_generation_holds_its_rounds(engine, dense):
    memory, most = bounded(engine, 3)
    only = job(speaker(engine, 7), prompt(6, 1), 91)  # the last token is not fed: 96 positions
    run([only], keep_prefixes=False, memory=memory, on_drafts=lambda *_: memory.used)
    assert only.result.tokens == generated(dense, only.prompt, 91)
    assert only.result.drafts.drafted > 0
    assert max(most) == memory.limit
    # With less it gets as far as it would plainly.
    counts = []
    for one in (dense, speaker(engine, 7)):
        cut = job(one, prompt(6, 1), 91)
        run([cut], keep_prefixes=False, memory=bounded(engine, 2)[0])
        assert "KV memory" in str(cut.error)
        counts.append(len(cut.result.tokens))
    assert counts[0] == counts[1]


def test_the_server_says_what_became_of_drafts(engine, dense):
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 80, "temperature": 0}
    with serving(speaker(engine, ngrams=True)) as url:
        about = httpx.get(f"{url}/about").json()
        assert about["lossless"] is True
        assert about["drafters"] == {"sparsity": 0.5, "allocator": "acttail", "ngrams": True}
        assert (about["sparsity"], about["adjustable"]) == (0.0, False)
        assert "dense model's" in about["fixed_because"]
        answer = post(url, body).json()
        told = answer["acttail"]
        assert told["lossless"] is True
        assert 0 < told["accepted"] <= told["drafted"]
        assert told["acceptance"] == round(told["accepted"] / told["drafted"], 4)
        assert told["weights_read"] > 0
        metrics = httpx.get(f"{url}/metrics").text
        values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
        assert float(values["acttail_drafted_tokens_total"]) == told["drafted"]
        assert float(values["acttail_accepted_tokens_total"]) == told["accepted"]
        refused = post(url, body | {"sparsity": 0.5})
        assert refused.status_code == 400
        assert error_of(refused)["param"] == "sparsity"
        assert "the plan only drafts" in error_of(refused)["message"]
        text = answer["choices"][0]["message"]["content"]
        for same in (body | {"sparsity": 0}, body | {"seed": 4}):
            assert post(url, same).json()["choices"][0]["message"]["content"] == text
        hot = body | {"temperature": 0.9, "seed": 4}
        first, again = (post(url, hot).json() for _ in range(2))
        assert first["choices"] == again["choices"]
        assert again["acttail"]["drafted"] > 0
        several = post(url, hot | {"n": 3}).json()
        assert several["choices"][0]["message"] == first["choices"][0]["message"]
        # Streams end with the same account.
        lines = post(url, body | {"stream": True}).text.split("\n\n")
        last = [json.loads(s[6:]) for s in lines if s.startswith("data: {")][-1]["acttail"]
        assert last["lossless"] is True
        assert last["drafted"] > 0
    with serving(dense) as url:
        assert httpx.get(f"{url}/about").json()["lossless"] is False
        plain = post(url, body).json()
        assert plain["choices"][0]["message"]["content"] == text
        assert plain["acttail"]["lossless"] is False
        assert "drafted" not in plain["acttail"]


@needs_browser
def test_the_page_says_lossless_and_how_many_drafts_were_kept(engine):
    with serving(speaker(engine), max_tokens=60) as url, page_of(url) as (page, said):
        page.locator("#about", has_text="lossless (drafts: plan of").wait_for()
        assert page.locator("#sparsity").is_disabled()
        assert "dense model's" in page.locator("#fixed").inner_text()
        page.locator("#prompt").fill("The fox")
        page.keyboard.press("Enter")
        told = page.locator("li.assistant small", has_text="tokens/s, lossless, ")
        told.wait_for()
        assert "drafts kept (" in told.inner_text()
        assert said == []
