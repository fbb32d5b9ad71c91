"""What `--rule` names: a rule of the plan, and the step on text that sets its values, if it needs one."""

from dataclasses import dataclass

from acttail.allocate.base import Allocator
from acttail.calibrate.thresholds import Calibrate, teal_thresholds, thresholds
from acttail.errors import ActTailError
from acttail.sparse.rules import THRESHOLD, TOPK, WINA, RuleKind


@dataclass(frozen=True)
class Selection:
    """A way to choose which entries of an input stay.

    Attributes:
        name: as given to `--rule`.
        rule: of the plan that results.
        calibrate: (calibration, sparsities by name) -> further fields of the plan's entries; None
            where the sparsity says all.
    """

    name: str
    rule: RuleKind
    calibrate: Calibrate | None = None


# top-p has no budget of its own: it is measured by `critical`, not planned.
SELECTIONS: dict[str, Selection] = {
    s.name: s
    for s in (
        Selection("topk", TOPK),
        Selection("wina", WINA),
        Selection("threshold", THRESHOLD, thresholds),
        Selection("teal", THRESHOLD, teal_thresholds),
    )
}


def selection_for(allocator: Allocator, asked: str | None) -> Selection:
    """How an allocator's entries are selected: as asked, else by its own rule.

    Raises:
        ActTailError: an unknown rule, or another than the one the allocator is about.
    """
    if asked is not None and asked != allocator.rule.name:
        if allocator.fixed_rule:
            raise ActTailError(f"{allocator.name} has a rule of its own; leave --rule out")
        if asked not in SELECTIONS:
            raise ActTailError(f"unknown rule {asked!r}: use {', '.join(SELECTIONS)}")
        return SELECTIONS[asked]
    if allocator.calibrate is not None:
        return Selection(allocator.rule.name, allocator.rule, allocator.calibrate)
    return SELECTIONS[allocator.rule.name]
