"""How calls of tools stand in a model's text: between tags, as JSON. Found from a chat template by rendering it."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a probe is told by in a rendered text: nothing that a template would say by itself.
_NAME, _OTHER, _ANSWER = "probe_7c1e", "probe_94ab", "answer 5d0f"
_ARGUMENTS = {"place": "x_31c8", "count": 3}
_BEFORE = re.compile(r'<[^<>\s]{1,40}>\s*\{\s*"name":\s*"$')
_MIDDLE = re.compile(r'",\s*"(?:arguments|parameters)":\s*$')
_AFTER = re.compile(r"\s*\}\s*<[^<>\s]{1,40}>")


@dataclass(frozen=True)
class CallForm:
    """The text of a call: ``before``, the name, ``middle``, the arguments as JSON, ``after``.

    Attributes:
        before: begins with a tag.
        middle: between name and arguments.
        after: ends with a tag.
        between: two calls; None where there is one at most.
    """

    before: str
    middle: str
    after: str
    between: str | None

    @property
    def tag(self) -> str:
        """What a call begins with, and no other text has."""
        return self.before[: self.before.index(">") + 1]

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call."""
        told = json.dumps(arguments, ensure_ascii=False)
        return f"{self.before}{name}{self.middle}{told}{self.after}"

    def texts(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """The calls of a message, each as a chat template takes it."""
        functions = [call["function"] for call in calls]
        return (self.between or "\n").join(self.text(f["name"], f["arguments"]) for f in functions)


# The form of Hermes 2 Pro, which Qwen 2.5 and 3 and many others were trained on.
HERMES = CallForm(
    before='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    after="}\n</tool_call>",
    between="\n",
)


def form_of(
    render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str], special: Iterable[str]
) -> CallForm | None:
    """How a chat template writes calls, if it tells of tools, of calls and of their answers in a form that is known.

    Args:
        render: (messages, tools) -> text; raises whatever it does for what it does not take.
        special: names of special tokens, which are no part of a model's text.
    """
    question = {"role": "user", "content": "x"}
    tool = {
        "type": "function",
        "function": {
            "name": _OTHER, "description": "x", "parameters": {"type": "object", "properties": {}},
        },
    }  # fmt: skip
    try:
        shown = _OTHER in render([question], [tool])
        text = render([question, *_asked(1)], [tool])
    except Exception:  # a template is a program that the model brings
        return None
    at = text.rfind(_NAME)
    written = json.dumps(_ARGUMENTS)
    begins = text.find(written, at)
    if not shown or _ANSWER not in text or at < 0 or begins < 0:
        return None
    before = _BEFORE.search(text, 0, at)
    middle = _MIDDLE.match(text[at + len(_NAME) : begins])
    after = _AFTER.match(text, begins + len(written))
    if before is None or middle is None or after is None:
        return None
    parts = (before[0], middle[0], after[0])
    if any(name in part for name in special for part in parts):
        return None
    return CallForm(*parts, _between(render, question, parts))


def _asked(count: int) -> list[dict[str, Any]]:
    """An assistant's message of so many calls, and their answers."""
    function = {"name": _NAME, "arguments": _ARGUMENTS}
    calls = [{"id": f"call0000{i}", "type": "function", "function": function} for i in range(count)]
    answers = [
        {"role": "tool", "content": _ANSWER, "name": _NAME, "tool_call_id": c["id"]} for c in calls
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *answers]


def _between(
    render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str], question: dict[str, Any],
    parts: tuple[str, str, str],
) -> str | None:  # fmt: skip
    """What stands between two calls; None where a message has one at most."""
    before, middle, after = parts
    whole = f"{before}{_NAME}{middle}{json.dumps(_ARGUMENTS)}{after}"
    try:
        text = render([question, *_asked(2)], [])
    except Exception:
        return None
    found = re.search(f"{re.escape(whole)}(\\s*){re.escape(whole)}", text)
    return None if found is None else found[1]
