"""What an allocator is: one row, made of a function from a model and a sparsity to an allocation."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from acttail.allocate.context import AllocationContext, Array
from acttail.calibrate.thresholds import Calibrate
from acttail.errors import ActTailError, BudgetError
from acttail.maths.budget import HIGHEST, check_target, model_sparsity
from acttail.sparse.rules import TOPK, RuleKind
from acttail.spectrum.tail import TailFit


@dataclass(frozen=True)
class Allocation:
    """What an allocator returns.

    Attributes:
        sparsities: [P], in the order of the context's projections; they meet the budget.
        fits: projection name -> the tail fits they were made from, which the plan notes; None if alpha
            played no part.
    """

    sparsities: Array
    fits: Mapping[str, TailFit] | None = None


class Needs(Enum):
    """What an allocator looks at, and so what another sparsity takes once there is a plan."""

    ENTRIES = "shapes, costs and exponents, all of which a plan holds"
    SPECTRA = "the spectra of the weights"
    CURVES = "sensitivity curves: those of a file, or measured on text"
    TEXT = "calibration text, each time"


Allocate = Callable[[AllocationContext, float, Mapping[str, Any]], Allocation]


@dataclass(frozen=True)
class Allocator:
    """A named rule.

    Attributes:
        name: as given to `--allocator`.
        summary: one line for `--help` and the docs.
        defaults: argument name -> default; its type is the argument's type.
        allocate: (context, sparsity, arguments) -> :class:`Allocation`.
        needs: what `allocate` looks at.
        rule: which entries stay, unless the user says otherwise: one that
            :data:`acttail.allocate.selection.SELECTIONS` can calibrate or, with `calibrate`, any.
        otherwise: the rule taken instead of `rule` where that loses more on text that calibration has not seen,
            unless the user asked for one; None takes `rule` unseen.
        fixed_rule: the rule is what the allocator is about: no other may be asked for.
        calibrate: the allocator's own step, (calibration, sparsities by name) -> further fields of the
            plan's entries; instead of the one its rule has.
        head: whether the output head can take part in its budget.
        head_asked: (context, arguments) -> whether it does without being asked for, in a model that has a
            head which can be sparse.
    """

    name: str
    summary: str
    defaults: Mapping[str, Any]
    allocate: Allocate
    needs: Needs = Needs.ENTRIES
    rule: RuleKind = TOPK
    otherwise: RuleKind | None = None
    fixed_rule: bool = False
    calibrate: Calibrate | None = None
    head: bool = True
    head_asked: Callable[[AllocationContext, Mapping[str, Any]], bool] = lambda context, arguments: (
        False
    )

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
