"""Read one projection's weight at a time from safetensors shards or a GGUF file.

The model itself is only built on the meta device (shapes, no weights), so that a model larger than
memory can be analysed: what is held is one matrix.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from acttail.errors import ModelError
from acttail.models import ModelSource, converted_folder, hub_arguments, load_config, reason
from acttail.projections import Projection, find_projections, weight_of


class WeightSource(Protocol):
    """Anything that lists projections and yields their weights one by one."""

    name: str
    projections: list[Projection]

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in], in its stored (or dequantised) dtype."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Any other parameter by its name in the model's state dict, in its stored dtype.

        Raises:
            ModelError: there is none.
        """
        ...


class LoadedWeights:
    """Weights of a model in memory."""

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self.model = model
        source = getattr(model, "acttail_source", None)
        config_name = getattr(getattr(model, "config", None), "name_or_path", "")
        self.name = name or (source.name if source else config_name) or type(model).__name__
        self.projections = find_projections(model)

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight as a view of the parameter, [d_out, d_in]; read if accelerate keeps it on disk."""
        with _onloaded(self.model.get_submodule(projection.module)):
            return weight_of(self.model, projection)

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


def meta_model(config: Any) -> nn.Module:
    """The model's modules on the meta device: shapes without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


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


class SafetensorsWeights:
    """Weights straight from a folder of safetensors shards."""

    def __init__(self, source: ModelSource, folder: Path) -> None:
        self.name = source.name
        config = load_config(source)
        self._model = meta_model(config)
        self.projections = find_projections(self._model)
        self._file_of = _shard_index(folder)
        self.files = sorted(set(self._file_of.values()))
        self._parts = _checkpoint_parts(self._model, list(self._file_of))

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in], in its stored dtype; experts stored apart are put together."""
        parts = self._parts.get(projection.parameter_name)
        if not parts:
            raise ModelError(
                f"the checkpoint of {self.name} has no tensor for {projection.parameter_name}"
            )
        if list(parts) == [""]:
            weight = self._read(parts[""][0], projection.expert)
        else:
            # One checkpoint tensor per expert and source (w1, w3): concatenated along the outputs.
            expert = projection.expert or 0
            weight = torch.cat([self._read(keys[expert], None) for keys in parts.values()], dim=0)
        expected = (projection.d_in, projection.d_out) if projection.transposed else (
            projection.d_out, projection.d_in)  # fmt: skip
        if tuple(weight.shape) != expected:
            raise ModelError(
                f"{projection.name} has shape {tuple(weight.shape)} in the checkpoint, not {expected}; "
                "the config and the weights do not belong together"
            )
        return weight.T if projection.transposed else weight

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model.

        Raises:
            ModelError: the checkpoint has none.
        """
        parts = self._parts.get(name)
        if not parts or list(parts) != [""]:
            raise ModelError(f"the checkpoint of {self.name} has no tensor for {name}")
        return self._read(parts[""][0], None)

    def _read(self, key: str, index: int | None) -> torch.Tensor:
        from safetensors import safe_open

        path = self._file_of[key]
        try:
            with safe_open(path, framework="pt") as file:
                view = file.get_slice(key)
                tensor = view[:] if index is None else view[index]
                # A copy, so that the file's mapping is dropped with it and memory stays bounded.
                return tensor.clone()  # type: ignore[no-any-return]
        except Exception as error:
            raise ModelError(
                f"cannot read {key} from {path}: {reason(error)}; fetch the file again"
            ) from error


def _shard_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> the shard that holds it.

    Raises:
        ModelError: a shard is missing or truncated, or there is none.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ModelError(f"{index} is not a shard index; fetch it again") from error
        shards = sorted({folder / str(file) for file in names.values()})
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(
            f"{folder} holds no safetensors; convert the checkpoint (pickle is not read)"
        )
    located: dict[str, Path] = {}
    for shard in shards:
        if shard.resolve().parent != folder.resolve() and not shard.is_symlink():
            raise ModelError(f"the shard index of {folder} points outside of it: {shard}")
        try:
            with safe_open(shard, framework="pt") as file:
                located.update(dict.fromkeys(file.keys(), shard))
        except Exception as error:
            raise ModelError(
                f"cannot read {shard}: {reason(error)}; fetch the file again"
            ) from error
    return located


def _checkpoint_parts(model: Any, keys: list[str]) -> dict[str, dict[str, list[str]]]:
    """Parameter name -> source pattern -> checkpoint keys in expert order.

    transformers renames and merges some checkpoints on load (Mixtral's w1, w3 of every expert become
    one 3-D gate_up_proj); the same table tells which tensors make up a parameter. An untouched
    parameter has the single pattern ''.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    order = {p: i for c in converters for i, p in enumerate(c.source_patterns)}
    state = dict(model.state_dict())
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in keys:
        target, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        parts[target][pattern or ""].append(key)
    return {
        target: {
            pattern: sorted(found[pattern], key=_natural)
            for pattern in sorted(found, key=lambda p: order.get(p, 0))
        }
        for target, found in parts.items()
    }


def _natural(key: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def open_gguf(path: Path) -> Any:
    """Open a GGUF file and check that every tensor lies within it.

    Raises:
        ModelError: not a GGUF file, or truncated.
    """
    return _open_gguf(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_gguf(path: Path, modified: int) -> Any:
    """Parsing the header takes seconds in Python (4 s for 49,152 tokens), so the last one is kept."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file")
    try:
        reader = GGUFReader(str(path))
    except Exception as error:
        raise ModelError(
            f"cannot read {path}: it is truncated or damaged; fetch it again"
        ) from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise ModelError(
                f"cannot read {path}: it is truncated at tensor {tensor.name}; fetch it again"
            )
    return reader


# Bytes of a block of 32 weights.
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


@dataclass(frozen=True)
class StoredBlocks:
    """A matrix in GGUF's own levels: w = scale * level (+ minimum), 32 inputs to a scale.

    Attributes:
        bits: 8 or 4.
        levels: [d_out, d_in]; int8, or uint8 from 0 to 15 (then 8 stands for zero if there is no
            minimum).
        scale: [d_out, d_in / 32] float16.
        minimum: the same shape, or None.
    """

    bits: int
    levels: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None

    @classmethod
    def read(cls, kind: str, raw: torch.Tensor) -> "StoredBlocks":
        """Take blocks apart.

        Args:
            kind: ``Q8_0``, ``Q4_0`` or ``Q4_1``.
            raw: [d_out, blocks, bytes of a block] uint8.
        """
        scale = raw[..., :2].contiguous().view(torch.float16)[..., 0]
        if kind == "Q8_0":
            levels = raw[..., 2:].contiguous().view(torch.int8)
            return cls(8, levels.flatten(1), scale, None)
        start = 4 if kind == "Q4_1" else 2
        packed = raw[..., start:]
        levels = torch.cat([packed & 15, packed >> 4], dim=-1)
        minimum = raw[..., 2:4].contiguous().view(torch.float16)[..., 0] if kind == "Q4_1" else None
        return cls(4, levels.flatten(1), scale, minimum)


class GgufWeights:
    """Weights straight from a GGUF file, dequantised one matrix (or expert) at a time."""

    def __init__(self, source: ModelSource) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        if source.path is None:
            raise ModelError(f"{source.name} is not a GGUF file")
        self.name = source.name
        self.files = [source.path]
        reader = open_gguf(source.path)
        config = load_config(source)
        model = meta_model(config)
        self.projections = find_projections(model)
        architecture = reader.fields["general.architecture"].contents()
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
            config=config.to_dict()
        )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._sources: dict[str, list[str]] = defaultdict(list)
        for gguf_name, hf_name in get_gguf_hf_weights_map(model, self._processor).items():
            # Stacked experts are listed with and without the suffix.
            name = gguf_name if gguf_name in self._tensors else f"{gguf_name}.weight"
            if name in self._tensors and name not in self._sources[hf_name]:
                self._sources[hf_name].append(name)

    def weight(self, projection: Projection) -> torch.Tensor:
        """The weight, [d_out, d_in], float32, dequantised."""
        from gguf import dequantize

        names = sorted(self._sources.get(projection.parameter_name, []), key=lambda n: "_up" in n)
        if not names:
            raise ModelError(
                f"the GGUF of {self.name} has no tensor for {projection.parameter_name}"
            )
        parts = []
        for name in names:
            tensor = self._tensors[name]
            if projection.expert is not None:
                parts.append(dequantize(tensor.data[projection.expert], tensor.tensor_type))
                continue
            values = dequantize(tensor.data, tensor.tensor_type)
            parts.append(self._processor.process(weights=values, name=name).weights)
        weight = torch.from_numpy(np.array(np.concatenate(parts, axis=0), dtype=np.float32))
        return weight.T if projection.transposed else weight

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, float32, dequantised.

        Raises:
            ModelError: the file has none.
        """
        from gguf import dequantize

        if not self._sources.get(name):
            raise ModelError(f"the GGUF of {self.name} has no tensor for {name}")
        source = self._sources[name][0]
        tensor = self._tensors[source]
        values = dequantize(tensor.data, tensor.tensor_type)
        processed = self._processor.process(weights=values, name=source).weights
        return torch.from_numpy(np.array(processed, dtype=np.float32))

    def stored_kind(self, projection: Projection) -> str | None:
        """Q8_0, Q4_0 or Q4_1 if the file keeps the matrix so, None if in any other form.

        In these 32 inputs share a scale, as in the engine's groups of 32.
        """
        names = self._sources.get(projection.parameter_name, [])
        if len(names) != 1 or projection.expert is not None or projection.transposed:
            return None
        kind = str(self._tensors[names[0]].tensor_type.name)
        return kind if kind in _BLOCK_BYTES else None

    def stored(self, projection: Projection) -> StoredBlocks:
        """The file's own quantised blocks of a matrix that :meth:`stored_kind` names.

        Raises:
            ModelError: the file keeps it in another form.
        """
        kind = self.stored_kind(projection)
        if kind is None:
            raise ModelError(f"{self.name} has no blocks of 32 weights for {projection.name}")
        names = self._sources[projection.parameter_name]
        tensor = self._tensors[names[0]]
        raw = torch.from_numpy(np.array(tensor.data)).reshape(
            projection.d_out, -1, _BLOCK_BYTES[kind]
        )
        # Some architectures store q and k with their outputs in another order: find it on row numbers.
        numbers = np.repeat(
            np.arange(projection.d_out, dtype=np.float32)[:, None], projection.d_in, 1
        )
        order = self._processor.process(weights=numbers, name=names[0]).weights[:, 0]
        return StoredBlocks.read(kind, raw[torch.from_numpy(np.array(order)).long()])


def open_weights(source: ModelSource) -> WeightSource:
    """Open a model's weights for reading one matrix at a time, without loading the model.

    Args:
        source: from :func:`acttail.models.resolve`. A Hub model is downloaded into the Hub's cache.

    Raises:
        ModelError: unknown, unreadable, truncated, or not a decoder.
    """
    if source.kind == "gguf" and source.path is not None:
        folder = converted_folder(source.path)
        if folder is None or not folder.exists():
            return GgufWeights(source)
        return SafetensorsWeights(ModelSource(source.name, "folder", folder), folder)
    if source.kind == "folder":
        if source.path is None:
            raise ModelError(f"{source.name} has no folder")
        return SafetensorsWeights(source, source.path)
    from huggingface_hub import snapshot_download

    load_config(source)
    try:
        folder = snapshot_download(
            str(source.hub_id),
            **hub_arguments(source),
            allow_patterns=["*.safetensors", "*.json"],
        )
    except Exception as error:
        raise ModelError(
            f"cannot fetch {source.name} ({reason(error)}); check the id and the network"
        ) from error
    return SafetensorsWeights(ModelSource(source.name, "folder", Path(folder)), Path(folder))
