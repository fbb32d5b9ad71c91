"""Answers held to a schema, through the official client; refused with the remedy where llguidance is not there."""

import json
import sys

import openai
import pytest
import torch
from byte_tokens import byte_tokenizer
from serving import MESSAGES, NAME, error_of, post

from acttail.engine.light_tokenizer import read_light, write_light
from acttail.serve.grammars import Grammar, Grammars, grammar_of_schema

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["fox", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "legs"],
    "additionalProperties": False,
}


def ask(client, form, **fields):
    fields = {"max_tokens": 120, "temperature": 1.5, "seed": 5} | fields
    return client.chat.completions.create(
        model=NAME, messages=MESSAGES, response_format=form, **fields
    )


def test_without_the_library_the_remedy_is_named(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"model": NAME, "messages": MESSAGES, "response_format": {"type": "json_object"}}
    answer = post(url, body)
    assert answer.status_code == 400
    assert "acttail[structured]" in error_of(answer)["message"]
    assert error_of(answer)["param"] == "response_format"


def test_every_answer_follows_the_schema(client):
    pytest.importorskip("llguidance")
    form = {
        "type": "json_schema",
        "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True},
    }
    answer = ask(client, form, n=8)
    assert len({c.message.content for c in answer.choices}) > 1, (
        "the model chooses within the schema"
    )
    for choice in answer.choices:
        found = json.loads(choice.message.content)
        assert set(found) == {"name", "legs"}
        assert found["name"] in ("fox", "dog")
        assert 0 <= found["legs"] <= 9
        assert choice.finish_reason == "stop"
    streamed = "".join(
        c.choices[0].delta.content or "" for c in ask(client, form, stream=True) if c.choices
    )
    assert streamed == answer.choices[0].message.content
    parsed = ask(client, form, temperature=0)
    assert set(json.loads(parsed.choices[0].message.content)) == {"name", "legs"}


def test_json_objects_and_schemas_that_cannot_be(client):
    pytest.importorskip("llguidance")
    text = ask(client, {"type": "json_object"}, max_tokens=30).choices[0].message.content
    assert text.startswith("{")
    for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert error.value.body["param"] == "response_format"


def allowed(engine, grammar, text):
    """Ids that may follow a text."""
    matcher = Grammars(engine).matcher(grammar)
    for token in engine.tokenizer(text)["input_ids"]:
        matcher.accept(token)
    return set(
        matcher.masked(torch.zeros(engine.vocabulary)).isfinite().nonzero().flatten().tolist()
    )


def test_kept_tokenizers_are_known(engine, tmp_path, monkeypatch):
    """Those of GGUF files and converted models, which are not transformers'."""
    pytest.importorskip("llguidance")
    grammar = grammar_of_schema(SCHEMA)
    expected = allowed(engine, grammar, '{"name":"')
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert write_light(tmp_path, tokenizer)
    monkeypatch.setattr(engine, "tokenizer", read_light(tmp_path))
    assert allowed(engine, grammar, '{"name":"') == expected
    assert sorted(map(engine.tokenizer.decode, expected)) == ["d", "f"]


def test_tokens_that_look_like_tags_are_text(engine, monkeypatch):
    pytest.importorskip("llguidance")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    monkeypatch.setattr(engine, "vocabulary", 260)
    text = Grammar("%llguidance {}\nstart: /[^x]+/\n", "tools", {})
    found = allowed(engine, text, "a<think>")
    assert tokenizer.convert_tokens_to_ids("<think>") in found
    assert not {0, 1} & found
    assert tokenizer.convert_tokens_to_ids("x") not in found
    forced = Grammar('%llguidance {}\nstart: "<think>" "."\n', "tools", {})
    assert allowed(engine, forced, "") == {tokenizer.convert_tokens_to_ids("<think>")}
