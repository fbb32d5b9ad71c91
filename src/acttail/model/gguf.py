"""Weights straight from a GGUF file: dequantised one matrix (or expert) at a time, or its own blocks."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from acttail.errors import ModelError
from acttail.model.contents import check_contents
from acttail.model.gguf_blocks import KINDS, WHOLE_ROWS, StoredMatrix
from acttail.model.gguf_file import open_gguf
from acttail.model.gguf_outline import Outline, OutlineNames
from acttail.model.gguf_types import BLOCKS
from acttail.model.hf import GgufNames
from acttail.model.projections import Projection, find_head, find_projections

Integers = npt.NDArray[np.int64]


class GgufWeights:
    """Weights straight from a GGUF file, dequantised one matrix (or expert) at a time.

    Args:
        name: of the model.
        path: of the file.
        config: of the model, from the file or from its dequantised copy.
        skeleton: its modules, on the meta device.

    Raises:
        ModelError: a tensor is missing, has another shape than the model's, or is none of its own.
    """

    def __init__(self, name: str, path: Path, config: Any, skeleton: nn.Module) -> None:
        self.name = name
        self.files = [path]
        self.projections = find_projections(skeleton)
        self.head = find_head(skeleton)
        reader = open_gguf(path)
        self._names: GgufNames | OutlineNames = (
            OutlineNames(skeleton) if isinstance(skeleton, Outline)
            else GgufNames(reader.get("general.architecture"), config, skeleton)
        )  # fmt: skip
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._origins: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._sources: dict[str, list[str]] = defaultdict(list)
        for gguf_name, parameter in self._names.parameters.items():
            # Stacked experts are listed with and without the suffix.
            found = gguf_name if gguf_name in self._tensors else f"{gguf_name}.weight"
            if found in self._tensors and found not in self._sources[parameter]:
                self._sources[parameter].append(found)
        self._check(skeleton)

    def _check(self, skeleton: nn.Module) -> None:
        experts = {p.parameter_name for p in self.projections if p.expert is not None}
        found: dict[str, tuple[int, ...] | None] = {}
        for parameter in self._sources:
            parts = self._parts_named(parameter)
            if parameter in experts:  # [experts, d_out, d_in]: gate and up one below the other
                shapes = [tuple(int(n) for n in reversed(self._tensors[p].shape)) for p in parts]
                first = shapes[0]
                rows = sum(shape[1] for shape in shapes) if all(len(s) == 3 for s in shapes) else 0
                same = all(s[0] == first[0] and s[2:] == first[2:] for s in shapes)
                found[parameter] = (first[0], rows, *first[2:]) if same else first
            else:
                found[parameter] = self._shape(parts[0])
        used = {name for names in self._sources.values() for name in names}
        # Frequencies of the rotary embedding are read into the config, where they differ from its own.
        unread = [t for t in self._tensors if t not in used and not t.startswith("rope_f")]
        check_contents(self.name, skeleton, found, unread, whole=True)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as the model wants it."""
        stored = tuple(int(n) for n in reversed(self._tensors[name].shape))
        try:
            # A view of one number: no memory, whatever is reordered.
            found = self._names.arranged(np.broadcast_to(np.float32(0), stored), name)
        except (ValueError, KeyError):  # rows that do not divide into heads; GPT-2's own head
            return stored
        return tuple(found.shape)

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in], float32, dequantised."""
        parts = [self._part(name, projection.expert) for name in self._parts_of(projection)]
        weight = torch.from_numpy(np.array(np.concatenate(parts, axis=0), dtype=np.float32))
        return weight.T if projection.transposed else weight

    def _part(self, name: str, expert: int | None) -> Any:
        from gguf import dequantize

        tensor = self._tensors[name]
        if expert is not None:
            return dequantize(tensor.data[expert], tensor.tensor_type)
        return self._names.arranged(dequantize(tensor.data, tensor.tensor_type), name)

    def _parts_of(self, projection: Projection) -> list[str]:
        """Tensors of the file that make up a matrix, one below the other."""
        return self._parts_named(projection.parameter_name)

    def _parts_named(self, parameter: str) -> list[str]:
        names = sorted(self._sources.get(parameter, []), key=lambda n: "_up" in n)
        if not names:
            raise ModelError(f"the GGUF of {self.name} has no tensor for {parameter}")
        return names

    def entries(self, projection: Projection, index: torch.Tensor) -> torch.Tensor:
        """Entries of a weight, [n] float32; only the blocks that hold them are read.

        Args:
            projection: one of :attr:`projections`.
            index: [n] int64, into the flattened [d_out, d_in].
        """
        row, column = index // projection.d_in, index % projection.d_in
        if projection.transposed:
            row, column = column, row
        rows, columns = row.numpy(), column.numpy()
        found = np.empty(len(index), dtype=np.float32)
        begin = 0
        for name in self._parts_of(projection):
            tensor = self._tensors[name]
            shape = [int(n) for n in reversed(tensor.shape)]  # GGUF counts the fastest axis first
            data = tensor.data
            if projection.expert is not None:
                data, shape = data[projection.expert], shape[1:]
                here = (rows >= begin) & (rows < begin + shape[0])
                at = rows[here] - begin, columns[here]
            else:
                from_row, from_column = self._origin(name, shape)
                here = (rows >= begin) & (rows < begin + from_row.shape[0])
                inside = rows[here] - begin, columns[here]
                at = from_row[inside].astype(np.int64), from_column[inside].astype(np.int64)
                shape = list(from_row.shape)
            found[here] = _dequantised_at(data, tensor.tensor_type, *at)
            begin += shape[0]
        return torch.from_numpy(found)

    def _origin(self, name: str, shape: list[int]) -> tuple[Any, Any]:
        """Row and column in the file of every entry of a tensor as the model wants it.

        Found on row and column numbers (float32 holds whole numbers up to 2^24 exactly), once for all
        blocks; views that hold next to no memory where whole rows are moved or nothing is.
        """
        key = re.sub(r"\d+", "N", name), *shape
        if key not in self._origins:
            rows, columns = np.arange(shape[0]), np.arange(shape[1])
            found = [
                self._names.arranged(np.broadcast_to(n.astype(np.float32), shape), name)
                for n in (rows[:, None], columns)
            ]
            if found[0].shape == tuple(shape) and all(
                (f == v).all() for f, v in zip(found, (found[0][:, :1], columns), strict=True)
            ):
                found = [np.broadcast_to(n, shape) for n in (found[0][:, :1].copy(), columns)]
            self._origins[key] = found[0], found[1]
        return self._origins[key]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, float32, dequantised.

        Raises:
            ModelError: the file has none.
        """
        if not self._sources.get(name):
            raise ModelError(f"the GGUF of {self.name} has no tensor for {name}")
        return torch.from_numpy(
            np.array(self._part(self._sources[name][0], None), dtype=np.float32)
        )

    def apart(self, first: str, second: str) -> bool:
        """See :class:`StoredWeights`."""
        return bool(self._sources.get(first)) and self._sources[first] != self._sources.get(second)

    def finish(self, model: Any) -> None:
        """See :class:`StoredWeights`; nothing."""

    def stored_kind(self, projection: Projection) -> str | None:
        """The kind of the file's blocks of a matrix, one of :data:`KINDS`; None if in any other form."""
        tensors = [self._tensors[n] for n in self._sources.get(projection.parameter_name, [])]
        kinds = {str(t.tensor_type.name) for t in tensors}
        if len(kinds) != 1 or not kinds <= KINDS.keys() or projection.transposed:
            return None
        # Gate and up of an expert lie one below the other here, in tensors of their own there.
        whole = len(tensors) == 1 or all(t.shape[1] % WHOLE_ROWS == 0 for t in tensors)
        return (
            kinds.pop() if whole and (len(tensors) == 1 or projection.expert is not None) else None
        )

    def stored_types(self, projection: Projection) -> frozenset[str]:
        """GGML's names of the types in which the file keeps a matrix, of which kind they may be."""
        names = self._sources.get(projection.parameter_name, [])
        return frozenset(str(self._tensors[n].tensor_type.name) for n in names)

    def stored(self, projection: Projection) -> list[StoredMatrix]:
        """A matrix that :meth:`stored_kind` names, as it lies in the file: one part, or several one below the other.

        Raises:
            ModelError: the file keeps it in another form.
        """
        if self.stored_kind(projection) is None:
            raise ModelError(
                f"{self.name} has no quantised blocks of a known kind for {projection.name}"
            )
        names = self._parts_of(projection)
        if projection.expert is not None:
            return [self._stored_expert(name, projection.expert) for name in names]
        # Some architectures store q and k with their outputs in another order.
        rows, _ = self._origin(names[0], [projection.d_out, projection.d_in])
        order = torch.from_numpy(np.array(rows[:, 0])).long()
        in_order = torch.equal(order, torch.arange(len(order)))
        return [self._stored(names[0], None if in_order else order)]

    def _stored_expert(self, name: str, expert: int) -> StoredMatrix:
        tensor = self._tensors[name]
        data = tensor.data[expert]
        begin = expert * data.nbytes

        def release(first: int, last: int) -> None:
            tensor.release(begin + first, begin + last)

        return StoredMatrix(tensor.tensor_type, data, tensor.shape[0], None, release)

    def stored_table(self, parameter: str) -> StoredMatrix | None:
        """An embedding or output head as it lies in the file; None if the model has it in another order.

        Args:
            parameter: its name in the model.
        """
        names = self._sources.get(parameter, [])
        if len(names) != 1 or len(self._tensors[names[0]].shape) != 2:
            return None
        sample = np.arange(64, dtype=np.float32).reshape(8, 8)
        try:
            if not np.array_equal(self._names.arranged(sample, names[0]), sample):
                return None
        except (ValueError, KeyError):
            return None
        return self._stored(names[0], None)

    def _stored(self, name: str, order: torch.Tensor | None) -> StoredMatrix:
        tensor = self._tensors[name]
        return StoredMatrix(tensor.tensor_type, tensor.data, tensor.shape[0], order, tensor.release)


def _dequantised_at(data: Any, kind: Any, rows: Integers, columns: Integers) -> Any:
    """Entries of a matrix in a GGUF's blocks, [n] float32.

    Args:
        data: the matrix as gguf's reader gives it: values, or [rows, bytes of a row] uint8.
        kind: gguf's name of the format.
        rows: [n] of the file.
        columns: [n] of the file.
    """
    from gguf import dequantize

    weights, size = BLOCKS[kind]
    if weights == 1 and data.dtype != np.uint8:
        return np.asarray(data[rows, columns], dtype=np.float32)
    blocks = data.reshape(data.shape[0], -1, size)[
        rows, columns // weights
    ]  # [n, bytes of a block]
    # As one row: gguf goes over rows sixteen at a time.
    values = dequantize(np.ascontiguousarray(blocks).reshape(1, -1), kind).reshape(-1, weights)
    return values[np.arange(len(rows)), columns % weights]
