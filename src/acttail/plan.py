"""The plan: a small versioned JSON file that says how sparse each projection's input is.

It is the border of the project: everything before it may be slow and offline, everything after it is
fast and knows nothing of alpha.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Len

from acttail._version import __version__
from acttail.base.controls import clean
from acttail.base.files import write_json
from acttail.base.schema import (
    STRICT,
    Count,
    Name,
    NotNegative,
    SchemaError,
    Share,
    Size,
    checked,
    read_json,
)
from acttail.errors import BudgetError, PlanError
from acttail.maths.budget import HIGHEST, check_target, kept_entries, model_sparsity
from acttail.model.projections import HEAD, Projection
from acttail.model.weights import WeightSource

# 2: the output head may be among the projections. Plans of version 1 have none, and leave it dense.
VERSION = 2
_READ = (1, VERSION)
# The rules that this version of the format knows, each with the field of an entry without which it leaves
# the projection dense (None: k says all). acttail.sparse.rules says what each does.
RULES: Mapping[str, str | None] = {
    "topk": None, "wina": None, "threshold": "threshold", "top-p": "p", "cats": "threshold",
}  # fmt: skip
DEFAULT_RULE = "topk"
# Entries sampled per matrix for the content sketch.
_SKETCH_SAMPLES = 4096
# Rounding float32 weights to bfloat16 moves a sketch by 1e-3 of the weights' RMS; another seed,
# quantisation or fine-tune moves it by far more than this.
_SKETCH_TOLERANCE = 0.02


@dataclass(frozen=True)
class ProjectionPlan:
    """What the plan says about one projection. The annotations are the file's schema.

    Attributes:
        sparsity: share of the input that is dropped, as solved, in [0, 0.99].
        k: entries of the input that stay, an integer; d_in where the rule leaves the projection dense.
        d_in: input features.
        d_out: output features.
        block: index of the decoder block.
        kind: see :class:`acttail.model.projections.Projection`.
        cost: weights read per token.
        sketch: (RMS, signed sum) of a sample of the weights; names the content of this matrix.
        alpha: exponent the budget was made from, if any.
        xmin: see :class:`acttail.spectrum.tail.TailFit`, as are the next four.
        ks_distance: fit quality.
        tail_size: number of eigenvalues in the tail.
        stderr: standard error of alpha.
        flag: what to know about the fit.
        threshold: magnitude at or below which an entry is dropped, for the rules ``threshold`` and
            ``cats``; None leaves the projection dense.
        p: share of the L1 norm that stays, for the rule ``top-p``; None leaves the projection dense.
    """

    __pydantic_config__ = STRICT

    sparsity: Share
    k: Size
    d_in: Size
    d_out: Size
    block: Count
    kind: Name
    cost: NotNegative
    sketch: tuple[float, float]
    alpha: float | None = None
    xmin: float | None = None
    ks_distance: float | None = None
    tail_size: Count | None = None
    stderr: float | None = None
    flag: str | None = None
    threshold: NotNegative | None = None
    p: Share | None = None

    @property
    def realised_sparsity(self) -> float:
        """1 - k / d_in: the sparsity after rounding to whole entries."""
        return 1 - self.k / self.d_in


@dataclass(frozen=True)
class SparsityPlan:
    """A sparsity per projection, for one model.

    Attributes:
        model: the model's name as the user gave it.
        fingerprint: hash of the names and shapes of the blocks' projections.
        allocator: name of the rule that made the budget.
        arguments: the rule's arguments, defaults included.
        sparsity: requested model sparsity.
        projections: name -> :class:`ProjectionPlan`; every projection of the blocks and, where it takes part in
            the budget, the output head (of kind ``lm_head``). A head without an entry stays dense.
        created_with: versions of acttail, torch and transformers.
        rule: which entries stay, one of :data:`RULES`: ``topk`` (the k largest), ``wina`` (the k largest
            by magnitude times column norm), ``threshold``, ``top-p`` or ``cats``; under the last three,
            k is what calibration expected on average.
        notes: on how the budget came to be where it was not asked for as a sparsity: what was asked for, and what is
            forecast.
        version: of this format.
    """

    __pydantic_config__ = STRICT

    model: Name
    fingerprint: Name
    allocator: Name
    arguments: dict[str, Any]
    sparsity: Share
    projections: Annotated[dict[Name, ProjectionPlan], Len(1)]
    created_with: dict[Name, Name] = field(default_factory=dict)
    rule: str = DEFAULT_RULE
    notes: dict[Name, Name] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.rule not in tuple(RULES):
            raise PlanError(f"the plan's rule {self.rule!r} is not one of {', '.join(RULES)}")
        # What is left dense keeps everything, whatever was solved for it: then k counts what is read.
        kept = {
            name: replace(entry, k=entry.d_in) if self.left_dense(entry) else entry
            for name, entry in self.projections.items()
        }
        object.__setattr__(self, "projections", kept)

    def left_dense(self, entry: ProjectionPlan) -> bool:
        """Whether an entry lacks the field without which the plan's rule drops nothing."""
        field_ = RULES[self.rule]
        return field_ is not None and getattr(entry, field_) is None

    @property
    def head(self) -> tuple[str, ProjectionPlan] | None:
        """Name and entry of the output head, None if the plan leaves it out of the budget, and so dense."""
        return next(((n, e) for n, e in self.projections.items() if e.kind == HEAD), None)

    @property
    def sparse_head(self) -> tuple[str, ProjectionPlan] | None:
        """The output head, if the plan drops some of its input."""
        found = self.head
        if found is None or self.left_dense(found[1]) or found[1].realised_sparsity <= 0:
            return None
        return found

    @property
    def exact(self) -> bool:
        """Whether it drops zeros alone, so that the model computes the same without it."""
        only_zeros = RULES[self.rule] == "threshold"
        return only_zeros and all(not e.threshold for e in self.projections.values())

    def covered(self, weights: WeightSource) -> list[Projection]:
        """The model's projections that the plan says something of: the blocks', and the head if it does."""
        head = weights.head if self.head is not None else None
        return [*_of_blocks(weights), *([] if head is None else [head])]

    @property
    def solved_sparsity(self) -> float:
        """Cost-weighted mean of the solved sparsities; within 1e-3 of the request."""
        return self._mean([p.sparsity for p in self.projections.values()])

    @cached_property
    def realised_sparsity(self) -> float:
        """Cost-weighted mean of 1 - k/d, after rounding to whole entries."""
        return self._mean([p.realised_sparsity for p in self.projections.values()])

    def _mean(self, values: list[float]) -> float:
        return model_sparsity(values, [p.cost for p in self.projections.values()])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; keys whose value is None are left out of the projections."""
        data = asdict(self)
        data["realised_sparsity"] = round(self.realised_sparsity, 6)
        for name, entry in data["projections"].items():
            kept = {key: value for key, value in entry.items() if value is not None}
            data["projections"][name] = kept | {"sketch": list(entry["sketch"])}
        return {key: data[key] for key in _ORDER if key != "notes" or self.notes}

    @classmethod
    def from_dict(cls, data: Any) -> "SparsityPlan":
        """Read what :meth:`to_dict` made.

        Raises:
            PlanError: unknown version, unknown or missing key, or a value out of range; names it.
        """
        if not isinstance(data, dict):
            raise PlanError("a plan is a JSON object")
        if data.get("version") not in _READ:
            raise PlanError(
                f"plan version {data.get('version')!r} is not known to acttail {__version__} "
                f"(it reads versions {' and '.join(map(str, _READ))}); make the plan again"
            )
        data = {k: v for k, v in data.items() if k != "realised_sparsity"} | {"version": VERSION}
        if data.get("projections") == {}:
            raise PlanError("the plan lists no projections")
        try:
            plan = checked(cls, data)
        except SchemaError as error:
            raise PlanError(f"the plan is malformed: {error}") from None
        for name, entry in plan.projections.items():
            if entry.k > entry.d_in:
                raise PlanError(
                    f"projection {name}: k {entry.k} is out of range for d_in {entry.d_in}"
                )
            if (
                RULES[plan.rule] is None
                and abs(entry.k - kept_entries(entry.sparsity, entry.d_in)) > 1
            ):
                raise PlanError(
                    f"projection {name}: k {entry.k} of {entry.d_in} and sparsity {entry.sparsity:g} "
                    "do not belong together"
                )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            ActTailError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SparsityPlan":
        """Read a plan file.

        Raises:
            PlanError: no such file, not JSON, or not a valid plan.
        """
        data = read_json(path, "a plan", error=PlanError)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def check(self, weights: WeightSource, *, contents: bool = True) -> None:
        """Make sure that the plan was made for this model.

        Args:
            weights: the model the plan is about to be applied to.
            contents: compare the weights' sketches too, not only names and shapes.

        Raises:
            PlanError: names the first difference.
        """
        have = {p.name: p for p in _of_blocks(weights)}
        needed = list(have)
        if weights.head is not None:
            have[weights.head.name] = weights.head
        for name, planned in self.projections.items():
            if name not in have:
                raise self._mismatch(weights, f"it has no projection {name}")
            actual = have[name]
            if (actual.d_out, actual.d_in) != (planned.d_out, planned.d_in):
                raise self._mismatch(
                    weights,
                    f"{name} is {actual.d_out}x{actual.d_in} there, {planned.d_out}x{planned.d_in} in the plan",
                )
        extra = next((name for name in needed if name not in self.projections), None)
        if extra is not None:
            raise self._mismatch(weights, f"the plan does not mention its projection {extra}")
        if contents:
            for name, planned in self.projections.items():
                if not any(same_sketch(planned.sketch, s) for s in _known_by(weights, have[name])):
                    raise self._mismatch(weights, f"the weights of {name} differ")

    def _mismatch(self, weights: WeightSource, difference: str) -> PlanError:
        return PlanError(
            f"the plan was made for {self.model}, not for {weights.name}: {difference}; "
            "make a plan for this model"
        )


_ORDER = (
    "version", "model", "fingerprint", "allocator", "arguments", "rule", "sparsity", "realised_sparsity",
    "created_with", "notes", "projections",
)  # fmt: skip


def sketch(weight: torch.Tensor) -> tuple[float, float]:
    """(RMS, signed sum / sqrt(n)) of up to 4,096 evenly spaced entries of a matrix.

    Tells whether two matrices hold the same values, whatever float dtype they were loaded in.

    Args:
        weight: [d_out, d_in]. On the meta device there is nothing to compare and the result is NaN.
    """
    index = _sampled(weight.numel())
    return _sketch(index, weight[index // weight.shape[1], index % weight.shape[1]])


def sketch_of(weights: WeightSource, projection: Projection) -> tuple[float, float]:
    """:func:`sketch` of a weight of which nothing else is read; of packed weights, of those they were made of.

    Args:
        weights: the model.
        projection: one of its projections.

    Raises:
        ModelError: the weight is missing or damaged.
    """
    # What was packed with losses is still the model that it was packed from.
    noted: Mapping[str, tuple[float, float]] = getattr(weights, "sketches", None) or {}
    if projection.name in noted:
        return noted[projection.name]
    index = _sampled(projection.d_out * projection.d_in)
    return _sketch(index, weights.entries(projection, index))


def _known_by(weights: WeightSource, projection: Projection) -> Iterator[tuple[float, float]]:
    """What a matrix is known by: its own sketch and, if it was packed, that of what it was packed from."""
    noted: Mapping[str, tuple[float, float]] = getattr(weights, "packed_from", None) or {}
    if projection.name in noted:
        yield noted[projection.name]
    index = _sampled(projection.d_out * projection.d_in)
    yield _sketch(index, weights.entries(projection, index))


def _sampled(count: int) -> torch.Tensor:
    """[n] positions of the entries of a sketch, of a flattened matrix of so many."""
    samples = min(_SKETCH_SAMPLES, count)
    return torch.arange(samples) * count // samples


def _sketch(index: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
    if values.device.type == "meta":
        return math.nan, math.nan
    values = values.to("cpu", torch.float64)
    # A fixed pseudo-random sign per position (Knuth's multiplicative hash).
    signs = ((index * 2654435761) >> 15) % 2 * 2 - 1
    rms = float(values.square().mean().sqrt())
    return round(rms, 10), round(float((values * signs).sum()) / math.sqrt(len(index)), 10)


def same_sketch(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two sketches differ by no more than another float dtype makes them."""
    scale = max(abs(a[0]), abs(b[0]))
    return all(abs(x - y) <= _SKETCH_TOLERANCE * scale for x, y in zip(a, b, strict=True))


def _of_blocks(weights: WeightSource) -> list[Projection]:
    return [p for p in weights.projections if p.kind != HEAD]


def fingerprint(projections: Sequence[Projection]) -> str:
    """Hash of the projections' names and shapes; an output head among them does not change it."""
    text = "\n".join(f"{p.name} {p.d_out} {p.d_in}" for p in projections if p.kind != HEAD)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def created_with() -> dict[str, str]:
    """Versions that a plan or result is made with."""
    from importlib.metadata import version

    return {
        "acttail": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }


def build_plan(
    weights: WeightSource,
    sparsities: Mapping[str, float],
    *,
    sparsity: float | None,
    allocator: str,
    arguments: Mapping[str, Any],
    fits: Mapping[str, Any] | None = None,
    rule: str = DEFAULT_RULE,
    extras: Mapping[str, Mapping[str, Any]] | None = None,
    sketches: Mapping[str, tuple[float, float]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> SparsityPlan:
    """Put solved sparsities, fits and the model's identity into a plan.

    Args:
        weights: the model the plan is for.
        sparsities: projection name -> sparsity in [0, 0.99], one for every projection of the blocks. One for
            the output head puts it into the budget.
        sparsity: the requested model sparsity; None takes the cost-weighted mean of the given ones.
        allocator: name of the rule.
        arguments: the rule's arguments.
        fits: projection name -> TailFit the allocator used.
        rule: which entries stay; see :class:`SparsityPlan`.
        extras: projection name -> further fields of its entry (threshold, p).
        sketches: projection name -> :func:`sketch` of its weight, where it was taken before; of the other
            matrices only its entries are read.
        notes: on how the budget came to be, see :class:`SparsityPlan`.

    Raises:
        PlanError: a projection is missing or unknown.
        BudgetError: a sparsity is out of range.
    """
    projections = _of_blocks(weights)
    if weights.head is not None and weights.head.name in sparsities:
        projections = [*projections, weights.head]
    noted = sketches or {}
    unknown = next((n for n in sparsities if n not in {p.name for p in projections}), None)
    if unknown is not None:
        raise PlanError(f"{weights.name} has no projection {unknown}")
    entries = {}
    for p in projections:
        if p.name not in sparsities:
            raise PlanError(f"no sparsity is given for projection {p.name}")
        try:
            s = check_target(sparsities[p.name], high=HIGHEST + 1e-12)
        except (BudgetError, TypeError, ValueError) as error:
            raise BudgetError(f"projection {p.name}: {error}") from error
        fit = fits.get(p.name) if fits else None
        entries[p.name] = ProjectionPlan(
            sparsity=round(s, 9), k=kept_entries(s, p.d_in), d_in=p.d_in, d_out=p.d_out,
            block=p.block, kind=p.kind, cost=p.cost, sketch=noted[p.name] if p.name in noted else sketch_of(weights, p),
            **(asdict(fit) if fit is not None else {}), **(extras[p.name] if extras else {}),
        )  # fmt: skip
    if sparsity is None:
        sparsity = model_sparsity(
            [e.sparsity for e in entries.values()], [e.cost for e in entries.values()]
        )
    return SparsityPlan(
        model=clean(weights.name) or "model", fingerprint=fingerprint(projections), allocator=allocator,
        arguments=dict(arguments), sparsity=sparsity, projections=entries, created_with=created_with(), rule=rule,
        notes=dict(notes or {}),
    )  # fmt: skip
