"""OpenAI's tools over HTTP, through the official client: calls are whole and valid, whatever a model would have said."""

import json
import sys

import jsonschema
import openai
import pytest
from byte_tokens import byte_tokenizer
from serving import MESSAGES, NAME, TEMPLATE, error_of, post, serving
from talker import talker
from test_call_form import QWEN

from acttail.engine import Engine
from acttail.engine.lossless import LosslessEngine
from acttail.engine.speculation import Pace

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Zürich"]},
        "days": {"$ref": "#/$defs/few"},
        "where": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "days", "where"],
    "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}},
}
SCHEMAS = {"weather": WEATHER, "time_now": {"type": "object", "properties": {}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time_now"}},
]  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}
# What begins the answer is the last character of the question.
CHAINS = {"w": ["Let me ", "see.", "<tool_call>", "</tool_call>"], "t": ["No ", "tools", "."]}


@pytest.fixture(scope="module", autouse=True)
def _needs():
    pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A client of a server whose model opens a call by itself, by a token that looks like a special one."""
    folder = talker(
        tmp_path_factory.mktemp("talker") / "model", byte_tokenizer(), CHAINS, context=3000
    )
    engine = Engine.from_pretrained(folder, None, dtype="fp32", threads=1)
    with serving(engine, max_tokens=200) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, messages=MESSAGES, **fields):
    fields = {"max_tokens": 190, "temperature": 1.5, "seed": 5, "tools": TOOLS} | fields
    return client.chat.completions.create(model=NAME, messages=messages, **fields)


def valid(calls, names=SCHEMAS):
    """[(name, arguments)] of calls, each checked against its schema."""
    found = []
    for call in calls:
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(
            arguments, SCHEMAS[call.function.name] | {"additionalProperties": False}
        )
        found.append((call.function.name, arguments))
    return found


def streamed(chunks):
    """Content, [[name, arguments]] and the finish reason of a stream's choice."""
    content, calls, reason = "", [], None
    for choice in (c.choices[0] for c in chunks if c.choices):
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, calls, reason


@pytest.mark.parametrize("template", [None, QWEN])
def test_required_calls_are_valid(engine, client, monkeypatch, template):
    if template:
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    answer = ask(client, tool_choice="required", parallel_tool_calls=False, n=8)
    found = []
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        found += valid(choice.message.tool_calls)
    assert len(found) == 8
    assert {name for name, _ in found} == set(SCHEMAS)
    first = answer.choices[0].message.tool_calls[0].function
    chunks = list(ask(client, tool_choice="required", parallel_tool_calls=False, stream=True))
    assert streamed(chunks) == ("", [[first.name, first.arguments]], "tool_calls")


def test_several_calls(client):
    answer = ask(client, tool_choice="required", n=6, logprobs=True)
    assert max(len(c.message.tool_calls) for c in answer.choices) > 1
    for choice in answer.choices:
        if choice.finish_reason == "length":
            continue
        assert len({c.id for c in choice.message.tool_calls}) == len(
            valid(choice.message.tool_calls)
        )
    tokens = sum(len(c.logprobs.content) for c in answer.choices)
    assert tokens == answer.usage.completion_tokens
    first = answer.choices[0]
    chunks = list(ask(client, tool_choice="required", stream=True, logprobs=True))
    assert streamed(chunks)[1] == [
        [c.function.name, c.function.arguments] for c in first.message.tool_calls
    ]
    scored = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in scored] == [t.token for t in first.logprobs.content]


def test_the_named_one_is_called_once(client):
    for choice in ask(client, tool_choice=NAMED, n=4).choices:
        assert choice.finish_reason == "stop"  # as OpenAI's API has it where the name is given
        ((name, _),) = valid(choice.message.tool_calls)
        assert name == "weather"


def test_a_call_cut_at_its_length_says_so(client):
    answer = ask(client, tool_choice=NAMED, max_tokens=60).choices[0]
    assert answer.finish_reason == "length"
    (call,) = answer.message.tool_calls
    assert call.function.arguments.startswith('{"city": "')
    assert ask(client, tool_choice=NAMED, max_tokens=3).choices[0].message.tool_calls is None


def test_what_the_model_begins_by_itself_is_held(talking):
    question = [{"role": "user", "content": "how"}]
    for fields in ({}, {"parallel_tool_calls": False}, {"stop": "unlikely"}):
        choice = ask(talking, question, temperature=0, **fields).choices[0]
        assert choice.message.content == "Let me see."
        assert choice.finish_reason == "tool_calls"
        assert len(valid(choice.message.tool_calls)) == 1
    calls = [[c.function.name, c.function.arguments] for c in choice.message.tool_calls]
    found = streamed(ask(talking, question, temperature=0, stream=True))
    assert found == ("Let me see.", calls, "tool_calls")


def test_text_stays_text(talking):
    question = [{"role": "user", "content": "what"}]
    for fields in ({}, {"tool_choice": "none"}, {"tool_choice": "auto", "tools": []}):
        choice = ask(talking, question, temperature=0, **fields).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("No tools.", "stop")
        assert choice.message.tool_calls is None
    assert streamed(ask(talking, question, temperature=0, stream=True)) == ("No tools.", [], "stop")


def test_who_calls_nothing_answers_in_the_form_that_is_asked_for(client):
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for choice in ask(client, response_format=form, n=16, parallel_tool_calls=False).choices:
        kinds.add(choice.finish_reason)
        if choice.message.tool_calls:
            valid(choice.message.tool_calls)
        else:
            assert set(json.loads(choice.message.content)) == {"yes"}
    assert kinds == {"stop", "tool_calls"}
    forced = ask(client, response_format=form, tool_choice=NAMED).choices[0].message
    assert (forced.content, len(valid(forced.tool_calls))) == (None, 1)


@pytest.mark.parametrize("template", [None, QWEN])
def test_a_conversation_goes_on_with_what_the_tool_says(engine, client, monkeypatch, template):
    if template:
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    first = ask(client, tool_choice=NAMED).choices[0].message
    (call,) = first.tool_calls
    talk = [*MESSAGES, first.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "rain </s> all day"}]  # fmt: skip
    answer = ask(client, talk, tool_choice="none", max_tokens=5)
    assert answer.choices[0].message.content
    base = str(client.base_url).removesuffix("/v1/")
    found = post(base, {"messages": talk, "tools": TOOLS}, "/tokenize").json()
    assert engine.tokenizer.eos_token_id not in found["tokens"]
    text = engine.tokenizer.decode(found["tokens"])
    assert f'<tool_call>\n{{"name": "weather", "arguments": {call.function.arguments}}}' in text
    assert "rain </s> all day" in text
    assert text.count('"description": "of a place"') == 1
    assert answer.usage.prompt_tokens < found["count"], "tools that may not be called are not shown"


def test_special_tokens_of_tools_are_text(engine, url, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", QWEN)
    odd = {"name": "x", "description": "</s>", "parameters": {"type": "object", "properties": {"<s>": {"type": "null"}}}}  # fmt: skip
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "x", "arguments": '{"<s>": "</s>"}'},
    }
    talk = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    body = {"messages": talk, "tools": [{"type": "function", "function": odd}]}
    ids = post(url, body, "/tokenize").json()["tokens"]
    assert not {1, 2} & set(ids)
    text = engine.tokenizer.decode(ids)
    assert '"description": "</s>"' in text
    assert '{"<s>": "</s>"}' in text


def test_drafts_are_held_as_plain_tokens_are(engine):
    found = []
    for one in (engine.dense, LosslessEngine(engine, pace=Pace(fixed=3))):
        with serving(one, max_tokens=200) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            answer = ask(client, tool_choice="required")
            found.append(valid(answer.choices[0].message.tool_calls))
    assert found[0] == found[1]
    assert answer.model_extra["acttail"]["drafted"] > 0


def test_transformers_calls_as_the_native_engine_does(roomy_folder):
    slow = Engine.from_pretrained(roomy_folder, None, dtype="fp32", native=False, threads=1)
    slow.tokenizer.chat_template = TEMPLATE
    with serving(slow, max_tokens=200) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = ask(client, tool_choice=NAMED)
    assert len(valid(answer.choices[0].message.tool_calls)) == 1


def test_without_the_library_the_remedy_is_named(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"model": NAME, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 2}
    answer = post(url, body)
    assert answer.status_code == 400
    assert "acttail[structured]" in error_of(answer)["message"]
    assert error_of(answer)["param"] == "tools"
    assert post(url, body | {"tool_choice": "none"}).status_code == 200


def tool(name="f", parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


def nested(depth):
    found = {"type": "string"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}}
    return found


CALLED = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [tool("a b")]}, "tools", "tools[0].function.name 'a b'"),
        ({"tools": [tool("x" * 65)]}, "tools", "1 to 64 letters"),
        ({"tools": [tool("f"), tool("f")]}, "tools", "tools[1].function.name 'f' is there twice"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools", "at most 128"),
        ({"tools": [tool("f", nested(60))]}, "tools", "nested too deeply"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools", "schema of type object"),
        ({"tools": [tool("g"), tool("f", {"type": "object", "properties": {"x": {"type": "odd"}}})]},
         "tools", "tools[1].function.parameters (f): the schema cannot be used: Invalid type: odd"),
        ({"tools": [tool("f", {"type": "object", "properties": {"x": {"$ref": "#/no"}}})]}, "tools", "/no"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "function"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice", "none"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": NAMED}, "tool_choice", "needs tools"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "use tool_choice"),
        ({"messages": [*MESSAGES, {"role": "assistant", "function_call": {"name": "f"}}]}, "messages", "tool_calls"),
        ({"messages": [*MESSAGES, {"role": "tool", "content": "x"}]}, "messages", "messages[1]"),
        ({"messages": [*MESSAGES, CALLED, {"role": "tool", "tool_call_id": "b", "content": "x"}]},
         "messages", "messages[2].tool_call_id 'b' answers no call"),
        ({"messages": [{**CALLED, "role": "user"}]}, "messages", "only an assistant's message has tool_calls"),
        ({"messages": [*MESSAGES, CALLED], "continue_final_message": True}, "continue_final_message", "tool_calls"),
    ],
)  # fmt: skip
def test_bad_tools_name_the_thing(url, fields, param, says):
    answer = post(url, {"model": NAME, "messages": MESSAGES, "max_tokens": 2} | fields)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"].startswith(param)
    assert says in error_of(answer)["message"]


@pytest.mark.parametrize("arguments", ["", "{", "[]", "3", '{"a": "\\ud800"}', "[" * 5000, '{"a":' * 90 + "1" + "}" * 90])  # fmt: skip
def test_arguments_that_are_no_object_are_refused(url, arguments):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    talk = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]
    answer = post(url, {"model": NAME, "messages": talk, "max_tokens": 2})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "messages"


def test_tools_too_long_for_any_context_are_refused(engine):
    with serving(engine) as url:
        long = tool("f", description="y" * (1 << 17))
        answer = post(url, {"model": NAME, "messages": MESSAGES, "tools": [long]})
        assert "characters of JSON" in error_of(answer)["message"]
        plain = post(url, {"model": NAME, "prompt": "x", "tools": [tool()]}, "/v1/completions")
        assert "use /v1/chat/completions" in error_of(plain)["message"]
