"""The plan: a small versioned JSON file that says how sparse each projection's input is.

It is the border of the project: everything before it may be slow and offline, everything after it is
fast and knows nothing of alpha.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from acttail._version import __version__
from acttail.budget import HIGHEST, check_target, kept_entries, model_sparsity
from acttail.checkpoint import WeightSource
from acttail.errors import BudgetError, PlanError
from acttail.files import write_json
from acttail.projections import Projection
from acttail.rules import NAMES as RULES

VERSION = 1
# Entries sampled per matrix for the content sketch.
_SKETCH_SAMPLES = 4096
# Rounding float32 weights to bfloat16 moves a sketch by 1e-3 of the weights' RMS; another seed,
# quantisation or fine-tune moves it by far more than this.
_SKETCH_TOLERANCE = 0.02


@dataclass(frozen=True)
class ProjectionPlan:
    """What the plan says about one projection.

    Attributes:
        sparsity: share of the input that is dropped, as solved, in [0, 0.99].
        k: entries of the input that stay, an integer.
        d_in: input features.
        d_out: output features.
        block: index of the decoder block.
        kind: see :class:`acttail.projections.Projection`.
        cost: weights read per token.
        sketch: (RMS, signed sum) of a sample of the weights; names the content of this matrix.
        alpha: exponent the budget was made from, if any.
        xmin: see :class:`acttail.tail.TailFit`, as are the next four.
        ks_distance: fit quality.
        tail_size: number of eigenvalues in the tail.
        stderr: standard error of alpha.
        flag: what to know about the fit.
        threshold: magnitude below which an entry is dropped, for the rule ``threshold``; None leaves
            the projection dense.
        p: share of the L1 norm that stays, for the rule ``top-p``.
    """

    sparsity: float
    k: int
    d_in: int
    d_out: int
    block: int
    kind: str
    cost: float
    sketch: tuple[float, float]
    alpha: float | None = None
    xmin: float | None = None
    ks_distance: float | None = None
    tail_size: int | None = None
    stderr: float | None = None
    flag: str | None = None
    threshold: float | None = None
    p: float | None = None

    @property
    def realised_sparsity(self) -> float:
        """1 - k / d_in: the sparsity after rounding to whole entries."""
        return 1 - self.k / self.d_in


@dataclass(frozen=True)
class SparsityPlan:
    """A sparsity per projection, for one model.

    Attributes:
        model: the model's name as the user gave it.
        fingerprint: hash of the projections' names and shapes.
        allocator: name of the rule that made the budget.
        arguments: the rule's arguments, defaults included.
        sparsity: requested model sparsity.
        projections: name -> :class:`ProjectionPlan`.
        created_with: versions of acttail, torch and transformers.
        rule: which entries stay: ``topk`` (the k largest), ``wina`` (the k largest by magnitude times
            column norm), ``threshold`` or ``top-p``; under the last two, k is what calibration
            expected on average.
        version: of this format.
    """

    model: str
    fingerprint: str
    allocator: str
    arguments: dict[str, Any]
    sparsity: float
    projections: dict[str, ProjectionPlan]
    created_with: dict[str, str] = field(default_factory=dict)
    rule: str = "topk"
    version: int = VERSION

    @property
    def solved_sparsity(self) -> float:
        """Cost-weighted mean of the solved sparsities; within 1e-3 of the request."""
        return self._mean([p.sparsity for p in self.projections.values()])

    @property
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
        return {key: data[key] for key in _ORDER}

    @classmethod
    def from_dict(cls, data: Any) -> "SparsityPlan":
        """Read what :meth:`to_dict` made.

        Raises:
            PlanError: unknown version, unknown or missing key, or a value out of range; names it.
        """
        if not isinstance(data, dict):
            raise PlanError("a plan is a JSON object")
        if data.get("version") != VERSION:
            raise PlanError(
                f"plan version {data.get('version')!r} is not known to acttail {__version__} "
                f"(it reads version {VERSION}); make the plan again"
            )
        data = dict(data)
        data.pop("realised_sparsity", None)
        _check_keys(data, cls, "the plan")
        if data.get("rule", "topk") not in RULES:
            raise PlanError(f"the plan's rule {data['rule']!r} is not one of {', '.join(RULES)}")
        if not isinstance(data["projections"], dict) or not data["projections"]:
            raise PlanError("the plan lists no projections")
        projections = {}
        for name, entry in data["projections"].items():
            if not isinstance(entry, dict):
                raise PlanError(f"projection {name} of the plan is not an object")
            _check_keys(entry, ProjectionPlan, f"projection {name}")
            projections[name] = _checked(name, entry)
        return cls(**{**data, "projections": projections})

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
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValueError as error:
            raise PlanError(f"{path} is not a plan: it is not valid JSON ({error})") from error
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
        have = {p.name: p for p in weights.projections}
        for name, planned in self.projections.items():
            if name not in have:
                raise self._mismatch(weights, f"it has no projection {name}")
            actual = have[name]
            if (actual.d_out, actual.d_in) != (planned.d_out, planned.d_in):
                raise self._mismatch(
                    weights,
                    f"{name} is {actual.d_out}x{actual.d_in} there, {planned.d_out}x{planned.d_in} in the plan",
                )
        extra = next((name for name in have if name not in self.projections), None)
        if extra is not None:
            raise self._mismatch(weights, f"the plan does not mention its projection {extra}")
        if contents:
            for name, planned in self.projections.items():
                if not _same_sketch(planned.sketch, sketch(weights.weight(have[name]))):
                    raise self._mismatch(weights, f"the weights of {name} differ")

    def _mismatch(self, weights: WeightSource, difference: str) -> PlanError:
        return PlanError(
            f"the plan was made for {self.model}, not for {weights.name}: {difference}; "
            "make a plan for this model"
        )


_ORDER = (
    "version", "model", "fingerprint", "allocator", "arguments", "rule", "sparsity", "realised_sparsity",
    "created_with", "projections",
)  # fmt: skip


def _check_keys(data: Mapping[str, Any], cls: type, where: str) -> None:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where} has the unknown key {unknown[0]!r}")
    optional = {
        "created_with",
        "alpha",
        "xmin",
        "ks_distance",
        "tail_size",
        "stderr",
        "flag",
        "rule",
        "threshold",
        "p",
    }
    missing = sorted(known - optional - set(data))
    if missing:
        raise PlanError(f"{where} lacks the key {missing[0]!r}")


def _checked(name: str, entry: dict[str, Any]) -> ProjectionPlan:
    try:
        plan = ProjectionPlan(**{**entry, "sketch": tuple(map(float, entry["sketch"]))})
        valid = (
            0 <= plan.sparsity <= 1 and 1 <= plan.k <= plan.d_in and plan.cost >= 0
            and len(plan.sketch) == 2 and isinstance(plan.k, int)
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise PlanError(f"projection {name}: {error}") from error
    if not valid:
        raise PlanError(
            f"projection {name}: sparsity {plan.sparsity} or k {plan.k} is out of range for d_in {plan.d_in}"
        )
    return plan


def sketch(weight: torch.Tensor) -> tuple[float, float]:
    """(RMS, signed sum / sqrt(n)) of up to 4,096 evenly spaced entries of a matrix.

    Tells whether two matrices hold the same values, whatever float dtype they were loaded in.

    Args:
        weight: [d_out, d_in]. On the meta device there is nothing to compare and the result is NaN.
    """
    if weight.device.type == "meta":
        return math.nan, math.nan
    count = weight.numel()
    samples = min(_SKETCH_SAMPLES, count)
    index = torch.arange(samples) * count // samples
    values = weight[index // weight.shape[1], index % weight.shape[1]].to("cpu", torch.float64)
    # A fixed pseudo-random sign per position (Knuth's multiplicative hash).
    signs = ((index * 2654435761) >> 15) % 2 * 2 - 1
    rms = float(values.square().mean().sqrt())
    return round(rms, 10), round(float((values * signs).sum()) / math.sqrt(samples), 10)


def _same_sketch(a: tuple[float, float], b: tuple[float, float]) -> bool:
    scale = max(abs(a[0]), abs(b[0]))
    return all(abs(x - y) <= _SKETCH_TOLERANCE * scale for x, y in zip(a, b, strict=True))


def fingerprint(projections: Sequence[Projection]) -> str:
    """Hash of the projections' names and shapes."""
    text = "\n".join(f"{p.name} {p.d_out} {p.d_in}" for p in projections)
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
    rule: str = "topk",
    extras: Mapping[str, Mapping[str, Any]] | None = None,
) -> SparsityPlan:
    """Put solved sparsities, fits and the model's identity into a plan.

    Args:
        weights: the model the plan is for.
        sparsities: projection name -> sparsity in [0, 0.99], one for every projection.
        sparsity: the requested model sparsity; None takes the cost-weighted mean of the given ones.
        allocator: name of the rule.
        arguments: the rule's arguments.
        fits: projection name -> TailFit the allocator used.
        rule: which entries stay; see :class:`SparsityPlan`.
        extras: projection name -> further fields of its entry (threshold, p).

    Raises:
        PlanError: a projection is missing or unknown.
        BudgetError: a sparsity is out of range.
    """
    projections = weights.projections
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
            block=p.block, kind=p.kind, cost=p.cost, sketch=sketch(weights.weight(p)),
            **(asdict(fit) if fit is not None else {}), **(extras[p.name] if extras else {}),
        )  # fmt: skip
    if sparsity is None:
        sparsity = model_sparsity(
            [e.sparsity for e in entries.values()], [e.cost for e in entries.values()]
        )
    return SparsityPlan(
        model=weights.name, fingerprint=fingerprint(projections), allocator=allocator,
        arguments=dict(arguments), sparsity=sparsity, projections=entries, created_with=created_with(), rule=rule,
    )  # fmt: skip
