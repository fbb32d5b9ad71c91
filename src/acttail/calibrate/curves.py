"""Sensitivity curves of one model: the value, its file, and what they predict for a budget."""

import math
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from acttail.base.controls import clean
from acttail.base.schema import Name, SchemaError, checked
from acttail.base.tensors import write_tensors
from acttail.errors import PlanError, reason
from acttail.maths.curves import interpolator

Array = npt.NDArray[np.float64]
_About = dict[Name, Name]
_Names = list[Name]


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
        write_tensors(path, {"grid": torch.from_numpy(self.grid), **tensors}, self.about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SensitivityCurves":
        """Read curves from a file.

        Raises:
            PlanError: no such file, or not a file of curves.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise PlanError(f"cannot read curves from {path}: {reason(error)}") from error
        if "grid" not in tensors:
            raise PlanError(f"{path} holds no sensitivity curves")
        try:
            return _checked(tensors, about)
        except SchemaError as error:
            raise PlanError(f"{path} holds no sensitivity curves: {error}") from None


def _checked(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> SensitivityCurves:
    """The curves of a file's tensors.

    Raises:
        SchemaError: they are no curves; names the tensor.
    """
    for key, tensor in tensors.items():
        known = key == "grid" or key.startswith("curve.")
        if not known or key == "curve.":
            raise SchemaError(f"the tensor {clean(key)!r} is not known")
        if tensor.dtype is not torch.float64 or tensor.dim() != 1:
            raise SchemaError(f"{clean(key)} is not a vector of float64")
        if not bool(tensor.isfinite().all()):
            raise SchemaError(f"{clean(key)} holds a number that is not finite")
    grid = tensors.pop("grid").numpy()
    rising = len(grid) >= 2 and grid[0] == 0 and grid[-1] <= 1 and bool((np.diff(grid) > 0).all())
    if not rising:
        raise SchemaError("grid does not rise from 0 to 1 at most")
    if not tensors:
        raise SchemaError("there is no curve")
    curves = {}
    for key, tensor in tensors.items():
        curve = tensor.numpy()
        if len(curve) != len(grid):
            raise SchemaError(f"{clean(key)} has {len(curve)} points, the grid {len(grid)}")
        if curve[0] < 0 or bool((np.diff(curve) < 0).any()):
            raise SchemaError(f"{clean(key)} is not a loss that rises with sparsity")
        curves[key.removeprefix("curve.")] = curve
    checked(_About, about)
    checked(_Names, list(curves))
    return SensitivityCurves(grid, curves, about)


def predicted_loss(curves: SensitivityCurves, sparsities: dict[str, float]) -> float:
    """Sum of the curves at the given sparsities: the predicted KL divergence per token, nats.

    A curve of what is not named, such as the output head's, is not counted: that stays dense.
    """
    return math.fsum(
        float(interpolator(curves.grid, curves.curves[name])(np.array([sparsity]))[0])
        for name, sparsity in sparsities.items()
    )
