"""Sampling against transformers' warpers, and text that comes out piece by piece."""

import pytest
import torch
from byte_tokens import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from acttail.engine import Generation
from acttail.engine.sampling import Sampler, Sampling
from acttail.engine.text import TextStream
from acttail.errors import ActTailError


def warped(logits, sampling, seen):
    """Probabilities as transformers' own processors leave them."""
    scores, ids = logits[None].clone(), seen[None]
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    return torch.softmax(scores[0], -1)


@pytest.mark.parametrize("vocabulary", [50, 5000])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 5.0, "top_p": 0.99},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.5},
        {"temperature": 1.0, "repetition_penalty": 0.7, "top_k": 7},
    ],
)
def test_candidates_equal_transformers(vocabulary, settings):
    torch.manual_seed(vocabulary)
    logits = torch.randn(vocabulary) * 3
    seen = torch.randint(0, vocabulary, (8,))
    sampling = Sampling(**settings, seed=0)
    sampler = Sampler(sampling)
    sampler.see(seen, vocabulary)
    expected = warped(logits, sampling, seen)
    found = torch.zeros(vocabulary)
    probabilities, index = sampler.candidates(sampler.penalised(logits) / sampling.temperature)
    found[index] = probabilities / probabilities.sum()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    drawn = {sampler.draw(logits) for _ in range(200)}
    assert all(expected[token] > 0 for token in drawn)


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -5.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    draws = torch.tensor([sampler.draw(logits) for _ in range(8000)])
    found = torch.bincount(draws, minlength=4) / 8000
    torch.testing.assert_close(found, torch.softmax(logits, 0), atol=0.02, rtol=0)


def test_greedy_and_seeds():
    logits = torch.randn(100)
    assert Sampler(Sampling()).draw(logits) == int(logits.argmax())
    runs = [
        [sampler.draw(logits) for _ in range(20)]
        for sampler in (Sampler(Sampling(temperature=1.0, seed=s)) for s in (3, 3, 4))
    ]
    assert runs[0] == runs[1] != runs[2]
    unseeded = [
        [sampler.draw(logits) for _ in range(20)]
        for sampler in (Sampler(Sampling(temperature=1.0, seed=s)) for s in (-1, -1, None))
    ]
    assert len({tuple(run) for run in unseeded}) == 3


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.56, "min_p": 0.57}, {"top_k": 3}])
@pytest.mark.parametrize("temperature", [1e-307, 5e-324, 1e-39, 1e-31, 1e-29, 1e-6])
def test_any_temperature_above_nought_draws_a_token(temperature, cut):
    """Found by fuzzing: logits over 1e-307 are infinite, and their softmax no number."""
    logits = torch.tensor([1.0, 30.0, -float("inf"), 29.0])
    assert Sampler(Sampling(temperature=temperature, seed=0, **cut)).draw(logits) == 1


def test_bad_settings_and_broken_logits_are_told():
    for bad in (
        {"temperature": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"top_k": -1},
        {"repetition_penalty": 0},
    ):
        with pytest.raises(ActTailError, match=next(iter(bad))):
            Sampling(**bad)
    with pytest.raises(ActTailError, match="not finite"):
        Sampler(Sampling()).draw(torch.full((5,), float("nan")))


def pieces(text, stop=()):
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, stop)
    out = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        out.append(stream.push(token))
        if stream.stopped:
            break
    out.append(stream.finish())
    return out, stream


def test_characters_of_several_tokens_come_out_whole():
    text = "naïve café – 你好 🙂 ok"
    out, stream = pieces(text)
    assert "".join(out) == text == stream.text
    assert all("�" not in p for p in out)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello STOP world", ["STOP"], "hello "),
        ("hello STO", ["STOP"], "hello STO"),
        ("aaab", ["aab"], "a"),
        ("one two", ["three", "two", ""], "one "),
        ("xENDy", ["END"], "x"),
    ],
)
def test_stop_strings_end_the_text_and_never_show(text, stop, expected):
    out, stream = pieces(text, stop)
    assert "".join(out) == expected == stream.text
    shown = ""
    for piece in out:
        shown += piece
        assert expected.startswith(shown)


def byte_fallback():
    """A tokenizer as Llama 2's and Gemma's: a few words, and every other character as its bytes."""
    words = ["▁", "a", "b", "▁a", "▁b"]
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_runs_of_characters_of_several_byte_tokens_come_out_whole():
    """Decoding from a fixed number of tokens back begins inside a character of three."""
    tokenizer = byte_fallback()
    text = "a 你好世界你好 🙂🙂 éé b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 30
    stream = TextStream(tokenizer)
    out = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(out) == text == tokenizer.decode(ids)
    assert max(map(len, out)) <= 2, "nothing is held back longer than its character"


def generation(limit=5, **arguments):
    found = Generation()
    settings = {"sampling": Sampling(), "tokenizer": byte_tokenizer(), "max_new_tokens": limit}
    found.begin(torch.tensor([7, 8, 9]), **settings | arguments)
    return found


def towards(token):
    return torch.nn.functional.one_hot(torch.tensor(token), 260).float()


def test_a_generation_is_advanced_by_logits_alone():
    found = generation(held=1, logprobs=1)
    assert found.next_tokens.tolist() == [8, 9]
    ids = byte_tokenizer()("héy!", add_special_tokens=False)["input_ids"]
    shown = []
    for token in ids:
        assert not found.finished
        piece = found.advance(towards(token))
        assert piece.token == piece.top[0][0] == token
        assert piece.logprob < 0
        shown.append(piece.text)
        if token != ids[-1]:
            assert found.next_tokens.tolist() == [token]
    assert "".join(shown) == found.text == "héy!"
    assert (found.finished, found.finish, found.tokens) == (True, "length", ids)
    assert found.prompt_tokens == 3
    with pytest.raises(ActTailError, match="not finished"):
        found.advance(towards(ids[0]))
    with pytest.raises(ActTailError, match="begun once"):
        found.begin(torch.tensor([1]), max_new_tokens=1, sampling=Sampling())
    with pytest.raises(ActTailError, match="begun"):
        Generation().advance(towards(1))
    with pytest.raises(ActTailError, match="empty"):
        Generation().begin(torch.tensor([]), max_new_tokens=1, sampling=Sampling())


def test_what_was_held_back_comes_with_the_end():
    a, b = byte_tokenizer()("ab", add_special_tokens=False)["input_ids"]
    ended = generation(stop=["abc"], eos=frozenset({2}))
    assert [ended.advance(towards(t)).text for t in (a, b, 2)] == ["", "", "ab"]
    assert (ended.finish, ended.text, ended.tokens) == ("stop", "ab", [a, b, 2])
    full = generation(2, stop=["abc"])
    assert [full.advance(towards(t)).text for t in (a, b)] == ["", "ab"]
    assert full.finish == "length"
    cancelled = generation(stop=["abc"])
    cancelled.advance(towards(a))
    assert cancelled.cancel().text == "a"
    assert (cancelled.finish, cancelled.text, cancelled.finished) == ("cancelled", "a", True)
    assert cancelled.cancel() is None
    stopped = generation(stop=["ab"])
    assert [stopped.advance(towards(t)).text for t in (a, b)] == ["", ""]
    assert (stopped.finish, stopped.text) == ("stop", "")


def test_the_smallest_nucleus_is_the_likeliest_token():
    logits = torch.tensor([0.0, 3.0, 1.0])
    for top_p in (1e-127, 1e-40, 1e-7):
        assert Sampler(Sampling(temperature=1.0, top_p=top_p, seed=0)).draw(logits) == 1
