"""Conversations as files: OpenAI's messages in JSON."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from acttail.base.files import write_json
from acttail.base.schema import read_json
from acttail.errors import ActTailError

# With ``role`` and ``content``, as OpenAI's API and chat templates take them.
Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
# OpenAI's newer name of the system role is not known to templates.
_NAMES = {"developer": "system"}


def check_messages(found: Iterable[Any]) -> list[Message]:
    """Messages that a chat template can take.

    Args:
        found: objects with ``role`` and ``content``, which is a text or OpenAI's list of text parts.

    Raises:
        ActTailError: names the first that is none, by its number from 1.
    """
    checked: list[Message] = []
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict):
            raise ActTailError(f"message {number} is no object with role and content")
        role = _NAMES.get(str(message.get("role")), message.get("role"))
        if role not in _ROLES:
            raise ActTailError(
                f"message {number} has the role {role!r}; a chat has {', '.join(_ROLES)}"
            )
        if role == "system" and number > 1:
            raise ActTailError(f"message {number} is a system message; only the first may be one")
        checked.append({"role": role, "content": _text(message.get("content"), number)})
    return checked


def _text(content: Any, number: int) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") if isinstance(p, dict) else None for p in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ActTailError(f"message {number} has content that is not text")
    return "".join(map(str, texts))


def save_messages(path: str | os.PathLike[str], model: str, messages: Sequence[Message]) -> None:
    """Write a conversation whole or not at all: ``{"model": …, "messages": […]}``.

    Raises:
        ActTailError: the file cannot be written.
    """
    write_json(path, {"model": model, "messages": list(messages)})


def load_messages(path: str | os.PathLike[str]) -> list[Message]:
    """Read a conversation: what :func:`save_messages` wrote, any request to OpenAI's API, or its messages alone.

    Raises:
        ActTailError: no such file, or no conversation in it; names what is wrong.
    """
    data = read_json(path, "a conversation")
    found = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(found, list):
        raise ActTailError(f'{path} holds no conversation: it has no list of "messages"')
    try:
        return check_messages(found)
    except ActTailError as error:
        raise ActTailError(f"{path}: {error}") from error
