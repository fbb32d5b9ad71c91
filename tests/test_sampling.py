"""Sampling against transformers' warpers, and text that comes out piece by piece."""

import pytest
import torch
from conftest import byte_tokenizer
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from acttail.engine.generation import TextStream
from acttail.engine.sampling import Sampler, Sampling
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
