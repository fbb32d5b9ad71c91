"""Where an answer is shown as it comes: on a terminal as Markdown, elsewhere as plain text."""

import time
from typing import Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment

from acttail.base.controls import Cleaner
from acttail.chat.markdown import Block, split

# Often enough to look like writing; each time costs a few milliseconds that no token is decoded in.
_SECONDS = 0.08


class Screen(Protocol):
    """Shows one answer."""

    def __enter__(self) -> "Screen": ...

    def __exit__(self, *error: object) -> None: ...

    def write(self, text: str) -> None:
        """Show the next piece."""
        ...


class PlainScreen:
    """Writes an answer as it is, but for control characters.

    Args:
        file: a text stream.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._cleaner, self._last = file, Cleaner(), "\n"

    def __enter__(self) -> "PlainScreen":
        return self

    def __exit__(self, *error: object) -> None:
        self._put(self._cleaner.finish())
        if self._last != "\n":
            self._put("\n")

    def write(self, text: str) -> None:
        """See :meth:`Screen.write`."""
        self._put(self._cleaner.push(text))

    def _put(self, text: str) -> None:
        if text:
            self._last = text[-1]
            self._file.write(text)
            self._file.flush()


class _Tail:
    """The end of a block, as much as the screen has room for: what has scrolled away cannot be redrawn."""

    def __init__(self, text: str, *, gap: bool) -> None:
        self.text, self.gap = text, gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Block(self.text), options.update(height=None), pad=False)
        if self.gap:
            lines.insert(0, [])
        for i, line in enumerate(lines[-max(1, console.size.height - 1) :]):
            if i:
                yield Segment.line()
            yield from line


class MarkdownScreen:
    """Writes finished blocks once and for all, and redraws the last one only.

    Args:
        console: of a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._cleaner, self._rest = console, Cleaner(), ""
        self._any, self._drawn = False, 0.0
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="visible",
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> "MarkdownScreen":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._rest += self._cleaner.finish()
        self._live.stop()  # it takes the unfinished block away
        if self._rest.strip():
            self._print(self._rest)

    def write(self, text: str) -> None:
        """See :meth:`Screen.write`."""
        self._rest += self._cleaner.push(text)
        now = time.monotonic()
        if now - self._drawn < _SECONDS:
            return
        finished, self._rest = split(self._rest)
        with self._console:  # one write: nothing is seen half drawn
            if finished:
                self._live.update("", refresh=True)
            for block in finished:
                self._print(block)
            if self._rest.strip():
                self._live.update(_Tail(self._rest, gap=self._any), refresh=True)
        self._drawn = now

    def _print(self, text: str) -> None:
        if self._any:
            self._console.print()
        self._console.print(Block(text))
        self._any = True
