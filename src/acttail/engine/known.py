"""What tells an engine's model from others once its weights are packed: sketches of what they were packed from."""

from collections.abc import Callable
from functools import cached_property

import torch

from acttail.engine.packed_weights import Sketches, sketches_of
from acttail.errors import ModelError
from acttail.model.projections import Projection
from acttail.model.weights import WeightSource
from acttail.plan import SparsityPlan

Check = Callable[[SparsityPlan], None]


class Known:
    """A model's projections and their sketches, in the form of a source of weights that are no longer held.

    Args:
        weights: of the model; not kept.
    """

    def __init__(self, weights: WeightSource) -> None:
        self.name, self.head = weights.name, weights.head
        self.projections = list(weights.projections)
        self.packed_from: Sketches = sketches_of(weights)

    def weight(self, projection: Projection) -> torch.Tensor:
        """[d_out, d_in] on the meta device: its shape."""
        return torch.empty(projection.d_out, projection.d_in, device="meta")

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """[n] on the meta device, which are like no other's."""
        return torch.empty(len(index), device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        """There is none."""
        raise ModelError(f"the weights of {self.name} are packed: {name} is not held")

    def check(self, plan: SparsityPlan) -> None:
        """Make sure that a plan was made for this model.

        Raises:
            PlanError: names the first difference.
        """
        plan.check(self)


class KnownLater:
    """:class:`Known`, its sketches taken at the first plan: of a GGUF that is a third of a second.

    Args:
        weights: opens the model's weights.
    """

    def __init__(self, weights: Callable[[], WeightSource]) -> None:
        self._weights = weights

    @cached_property
    def _known(self) -> Known:
        return Known(self._weights())

    def check(self, plan: SparsityPlan) -> None:
        """See :meth:`Known.check`.

        Raises:
            PlanError: names the first difference.
            ModelError: the model's file can no longer be read.
        """
        self._known.check(plan)
