"""A model, opened once: its config, tokenizer and weights, each read when first asked for and never again.

Whatever opens a model takes a name or an :class:`Opened`, and hands on the latter.
"""

import copy
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acttail.base.progress import Progress
from acttail.errors import ActTailError, ModelError, reason
from acttail.model.config import load_config, quantization_of
from acttail.model.gguf import GgufWeights
from acttail.model.gguf_copy import copy_folder, keep_copy, nearest
from acttail.model.gguf_file import open_gguf
from acttail.model.gguf_outline import Outline, outline
from acttail.model.hf import meta_model, reading, refused_code
from acttail.model.hub import fetched
from acttail.model.names import (
    FolderSource,
    GgufSource,
    HubSource,
    ModelSource,
    PackedSource,
    resolve,
)
from acttail.model.relu import rectify_
from acttail.model.shards import SafetensorsWeights
from acttail.model.weights import LoadedWeights, StoredWeights, WeightSource
from acttail.model.whole import dtype_of, fill_whole, load_whole, placement

# What would work where a vocabulary has no tokenizer that can be built.
_TOKENIZER = "take a folder or a GGUF of the model with a tokenizer that transformers builds (tokenizer.json, say)"


class Opened:
    """A model on disk or on the Hub.

    Args:
        source: where it is.
        asked: what the user typed, under which another process finds it.
        trust_remote_code: run code that the model's repository ships.
    """

    def __init__(self, source: ModelSource, asked: str, *, trust_remote_code: bool = False) -> None:
        self.source, self.asked, self.trust_remote_code = source, asked, trust_remote_code

    @property
    def name(self) -> str:
        """As written to plans and results."""
        return self.source.name

    @property
    def findable(self) -> str:
        """What the user typed, for a process in another folder."""
        return str(Path(self.asked).absolute()) if Path(self.asked).exists() else self.asked

    @cached_property
    def near(self) -> ModelSource:
        """Where its JSON and its float weights are read.

        The dequantised copy of a GGUF if there is one: its JSON is read a hundred times faster.
        """
        return nearest(self.source)

    @cached_property
    def config(self) -> Any:
        """Its transformers config.

        Raises:
            ModelError: it cannot be read, or the model is not a causal decoder.
        """
        return load_config(self.near, trust_remote_code=self.trust_remote_code)

    @cached_property
    def skeleton(self) -> nn.Module:
        """Its modules on the meta device: shapes without weights.

        Raises:
            ModelError: see :attr:`config`, or no modules can be made of it.
        """
        # from_config writes into the config it is given.
        config = copy.deepcopy(self.config)
        try:
            return meta_model(config, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise refused_code(self.name, error) or ModelError(
                f"no model can be made of the config of {self.name} ({type(error).__name__}: {reason(error)}); "
                "correct it or fetch the model again"
            ) from error

    @cached_property
    def outline(self) -> Outline | None:
        """Of a GGUF whose header says enough, config and modules without transformers; else None.

        Raises:
            ModelError: the file is damaged, or its rotary embedding is not known.
        """
        return outline(open_gguf(self.source.gguf), self.name) if self.source.gguf else None

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The quantization config that the checkpoint carries, such as a plan; empty if none."""
        return quantization_of(self.config)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers.

        Raises:
            ModelError: it cannot be read.
        """
        from transformers import AutoTokenizer

        where, arguments = self.near.location()
        try:
            with reading(self.near.gguf):
                # Given the config, it reads none of its own.
                return AutoTokenizer.from_pretrained(
                    where, config=self.config, trust_remote_code=self.trust_remote_code, **arguments
                )
        except ActTailError:
            raise
        except Exception as error:
            raise refused_code(self.name, error) or ModelError(
                f"cannot read the tokenizer of {self.name}: {reason(error)}; {_TOKENIZER}"
            ) from error

    @cached_property
    def generation_config(self) -> Any:
        """Of transformers; None where the model has none."""
        from transformers import GenerationConfig

        if self.near.gguf is not None:
            # Its ends of turns are in the config.
            return GenerationConfig.from_model_config(self.config)
        where, arguments = self.near.location()
        try:
            with reading():
                return GenerationConfig.from_pretrained(where, **arguments)
        except Exception:  # many checkpoints have none
            return None

    @cached_property
    def weights(self) -> StoredWeights:
        """Its weights, read one matrix at a time; from a GGUF's dequantised copy where there is one.

        Raises:
            ModelError: they are missing or damaged.
        """
        return (
            self.stored if self.near is self.source else _WEIGHTS[type(self.near)](self, self.near)
        )

    @cached_property
    def stored(self) -> StoredWeights:
        """Its weights from the file that was named, which for a GGUF knows its own blocks too.

        Raises:
            ModelError: they are missing or damaged.
        """
        return _WEIGHTS[type(self.source)](self, self.source)

    def load(
        self, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu",
        device_map: str | dict[str, Any] | None = None, max_memory: dict[str | int, str] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Load the whole model and its tokenizer; arguments as for :func:`acttail.load`.

        Raises:
            ModelError: unreadable, truncated, or not a decoder.
        """
        spreads = device_map is not None or max_memory is not None
        wanted = dtype_of(dtype, device, spread=spreads)
        spread = placement(device_map, max_memory)
        remote = self.trust_remote_code and getattr(self.config, "auto_map", None)
        if not remote:
            _ = self.stored  # refused by the names in its headers, before anything is read or kept
        at = self._ready(progress)
        if self.source.of_transformers:
            model = load_whole(
                at.near, at.config, wanted, trust_remote_code=self.trust_remote_code, spread=spread,
                progress=progress,
            )  # fmt: skip
        else:
            model = fill_whole(self.stored, self.skeleton, wanted, spread=spread, progress=progress)
            model.generation_config = self.generation_config or model.generation_config
        rectify_(model)
        model.acttail_source = self.source
        if not spread:
            model = model.to(device)
        return model.eval(), at.tokenizer

    def _ready(self, progress: Progress | None) -> "Opened":
        """What transformers loads from: of a GGUF the dequantised copy, made on first use."""
        if self.near.gguf is None or copy_folder(self.near.gguf) is None:
            return self
        model = load_whole(self.near, self.config, torch.float32, progress=progress)
        made = keep_copy(self.near, model, self.tokenizer)
        return self if made is self.near else Opened(made, self.asked)


def _hub_weights(opened: Opened, source: HubSource) -> StoredWeights:
    skeleton = opened.skeleton  # refused before gigabytes are fetched
    return SafetensorsWeights(
        source.name, fetched(source.name, source.hub_id, source.revision), skeleton
    )


# How the weights of each kind of place are read.
_WEIGHTS: dict[type[ModelSource], Callable[[Opened, Any], StoredWeights]] = {
    FolderSource: lambda o, s: SafetensorsWeights(s.name, s.path, o.skeleton),
    GgufSource: lambda o, s: (
        GgufWeights(s.name, s.path, o.outline.config, o.outline)
        if o.outline is not None
        else GgufWeights(s.name, s.path, o.config, o.skeleton)
    ),
    HubSource: _hub_weights,
    PackedSource: lambda o, s: type(s).reader(s),
}


def open_model(
    model: str | os.PathLike[str] | Opened,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Opened:
    """Open a model; nothing of it is read yet.

    Args:
        model: Hub id, folder, GGUF file, .acttail folder or alias; what is opened already is handed on as it is.
        revision: Hub revision.
        trust_remote_code: run code that the model's repository ships; off unless you say so.

    Raises:
        ModelError: it is a path that does not exist, or a folder without a model in it.
    """
    if isinstance(model, Opened):
        return model
    asked = os.fspath(model)
    return Opened(resolve(asked, revision), asked, trust_remote_code=trust_remote_code)


def as_weights(model: Any) -> WeightSource:
    """A WeightSource for whatever names or holds a model.

    Raises:
        ModelError: the model cannot be read or is not a decoder.
    """
    if isinstance(model, str | os.PathLike | Opened):
        return open_model(model).weights
    if isinstance(model, nn.Module):
        return LoadedWeights(model)
    return model  # type: ignore[no-any-return]
