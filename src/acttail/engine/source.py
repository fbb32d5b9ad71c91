"""Open a model on disk for the engine: its description, weights and tokenizer, no whole model in memory."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acttail.checkpoint import (
    GgufWeights,
    SafetensorsWeights,
    WeightSource,
    meta_model,
    open_weights,
)
from acttail.engine.spec import DecoderSpec, describe
from acttail.errors import ActTailError, ModelError
from acttail.files import write_json
from acttail.models import (
    ModelSource,
    converted_folder,
    load_config,
    quiet_transformers,
    reason,
    resolve,
)
from acttail.plan import SparsityPlan


@dataclass
class OpenedModel:
    """A model on disk.

    Attributes:
        spec: its description.
        weights: read one matrix at a time.
        generation_config: of transformers, or None.
        plan: that a checkpoint saved by acttail carries, else None.
        prefill: its prefill policy.
    """

    spec: DecoderSpec
    weights: WeightSource
    generation_config: Any
    plan: SparsityPlan | None
    prefill: str
    _source: ModelSource

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ModelError: it cannot be read.
        """
        return load_tokenizer(self._source)


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoTokenizer

    from acttail.models import location

    at = _nearest(source)
    where, arguments = location(at)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(where, **arguments)
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer of {source.name}: {reason(error)}") from error


def _nearest(source: ModelSource) -> ModelSource:
    """The converted copy of a GGUF if there is one: its JSON is read a hundred times faster."""
    if source.kind == "gguf" and source.path is not None:
        folder = converted_folder(source.path)
        if folder is not None and folder.exists():
            return ModelSource(source.name, "folder", folder)
    return source


def open_for_engine(model: str | os.PathLike[str], *, own_blocks: bool) -> OpenedModel:
    """Open a model.

    Args:
        model: Hub id, folder, GGUF file or alias.
        own_blocks: read a GGUF itself even where a dequantised copy is in the cache, for the engine can
            take its blocks as they are.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: the native engine does not run it.
    """
    source = resolve(model)
    near = _nearest(source)
    config = load_config(near)
    spec = describe(meta_model(config))
    weights: WeightSource
    if source.kind == "gguf" and own_blocks:
        weights = GgufWeights(source)
    elif near is not source and near.path is not None:
        weights = SafetensorsWeights(near, near.path)
    else:
        weights = open_weights(source)
    carried = getattr(config, "quantization_config", None) or {}
    carried = carried if isinstance(carried, dict) else vars(carried)
    plan = None
    if carried.get("quant_method") == "acttail":
        plan = SparsityPlan.from_dict(carried["plan"])
    return OpenedModel(
        spec, weights, _generation_config(near), plan, carried.get("prefill", "all"), source
    )


def _generation_config(source: ModelSource) -> Any:
    from transformers import GenerationConfig

    from acttail.models import location

    if source.kind == "gguf":
        return None
    where, arguments = location(source)
    try:
        with quiet_transformers():
            return GenerationConfig.from_pretrained(where, **arguments)
    except Exception:  # many checkpoints have none
        return None


def convert_model(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, dtype: str, plan: Any = None,
    head_dtype: str | None = None, group: int | None = None, progress: Any = None,
) -> Path:  # fmt: skip
    """Write an .acttail folder: packed weights, description, plan and tokenizer.

    Memory stays at one matrix and its packed copy, however large the model is.

    Args:
        model: Hub id, folder, GGUF file or alias.
        output: the folder.
        dtype: ``fp32``, ``bf16``, ``int8`` or ``int4``.
        plan: kept inside; decides the order of fused projections.
        head_dtype: of embedding and output head.
        group: inputs that share a scale.
        progress: called with (matrices done, matrices).

    Returns:
        The folder.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: the native engine does not run it.
        PlanError: the plan was made for another model.
        ActTailError: the folder cannot be written.
    """
    from acttail.engine import eos_of
    from acttail.engine.convert import Conversion, convert_to_folder

    opened = open_for_engine(model, own_blocks=dtype in ("int8", "int4"))
    plan = plan or opened.plan
    if plan is not None:
        plan.check(opened.weights)
    conversion = Conversion(
        opened.spec, opened.weights, dtype, plan=plan, head_dtype=head_dtype, group=group
    )
    tokenizer = opened.tokenizer()
    folder = Path(output)
    convert_to_folder(conversion, folder, progress)
    tokenizer.save_pretrained(folder)
    eos = sorted(eos_of(opened.generation_config, tokenizer))
    write_json(folder / "generation.json", {"eos_token_id": eos})
    return folder


def folder_tokenizer(folder: Path) -> tuple[Any, frozenset[int]]:
    """Tokenizer and end-of-sequence ids of an .acttail folder; (None, none) if it holds none.

    Raises:
        ActTailError: what is there cannot be read.
    """
    if not (folder / "tokenizer_config.json").exists():
        return None, frozenset()
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        eos = json.loads((folder / "generation.json").read_text())["eos_token_id"]
    except Exception as error:
        raise ActTailError(f"cannot read the tokenizer in {folder}: {reason(error)}") from error
    return tokenizer, frozenset(map(int, eos))
