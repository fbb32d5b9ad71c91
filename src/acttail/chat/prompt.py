"""The line that is typed into: several lines, history, completion of commands, a bar below."""

from collections.abc import Callable, Iterable
from contextlib import suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from acttail.base.files import cache_dir
from acttail.chat.commands import COMMANDS

_STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"})
_FILE = "chat_history"
# Lines kept free below what is typed: all commands fit in.
_MENU = 3


class _Commands(Completer):
    """Names of commands, and of files where a command takes one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            for command in COMMANDS.values():
                if command.name.startswith(name):
                    yield Completion(f"/{command.name}", -len(text), display_meta=command.about)
        elif name in COMMANDS and COMMANDS[name].file:
            yield from self._paths.get_completions(Document(rest), event)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Of earlier chats, where it can be kept; what was asked is the user's own business."""
    path = cache_dir() / _FILE
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return FileHistory(str(path))
    return InMemoryHistory()


class Prompt:
    """Asks for a message.

    Args:
        bar: what stands in the bar below, asked whenever it is drawn.
    """

    def __init__(self, bar: Callable[[], str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ", multiline=True, prompt_continuation="  ", key_bindings=_keys(), history=_history(),
            completer=_Commands(), complete_style=CompleteStyle.MULTI_COLUMN, bottom_toolbar=bar,
            style=_STYLE, reserve_space_for_menu=_MENU, output=create_output(always_prefer_tty=True),
            enable_open_in_editor=False,
        )  # fmt: skip

    def __call__(self) -> str:
        """What was typed.

        Raises:
            KeyboardInterrupt: Ctrl-C; its text is what had been typed.
            EOFError: Ctrl-D.
        """
        try:
            return self._session.prompt()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._session.default_buffer.text) from None
