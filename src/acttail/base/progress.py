"""How long work tells how far it is, and the lines that say so where there is no terminal."""

import time
from collections.abc import Callable

# (steps done, steps in all), called by the work after each step.
Progress = Callable[[int, int], None]

# A line for shorter work would only be noise.
FIRST_AFTER_SECONDS = 2.0
_EVERY_SECONDS = 5.0


class ProgressLines:
    """A Progress that writes one plain line every few seconds.

    `12/80 (15 %), 40 s, about 3 min left` after a description. Between two steps nothing is called, so
    whoever owns the lines calls :meth:`tick` now and then; both are silent until a line is due.

    Args:
        description: what is being done.
        write: takes one line, without its end.
        clock: seconds, monotonic.
        first: seconds of work before the first line.
        every: seconds between lines.
    """

    def __init__(
        self, description: str, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic,
        first: float = FIRST_AFTER_SECONDS, every: float = _EVERY_SECONDS,
    ) -> None:  # fmt: skip
        self.description = description
        self._write = write
        self._clock = clock
        self._every = every
        self._started = self._phase = clock()
        self._due = self._started + first
        self._done = self._before = self._total = 0

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` steps are finished, and write if a line is due."""
        if total != self._total or done < self._done:
            # Another piece of work under the same description: its speed says nothing of the last one's.
            self._phase, self._before = self._clock(), done
        self._done, self._total = done, total
        if done < total:
            self.tick()

    def tick(self) -> None:
        """Write a line if one is due."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + self._every
        self._write(self._line(now))

    def _line(self, now: float) -> str:
        passed = spoken_seconds(now - self._started)
        if not self._total:
            return f"{self.description}: {passed}"
        share = 100 * self._done // self._total
        line = f"{self.description}: {self._done}/{self._total} ({share} %), {passed}"
        # Steps that were there before this run took no time of it.
        made = self._done - self._before
        if made > 0:
            left = (now - self._phase) / made * (self._total - self._done)
            line += f", about {spoken_seconds(left)} left"
        return line


def spoken_seconds(seconds: float) -> str:
    """`40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
