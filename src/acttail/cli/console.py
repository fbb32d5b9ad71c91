"""What the sub-commands print: results on stdout; remarks, warnings and errors on stderr.

Both consoles print text as it is: a model or a path may hold brackets, which rich would take for markup.
Styles are given beside a text, never inside it; control characters in it, which a terminal would obey, are left out.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from acttail.base.controls import clean
from acttail.base.files import finite


class CleanConsole(Console):
    """Prints no control characters but its own."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See :class:`rich.console.Console`."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else clean(segment.text)
            yield Segment(text, segment.style, segment.control)


out = CleanConsole(highlight=False, markup=False, emoji=False)
err = CleanConsole(stderr=True, highlight=False, markup=False, emoji=False)


class _Voice:
    """Whether remarks and progress are wanted; set anew by every command line."""

    quiet = False

    def last(self, line: str) -> None:
        """Say on stderr why the command ends, if stderr still takes anything."""
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


voice = _Voice()


def say(line: str, style: str | None = None) -> None:
    """Print one line of a result, not broken at the terminal's width: it may hold a path."""
    out.print(line, style=style, soft_wrap=True)


def note(line: str, style: str | None = "dim") -> None:
    """Print a remark on stderr, unless --quiet was given."""
    if not voice.quiet:
        err.print(line, style=style, soft_wrap=True)


def warn(line: str) -> None:
    """Print on stderr what must be known, --quiet or not."""
    err.print(line, style="yellow", soft_wrap=True)


def fail(message: str, code: int, error: BaseException) -> int:
    """Print one line on stderr (and the traceback under --debug); return the exit status."""
    if os.environ.get("ACTTAIL_DEBUG") == "1":
        with suppress(OSError):
            traceback.print_exception(error)
    voice.last(f"acttail: {clean(' '.join(message.split()))}")
    return code


def open_streams() -> None:
    """Make stdout and stderr take every text: a character that their encoding lacks becomes a question mark.

    Where one was closed before the start (`>&-`), what is written to it is an error, and no file that is opened
    later takes its place.
    """
    while (lowest := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(lowest)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(
                sys,
                name,
                os.fdopen(descriptor, "w", encoding="utf-8", errors="replace", closefd=False),
            )
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def abandon_streams() -> None:
    """Let what could not be written go, so that Python does not try again, and complain, at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(value: Any) -> None:
    """Print JSON on stdout. A number that is not finite becomes null: JSON has no NaN."""
    sys.stdout.write(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def with_error(value: float, error: float | None) -> str:
    """`23.11 ± 0.42`, or the value alone."""
    if not math.isfinite(value):
        return "not finite"
    digits = 2 if value < 1000 else 0
    return f"{value:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error is not None else "")
