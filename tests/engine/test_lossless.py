"""Lossless speculation against plain dense decoding of the same engine."""

import itertools
import random
from collections import Counter

import pytest
import torch
from gguf_files import blocky, write_gguf
from scipy.stats import chisquare
from test_engine import FAMILIES, lively, tokens
from test_file_widths import engine_of, file  # noqa: F401

from acttail import make_plan
from acttail.engine import Engine, Generation, Sampling
from acttail.engine.distribution import Proposal, accepted
from acttail.engine.lossless import LosslessEngine
from acttail.engine.ngrams import LENGTHS, Ngrams
from acttail.engine.sampling import Sampler
from acttail.engine.speculation import Pace
from acttail.engine.uniform import uniform_plan
from acttail.errors import ActTailError
from acttail.sparse.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")
NEW = 60
# Drafts of half the inputs are nearly always right for gemma2.
SPARSITY = {"gemma2": 0.8}
# Not all drafts are right; others say the same token for ever.
TESTING = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def engines(family, sparsity=0.7, dtype="fp32", threads=1, **changes):
    """(the dense engine of a tiny model, the same weights under a plan)."""
    model = lively(family, **changes)
    plan = make_plan(model, sparsity, allocator="uniform")
    sparse = Engine.from_model(model, plan, dtype=dtype, native=True, threads=threads)
    return sparse.dense, sparse, tokens(model, 20)


def greedy(engine, ids, **arguments):
    return engine.generate(ids, max_new_tokens=NEW, sampling=Sampling(ignore_eos=True), **arguments)


def assert_same(dense, engine, ids):
    expected, found = greedy(dense, ids), greedy(engine, ids)
    assert found.tokens == expected.tokens
    assert found.finish == expected.finish == "length"
    return found.drafts


@pytest.mark.parametrize("fixed", [1, 3, 7, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_dense_decoding(family, fixed):
    dense, sparse, ids = engines(family, SPARSITY.get(family, 0.5))
    drafts = assert_same(dense, LosslessEngine(sparse, pace=Pace(fixed=fixed), ngrams=False), ids)
    assert drafts.rounds + drafts.plain + drafts.accepted == NEW - 1
    if fixed:
        assert drafts.drafted >= fixed * (drafts.rounds - fixed)  # the last rounds have less room
        assert drafts.accepted > 0
        if family in TESTING:
            assert drafts.accepted < drafts.drafted


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_greedy_is_dense_decoding_in_every_width(family, dtype):
    dense, sparse, ids = engines(family, dtype=dtype, threads=1 + (family == "llama"))
    drafts = assert_same(dense, LosslessEngine(sparse, pace=Pace(fixed=4)), ids)
    assert 0 < drafts.accepted < drafts.drafted


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "mixed"])
def test_greedy_is_dense_decoding_of_a_gguf_file(kind, tmp_path, tokenizer, file):  # noqa: F811
    if kind == "mixed":  # of Q4_K, Q5_K, Q6_K, Q5_0, Q5_1 and Q8_0
        engine, _ = engine_of(file, "auto")
    else:
        path = tmp_path / "m.gguf"
        write_gguf(path, blocky(), kind, tokenizer)
        engine = Engine.from_pretrained(path, native=True, threads=1)
    sparse = engine.with_own_plan(uniform_plan(engine, 0.5))
    speculative = LosslessEngine(sparse, pace=Pace(fixed=3), ngrams=False)
    drafts = assert_same(engine, speculative, torch.arange(40, 60))
    assert 0 < drafts.accepted < drafts.drafted


def test_ngrams_alone_need_no_plan():
    dense, _, _ = engines("llama")
    ids = torch.tensor([7, 8, 9, 10, 11, 12] * 5)
    drafts = assert_same(dense, dense.lossless(), ids)
    assert drafts.rounds + drafts.plain + drafts.accepted == NEW - 1
    drafts = assert_same(dense, LosslessEngine(dense, pace=Pace(fixed=5)), ids)
    assert drafts.accepted  # a greedy tiny model runs into a loop


def test_a_text_that_ends_inside_a_round_ends_there():
    dense, sparse, ids = engines("qwen2")
    expected = greedy(dense, ids).tokens
    eos = expected[30]
    for engine in (dense, sparse):
        engine.eos = frozenset([eos])
    plain = dense.generate(ids, max_new_tokens=NEW)
    found = LosslessEngine(sparse, pace=Pace(fixed=7)).generate(ids, max_new_tokens=NEW)
    assert (found.tokens, found.finish) == (plain.tokens, "stop")
    assert plain.finish == "stop"


def test_whoever_stops_midway_finds_the_sequence_of_plain_decoding():
    dense, sparse, ids = engines("gemma3", dtype="int8")
    expected = greedy(dense, ids).tokens
    for count in range(1, 14):
        engine = LosslessEngine(sparse, pace=Pace(fixed=5), ngrams=False)
        sequence, result = engine.new_sequence(100), Generation()
        pieces = engine.stream(ids, result, max_new_tokens=NEW, sequence=sequence)
        got = [piece.token for piece in itertools.islice(pieces, count)]
        assert got == result.tokens == expected[:count]
        assert sequence.length == len(ids) + count - 1
        # What it holds is what a dense pass has written, never a draft's keys and values.
        more = [got[-1]]
        for _ in range(4):
            more.append(int(dense.step([(sequence, torch.tensor(more[-1:]))])[0].argmax()))
        assert more == expected[count - 1 : count + 4]


def test_logprobs_penalties_and_stops_are_those_of_dense_decoding():
    dense, sparse, ids = engines("llama")
    sampling = Sampling(
        repetition_penalty=1.3, frequency_penalty=0.4, bias=((7, 1.5),), ignore_eos=True
    )
    engine = LosslessEngine(sparse, pace=Pace(fixed=3))
    plain, found = ([
        (piece.token, piece.logprob, piece.top)
        for piece in e.stream(ids, max_new_tokens=40, sampling=sampling, logprobs=3)
    ] for e in (dense, engine))  # fmt: skip
    assert found == plain


class EvenOnly:
    """A constraint: ids are even, and five make a whole text."""

    def __init__(self):
        self.seen = 0

    def masked(self, logits):
        found = logits.clone()
        found[1::2] = float("-inf")
        return found

    def accept(self, token):
        assert token % 2 == 0
        self.seen += 1
        return self.seen == 12


def test_a_constraint_holds_for_drafts_too():
    dense, sparse, ids = engines("llama")
    texts = []
    for engine in (dense, LosslessEngine(sparse, pace=Pace(fixed=4), ngrams=False)):
        result = Generation()
        sequence = engine.start(result, ids, constraint=EvenOnly())
        for _ in engine.pieces(result, sequence):
            pass
        assert result.finish == "stop"
        texts.append(result.tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("ngrams", [False, True])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.5}, {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.3}]
)
def test_repeatable_text_is_that_of_dense_decoding_with_its_seed(settings, ngrams):
    dense, sparse, ids = engines("llama", sparsity=0.5)
    engine = LosslessEngine(sparse, pace=Pace(fixed=4), ngrams=ngrams)
    texts = set()
    for seed in range(4):
        sampling = Sampling(**settings, seed=seed, ignore_eos=True, repeatable=True)
        plain, found = (
            e.generate(ids, max_new_tokens=NEW, sampling=sampling) for e in (dense, engine)
        )
        assert found.tokens == plain.tokens
        assert 0 < found.drafts.accepted < found.drafts.drafted
        texts.add(tuple(found.tokens))
    assert len(texts) == 4


def test_drafts_of_the_dense_model_itself_are_all_kept_where_text_is_repeatable():
    dense, _, ids = engines("llama")
    sampler = Sampler(Sampling(temperature=1.0, seed=3, repeatable=True))
    other = Sampler(Sampling(temperature=1.0, seed=3))
    logits = dense.new_sequence(64).feed(ids).clone()
    for made in (3, 0, 5, 1, 2):
        drafts = [sampler.propose(logits) for _ in range(made)]
        taken = made - made // 2  # some behind one that was not kept are dropped
        drawn = [sampler.draw(logits, draft) for draft in drafts[:taken]]
        assert drawn == [draft.token for draft in drafts[:taken]]
        drawn.append(sampler.draw(logits))
        assert drawn == [other.draw(logits) for _ in drawn]


DRAWS = 100_000


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.4},
        {"temperature": 0.3, "top_k": 12, "top_p": 0.95},
        {"temperature": 0.4, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
)
def test_what_is_sampled_has_the_dense_distribution(settings, delta):
    """Of real logits: a sparse model's drafts, or always the same token, against the dense model's chances."""
    dense, sparse, ids = engines("llama", sparsity=0.9)
    sampler = Sampler(Sampling(**settings))
    sampler.see(ids, dense.vocabulary, generated=False)
    p, q = (sampler.distribution(e.new_sequence(64).feed(ids).clone()) for e in (dense, sparse))
    exact, drafts = p.dense(dense.vocabulary), q.dense(dense.vocabulary)
    distance = abs(exact - drafts).sum() / 2
    assert distance > 0.1
    uniform = random.Random(5).random
    best = Proposal(int(drafts.argmax()), None, 1.0)
    counts, wrong, kept = Counter(), Counter(), 0
    for _ in range(DRAWS):
        proposal = best if delta else Proposal(q.draw(uniform()), q, 1.0)
        token = accepted(p, proposal, uniform)
        counts[token] += 1
        wrong[proposal.token] += 1
        kept += token == proposal.token
    assert likely(counts, exact) > 1e-3
    assert likely(wrong, exact) < 1e-3  # the test can fail
    # As often as can be: 1 - the distance of the two (Leviathan et al., corollary 3.6).
    most = exact[best.token] if delta else 1 - distance
    assert abs(kept / DRAWS - most) < 0.01


def likely(counts, p):
    """p-value of counts of tokens under probabilities, rare ones taken together."""
    if any(p[token] == 0 for token in counts):
        return 0.0
    total, rare = sum(counts.values()), [0.0, 0.0]
    seen, wanted = [], []
    for token, chance in enumerate(p):
        if chance * total >= 5:
            seen.append(counts[token])
            wanted.append(chance * total)
        else:
            rare = [rare[0] + counts[token], rare[1] + chance * total]
    if rare[1] >= 5:
        seen.append(rare[0])
        wanted.append(rare[1])
    scale = sum(seen) / sum(wanted)
    return float(chisquare(seen, [w * scale for w in wanted]).pvalue)


def test_pairs_of_tokens_in_a_round_are_distributed_as_in_dense_decoding():
    """The whole way: drafts, one pass, acceptance; the second and third token against their exact chances."""
    dense, sparse, _ = engines("llama", sparsity=0.9, vocab_size=12)
    ids = torch.tensor([3, 4, 5])
    sampling = {"temperature": 0.7, "ignore_eos": True}
    whole = Sampler(Sampling(**sampling))

    def chances(tokens):
        return whole.distribution(dense.new_sequence(16).feed(tokens).clone()).dense(12)

    exact = torch.zeros(12, 12, dtype=torch.float64)
    first = chances(ids)
    for a in range(12):
        second = chances(torch.cat([ids, torch.tensor([a])]))
        for b in range(12):
            third = chances(torch.cat([ids, torch.tensor([a, b])]))
            exact[b] += first[a] * second[b] * torch.from_numpy(third)
    engine, counts, kept = LosslessEngine(sparse, pace=Pace(fixed=2), ngrams=False), Counter(), 0
    for seed in range(3000):
        result = engine.generate(ids, max_new_tokens=4, sampling=Sampling(**sampling, seed=seed))
        counts[12 * result.tokens[1] + result.tokens[2]] += 1
        kept += result.drafts.accepted
    assert 1000 < kept < 5000
    assert likely(counts, exact.reshape(-1).numpy()) > 1e-3


def test_ngrams_are_found_where_they_stood_last():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 4, (300,), generator=generator).tolist()
    index = Ngrams()
    for end, token in enumerate(text, 1):
        index.extend([token])
        found = index.lookup(5)
        expected = (0, [])
        for n in LENGTHS:
            places = [i for i in range(n, end) if text[i - n : i] == text[end - n : end]]
            if places and end >= n:
                run = text[places[-1] : end]
                expected = (n, [run[i % len(run)] for i in range(5)])
                break
        assert found == expected


def paced(plain, draft, passes, kept, rounds=12):
    """A pace that has seen these costs and drafts of which this share was kept."""
    pace = Pace()
    pace.note_pass(1, plain)
    outcomes = itertools.cycle([True] * round(10 * kept) + [False] * round(10 - 10 * kept))
    for _ in range(rounds):
        drafts = []
        while pace.wants("sparse", drafts, 7):
            drafts.append(0.9)
            pace.note_draft("sparse", draft)
        n = pace.keep("sparse", drafts, 7)
        if not drafts:
            pace.note_plain()
            continue
        pace.note_pass(n + 1, passes(n + 1))
        good = list(itertools.takewhile(bool, itertools.islice(outcomes, n)))
        for outcome in [*good, *([False] if len(good) < n else [])]:
            pace.note_outcome("sparse", 0.9, outcome)
        pace.note_round("sparse", len(good) + 1, draft * len(drafts) + passes(n + 1))
    return pace


def test_cheap_drafts_that_are_kept_are_made_and_dear_ones_are_not():
    def alone(n):
        return 1 + 0.1 * (n - 1)

    pays = paced(1.0, 0.3, alone, kept=0.9)
    assert pays.gain("sparse") > 1
    assert pays.wants("sparse", [0.9, 0.9], 7)
    assert not pays.wants("sparse", [0.9], 1)  # no room
    # The surer the drafter was, the further it goes.
    assert not pays.wants("sparse", [0.05] * 3, 7)
    dear = paced(1.0, 0.9, lambda n: n, kept=0.5)
    assert not dear.wants("sparse", [], 7)
    assert dear.keep("sparse", [0.9], 7) == 0
    for _ in range(2000):
        dear.note_plain()
    assert dear.wants("sparse", [], 7)  # tried again, for texts change


def test_a_fixed_number_is_drafted_whatever_it_costs():
    pace = Pace(fixed=2)
    assert pace.wants("sparse", [0.1], 7)
    assert not pace.wants("sparse", [0.1, 0.1], 7)
    assert pace.keep("sparse", [0.1, 0.1], 7) == 2


def test_what_cannot_be_is_refused_in_one_line():
    model = lively("llama")
    other = Engine.from_model(model, dtype="fp32", native=False)
    with pytest.raises(ActTailError, match="lossless decoding needs the native engine"):
        other.generate(torch.tensor([3, 4]), lossless=True)
    dense = Engine.from_model(lively("llama"), dtype="fp32", native=True)
    for drafters in ({"ngrams": False}, {"sparse": False, "ngrams": False}):
        with pytest.raises(ActTailError, match="nothing would draft"):
            dense.lossless(**drafters)
