"""The model as an allocator sees it: shapes, costs, spectra and fits, and what was measured on text."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from acttail.base.progress import Progress
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.curves import SensitivityCurves
from acttail.errors import ActTailError, TextError
from acttail.model.projections import Projection
from acttail.model.weights import WeightSource, with_head
from acttail.plan import sketch, sketch_of
from acttail.spectrum.analysis import alphas_or_mean, spectra
from acttail.spectrum.tail import ESTIMATORS, TailFit

Array = npt.NDArray[np.float64]
Sketch = tuple[float, float]


class _Sketching:
    """A weight source that takes each matrix's sketch as it is read, so that it need not be read again."""

    def __init__(self, weights: WeightSource, sketches: dict[str, Sketch]) -> None:
        self._weights = weights
        self._sketches = sketches
        self.name = weights.name
        self.projections, self.head = weights.projections, weights.head

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in]."""
        weight = self._weights.weight(projection)
        if projection.name not in self._sketches:
            self._sketches[projection.name] = sketch(weight)
        return weight

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """Some entries of a weight, [n]."""
        return self._weights.entries(projection, index)

    def tensor(self, name: str) -> torch.Tensor:
        """Any other parameter by its name."""
        return self._weights.tensor(name)


@dataclass
class AllocationContext:
    """The model as an allocator sees it; spectra and fits are made when first asked for, and kept.

    A context is for one model whose weights stay as they are. Data-free plans made from one context read
    each matrix once between them.

    Attributes:
        weights: names, shapes, costs and weights of the projections; those of
            :func:`acttail.model.weights.with_head` put the output head into the budget.
        progress: called with (done, total) during long work.
        calibration: what a calibrated allocator needs; None for data-free ones.
        curves: of this model, to use instead of a file's or of measuring some.
        prices: projection -> its cost in the budget where that is not the number of its weights; for each, or none.
    """

    weights: WeightSource
    progress: Progress | None = None
    calibration: Calibration | None = None
    curves: SensitivityCurves | None = None
    prices: Mapping[str, float] | None = None
    _spectra: dict[bool, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    _fits: dict[str, dict[str, TailFit]] = field(default_factory=dict, repr=False)
    _sketches: dict[str, Sketch] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._sketches.update(getattr(self.weights, "sketches", None) or {})

    def with_head(self) -> "AllocationContext":
        """The same with the output head in the budget; what is measured of the rest is shared.

        Raises:
            ModelError: the model has none that could be sparse.
        """
        return replace(self, weights=with_head(self.weights))

    @property
    def projections(self) -> list[Projection]:
        """The projections, in the order of every array an allocator returns."""
        return self.weights.projections

    @property
    def costs(self) -> Array:
        """[P] what each costs in the budget: the weights read per token, unless there are prices."""
        prices = self.prices or {p.name: p.cost for p in self.projections}
        return np.array([prices[p.name] for p in self.projections], dtype=np.float64)

    @property
    def blocks(self) -> npt.NDArray[np.int64]:
        """[P] block indices."""
        return np.array([p.block for p in self.projections], dtype=np.int64)

    def eigenvalues(self, *, farms: bool = False) -> dict[str, torch.Tensor]:
        """Projection name -> ascending eigenvalues, float64.

        Raises:
            SpectrumError: a weight has NaN or infinite entries.
        """
        found = self._spectra.setdefault(farms, {})
        missing = [p.name for p in self.projections if p.name not in found]
        if missing:
            source = _Sketching(self.weights, self._sketches)
            found |= spectra(source, farms=farms, progress=self.progress, only=missing)
        return found

    def fits(self, estimator: str) -> dict[str, TailFit]:
        """Projection name -> tail fit by the named estimator.

        Raises:
            ActTailError: unknown estimator.
            SpectrumError: a spectrum is not finite.
        """
        if estimator not in ESTIMATORS:
            raise ActTailError(f"unknown estimator {estimator!r}: use {', '.join(ESTIMATORS)}")
        fits = self._fits.setdefault(estimator, {})
        found = self.eigenvalues(farms=estimator == "farms")
        for p in self.projections:
            if p.name not in fits:
                fits[p.name] = ESTIMATORS[estimator](found[p.name])
        return fits

    def alphas(self, estimator: str) -> Array:
        """[P] exponents of :meth:`fits`; a projection without a tail gets the mean.

        Raises:
            ActTailError: unknown estimator.
            SpectrumError: nothing to fit.
        """
        fits = self.fits(estimator)
        return alphas_or_mean([fits[p.name] for p in self.projections])

    def sketches(self) -> dict[str, Sketch]:
        """Projection name -> sketch of its weight; of matrices not read before only its entries are."""
        for p in self.projections:
            if p.name not in self._sketches:
                self._sketches[p.name] = sketch_of(self.weights, p)
        return self._sketches


def calibration_of(context: AllocationContext) -> Calibration:
    """The context's calibration.

    Raises:
        TextError: there is none.
    """
    if context.calibration is None:
        raise TextError("this allocator is calibrated: give --calibration-text (or 'self')")
    return context.calibration
