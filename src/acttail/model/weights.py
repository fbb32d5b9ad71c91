"""Read one projection's weight at a time from safetensors shards or a GGUF file.

The model itself is only built on the meta device (shapes, no weights), so that a model larger than
memory can be analysed: what is held is one matrix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from acttail.errors import ModelError
from acttail.model.projections import Projection, find_head, find_projections, weight_of


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: its first weight that is not on disk."""
    hook = getattr(model, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device("cpu" if execution == "disk" else execution)
    devices = (p.device for p in model.parameters())
    return next((d for d in devices if d.type != "meta"), torch.device("cpu"))


class WeightSource(Protocol):
    """Anything that lists projections and yields their weights one by one.

    Attributes:
        name: of the model.
        projections: those it is asked about; the blocks' alone unless :func:`with_head` made it.
        head: the output head, which any of the methods takes too; None if the model has none.
    """

    name: str
    projections: list[Projection]
    head: Projection | None

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in], in its stored (or dequantised) dtype."""
        ...

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """Some entries of a weight, [n], in the dtype of :meth:`weight`; the rest is not read.

        Args:
            projection: one of :attr:`projections`.
            index: [n] int64, into the flattened [d_out, d_in].
        """
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Any other parameter by its name in the model's state dict, in its stored dtype.

        Raises:
            ModelError: there is none.
        """
        ...


class StoredWeights(WeightSource, Protocol):
    """Those of a file."""

    def apart(self, first: str, second: str) -> bool:
        """Whether two parameters are kept apart with other values, whatever the config says of them."""
        ...

    def finish(self, model: Any) -> None:
        """Give a model that was filled with these weights what they carry beside them."""
        ...


class LoadedWeights:
    """Weights of a model in memory."""

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self.model = model
        source = getattr(model, "acttail_source", None)
        config_name = getattr(getattr(model, "config", None), "name_or_path", "")
        self.name = name or (source.name if source else config_name) or type(model).__name__
        self.projections = find_projections(model)
        self.head = find_head(model)
        # Sketches of the weights that these were packed from, before they were dequantised again.
        self.packed_from = getattr(model, "acttail_sketches", None)

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight as a view of the parameter, [d_out, d_in]; read if accelerate keeps it on disk."""
        holder = projection.parameter_name.rpartition(".")[0]
        with _onloaded(self.model.get_submodule(holder)):
            return weight_of(self.model, projection)

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """See :class:`WeightSource`; on the meta device if the weight is."""
        weight = self.weight(projection)
        return weight[index // projection.d_in, index % projection.d_in]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter by name.

        Raises:
            ModelError: there is none.
        """
        try:
            with _onloaded(self.model.get_submodule(name.rpartition(".")[0])):
                return self.model.get_parameter(name).detach()
        except AttributeError as error:
            raise ModelError(f"{self.name} has no parameter {name}") from error


class _WithHead:
    """A weight source that lists the output head after the blocks' projections."""

    def __init__(self, weights: WeightSource, head: Projection) -> None:
        self._weights = weights
        self.head: Projection | None = head
        self.name = weights.name
        self.projections = [*weights.projections, head]
        # Of the file or files it is read from, by which spectra are kept; a loaded model has none.
        self.files = getattr(weights, "files", None)
        self.sketches = getattr(weights, "sketches", None)
        self.packed_from = getattr(weights, "packed_from", None)

    def weight(self, projection: Projection) -> torch.Tensor:
        """See :class:`WeightSource`."""
        return self._weights.weight(projection)

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """See :class:`WeightSource`."""
        return self._weights.entries(projection, index)

    def tensor(self, name: str) -> torch.Tensor:
        """See :class:`WeightSource`."""
        return self._weights.tensor(name)


def with_head(weights: WeightSource) -> WeightSource:
    """The same model with its output head among the projections.

    Args:
        weights: of the model; one that lists its head already is handed back.

    Raises:
        ModelError: it has no output head, or one that is no linear map.
    """
    if weights.head is None:
        raise ModelError(
            f"{weights.name} has no linear output head that could be sparse; leave out --head"
        )
    return weights if weights.head in weights.projections else _WithHead(weights, weights.head)


@contextmanager
def _onloaded(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module that accelerate has offloaded are there."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or all(p.device.type != "meta" for p in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
