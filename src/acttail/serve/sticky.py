"""Which replica a conversation belongs to: the one whose KV caches hold its earlier turns.

A conversation sends all its turns every time, so its beginning names it. It knows nothing of Ray.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Of a prompt without messages: enough to tell documents apart, little enough that what is appended leaves it alone.
_BEGINNING = 256
# Requests that a conversation's own replica may have more than the idlest one before others take it: a pass over the
# weights decodes eight, so that many wait for nothing.
LEAD = 8


def conversation_of(client: str, body: bytes) -> str | None:
    """A name for the conversation that a request goes on with, the same for all its turns.

    That is the client and the messages up to the first of the user, or the first characters or token ids of a prompt.

    Args:
        client: whose request it is; KV caches are shared between requests of one client alone.
        body: of the request, whatever it is.

    Returns:
        A digest, or None where the body says nothing of the kind.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    beginning = _beginning(asked) if isinstance(asked, Mapping) else None
    if not beginning:
        return None
    told = json.dumps([client, beginning], sort_keys=True)
    return hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()


def _beginning(asked: Mapping[str, Any]) -> Any:
    messages = asked.get("messages")
    if isinstance(messages, list):
        found = []
        for message in messages:
            found.append(message)
            if isinstance(message, Mapping) and message.get("role") == "user":
                break
        return found
    prompt = asked.get("prompt")
    return prompt[:_BEGINNING] if isinstance(prompt, (str, list)) else None


def ranked(conversation: str, replicas: Sequence[str]) -> list[str]:
    """Replicas in the order in which a conversation prefers them.

    By rendezvous hashing: where a replica goes or comes, only conversations that had it or get it move.

    Args:
        conversation: of :func:`conversation_of`.
        replicas: their names, in any order.
    """

    def weight(name: str) -> bytes:
        return hashlib.sha256(f"{conversation} {name}".encode()).digest()

    return sorted(replicas, key=weight, reverse=True)


def chosen(conversation: str | None, busy: Mapping[str, int]) -> str:
    """The replica for a request: its conversation's own unless that one has much more to do than the idlest.

    Args:
        conversation: of :func:`conversation_of`; None takes the idlest.
        busy: replica -> requests that it has; at least one.
    """
    idlest = min(busy, key=lambda name: (busy[name], name))
    if conversation is None:
        return idlest
    own = ranked(conversation, list(busy))[0]
    return own if busy[own] < busy[idlest] + LEAD else idlest
