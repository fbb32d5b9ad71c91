"""From a model's text to calls of tools, as the text comes."""

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from acttail.serve.call_form import CallForm

# What a stream says of one message in one event, as OpenAI's API words it.
Delta = dict[str, Any]


@dataclass
class CallReader:
    """Reads one answer, which a grammar holds to calls of the form, or to text without its tag.

    Attributes:
        form: of the calls.
        forced: whether there is no text beside calls.
        calls: read so far.
    """

    form: CallForm
    forced: bool
    calls: int = 0
    _rest: str = ""
    _at: Literal["text", "name", "arguments", "after"] = "text"
    _object: "_Object" = field(default_factory=lambda: _Object())

    def push(self, text: str, *, last: bool = False) -> list[Delta]:
        """What further text adds.

        Args:
            text: that has come.
            last: whether nothing more comes, so that what could begin a call is text after all.
        """
        self._rest += text
        found: list[Delta] = []
        steps = {
            "text": self._text,
            "name": self._name,
            "arguments": self._arguments,
            "after": self._after,
        }
        while True:
            before = self._at
            found += steps[before](last)
            if self._at == before:
                return found

    def whole(self, text: str) -> Delta:
        """The message that a whole text is."""
        content, calls = "", []
        for delta in self.push(text, last=True):
            content += delta.get("content", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    calls.append({k: v for k, v in call.items() if k != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        message: Delta = {"content": content or (None if calls or self.forced else "")}
        return message | ({"tool_calls": calls} if calls else {})

    def _text(self, last: bool) -> list[Delta]:
        at = self._rest.find(self.form.tag)
        if at >= 0:
            # Blanks before a call are the template's, not the answer's.
            content, self._rest = self._rest[:at].rstrip(), self._rest[at:]
            self._at = "name"
        else:
            end = len(self._rest) if last else self._settled()
            content, self._rest = self._rest[:end], self._rest[end:]
        return [{"content": content}] if content and not self.forced and not self.calls else []

    def _settled(self) -> int:
        """Length of the text that cannot belong to a call: no part of a tag at its end, nor blanks before one."""
        tag, rest = self.form.tag, self._rest
        open_ = next(
            (n for n in range(min(len(tag) - 1, len(rest)), 0, -1) if rest.endswith(tag[:n])), 0
        )
        return len(rest[: len(rest) - open_].rstrip())

    def _name(self, last: bool) -> list[Delta]:
        form = self.form
        end = self._rest.find(form.middle, len(form.before))
        if end < 0:
            return []
        name = self._rest[len(form.before) : end]
        self._rest = self._rest[end + len(form.middle) :]
        self._at, self._object = "arguments", _Object()
        call = {
            "index": self.calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": name, "arguments": ""},
        }  # fmt: skip
        self.calls += 1
        return [{"tool_calls": [call]}]

    def _arguments(self, last: bool) -> list[Delta]:
        end = self._object.end(self._rest)
        told, self._rest = self._rest[:end], self._rest[end:]
        if self._object.closed:
            self._at = "after"
        if not told:
            return []
        return [{"tool_calls": [{"index": self.calls - 1, "function": {"arguments": told}}]}]

    def _after(self, last: bool) -> list[Delta]:
        if len(self._rest) >= len(self.form.after):
            self._rest = self._rest[len(self.form.after) :]
            self._at = "text"
        return []


@dataclass
class _Object:
    """Where a JSON object ends that comes in pieces.

    Attributes:
        closed: whether it has.
    """

    closed: bool = False
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False

    def end(self, text: str) -> int:
        """How much of further text is the object's."""
        for i, c in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = c == "\\", c != '"'
            elif c == '"':
                self._quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return i + 1
        return len(text)
