"""A plan for packed weights alone: no model, no file."""

import torch

from acttail.engine.layout import HEAD_MATRIX
from acttail.engine.native_engine import NativeEngine
from acttail.errors import ModelError
from acttail.model.projections import HEAD, Projection
from acttail.plan import SparsityPlan, build_plan


def _block(fused: str, blocks: int) -> int:
    return blocks if fused == HEAD_MATRIX else int(fused.split(".")[1])


class _Shapes:
    """The projections of an engine in the form of a weight source without weights."""

    def __init__(self, engine: NativeEngine) -> None:
        layout = engine.packed.layout
        self.name = layout.source
        self.projections = [
            Projection(
                name=s.name, block=_block(fused, len(layout.spec.blocks)), kind=s.kind, d_in=layout.shapes[fused].rows,
                d_out=s.d_out, cost=float(layout.share(fused) * layout.shapes[fused].rows * s.d_out), module=s.name,
                parameter="weight", expert=None, transposed=False,
            )
            for fused, segments in layout.segments.items()
            for s in segments
        ]  # fmt: skip
        self.head = next((p for p in self.projections if p.kind == HEAD), None)

    def weight(self, projection: Projection) -> torch.Tensor:
        """[d_out, d_in] on the meta device: its shape."""
        return torch.empty(projection.d_out, projection.d_in, device="meta")

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """[n] on the meta device."""
        return torch.empty(len(index), device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        """There is none."""
        raise ModelError(f"packed weights do not hold the parameter {name}")


def uniform_plan(engine: NativeEngine, sparsity: float) -> SparsityPlan:
    """The same sparsity everywhere, for this engine; costs milliseconds.

    Its sketches are NaN, so that it passes for the plan of no other model.

    Args:
        engine: whose projections it names.
        sparsity: of every projection, in [0, 0.99].

    Raises:
        BudgetError: the sparsity is out of range.
    """
    shapes = _Shapes(engine)
    return build_plan(
        shapes, {p.name: sparsity for p in shapes.projections}, sparsity=sparsity, allocator="uniform",
        arguments={},
    )  # fmt: skip
