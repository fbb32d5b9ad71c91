"""Timing two or more things by turns: what counts is their ratio within a round."""

import statistics
import time
from collections.abc import Callable


def by_turns(
    things: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each thing in each round, every round running all of them, order alternating."""
    for _ in range(warmup):
        for run in things.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for i in range(rounds):
        names = list(things) if i % 2 == 0 else list(things)[::-1]
        for name in names:
            started = time.perf_counter()
            things[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], top: str, bottom: str) -> dict[str, float]:
    """Median, lowest and highest of top / bottom over the rounds."""
    values = [a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)]
    return {
        "median": round(statistics.median(values), 4),
        "low": round(min(values), 4),
        "high": round(max(values), 4),
    }
