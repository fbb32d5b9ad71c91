"""What a request may say: every malformed one is answered 400 with the field's name, and what is asked works."""

import json
from itertools import pairwise

import httpx
import pytest
import torch
from serving import MESSAGES, NAME, error_of, post, serving

from acttail.engine import Sampling


def complete(url, **fields):
    return post(
        url, {"model": NAME, "prompt": "The fox", "temperature": 0} | fields, "/v1/completions"
    )


def raw(url, text, path="/v1/chat/completions"):
    content = text if isinstance(text, bytes) else text.encode()
    return httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})


CHAT = '{"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]'


@pytest.mark.parametrize(
    ("more", "param"),
    [
        (', "temperature": NaN}', "temperature"),
        (', "top_p": Infinity}', "top_p"),
        (', "logit_bias": {"5": NaN}}', "logit_bias.5"),
        (', "logit_bias": {"9223372036854775808": 1}}', "logit_bias.9223372036854775808"),
        (', "logit_bias": {"260": 1}}', "logit_bias"),
        (', "logit_bias": {"-1": 1}}', "logit_bias.-1"),
        (', "logit_bias": {"a\\nb": 1}}', "logit_bias.a b"),
        (', "seed": 9223372036854775808}', "seed"),
        (', "top_k": 9223372036854775808}', "top_k"),
        (', "max_tokens": -2}', "max_tokens"),
        (', "max_tokens": "many"}', "max_tokens"),
        (', "stop": "\\ud800"}', "stop"),
        (', "user": "\\udfff x"}', "user"),
        (', "messages": [{"role": "user", "content": "a\\ud83dz"}]}', "messages"),
        (', "\\ud800": 1}', None),
        (', "sparsity": 1.5}', "sparsity"),
        (', "grammar": "root ::= x"}', "grammar"),
        (', "guided_json": {"type": "object"}}', "guided_json"),
        (', "guided_regex": "x"}', "guided_regex"),
        (', "stop_token_ids": [5]}', "stop_token_ids"),
        (', "min_tokens": 5}', "min_tokens"),
        (', "enable_thinking": false}', "enable_thinking"),
        (', "chat_template_kwargs": {"depth": 3}}', "depth"),
        (', "chat_template_kwargs": {"tokenize": false}}', "chat_template_kwargs"),
        (', "continue_final_message": true}', "continue_final_message"),
        (', "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages"),
        (', "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}', "messages"),
        (', "modalities": ["text", "audio"]}', "modalities"),
        ("", None),
        (', "x": ' + "[" * 5000 + "}", None),
        (', "x": ' + "9" * 5000 + "}", None),
    ],
)  # fmt: skip
def test_malformed_requests_name_the_field(url, more, param):
    answer = raw(url, CHAT + more)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"x"', "{", "\ufeff{}", b"\xff\xfe", b"\x00"]
)
def test_a_body_that_is_no_object_is_400(url, text):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        answer = raw(url, text, path)
        assert answer.status_code == 400
        error_of(answer)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([2**63], "prompt"), ([-1], "prompt"), ([260], "prompt"), ([[]], "prompt"), ([""], "prompt"), ("", "prompt"),
        ([[1], [260]], "prompt"), (["x"] * 65, "n"), ({"a": 1}, "prompt"),
    ],
)  # fmt: skip
def test_bad_prompts_name_the_prompt(url, prompt, param):
    answer = complete(url, prompt=prompt)
    assert answer.status_code == 400
    assert error_of(answer)["param"].split(".")[0] == param


def test_null_is_absent(url):
    names = (
        "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "presence_penalty",
        "frequency_penalty", "logit_bias", "user", "top_k", "min_p", "repetition_penalty", "sparsity", "logprobs",
        "tools", "tool_choice", "response_format", "functions", "modalities", "audio",
    )  # fmt: skip
    fields = dict.fromkeys(names) | {"seed": 1, "max_completion_tokens": 3}
    chat = post(url, {"model": NAME, "messages": MESSAGES} | fields)
    assert chat.status_code == 200, chat.text
    assert chat.json() | {"id": 0, "created": 0, "acttail": 0} == post(
        url, {"model": NAME, "messages": MESSAGES, "seed": 1, "max_tokens": 3}
    ).json() | {"id": 0, "created": 0, "acttail": 0, "usage": chat.json()["usage"]}
    assert complete(url, **dict.fromkeys(names), echo=None, best_of=None).status_code == 200


def test_limits_are_cut_to_what_there_is(url, engine):
    """-1 is as much as fits, 0 nothing; too much is cut, and the finish reason says so."""
    for limit in (-1, 10**6, 201):
        answer = complete(url, max_tokens=limit).json()
        assert answer["usage"]["completion_tokens"] == 200
        assert answer["choices"][0]["finish_reason"] == "length"
    none = complete(url, max_tokens=0).json()
    assert none["usage"]["completion_tokens"] == 0
    assert none["choices"][0]["text"] == ""
    body = {"model": NAME, "messages": MESSAGES}
    assert post(url, body | {"max_tokens": 0}).json()["usage"]["completion_tokens"] == 0
    long = "y" * (engine.context - 10)
    short = complete(url, prompt=long, max_tokens=100).json()
    assert short["usage"]["total_tokens"] == engine.context
    full = complete(url, prompt="y" * engine.context)
    assert full.status_code == 400
    assert error_of(full)["code"] == "context_length_exceeded"
    assert error_of(full)["param"] == "prompt"


def scores_of(engine, ids):
    """Log-probabilities of a prompt's tokens after the first, one token at a time."""
    sequence, found = engine.new_sequence(len(ids)), []
    for token, following in pairwise(ids):
        logits = sequence.feed(torch.tensor([token]))
        found.append(float(logits.log_softmax(0)[following]))
    return found


def test_echo_scores_the_prompt(url, engine):
    """As lm-eval's local-completions asks: ids, echo, one new token, log-probabilities of all."""
    ids = engine.encode("The quick fox").tolist()
    other = engine.encode("A dog").tolist()
    answer = complete(
        url, prompt=[ids, other], echo=True, logprobs=1, max_tokens=1, seed=1234
    ).json()
    for choice, prompt in zip(answer["choices"], (ids, other), strict=True):
        scored = choice["logprobs"]
        assert len(scored["tokens"]) == len(scored["token_logprobs"]) == len(prompt) + 1
        assert scored["token_logprobs"][0] is None
        assert scored["top_logprobs"][0] is None
        assert scored["token_logprobs"][1:-1] == pytest.approx(scores_of(engine, prompt), abs=1e-4)
        # A token that is drawn may be half a character.
        assert choice["text"].startswith("".join(scored["tokens"][:-1]))
        assert scored["text_offset"] == list(range(len(prompt) + 1))
        for value, top in zip(
            scored["token_logprobs"][1:], scored["top_logprobs"][1:], strict=True
        ):
            assert max(top.values()) >= value - 1e-6
    only = complete(url, prompt=ids, echo=True, logprobs=0, max_tokens=0).json()
    assert only["choices"][0]["text"] == "The quick fox"
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert only["usage"]["completion_tokens"] == 0
    single = complete(url, prompt=[70], echo=True, logprobs=0, max_tokens=1).json()["choices"][0][
        "logprobs"
    ]
    assert len(single["tokens"]) == 2
    streamed = complete(url, prompt=ids, echo=True, logprobs=1, max_tokens=3, stream=True).text
    chunks = [json.loads(x[6:]) for x in streamed.splitlines() if x.startswith("data: {")]
    whole = complete(url, prompt=ids, echo=True, logprobs=1, max_tokens=3).json()["choices"][0][
        "logprobs"
    ]
    for name in ("tokens", "text_offset"):
        found = [
            v
            for c in chunks
            if c["choices"][0]["logprobs"]
            for v in c["choices"][0]["logprobs"][name]
        ]
        assert found == whole[name]


def test_lm_eval_agrees_with_the_engine(url, engine):
    """lm-eval's own client of completions parses what comes."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    context, continuation = engine.encode("The quick ").tolist(), engine.encode("fox").tolist()
    answer = complete(
        url, prompt=[context + continuation], echo=True, logprobs=1, max_tokens=1, seed=1234
    ).json()
    ((value, _greedy),) = LocalCompletionsAPI.parse_logprobs(
        outputs=answer, tokens=[context + continuation], ctxlens=[len(context)]
    )
    expected = scores_of(engine, context + continuation)[-len(continuation) :]
    assert value == pytest.approx(sum(expected), abs=1e-3)


def test_special_tokens_of_a_user_are_text(url, engine):
    def ids_of(content):
        messages = [{"role": "user", "content": content}]
        return post(url, {"messages": messages}, "/tokenize").json()["tokens"]

    assert engine.tokenizer.eos_token_id not in ids_of("a</s>b<s></s>")
    text = engine.tokenizer.decode(ids_of("a</s>b<s></s>"))
    assert text == "user: a</s>b<s></s>\nassistant:"
    for plain in ("The fox", "", "é 狐 \ue000", "</", "s>"):
        messages = [{"role": "user", "content": plain}]
        assert ids_of(plain) == engine.encode_chat(messages).tolist()
    with serving(engine, special_tokens=True) as open_url:
        messages = [{"role": "user", "content": "a</s>b"}]
        found = post(open_url, {"messages": messages}, "/tokenize").json()["tokens"]
        assert engine.tokenizer.eos_token_id in found


def test_template_variables_and_open_answers(engine, monkeypatch):
    template = engine.tokenizer.chat_template + "{% if enable_thinking %}<think>{% endif %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)

    def expected(text):
        return engine.generate(text, max_new_tokens=8, sampling=Sampling(temperature=0)).text

    with serving(engine) as url:

        def say(**fields):
            body = {"model": NAME, "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | fields
            answer = post(url, body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]["content"]

        assert say(enable_thinking=True) == expected("user: x\nassistant:<think>")
        assert say(chat_template_kwargs={"enable_thinking": True}) == say(enable_thinking=True)
        assert say(enable_thinking=False) == say() == expected("user: x\nassistant:")
        begun = [*MESSAGES, {"role": "assistant", "content": "So it"}]
        assert say(messages=begun, continue_final_message=True) == expected(
            "user: x\nassistant: So it"
        )


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ messages[9].role }}", "{{ [] + 1 }}", "{{ nothing() }}", "{% x %}"],
)
def test_whatever_a_template_fails_with_is_400(engine, monkeypatch, template):
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    with serving(engine) as url:
        answer = post(url, {"model": NAME, "messages": MESSAGES})
        assert answer.status_code == 400
        assert "template" in error_of(answer)["message"]
        assert error_of(answer)["param"] == "messages"


def test_a_template_that_does_not_end_stalls_nobody(engine, monkeypatch):
    nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", nested)
    with serving(engine, prompt_seconds=0.5) as url:
        for _ in range(3):  # more than are read at once: each thread has ended
            answer = post(url, {"model": NAME, "messages": MESSAGES}, timeout=60)
            assert answer.status_code == 400
            assert "longer than 0.5 s" in error_of(answer)["message"]
            assert complete(url).status_code == 200


def test_tokenize_and_back(url, engine):
    found = post(url, {"content": "The fox é"}, "/tokenize").json()
    assert found["tokens"] == engine.tokenizer("The fox é", add_special_tokens=False)["input_ids"]
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == engine.context
    assert post(url, {"prompt": "The fox é"}, "/tokenize").json() == found
    assert post(url, {"content": ""}, "/tokenize").json()["tokens"] == []
    back = post(url, {"tokens": found["tokens"]}, "/detokenize").json()
    assert back["content"] == "The fox é"
    assert post(url, {"tokens": [260]}, "/detokenize").status_code == 400
    assert post(url, {}, "/tokenize").status_code == 400
    assert post(url, {"prompt": "x", "content": "x"}, "/tokenize").status_code == 400


def test_suffix_and_best_of_are_refused_by_name(url):
    for name, value in (("suffix", "end"), ("best_of", 3)):
        answer = complete(url, **{name: value})
        assert answer.status_code == 400
        assert error_of(answer)["param"] == name
        assert name in error_of(answer)["message"]
