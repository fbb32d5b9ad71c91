"""How calls stand in a prompt and in an answer: found by rendering, told where a template knows none, read in any pieces."""

import json

import pytest
from byte_tokens import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TEMPLATE

from acttail.serve.call_form import HERMES, CallForm, form_of
from acttail.serve.tool_calls import CallReader
from acttail.serve.tool_prompts import ToolPrompts

# As Qwen's: tools in a system message, calls in tags, answers in a user's turn.
QWEN = (
    "{% if tools %}<|system|># Tools{% for t in tools %}\n{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|><tool_response>{{ m.content }}</tool_response>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ '' if loop.first else '\n' }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Other tags, another name for the arguments, and one call in a message.
ONE = (
    "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call') }}{% endif %}{% set f = m.tool_calls[0].function %}"
    '<call>{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}</call>'
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
# Llama 3's calls have no tag: text that begins with a brace could be one.
BARE = ONE.replace("<call>", "").replace("</call>", "")
# Gemma's: no system message, and turns alternate.
GEMMA = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "of a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
ARGUMENTS = {"city": "Zürich", "at": [1, {"x": None}]}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
    {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"},
    {"role": "user", "content": "And now?"},
]
WRITTEN = f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(ARGUMENTS, ensure_ascii=False)}}}\n</tool_call>'


def renderer(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template

    def render(messages, tools):
        return tokenizer.apply_chat_template(messages, tokenize=False, tools=tools or None)

    return render


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (QWEN, HERMES),
        (ONE, CallForm('<call>{"name": "', '", "parameters": ', "}</call>", None)),
        (QWEN.replace("</tool_call>'", "</tool_call>\n'"), HERMES),
        (BARE, None),
        (TEMPLATE, None),
        (GEMMA, None),
        ("{{ messages[7].role }}", None),
        # Tools are not shown, or answers are not.
        (QWEN.replace("{{ t | tojson }}", ""), None),
        (QWEN.replace("<tool_response>{{ m.content }}", ""), None),
    ],
)  # fmt: skip
def test_the_form_is_found_by_rendering(template, form):
    assert form_of(renderer(template), []) == form


def test_tags_that_no_text_has_are_no_form():
    assert form_of(renderer(QWEN), ["</s>"]) == HERMES
    assert form_of(renderer(QWEN), ["<tool_call>"]) is None


def test_a_template_that_knows_tools_gets_them():
    prompts = ToolPrompts(renderer(QWEN), [])
    messages, more = prompts.prepared(TALK, [TOOL])
    assert (messages, more) == (TALK, {"tools": [TOOL]})
    assert prompts.prepared(TALK, [])[1] == {}
    assert f"{WRITTEN}\n{WRITTEN}" in renderer(QWEN)(messages, more["tools"])


def test_a_template_that_knows_none_gets_text():
    messages, more = ToolPrompts(renderer(TEMPLATE), []).prepared(TALK, [TOOL])
    assert more == {}
    system, *rest = messages
    assert system["role"] == "system"
    assert system["content"].startswith("Be short.\n\n")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in system["content"]
    assert [(m["role"], m["content"]) for m in rest] == [
        ("user", "Weather?"),
        ("assistant", f"{WRITTEN}\n{WRITTEN}"),
        ("user", "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>\nAnd now?"),
    ]  # fmt: skip
    plain, _ = ToolPrompts(renderer(TEMPLATE), []).prepared(TALK[1:2], [TOOL])
    assert [m["role"] for m in plain] == ["system", "user"]


def test_without_a_system_message_the_user_tells():
    render = renderer(GEMMA)
    messages, _ = ToolPrompts(render, []).prepared(TALK[1:], [TOOL])
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"].endswith("\n\nWeather?")
    assert "<tools>" in render(messages, [])


def read(pieces, form=HERMES, *, forced=False):
    """What a stream of pieces says: content, [(name, arguments)], and its deltas."""
    reader = CallReader(form, forced)
    deltas = [d for p in pieces for d in reader.push(p)] + reader.push("", last=True)
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    assert reader.calls == len(calls)
    return content, [tuple(c) for c in calls], deltas


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab\"\\{}[]<>/é狐\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\}'), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "get-x_1"]), st.dictionaries(st.text(), VALUES, max_size=3)),
    max_size=3,
)
FORMS = st.sampled_from(
    [HERMES, CallForm('<c>{"name": "', '", "parameters": ', "}</c>", "")]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["", "Sure.", "a <tool b < c "]), CALLS, FORMS, st.data())
def test_any_pieces_of_a_text_are_read_alike(said, calls, form, data):
    text = said + (form.between or "").join(form.text(n, a) for n, a in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, found, _ = read(pieces, form)
    assert content == (said.rstrip() if calls else said)
    assert [(n, json.loads(a)) for n, a in found] == calls
    message = CallReader(form, forced=False).whole(text)
    whole = [
        (c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])
    ]
    assert whole == found
    assert (message["content"] or "") == content
    assert ("tool_calls" in message) == bool(calls)


def test_what_is_cut_off_is_as_much_as_there_is():
    text = f"Sure.\n{WRITTEN}"
    assert read([text[:8]])[0] == "Sure.\n<t"
    assert read([text[:8]], forced=True) == ("", [], [])
    assert read([text[:22]])[:2] == ("Sure.", [])
    for end in range(text.index("{", 30), len(text)):
        content, ((name, arguments),), _ = read(text[:end])
        assert (content, name) == ("Sure.", "weather")
        assert json.dumps(ARGUMENTS, ensure_ascii=False).startswith(arguments)


def test_the_name_comes_first_and_at_once():
    deltas = read(WRITTEN)[2]
    first, *rest = (d["tool_calls"][0] for d in deltas)
    assert (first["index"], first["type"], first["function"]) == (
        0, "function", {"name": "weather", "arguments": ""},
    )  # fmt: skip
    assert first["id"].startswith("call_")
    assert all(set(c) == {"index", "function"} for c in rest)
    assert len(rest) > 10
    ids = {
        d["tool_calls"][0]["id"]
        for d in read([WRITTEN + "\n" + WRITTEN])[2]
        if "id" in d["tool_calls"][0]
    }
    assert len(ids) == 2
