"""Messages of a conversation: what a request may send, and what a chat template gets."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from acttail.serve.bodies import Model
from acttail.serve.unsupported import depth_of, refusal, refuse_kind, refuse_surrogates

# Nesting of what a client sends to be rendered; far beyond any tool, far within Python's recursion.
DEEPEST = 64


class _Part(Model):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        refuse_kind(data, ("text", "refusal"), "messages", "parts of type {} are", "send text")
        return data


class _SentFunction(Model):
    name: str = Field(min_length=1, max_length=64)
    arguments: str = "{}"


class _SentCall(Model):
    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: _SentFunction

    def plain(self) -> dict[str, Any]:
        """For a chat template, which writes the arguments as JSON itself."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}

    def check(self, where: str) -> None:
        """Refuse arguments that no template can write.

        Args:
            where: the call is, for the message.

        Raises:
            PydanticCustomError: they are no JSON object.
        """
        try:
            found = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise refusal(
                "messages", f"{where}.function.arguments is no JSON object; send it as the call had it"
            )  # fmt: skip
        if depth_of(found) > DEEPEST:
            raise refusal("messages", f"{where}.function.arguments is nested too deeply")
        refuse_surrogates({"messages": found})


class Message(Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_SentCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_functions(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("function_call"):
            raise refusal(
                "messages",
                "a message's function_call is not supported by this server; send tool_calls",
            )
        return data

    def plain(self) -> dict[str, Any]:
        """For a chat template. OpenAI's newer name of the system role is not known to templates."""
        content = self.content
        text = content if isinstance(content, str) else "".join(p.text for p in content or [])
        found: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.tool_calls:
            found["tool_calls"] = [call.plain() for call in self.tool_calls]
        return found


def check_calls(messages: Sequence[Message]) -> None:
    """Refuse calls that nobody could have made and answers to none.

    Raises:
        PydanticCustomError: names the first such message.
    """
    known: set[str] = set()
    for i, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            raise refusal("messages", f"messages[{i}]: only an assistant's message has tool_calls")
        for j, call in enumerate(message.tool_calls or []):
            call.check(f"messages[{i}].tool_calls[{j}]")
            known.add(call.id)
        if message.role != "tool":
            continue
        if message.tool_call_id is None:
            raise refusal(
                "messages",
                f"messages[{i}]: a message of role tool needs tool_call_id, the id of the call that it answers",
            )
        if message.tool_call_id not in known:
            raise refusal(
                "messages",
                f"messages[{i}].tool_call_id {message.tool_call_id[:80]!r} answers no call before it; send the"
                " assistant's message with its tool_calls first",
            )


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them, each answer of a tool with the tool's name."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        plain = message.plain()
        for call in message.tool_calls or []:
            names[call.id] = call.function.name
        if message.role == "tool" and message.tool_call_id is not None:
            plain |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        found.append(plain)
    return found
