"""Answers held to a schema, through the official client; refused with the remedy where llguidance is not there."""

import json
import sys

import openai
import pytest
from serving import MESSAGES, NAME, error_of, post

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
