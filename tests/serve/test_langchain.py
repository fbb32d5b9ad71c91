"""LangChain's client of OpenAI servers: what it sends and reads on top of the official client."""

import functools
import operator
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from serving import NAME


def chat(url, **options):
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=NAME, temperature=0, max_retries=0, **options
    )


def test_a_call_gives_what_the_engine_generates(engine, url):
    answer = chat(url, max_tokens=8).invoke([HumanMessage("The quick brown fox")])
    messages = [{"role": "user", "content": "The quick brown fox"}]
    expected = engine.generate(engine.encode_chat(messages), max_new_tokens=8)
    assert answer.content == expected.text
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.response_metadata["finish_reason"] == "length"


def test_a_stream_is_the_call_in_pieces(url):
    model = chat(url, max_tokens=8, stream_usage=True)
    messages = [HumanMessage("one"), AIMessage("two"), HumanMessage("three")]
    pieces = list(model.stream(messages))
    assert len(pieces) > 2
    assert "".join(p.content for p in pieces) == model.invoke(messages).content
    assert sum(p.usage_metadata["output_tokens"] for p in pieces if p.usage_metadata) == 8


def test_structured_output_is_what_the_schema_says(url):
    schema = {
        "title": "answer", "type": "object", "additionalProperties": False,
        "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
    }  # fmt: skip
    model = chat(url, max_tokens=40).with_structured_output(schema, method="json_schema")
    found = model.invoke("Is water wet?")
    assert set(found) == {"yes"}
    assert isinstance(found["yes"], bool)


@tool
def weather(city: Literal["Rome", "Oslo"], days: list[bool]) -> str:
    """The weather of a city."""
    return f"rain in {city} for {len(days)} days"


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_bound_tools_are_called_and_answered(url, choice):
    pytest.importorskip("llguidance")
    model = chat(url, max_tokens=200).bind_tools(
        [weather], tool_choice=choice, parallel_tool_calls=False
    )
    question = HumanMessage("What is the weather?")
    answer = model.invoke([question])
    (call,) = answer.tool_calls
    assert answer.content == ""
    assert call["name"] == "weather"
    found = weather.invoke(call)
    assert found.content.startswith("rain in ")
    assert found.tool_call_id == call["id"]
    streamed = functools.reduce(operator.add, model.stream([question]))
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]
    after = chat(url, max_tokens=4).invoke([question, answer, found])
    assert after.usage_metadata["output_tokens"] == 4
