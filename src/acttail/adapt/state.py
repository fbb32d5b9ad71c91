"""Where a run is, in a file of the cache, so that one that was stopped goes on as if it had not been."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from acttail.adapt.parts import Part, values
from acttail.base.files import cache_dir
from acttail.base.tensors import write_tensors
from acttail.errors import ActTailError

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Position:
    """How far a run is. Everything random in it is a function of the step.

    Attributes:
        step: steps that are done.
        seconds: wall time they took, of all starts together.
        cpu_seconds: time of all processors that they took.
        before: KL on the held-out windows before the first step, nats per token.
        best: lowest since.
        best_step: the step it was seen after.
        worse: validations since.
        validated: how many there were.
        history: [(step, KL on the held-out windows)].
        over: whether the training has ended.
    """

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    before: float = float("inf")
    best: float = float("inf")
    best_step: int = 0
    worse: int = 0
    validated: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    over: bool = False


class RunState:
    """The file of one run: position, values under training, the best of them, and the optimiser's moments.

    Args:
        key: names the run: model, plan, windows and settings.
    """

    def __init__(self, key: str) -> None:
        self.path: Path = cache_dir() / "adapt" / f"{key}.safetensors"

    def read(
        self, parts: Sequence[Part], optimiser: torch.optim.Optimizer, best: dict[str, torch.Tensor]
    ) -> Position | None:
        """Put the parts and the optimiser where the run stopped.

        Args:
            parts: under training, in place.
            optimiser: of their parameters, in place.
            best: filled with the best values so far.

        Returns:
            None if there is no such run, or its file is damaged; then nothing has changed.
        """
        if not self.path.exists():
            return None
        parameters = {name: p for part in parts for name, p in part.parameters.items()}
        try:
            with safe_open(self.path, framework="pt") as file:
                position = Position(**json.loads((file.metadata() or {})["position"]))
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for name, p in parameters.items():
                for kind in ("now", "best", *_MOMENTS):
                    if found[f"{kind}.{name}"].shape != p.shape:
                        return None
        except Exception:  # a damaged file: the run begins again
            return None
        position.history = [(int(step), float(kl)) for step, kl in position.history]
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(found[f"now.{name}"])
                best[name] = found[f"best.{name}"].to(p.device)
                optimiser.state[p] = {
                    "step": torch.tensor(float(position.step)),
                    **{kind: found[f"{kind}.{name}"].to(p.device) for kind in _MOMENTS},
                }
        return position

    def write(
        self, position: Position, parts: Sequence[Part], optimiser: torch.optim.Optimizer,
        best: Mapping[str, torch.Tensor],
    ) -> None:  # fmt: skip
        """Replace the file, whole or not at all; a cache that cannot be written costs only the resume."""
        tensors: dict[str, torch.Tensor] = {}
        for part in parts:
            for name, p in part.parameters.items():
                state: Any = optimiser.state.get(p, {})
                for kind in _MOMENTS:
                    tensors[f"{kind}.{name}"] = state.get(kind, torch.zeros_like(p))
        tensors |= {f"now.{name}": value for name, value in values(parts).items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        with suppress(OSError, ActTailError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            write_tensors(self.path, plain, {"position": json.dumps(asdict(position))})

    def remove(self) -> None:
        """The run has served."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
