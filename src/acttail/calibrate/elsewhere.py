"""Windows of a text measured on other machines, each as by this process.

A task takes one window, as many threads as this process has and a model of the same weights, so that its sums are, bit for bit,
those of this process wherever processors compute alike.
"""

import hashlib
import pickle
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from acttail.base.distribute import runner
from acttail.calibrate.energies import EnergySums
from acttail.calibrate.losses import LOSSES
from acttail.errors import ModelError
from acttail.model.weights import input_device

# Bytes that Ray sets aside for a task, over those of its weights: activations of one block and of the head.
_ROOM = 2
# Of each parameter, to tell whether two models are the same.
_ENTRIES = 4096
# The model of this process, by what loads it: a worker measures one window after the other.
_loaded: dict[bytes, Any] = {}


@dataclass(frozen=True)
class Elsewhere:
    """Where windows are measured instead of here.

    Attributes:
        address: of a Ray cluster: ``auto``, ``local`` or an address.
        load: the dense model in another process, on the same device and of the same dtype; it can be pickled.
    """

    address: str
    load: Callable[[], Any]


def digest_of(model: Any) -> str:
    """Of a model's parameters: their names, shapes and dtypes, and entries of each, exactly as they are."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(repr((name, tuple(parameter.shape), parameter.dtype)).encode())
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _ENTRIES)
        found.update(flat[::step].cpu().double().numpy().tobytes())
    return found.hexdigest()


def window_sums(
    load: Callable[[], Any], digest: str, loss: str, ids: torch.Tensor, seed: int, empty: EnergySums,
    threads: int | None = None,
) -> EnergySums:  # fmt: skip
    """The sums of one window, in whichever process.

    Args:
        load: the model.
        digest: :func:`digest_of` it.
        loss: a name of :data:`acttail.calibrate.losses.LOSSES`.
        ids: [1, window].
        seed: of what is drawn.
        empty: sums of nothing yet.
        threads: of torch; None leaves them.

    Raises:
        ModelError: the model has other weights here.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    key = pickle.dumps((load, digest))
    if key not in _loaded:
        _loaded.clear()
        model = load()
        if digest_of(model) != digest:
            raise ModelError(
                "the model has other weights, or another dtype, on a machine of the cluster: put the same one under its name"
            )
        _loaded[key] = model
    return add_window(_loaded[key], loss, ids, seed, empty.empty())


def add_window(
    model: Any, loss: str, ids: torch.Tensor, seed: int, empty: EnergySums
) -> EnergySums:
    """The sums of one window [1, window] of a model, drawn from a seed of its own."""
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    LOSSES[loss].step(model, ids.to(device), generator, empty)
    return empty


def measured(
    elsewhere: Elsewhere, model: Any, loss: str, windows: dict[int, tuple[torch.Tensor, int]],
    empty: EnergySums,
) -> Generator[EnergySums, None, None]:  # fmt: skip
    """The sums of windows, in their order, however they end.

    Args:
        elsewhere: where they are measured.
        model: as it is here.
        loss: a name of :data:`acttail.calibrate.losses.LOSSES`.
        windows: index -> (ids [1, window], seed), ascending.
        empty: sums of nothing yet.

    Raises:
        ActTailError: the cluster is not reached, has no room, or has another model.
    """
    digest = digest_of(model)
    room = _ROOM * sum(p.numel() * p.element_size() for p in model.parameters())
    todo = {
        str(index): (elsewhere.load, digest, loss, ids, seed, empty)
        for index, (ids, seed) in windows.items()
    }
    early: dict[str, EnergySums] = {}
    with runner(
        window_sums, ray_address=elsewhere.address, threads=torch.get_num_threads(), memory=room
    ) as run:
        found = run(todo)
        for index in todo:
            while index not in early:
                key, part = next(found)
                early[key] = part
            yield early.pop(index)
