"""What an adaptation is asked for, as one value, and how far through it a run is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from acttail.adapt.parts import check_parts
from acttail.calibrate.text import check_window
from acttail.errors import ActTailError

# docs/log.md: 0.9 and 0.95 forget early gradients sooner than AdamW's 0.999, which a run of a hundred steps never fills.
BETAS = (0.9, 0.95)
WARM_UP = 10
CLIP = 1.0


def _positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ActTailError(f"{what} must be a positive number, got {value}")


def _counted(what: str, value: int) -> None:
    if value < 1:
        raise ActTailError(f"{what} must be at least 1, got {value}")


# How each field is judged by itself.
CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "train": lambda what, value: check_parts(value),
    "minutes": _positive, "steps": _counted, "window": lambda what, value: check_window(value, None, None),
    "batch": _counted, "rank": _counted, "learning_rate": _positive, "evaluations": _counted, "patience": _counted,
}  # fmt: skip


def check(field: str, value: Any) -> None:
    """Judge one field of :class:`Settings`; None, where it may be, is judged with the others.

    Raises:
        ActTailError: it is of no use; says why.
    """
    if value is not None:
        CHECKS[field](field.replace("_", " "), value)


@dataclass(frozen=True)
class Settings:
    """How a model is adapted.

    Attributes:
        train: what is trained, names of :data:`acttail.adapt.parts.KINDS`.
        minutes: wall time of training and validation; None where `steps` counts.
        steps: optimiser steps instead, which make a run repeatable to the bit; None where minutes count.
        window: tokens per window.
        batch: windows per step.
        rank: of LoRA.
        learning_rate: multiplies the learning rate of each kind.
        held_out: tokens that validate, never trained on.
        evaluations: how often the run is validated, evenly over its length.
        patience: validations without a new best after which it stops.
        seed: of everything random.
    """

    train: tuple[str, ...] = ("lora",)
    minutes: float | None = 10.0
    steps: int | None = None
    window: int = 256
    batch: int = 4
    rank: int = 16
    learning_rate: float = 1.0
    held_out: int = 4096
    evaluations: int = 8
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in CHECKS:
            check(name, getattr(self, name))
        if (self.minutes is None) == (self.steps is None):
            raise ActTailError(
                "a run is so many minutes or so many steps long: give one of the two"
            )
        check_window(self.window, self.held_out, None)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over, in [0, 1].

        Args:
            step: steps that are done.
            seconds: that they took, of all starts of the run together.
        """
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.minutes is not None  # noqa: S101  (judged when made)
        return min(seconds / (60 * self.minutes), 1.0)

    def rate(self, step: int, done: float) -> float:
        """Factor of the learning rates: a warm-up, then half a cosine down to a hundredth.

        Args:
            step: steps that are done.
            done: share of the run that is over.
        """
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * min((step + 1) / WARM_UP, 1.0) * (0.01 + 0.99 * cosine)
