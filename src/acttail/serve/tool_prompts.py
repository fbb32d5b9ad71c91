"""Tools, calls and their answers in a prompt: by the model's chat template, or told in Hermes' form where it knows none."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from acttail.serve.call_form import HERMES, CallForm, form_of

Messages = list[dict[str, Any]]
Render = Callable[[Messages, list[dict[str, Any]]], str]

# Hermes' own words, shortened.
_TOLD = (
    "You may call one or more functions to help the user. Their signatures are within <tools></tools>:\n<tools>\n{tools}\n</tools>\n\n"
    "For each call, answer with a JSON object of the function's name and arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <arguments-as-object>}}\n</tool_call>'
)
_MARK = "system 2f9b"


class ToolPrompts:
    """What one model's chat template makes of tools.

    Whether it knows them is seen by rendering: its own form is used if it shows a tool, a call as tagged JSON, and a
    tool's answer. All else goes by Hermes' form, in messages of the roles that every template knows.

    Args:
        render: (messages, tools) -> text, by the template.
        special: names of special tokens.
    """

    def __init__(self, render: Render, special: Iterable[str]) -> None:
        own = form_of(render, special)
        self.native = own is not None
        self.form: CallForm = own or HERMES
        self._system = self.native or _has_system(render)

    def prepared(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Messages, dict[str, Any]]:
        """Messages, and further arguments, for the template.

        Args:
            messages: calls and answers of tools among them.
            tools: that are shown.
        """
        if self.native:
            return [dict(m) for m in messages], {"tools": list(tools)} if tools else {}
        found: Messages = []
        for message in messages:
            self._add(found, message)
        if tools:
            shown = "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
            self._tell(found, _TOLD.format(tools=shown))
        return found, {}

    def _add(self, found: Messages, message: Mapping[str, Any]) -> None:
        role, content = message["role"], message["content"]
        if message.get("tool_calls"):
            calls = self.form.texts(message["tool_calls"])
            content = f"{content}\n{calls}" if content else calls
        answers = role == "tool"
        if answers:
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        # Several answers, and what the user says after them, are one turn: some templates refuse two of a role.
        if role == "user" and found and found[-1].get("answers"):
            found[-1] = {
                "role": role,
                "content": f"{found[-1]['content']}\n{content}",
                "answers": answers,
            }
        else:
            found.append({"role": role, "content": content, "answers": answers})

    def _tell(self, found: Messages, text: str) -> None:
        """Put a text before the conversation."""
        wanted = "system" if self._system else "user"
        at = next((i for i, m in enumerate(found) if m["role"] == wanted), None)
        if at is None or (self._system and at > 0):
            found.insert(0, {"role": wanted, "content": text})
        elif self._system:
            found[at]["content"] = f"{found[at]['content']}\n\n{text}"
        else:
            found[at]["content"] = f"{text}\n\n{found[at]['content']}"


def _has_system(render: Render) -> bool:
    """Whether a template takes a system message."""
    messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "x"}]
    try:
        return _MARK in render(messages, [])
    except Exception:  # a template is a program that the model brings
        return False
