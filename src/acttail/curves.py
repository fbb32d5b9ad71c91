"""Sensitivity curves: how much the model's output suffers as one projection grows sparser.

F_i(s) = ½ E_t[(g_t · W_i (x_t - TopK_s(x_t)))²], with g_t the gradient, with respect to the projection's
output, of the sum of log-probabilities of tokens sampled from the model: the Fisher-weighted, second
order estimate of the KL divergence per token.

No product with W is needed per grid point: g · WΔx = (Wᵀg) · Δx, so one backward pass, one sort of |x|
and a cumulative sum over the sorted products give the curve at every s at once.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from acttail.backends import cpu, reference
from acttail.budget import kept_entries
from acttail.calibrate import BlockTape, Calibration, backward_by_block, fisher_objective, probing
from acttail.checkpoint import LoadedWeights
from acttail.errors import ActTailError, PlanError
from acttail.evaluate.perplexity import divergence
from acttail.files import cache_dir, replacing
from acttail.models import input_device
from acttail.ops import topk_mask
from acttail.projections import find_projections

Array = npt.NDArray[np.float64]

LOSSES = ("fisher", "output", "kl")
# Denser towards 1, where the curves bend most.
GRID = (
    *(round(0.05 * i, 2) for i in range(19)), 0.925, 0.95, 0.965, 0.98, 0.99,
)  # fmt: skip
# One forward pass per projection and point: 7 points where 24 would take an hour for 512 tokens.
KL_GRID = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class SensitivityCurves:
    """The measured curves of one model on one text.

    Attributes:
        grid: [G] sparsities, ascending from 0.
        curves: projection name -> [G] float64, F at each grid point, non-decreasing, F(0) = 0.
        about: the protocol: model, text, tokens, window, loss, dtype, seed.
    """

    grid: Array
    curves: dict[str, Array]
    about: dict[str, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curves as safetensors, whole or not at all.

        Raises:
            ActTailError: the file cannot be written.
        """
        tensors = {f"curve.{name}": torch.from_numpy(c) for name, c in self.curves.items()}
        with replacing(path) as temporary:
            save_file(
                {"grid": torch.from_numpy(self.grid), **tensors}, temporary, metadata=self.about
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SensitivityCurves":
        """Read curves from a file.

        Raises:
            PlanError: no such file, or not a file of curves.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            from acttail.models import reason

            raise PlanError(f"cannot read curves from {path}: {reason(error)}") from error
        if "grid" not in tensors:
            raise PlanError(f"{path} holds no sensitivity curves")
        grid = tensors.pop("grid")
        return cls(grid, {k.removeprefix("curve."): v for k, v in tensors.items()}, about)


class _Accumulator:
    """Sums of F over tokens, one row of the grid per projection."""

    def __init__(
        self, names: list[str], d_in: dict[str, int], grid: Array, *, threshold: bool
    ) -> None:
        self._threshold = threshold
        self.sums = {name: torch.zeros(len(grid), dtype=torch.float64) for name in names}
        # How many of the smallest entries each grid point drops.
        self._dropped = {
            d: torch.tensor([d - kept_entries(s, d) for s in grid]) for d in set(d_in.values())
        }

    def dropped(self, d_in: int) -> torch.Tensor:
        """[G] int64: entries dropped at each grid point."""
        return self._dropped[d_in]

    def visit(self, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add one block's projections; those that read the same vector share its sort."""
        energies = _threshold_energies if self._threshold else _topk_energies
        groups: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
        for name, (x, _) in seen.items():
            groups[x.data_ptr(), x.shape].append(name)
        for names in groups.values():
            x = seen[names[0]][0].float()
            vectors = [seen[name][1].float() for name in names]
            sums = energies(x, vectors, self._dropped[x.shape[-1]])
            for name, row in zip(names, sums, strict=True):
                self.sums[name] += row


def _topk_energies(
    x: torch.Tensor, vectors: list[torch.Tensor], dropped: torch.Tensor
) -> torch.Tensor:
    """[n, G] half squared partial sums when each row drops its own smallest entries."""
    if cpu.supports(x):
        return cpu.partial_energies(x, vectors, dropped)
    return reference.partial_energies(x, vectors, dropped)


def _threshold_energies(
    x: torch.Tensor, vectors: list[torch.Tensor], dropped: torch.Tensor
) -> torch.Tensor:
    """[n, G] half squared partial sums when one magnitude decides for all rows of the window.

    The thresholds are the window's own quantiles, so that every point has its sparsity exactly.
    """
    magnitudes = x.abs()
    ranks = (dropped.double() / x.shape[-1] * x.numel()).round().long().clamp(0, x.numel() - 1)
    edges = magnitudes.flatten().sort().values[ranks.to(x.device)]
    # An entry belongs to the first grid point whose threshold it does not reach.
    place = torch.bucketize(magnitudes, edges, right=True)
    sums = []
    for v in vectors:
        parts = torch.zeros(x.shape[0], len(edges) + 1, device=x.device)
        parts.scatter_add_(1, place, x * v)
        partial = parts.cumsum(1)[:, : len(edges)]
        sums.append(0.5 * partial.double().square().sum(0))
    return torch.stack(sums).cpu()


def _monotone(values: Array) -> Array:
    return np.maximum.accumulate(np.maximum(values, 0.0))


def measure(
    calibration: Calibration,
    *,
    loss: str = "fisher",
    selection: str = "topk",
    grid: tuple[float, ...] | None = None,
    resume: bool = True,
) -> SensitivityCurves:
    """Measure the curves of every projection, one backward pass per window.

    Memory is bounded by one block's activations plus one hidden state per block. After each window
    the sums are written to the cache; a run that was killed goes on from there and gives the same
    result, for each window draws from a seed of its own.

    Args:
        calibration: model and text.
        loss: ``fisher`` (default; docs/log.md); ``output``, the relative error of the projection's
            own output, which needs no gradient of the model; or ``kl``, the measured KL divergence to
            the dense model's logits with that projection alone sparse, one pass per point.
        selection: ``topk``, or ``threshold``: one magnitude for all tokens of a window, so that a token
            with large inputs keeps more. Must be the rule that will run; not for ``kl``.
        grid: sparsities at which the curves are taken, ascending, the first 0; None for the default.
        resume: read and write partial results in the cache folder.

    Returns:
        The curves.

    Raises:
        ActTailError: unknown loss or a bad grid.
        TextError: the text is too short.
    """
    if loss not in LOSSES:
        raise ActTailError(f"unknown loss {loss!r}: use {' or '.join(LOSSES)}")
    if selection not in ("topk", "threshold") or (selection == "threshold" and loss == "kl"):
        raise ActTailError(f"curves of {loss} cannot be taken under the selection {selection!r}")
    grid = grid or (KL_GRID if loss == "kl" else GRID)
    points = np.asarray(grid, dtype=np.float64)
    if len(points) < 3 or points[0] != 0 or not (np.diff(points) > 0).all() or points[-1] > 0.99:
        raise ActTailError(
            "a grid of sparsities ascends from 0 to at most 0.99, with 3 points or more"
        )
    model = calibration.model
    batches = calibration.batches()
    projections = find_projections(model)
    names = [p.name for p in projections]
    sums = _Accumulator(
        names, {p.name: p.d_in for p in projections}, points,
        threshold=selection == "threshold",
    )  # fmt: skip
    scale = dict.fromkeys(names, 0.0)
    partial = (
        _Partial(calibration.key("curves", loss, selection, tuple(grid)), names) if resume else None
    )
    first = partial.read(sums.sums, scale) if partial else 0
    step = {"output": _output_step, "fisher": _fisher_step, "kl": _kl_step}[loss]
    device = input_device(model)
    for index in range(first, len(batches)):
        generator = torch.Generator(device).manual_seed(calibration.seed * 1_000_003 + index)
        step(model, batches[index : index + 1].to(device), generator, sums, scale)
        if partial:
            partial.write(index + 1, sums.sums, scale)
        if calibration.progress is not None:
            calibration.progress(index + 1, len(batches))
    curves = {
        n: _monotone(
            sums.sums[n].numpy() / (scale[n] if loss == "output" and scale[n] else batches.numel())
        )
        for n in names
    }
    about = {
        "loss": loss, "selection": selection, "text": calibration.text.name, "tokens": str(batches.numel()),
        "window": str(batches.shape[1]), "seed": str(calibration.seed),
        "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    return SensitivityCurves(points, curves, about)


def _fisher_step(
    model: Any,
    ids: torch.Tensor,
    generator: torch.Generator,
    sums: _Accumulator,
    scale: dict[str, float],
) -> None:
    backward_by_block(model, ids, fisher_objective(generator), lambda _, seen: sums.visit(seen))


def _output_step(
    model: Any,
    ids: torch.Tensor,
    generator: torch.Generator,
    sums: _Accumulator,
    scale: dict[str, float],
) -> None:
    """A random g ~ N(0, I) makes E[(g·WΔx)²] = |WΔx|², so the same machinery gives output errors."""
    weights = LoadedWeights(model)
    by_name = {p.name: p for p in weights.projections}

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight = weights.weight(by_name[name])
        g = torch.randn(flat.shape[0], weight.shape[0], generator=generator, device=x.device)
        v = (g.to(weight.dtype) @ weight).to(flat.dtype)  # [rows, d_in], Wᵀg
        sums.visit({name: (flat, v)})
        scale[name] += 0.5 * float((flat * v).float().sum(-1).double().square().sum())
        return x

    with torch.no_grad(), probing(model, probe):
        model(input_ids=ids, use_cache=False)


def _kl_step(
    model: Any,
    ids: torch.Tensor,
    generator: torch.Generator,
    sums: _Accumulator,
    scale: dict[str, float],
) -> None:
    """KL(dense || one projection sparse), summed over positions; a pass starts at that block."""
    projections = find_projections(model)
    chosen: dict[str, int] = {}

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        return topk_mask(x, chosen[name]) if name in chosen else x

    tape = BlockTape(model)
    with probing(model, probe):
        with tape, torch.no_grad():
            dense = model(input_ids=ids, use_cache=False).logits.flatten(0, -2).detach()
        for p in projections:
            with tape.starting_at(p.block), torch.no_grad():
                for point, dropped in enumerate(sums.dropped(p.d_in).tolist()):
                    if dropped:
                        chosen.update({p.name: p.d_in - dropped})
                        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, -2)
                        kl, _ = divergence(dense, logits)
                        sums.sums[p.name][point] += float(kl.double().sum())
            chosen.clear()


class _Partial:
    """Sums so far, in the cache, rewritten after each window."""

    def __init__(self, key: str, names: list[str]) -> None:
        self._path: Path = cache_dir() / "curves" / f"{key}.safetensors"
        self._names = names

    def read(self, sums: dict[str, torch.Tensor], scale: dict[str, float]) -> int:
        """Fill `sums` and `scale`; return the number of windows they hold."""
        if not self._path.exists():
            return 0
        try:
            with safe_open(self._path, framework="pt") as file:
                done = int((file.metadata() or {})["windows"])
                read = {name: file.get_tensor(name) for name in self._names}
                scales = file.get_tensor("scale").tolist()
        except Exception:  # a damaged cache entry is computed again
            return 0
        sums.update(read)
        scale.update(zip(self._names, scales, strict=True))
        return done

    def write(self, done: int, sums: dict[str, torch.Tensor], scale: dict[str, float]) -> None:
        """Replace the file; a cache that cannot be written costs only the resume."""
        with suppress(OSError, ActTailError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as temporary:
                scales = torch.tensor([scale[n] for n in self._names], dtype=torch.float64)
                save_file({**sums, "scale": scales}, temporary, metadata={"windows": str(done)})


def interpolator(grid: Array, values: Array) -> Callable[[Array], Array]:
    """Smooth monotone cubic through a curve (Fritsch & Butland, by scipy's PCHIP).

    With linear pieces the optimum would stick to grid points.
    """
    from scipy.interpolate import PchipInterpolator

    smooth = PchipInterpolator(grid, values)
    return lambda s: np.asarray(smooth(np.clip(s, grid[0], grid[-1])), dtype=np.float64)


def predicted_loss(curves: SensitivityCurves, sparsities: dict[str, float]) -> float:
    """Sum of the curves at the given sparsities: the predicted KL divergence per token, nats."""
    return math.fsum(
        float(interpolator(curves.grid, curve)(np.array([sparsities[name]]))[0])
        for name, curve in curves.curves.items()
    )
