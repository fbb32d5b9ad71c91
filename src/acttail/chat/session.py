"""A chat on a terminal, and the answer to what was piped in."""

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from acttail.base.controls import clean
from acttail.chat.commands import Leave, run, tokens_per_second
from acttail.chat.conversation import Conversation
from acttail.chat.screen import MarkdownScreen, PlainScreen, Screen
from acttail.errors import ActTailError

# rich's own inline code has a black background, which is a hole in a light terminal.
_THEME = Theme(
    {"markdown.code": "bold cyan", "markdown.h1": "bold underline", "markdown.h2": "bold"}
)


def console_for(*, stderr: bool = False) -> Console:
    """A console that takes text as text: no markup, no emoji codes, nothing highlighted."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, theme=_THEME)


class Session:
    """A conversation and where it is shown.

    Args:
        conversation: with the model.
        name: of the model.
        out: for answers; Markdown is rendered if it is a terminal that can be drawn on.
        notes: for all else.
    """

    def __init__(self, conversation: Conversation, name: str, out: Console, notes: Console) -> None:
        self.conversation, self.name = conversation, clean(name)
        self._out, self._notes = out, notes

    def greet(self) -> None:
        """Say who answers, and how to leave."""
        engine = self.conversation.engine
        self._note(f"{self.name}: {engine.name} engine, {engine.dtype}", "")
        self._note("/help lists the commands, Ctrl-D leaves")

    def bar(self) -> str:
        """Model, sparsity and speed, in one line of the terminal."""
        talk, engine = self.conversation, self.conversation.engine
        parts = [engine.dtype, f"sparsity {talk.sparsity:g}" if talk.sparsity else "dense"]
        drafts = talk.turns[-1].drafts if talk.turns else None
        if drafts is not None and drafts.acceptance is not None:
            parts.append(f"lossless, {drafts.acceptance:.0%} kept")
        if talk.turns:
            last = talk.turns[-1]
            speed = tokens_per_second([last])
            parts += [] if math.isnan(speed) else [f"{speed:.1f} tokens/s"]
            parts.append(f"{last.prompt_tokens + last.tokens}/{engine.context}")
        rest = " · ".join(parts)
        room = self._notes.width - len(rest) - 4
        name = self.name if len(self.name) <= room else f"…{self.name[-max(1, room - 1) :]}"
        return f" {name} · {rest}"

    def loop(self, ask: Callable[[], str]) -> None:
        """Ask and answer until the user leaves.

        Args:
            ask: for what the user types; raises KeyboardInterrupt and EOFError for Ctrl-C and Ctrl-D.
        """
        while True:
            try:
                line = ask()
            except KeyboardInterrupt as stopped:
                if not str(stopped):
                    self._note("Ctrl-D leaves, /help lists the commands")
                continue
            except EOFError:
                return
            try:
                shown = run(self.conversation, line)
                if shown is not None:
                    self._note(shown)
                elif line.strip():
                    self._space()
                    with _stopping(self.conversation), _silent():
                        self.answer(line)
                    self._space()
            except Leave:
                return
            except KeyboardInterrupt:
                self._note("stopped before the answer began; your message is taken back")
            except ActTailError as error:
                self._note(" ".join(str(error).split()), "red")

    def answer(self, text: str) -> None:
        """Say something and show the answer.

        Raises:
            ActTailError: see :meth:`Conversation.ask`.
        """
        talk = self.conversation
        with closing(talk.ask(text)) as pieces, self._screen() as screen:
            for piece in pieces:
                screen.write(piece)
        last = talk.turns[-1]
        if last.finish == "cancelled":
            self._remark("stopped")
        elif last.finish == "length":
            full = last.prompt_tokens + last.tokens >= talk.engine.context
            why = "the context is full: /clear" if full else "--max-new-tokens sets the limit"
            self._remark(f"cut off after {last.tokens} tokens; {why}")
        elif not talk.messages[-1]["content"].strip():
            self._remark("the model said nothing")

    def _remark(self, text: str) -> None:
        """A note about an answer, set off from its text."""
        self._space()
        self._note(text)

    def _space(self) -> None:
        """Set an answer off from what is typed."""
        if self._out.is_terminal:
            self._out.print()

    def _screen(self) -> Screen:
        if self._out.is_terminal and not self._out.is_dumb_terminal:
            return MarkdownScreen(self._out)
        return PlainScreen(sys.stdout)

    def _note(self, text: str, style: str = "dim") -> None:
        for line in text.splitlines():
            self._notes.print(Text(clean(line), style))


@contextmanager
def _stopping(talk: Conversation) -> Iterator[None]:
    """Ctrl-C ends an answer at its next token; before its first one, or pressed again, at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if not talk.stop():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _silent() -> Iterator[None]:
    """Keys typed during an answer do not appear in the midst of it; they wait for the next message."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
