"""An .acttail folder as a source of weights: each matrix dequantised when it is asked for, the rest left on disk."""

import math
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from acttail.base.files import write_json
from acttail.base.schema import Name, NotNegative, SchemaError, checked, read_json
from acttail.engine.families.family import MLP
from acttail.engine.layout import EMBEDDING, HEAD_MATRIX, ROUTER, Segment, Stage
from acttail.engine.packing import unpack
from acttail.engine.shapes import Shape
from acttail.engine.spec import bias_of
from acttail.engine.store import read_description
from acttail.errors import ActTailError, ModelError, reason
from acttail.model.projections import HEAD, Projection
from acttail.model.weights import WeightSource
from acttail.plan import SparsityPlan, sketch_of
from acttail.sparse.apply import sparsify_
from acttail.sparse.policy import PrefillPolicy

SKETCHES = "sketches.json"
Sketches = dict[str, tuple[float, float]]


def read_sketches(folder: Path) -> Sketches:
    """Sketches of the weights that a folder's were packed from; empty where none were kept.

    Raises:
        ActTailError: the file is damaged.
    """
    path = folder / SKETCHES
    if not path.exists():
        return {}
    try:
        return checked(dict[Name, tuple[NotNegative, float]], read_json(path, "a file of sketches"))
    except SchemaError as error:
        raise ActTailError(f"{path} is not a file of sketches: {error}; convert again") from None


def sketches_of(weights: WeightSource) -> Sketches:
    """Sketches of a model's projections and its head; of each matrix only some entries are read."""
    listed = [*weights.projections, *([] if weights.head is None else [weights.head])]
    return {p.name: sketch_of(weights, p) for p in listed}


def write_sketches(folder: Path, sketches: Sketches) -> None:
    """Keep the sketches of the weights that a folder's were packed from.

    Raises:
        ActTailError: the folder cannot be written.
    """
    # A weight that is not finite is like no other.
    finite = {name: values for name, values in sketches.items() if all(map(math.isfinite, values))}
    write_json(folder / SKETCHES, finite)


class PackedWeights:
    """Weights of an .acttail folder, in the names that they have in the model.

    Memory is that of one matrix, packed and in float32.

    Args:
        name: of the model.
        folder: that it is in.

    Attributes:
        name: of the model.
        files: that it is read from.
        sketches: of the weights that these were packed from, which losses of packing do not change; empty for
            folders of before they were kept.
        plan: the plan kept inside, None for none.
        policy: the prefill policy kept inside.

    Raises:
        ActTailError: the folder is damaged, or of a version that is not known.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.files = [folder / "weights.safetensors", folder / "engine.json"]
        described = read_description(folder)
        self.layout = described.layout
        self.plan: SparsityPlan | None = described.plan
        self.policy: PrefillPolicy = described.policy
        self.sketches = read_sketches(folder)
        self._at: dict[str, tuple[str, Segment]] = {}  # projection -> matrix, columns
        for matrix, segments in self.layout.segments.items():
            self._at |= {s.name: (matrix, s) for s in segments}
        # As transformers lists them: the experts' of one kind together, and before the MLP beside them.
        listed: list[tuple[str, int]] = []
        self._routers: dict[str, tuple[str, slice]] = {}
        for i, block in enumerate(self.layout.spec.blocks):
            listed += [(name, i) for kind, name in block.projections.items() if kind not in MLP]
            beside = [(name, i) for kind, name in block.projections.items() if kind in MLP]
            if block.experts is not None:
                own = block.experts.projections
                listed += [(each[kind], i) for kind in own[0] for each in own]
                at = f"blocks.{i}.{ROUTER}"
                self._routers[block.experts.router] = at, slice(len(own))
                if block.experts.shared_gate is not None:
                    self._routers[block.experts.shared_gate] = at, slice(len(own), None)
            listed += beside
        self._readers: dict[tuple[int, str], list[str]] = defaultdict(list)
        for stage in self.layout.stages:
            self._readers[stage.block, stage.part] += stage.members.values()
        # Parameter of stacked experts -> the names of their projections.
        self._stacks: dict[str, list[str]] = defaultdict(list)
        self.projections = [self._projection(self._at[name][1], i) for name, i in listed]
        for p in self.projections:
            if p.expert is not None:
                self._stacks[p.parameter_name].append(p.name)
        self.head: Projection | None = self._head()
        spec = self.layout.spec
        self._norms = {spec.final_norm: "final_norm"} | {
            source: f"blocks.{i}.{role}"
            for i, block in enumerate(spec.blocks)
            for role, source in block.norms.items()
        }

    def _stage(self, name: str) -> Stage:
        """What reads a projection's input vector in one MLP or attention."""
        return self.layout.stage_of[self._at[name][0]]

    def _projection(self, segment: Segment, block: int) -> Projection:
        stage = self._stage(segment.name)
        # All MLPs of a block read one vector; what comes out of the heads, or is inside of an MLP, one stage reads.
        of_block = stage.part in ("qkv", "gate_up")
        group = self._readers[block, stage.part] if of_block else list(stage.members.values())
        cost = float(stage.share * stage.d_in * segment.d_out)
        module, parameter, expert = segment.name, "weight", None
        if stage.expert is not None:  # its name is that of the stack and its number
            path, number = segment.name.rsplit(".", 1)
            module, parameter = path.rsplit(".", 1)
            expert = int(number)
        return Projection(
            segment.name, block, segment.kind, stage.d_in, segment.d_out, cost, module, parameter, expert,
            transposed=False, shared_input=tuple(n for n in group if n != segment.name),
        )  # fmt: skip

    def _head(self) -> Projection:
        spec = self.layout.spec
        own = self.layout.segments.get(HEAD_MATRIX)
        tied = spec.head == spec.embedding
        # Every family that the engine runs calls its output head so.
        name = own[0].name if own else HEAD if tied else spec.head.removesuffix(".weight")
        kept_once = tied and not {EMBEDDING, HEAD_MATRIX} <= self.layout.shapes.keys()
        return Projection(
            name, len(spec.blocks), HEAD, spec.hidden, spec.vocabulary, float(spec.hidden * spec.vocabulary), name,
            "weight", None, transposed=False, tied=spec.embedding if kept_once else None,
        )  # fmt: skip

    @cached_property
    def _file(self) -> Any:
        try:
            return safe_open(self.files[0], framework="pt")
        except Exception as error:
            raise ModelError(
                f"cannot read {self.files[0]}: {reason(error)}; convert again"
            ) from error

    @property
    def packed_from(self) -> Sketches:
        """The sketches, as a check of a plan asks for them."""
        return self.sketches

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in], float32, dequantised.

        Raises:
            ModelError: it is damaged.
        """
        if projection.kind == HEAD and projection.name not in self._at:
            return self._by_outputs(self.layout.head_name, projection.d_out)
        matrix, segment = self._at[projection.name]
        values = self._unpacked(matrix, segment.begin, segment.end)
        return values[: segment.d_out]

    def _by_outputs(self, matrix: str, rows: int) -> torch.Tensor:
        return self._unpacked(matrix, 0, None)[:rows, : self.layout.spec.hidden]

    def _unpacked(self, matrix: str, begin: int, end: int | None) -> torch.Tensor:
        """Columns of a packed matrix as [d_out, d_in] of an input-major one, else as they lie."""
        shape: Shape = self.layout.shapes[matrix]
        tensors = {}
        try:
            for suffix, (dtype, (_, width)) in shape.tensors().items():
                part = self._file.get_slice(f"{matrix}.{suffix}")
                # Whatever is kept of a column lies together, so that it is a run of each array's.
                first = begin * width // shape.columns
                last = width if end is None else end * width // shape.columns
                found = part[:, first:last]
                tensors[suffix] = found.contiguous() if found.dtype == dtype else found.to(dtype)
        except ActTailError:
            raise
        except Exception as error:
            raise ModelError(
                f"cannot read {matrix} of {self.name}: {reason(error)}; convert again"
            ) from error
        return unpack(tensors, shape)

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """Some entries of a weight, [n] float32; its matrix is dequantised for them.

        Args:
            projection: one of :attr:`projections`.
            index: [n] int64, into the flattened [d_out, d_in].
        """
        return self.weight(projection)[index // projection.d_in, index % projection.d_in]

    def tensor(self, name: str) -> torch.Tensor:
        """Any parameter by its name in the model, float32.

        Raises:
            ModelError: there is none.
        """
        spec = self.layout.spec
        module, _, leaf = name.rpartition(".")
        if name == spec.embedding:
            if self.layout.gathered:
                assert self.head is not None  # noqa: S101
                return self.weight(self.head)
            return self._by_outputs(EMBEDDING, spec.vocabulary)
        if self.head is not None and name == f"{self.head.name}.weight":
            return self.weight(self.head)
        if name in self._norms:
            return self._vector(self._norms[name]) - spec.norm_shift
        if name in self._routers:
            at, rows = self._routers[name]
            return self._vector(at)[rows, : spec.hidden].clone()
        if name in self._stacks:
            parts = [self._at[n] for n in self._stacks[name]]
            return torch.stack([self._unpacked(m, s.begin, s.end)[: s.d_out] for m, s in parts])
        if leaf == "weight" and module in self._at:
            matrix, segment = self._at[module]
            return self._unpacked(matrix, segment.begin, segment.end)[: segment.d_out]
        if leaf == "bias" and module in self._at:
            return self._bias(module, name)
        norm = next((at for source, at in self._norms.items() if bias_of(source) == name), None)
        if norm is not None and spec.layer_norm:
            return self._vector(f"{norm}.bias")
        raise ModelError(f"{self.name} holds no parameter {name}")

    def _bias(self, module: str, name: str) -> torch.Tensor:
        # A stage of several matrices has one bias, over the columns of all of them.
        stage = self._stage(module).name
        if f"{stage}.bias" not in self._file.keys():  # noqa: SIM118 - not a dict
            raise ModelError(f"{self.name} holds no parameter {name}")
        segment = next(s for s in self.layout.stage(stage) if s.name == module)
        return self._vector(f"{stage}.bias")[segment.begin : segment.begin + segment.d_out].clone()

    def _vector(self, name: str) -> torch.Tensor:
        try:
            found: torch.Tensor = self._file.get_tensor(name)
        except Exception as error:
            raise ModelError(
                f"cannot read {name} of {self.name}: {reason(error)}; convert again"
            ) from error
        return found

    def apart(self, first: str, second: str) -> bool:
        """See :class:`acttail.model.weights.StoredWeights`."""
        spec = self.layout.spec
        both = {EMBEDDING, HEAD_MATRIX} <= self.layout.shapes.keys()
        return both and spec.embedding in (first, second)

    def check(self, plan: SparsityPlan | None) -> None:
        """Make sure that a plan was made for this model, by its contents where sketches of them were kept.

        Raises:
            PlanError: names the first difference.
        """
        if plan is not None:
            plan.check(self, contents=bool(self.sketches))

    def finish(self, model: Any) -> None:
        """See :class:`acttail.model.weights.StoredWeights`: the plan kept inside makes the model sparse."""
        model.acttail_sketches = self.sketches
        if self.plan is not None:
            sparsify_(model, self.plan, prefill=self.policy, check_contents=False)
