"""Weights straight from a folder of safetensors shards, one matrix in memory at a time."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acttail.base.schema import OPEN, Name, SchemaError, checked, read_json
from acttail.errors import ModelError, reason
from acttail.model.contents import check_contents
from acttail.model.hf import checkpoint_parts, is_custom_code, tied_parameters
from acttail.model.projections import Projection, find_head, find_projections
from acttail.model.quantised import check_stored


@dataclass(frozen=True)
class _Stored:
    """One tensor of a checkpoint: its file, type (safetensors' name) and shape."""

    file: Path
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Index:
    """What is read of a shard index; the annotations are its schema."""

    __pydantic_config__ = OPEN

    weight_map: dict[str, Name]


class SafetensorsWeights:
    """Weights straight from a folder of safetensors shards.

    Args:
        name: of the model.
        folder: that holds them.
        skeleton: the model's modules, on the meta device.

    Raises:
        ModelError: a shard is missing or truncated, or there is none; the weights are quantised, or are not
            those of the model.
    """

    def __init__(self, name: str, folder: Path, skeleton: nn.Module) -> None:
        self.name = name
        self.projections = find_projections(skeleton)
        self.head = find_head(skeleton)
        self._stored = _shard_index(name, folder)
        check_stored(name, ((key, s.kind) for key, s in self._stored.items()))
        self.files = sorted({s.file for s in self._stored.values()})
        self._parts = checkpoint_parts(skeleton, list(self._stored))
        if not is_custom_code(skeleton):
            self._check(skeleton)
        # What is tied may be kept under either name.
        for key, others in tied_parameters(skeleton).items():
            kept = next((o for o in others if o in self._parts), None)
            if key not in self._parts and kept is not None:
                self._parts[key] = self._parts[kept]

    def _check(self, skeleton: nn.Module) -> None:
        wanted = skeleton.state_dict().keys()
        experts = Counter(p.parameter_name for p in self.projections if p.expert is not None)
        found: dict[str, tuple[int, ...] | None] = {}
        unread = []
        for parameter, patterns in self._parts.items():
            if parameter not in wanted:
                unread += [key for keys in patterns.values() for key in keys]
            elif list(patterns) == [""]:
                found[parameter] = self._stored[patterns[""][0]].shape
            else:  # put together from one tensor per expert; some of them may be missing
                few = [keys for keys in patterns.values() if len(keys) < experts[parameter]]
                if few:
                    raise ModelError(
                        f"the checkpoint of {self.name} has only {len(few[0])} of the "
                        f"{experts[parameter]} experts of {parameter}; fetch the model again"
                    )
                found[parameter] = None
        check_contents(self.name, skeleton, found, unread)

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in], in its stored dtype; experts stored apart are put together."""
        parts = [self._read(key, index) for key, index in self._parts_of(projection)]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)
        _check_shape(projection, tuple(weight.shape))
        return weight.T if projection.transposed else weight

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """Entries of a weight, [n], in its stored dtype; of the file only their pages are read.

        Args:
            projection: one of :attr:`projections`.
            index: [n] int64, into the flattened [d_out, d_in].
        """
        row, column = index // projection.d_in, index % projection.d_in
        if projection.transposed:
            row, column = column, row
        with ExitStack() as stack:
            parts = [stack.enter_context(self._mapped(*p)) for p in self._parts_of(projection)]
            _check_shape(projection, (sum(len(p) for p in parts), *parts[0].shape[1:]))
            found = parts[0].new_zeros(len(index))
            begin = 0
            for part in parts:
                here = (row >= begin) & (row < begin + len(part))
                found[here] = part[row[here] - begin, column[here]]
                begin += len(part)
            return found

    def _parts_of(self, projection: Projection) -> list[tuple[str, int | None]]:
        """Checkpoint tensors (and the expert in them) that make up a matrix, one below the other."""
        parts = self._parts.get(projection.parameter_name)
        if not parts:
            raise ModelError(
                f"the checkpoint of {self.name} has no tensor for {projection.parameter_name}"
            )
        if list(parts) == [""]:
            return [(parts[""][0], projection.expert)]
        # One checkpoint tensor per expert and source (w1, w3): concatenated along the outputs.
        return [(keys[projection.expert or 0], None) for keys in parts.values()]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model.

        Raises:
            ModelError: the checkpoint has none.
        """
        parts = self._parts.get(name)
        if not parts or list(parts) != [""]:
            raise ModelError(f"the checkpoint of {self.name} has no tensor for {name}")
        return self._read(parts[""][0], None)

    def apart(self, first: str, second: str) -> bool:
        """See :class:`StoredWeights`."""
        if self._parts.get(first) == self._parts.get(second):
            return False
        return not torch.equal(self.tensor(first), self.tensor(second))

    def finish(self, model: Any) -> None:
        """See :class:`StoredWeights`; nothing."""

    def _read(self, key: str, expert: int | None) -> torch.Tensor:
        with self._mapped(key, expert) as tensor:
            # A copy, so that the file's mapping is dropped with it and memory stays bounded.
            return tensor.clone()

    @contextmanager
    def _mapped(self, key: str, expert: int | None) -> Iterator[torch.Tensor]:
        """A tensor of the checkpoint, mapped: what is not looked at is not read."""
        from safetensors import safe_open

        path = self._stored[key].file
        with ExitStack() as stack:
            try:
                view = stack.enter_context(safe_open(path, framework="pt")).get_slice(key)
                tensor = view[:] if expert is None else view[expert]
            except Exception as error:
                raise ModelError(
                    f"cannot read {key} from {path}: {reason(error)}; fetch the file again"
                ) from error
            yield tensor


def _check_shape(projection: Projection, found: tuple[int, ...]) -> None:
    expected = projection.d_out, projection.d_in
    expected = expected[::-1] if projection.transposed else expected
    if found != expected:
        raise ModelError(
            f"{projection.name} has shape {found} in the checkpoint, not {expected}; "
            "the config and the weights do not belong together"
        )


def _shard_files(name: str, folder: Path) -> list[Path]:
    """The files that transformers would read: one, or those of an index.

    Raises:
        ModelError: there is none, or the index is damaged or points elsewhere.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        shards = [single]
    elif index.exists():
        try:
            found = checked(_Index, read_json(index, "a shard index", error=ModelError))
        except SchemaError as error:
            raise ModelError(f"{index} is not a shard index: {error}; fetch it again") from None
        shards = sorted({folder / file for file in found.weight_map.values()})
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(
            f"{name} holds no safetensors ({folder}); convert the checkpoint (pickle is not read)"
        )
    for shard in shards:
        # realpath, for resolve() fails on a link to itself.
        if Path(os.path.realpath(shard)).parent != folder.resolve() and not shard.is_symlink():
            raise ModelError(f"the shard index of {folder} points outside of it: {shard}")
    return shards


def _shard_index(name: str, folder: Path) -> dict[str, _Stored]:
    """Tensor name -> what the headers say of it.

    Raises:
        ModelError: a shard is missing or truncated, or there is none.
    """
    from safetensors import safe_open

    located: dict[str, _Stored] = {}
    for shard in _shard_files(name, folder):
        try:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    about = file.get_slice(key)
                    located[key] = _Stored(shard, about.get_dtype(), tuple(about.get_shape()))
        except Exception as error:
            raise ModelError(
                f"cannot read {shard}: {reason(error)}; fetch the file again"
            ) from error
    return located
