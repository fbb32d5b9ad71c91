"""What an allocator is and what it may look at."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from acttail.analysis import Progress, alphas_or_mean, spectra
from acttail.budget import HIGHEST, check_target, model_sparsity
from acttail.calibrate import Calibration
from acttail.checkpoint import WeightSource
from acttail.errors import ActTailError, BudgetError, TextError
from acttail.projections import Projection
from acttail.tail import ESTIMATORS, TailFit

Array = npt.NDArray[np.float64]


@dataclass
class AllocationContext:
    """The model as an allocator sees it; spectra and fits are made when first asked for.

    Attributes:
        weights: names, shapes, costs and weights of the projections.
        progress: called with (done, total) during long work.
        calibration: what a calibrated allocator needs; None for data-free ones.
    """

    weights: WeightSource
    progress: Progress | None = None
    calibration: Calibration | None = None
    used_fits: dict[str, TailFit] | None = None
    _spectra: dict[bool, dict[str, Any]] = field(default_factory=dict)

    @property
    def projections(self) -> list[Projection]:
        """The projections, in the order of every array an allocator returns."""
        return self.weights.projections

    @property
    def costs(self) -> Array:
        """[P] weights read per token."""
        return np.array([p.cost for p in self.projections], dtype=np.float64)

    @property
    def blocks(self) -> npt.NDArray[np.int64]:
        """[P] block indices."""
        return np.array([p.block for p in self.projections], dtype=np.int64)

    def eigenvalues(self, *, farms: bool = False) -> dict[str, Any]:
        """Projection name -> ascending eigenvalues."""
        if farms not in self._spectra:
            self._spectra[farms] = spectra(self.weights, farms=farms, progress=self.progress)
        return self._spectra[farms]

    def alphas(self, estimator: str) -> Array:
        """[P] exponents by the named estimator; noted in the plan as the fits that were used.

        Raises:
            ActTailError: unknown estimator.
            SpectrumError: nothing to fit.
        """
        if estimator not in ESTIMATORS:
            raise ActTailError(f"unknown estimator {estimator!r}: use {', '.join(ESTIMATORS)}")
        found = self.eigenvalues(farms=estimator == "farms")
        fits = {p.name: ESTIMATORS[estimator](found[p.name]) for p in self.projections}
        self.used_fits = fits
        return alphas_or_mean([fits[p.name] for p in self.projections])


def calibration_of(context: AllocationContext) -> Calibration:
    """The context's calibration.

    Raises:
        TextError: there is none.
    """
    if context.calibration is None:
        raise TextError("this allocator is calibrated: give --calibration-text (or 'self')")
    return context.calibration


@dataclass(frozen=True)
class Allocator:
    """A named rule.

    Attributes:
        name: as given to `--allocator`.
        summary: one line for `--help` and the docs.
        defaults: argument name -> default; its type is the argument's type.
        allocate: (context, sparsity, arguments) -> [P] sparsities that meet the budget.
        needs_text: whether it must see calibration text.
        rule: which entries stay, unless the user says otherwise.
    """

    name: str
    summary: str
    defaults: Mapping[str, Any]
    allocate: Callable[[AllocationContext, float, Mapping[str, Any]], Array]
    needs_text: bool = False
    rule: str = "topk"

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults overridden by what was given, each in the type of its default.

        Raises:
            ActTailError: an unknown argument, or a value of the wrong type; names it.
        """
        merged = dict(self.defaults)
        for key, value in given.items():
            if key not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise ActTailError(
                    f"allocator {self.name} has no argument {key!r}; it takes: {known}"
                )
            kind = type(self.defaults[key])
            try:
                merged[key] = kind(value)
            except (TypeError, ValueError) as error:
                raise ActTailError(
                    f"allocator {self.name}: {key} must be of type {kind.__name__}, got {value!r}"
                ) from error
            if isinstance(merged[key], float) and not np.isfinite(merged[key]):
                raise ActTailError(f"allocator {self.name}: {key} must be finite, got {value!r}")
        return merged


def confined(
    context: AllocationContext, sparsity: float, names: Collection[str], rule: str, why: str
) -> Array:
    """[P] one sparsity for the named projections, 0 for all others.

    Args:
        context: the model.
        sparsity: model sparsity.
        names: projections that may be sparse.
        rule: the allocator's name, for the message.
        why: what limits it, for the message.

    Raises:
        BudgetError: the target is beyond what these projections can give; names the largest.
    """
    target = check_target(sparsity)
    mask = np.array([p.name in names for p in context.projections], dtype=np.float64)
    reach = HIGHEST * model_sparsity(mask, context.costs)
    if target > reach + 1e-9:
        raise BudgetError(
            f"{rule} reaches a model sparsity of {reach:.3f} at most, not {target}; {why}"
        )
    return mask * min(target * HIGHEST / reach, HIGHEST) if reach > 0 else mask


def unit(values: Array) -> Array:
    """Min-max map of a set of numbers to [-1, 1]; zeros if they are all equal."""
    low, high = float(values.min()), float(values.max())
    # Means of equal numbers differ in the last bits; that is not a spread.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return np.zeros_like(values)
    return np.asarray(2 * (values - low) / (high - low) - 1, dtype=np.float64)


def block_means(values: Array, blocks: npt.NDArray[np.int64]) -> Array:
    """[P]: the cost-free mean of the values over each entry's block."""
    means = {b: values[blocks == b].mean() for b in np.unique(blocks)}
    return np.array([means[b] for b in blocks], dtype=np.float64)
