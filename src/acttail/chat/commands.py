"""What may be typed instead of a message: one row per command."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from acttail.base.files import expanded
from acttail.chat.conversation import Conversation, Turn
from acttail.chat.transcript import load_messages, save_messages
from acttail.errors import ActTailError

# "/usr/bin is full" and "/ 2" are messages.
_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?\Z", re.DOTALL)


class Leave(Exception):  # noqa: N818  (the end of a chat is no error)
    """The user wants to go."""


@dataclass(frozen=True)
class Command:
    """A row.

    Attributes:
        name: without the slash.
        takes: what follows it, for the help; "" for nothing.
        about: what it does.
        run: (conversation, what followed) -> lines to show.
        file: whether a file's name follows.
    """

    name: str
    takes: str
    about: str
    run: Callable[[Conversation, str], str]
    file: bool = False


def run(conversation: Conversation, line: str) -> str | None:
    """Do what a line says; None if it is a message.

    Args:
        conversation: to do it to.
        line: as typed.

    Returns:
        Text to show, several lines perhaps.

    Raises:
        ActTailError: there is no such command, or it cannot be done.
        Leave: the user wants to go.
    """
    found = _COMMAND.match(line.rstrip())
    if found is None:
        return None
    command = COMMANDS.get(found[1].lower())
    if command is None:
        raise ActTailError(f"there is no command /{found[1]}; /help lists those there are")
    rest = (found[2] or "").strip()
    if rest and not command.takes:
        raise ActTailError(f"/{command.name} takes nothing")
    return command.run(conversation, rest)


def _help(conversation: Conversation, rest: str) -> str:
    rows = [(f"/{c.name} {c.takes}".rstrip(), c.about) for c in COMMANDS.values()]
    return "\n".join(f"{left:<15}  {right}" for left, right in [*rows, *_KEYS])


def _sparsity(conversation: Conversation, rest: str) -> str:
    if rest:
        try:
            value = float(rest)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 0.99:
            raise ActTailError(f"/sparsity takes a number from 0 to 0.99, got {rest!r}")
        conversation.at(value)
    plan = conversation.plan
    if plan is None or conversation.sparsity == 0:
        return "dense: every weight is read"
    return f"sparsity {conversation.sparsity:g}, a plan of {plan.allocator}"


def _stats(conversation: Conversation, rest: str) -> str:
    engine, turns = conversation.engine, conversation.turns
    rows = [("engine", f"{engine.name}, {engine.dtype}, {_sparsity(conversation, '')}")]
    if turns:
        last = turns[-1]
        rows.append(("last answer", f"{last.tokens} tokens, {_speed([last])}{_read(last)}"))
        if last.drafts is not None:
            rows.append(("its drafts", str(last.drafts)))
        rows.append(
            ("its prompt", f"{last.prompt_tokens} tokens, {last.prompt_tokens - last.held} of them new, "
             f"{last.prefill_seconds:.2f} s")
        )  # fmt: skip
        total = sum(t.tokens for t in turns)
        rows.append(("all answers", f"{len(turns)}: {total} tokens, {_speed(turns)}"))
        used = last.prompt_tokens + last.tokens
        rows.append(("context", f"{used} of {engine.context} tokens at the last answer"))
    else:
        rows.append(("answers", "none yet"))
    return "\n".join(f"{left:<13}{right}" for left, right in rows)


def tokens_per_second(turns: list[Turn]) -> float:
    """Decoding speed over some answers; NaN if they decoded nothing."""
    seconds = sum(t.decode_seconds for t in turns)
    return sum(t.decoded for t in turns) / seconds if seconds > 0 else math.nan


def _speed(turns: list[Turn]) -> str:
    speed = tokens_per_second(turns)
    return "too short to time" if math.isnan(speed) or speed == 0 else f"{speed:.1f} tokens/s"


def _read(turn: Turn) -> str:
    return (
        "" if math.isnan(turn.read_share) else f", {turn.read_share:.1%} of the weights' bytes read"
    )


def _save(conversation: Conversation, rest: str) -> str:
    path = _path("save", rest)
    if not conversation.messages:
        raise ActTailError("nothing has been said yet")
    save_messages(path, conversation.engine.source, conversation.messages)
    return f"{len(conversation.messages)} messages written to {path}"


def _load(conversation: Conversation, rest: str) -> str:
    path = _path("load", rest)
    conversation.resume(load_messages(path))
    return f"{len(conversation.messages)} messages read from {path}"


def _path(name: str, rest: str) -> Path:
    if not rest:
        raise ActTailError(f"/{name} takes the name of a file, such as /{name} talk.json")
    return expanded(rest)


def _clear(conversation: Conversation, rest: str) -> str:
    conversation.clear()
    return "forgotten" + ("; the system message stays" if conversation.system is not None else "")


def _system(conversation: Conversation, rest: str) -> str:
    if rest == "none":
        conversation.system = None
    elif rest:
        conversation.system = rest
    text = conversation.system
    return "no system message" if text is None else f"system message: {text}"


def _leave(conversation: Conversation, rest: str) -> str:
    raise Leave


COMMANDS = {
    c.name: c
    for c in (
        Command("sparsity", "0.3", "drop this share of the inputs from now on; 0 is dense", _sparsity),
        Command("stats", "", "tokens per second, share of the weights' bytes read", _stats),
        Command("system", "TEXT", "set the system message; none takes it away", _system),
        Command("clear", "", "forget what was said", _clear),
        Command("save", "FILE", "write the conversation as JSON (OpenAI's messages)", _save, file=True),
        Command("load", "FILE", "go on with a conversation that was saved", _load, file=True),
        Command("help", "", "this", _help),
        Command("quit", "", "leave", _leave),
    )
}  # fmt: skip
_KEYS = (
    ("Enter", "send; Alt-Enter, or Enter after a backslash, begins a line"),
    ("Ctrl-C", "stop the answer, or drop what is typed"),
    ("Ctrl-D", "leave"),
)
