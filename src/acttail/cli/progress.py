"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere, nothing if quiet."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from acttail.base.progress import FIRST_AFTER_SECONDS, ProgressLines
from acttail.base.progress import Progress as Callback
from acttail.cli.console import err, voice

# How often lines are asked whether one is due.
_TICK_SECONDS = 0.5


class _Bar:
    """A bar that shows itself once the work has taken two seconds: for shorter work it would flicker."""

    def __init__(self, description: str, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task: Any = self._progress.add_task(description, total=None)
        self._due = time.monotonic() + FIRST_AFTER_SECONDS
        self._lock = threading.Lock()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` steps are finished."""
        self._progress.update(self._task, completed=done, total=total)
        if done < total:
            self.tick()

    def tick(self) -> None:
        """Show the bar if it is time."""
        with self._lock:
            if not self._shown and time.monotonic() >= self._due:
                self._shown = True
                self._progress.start()

    def close(self) -> None:
        """Remove the bar."""
        with self._lock:
            if self._shown:
                self._progress.stop()
            self._shown = True


@contextmanager
def work(description: str) -> Iterator[Callback]:
    """A progress callback for the length of a block.

    Work that calls nothing for long is still seen to run: a thread asks whether a line is due.
    """
    if voice.quiet:
        yield lambda done, total: None
        return
    shown = (
        _Bar(description, err)
        if err.is_terminal
        else ProgressLines(description, lambda line: err.print(line, soft_wrap=True))
    )
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_TICK_SECONDS):
            shown.tick()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        over.set()
        thread.join()
        if isinstance(shown, _Bar):
            shown.close()
