"""Open a model on disk for the engine: its description, weights and tokenizer, no whole model in memory."""

import copy
import math
import os
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from acttail.base.folders import replacing_folder
from acttail.engine.accounting import other_bytes
from acttail.engine.config import EngineConfig
from acttail.engine.convert import Conversion, convert_to_folder
from acttail.engine.describe import describe, with_own_head
from acttail.engine.kept import read_ends, write_model_text
from acttail.engine.layout import Layout
from acttail.engine.light_tokenizer import FILE as LIGHT
from acttail.engine.light_tokenizer import light_from_header, read_light
from acttail.engine.packed_weights import SKETCHES, PackedWeights, sketches_of, write_sketches
from acttail.engine.shapes import Shape
from acttail.engine.spec import DecoderSpec, check_rule
from acttail.engine.store import read_description, read_folder, write_packed
from acttail.engine.text import eos_of, turn_ends
from acttail.errors import ActTailError, ActTailWarning, reason
from acttail.model.gguf_file import open_gguf
from acttail.model.hf import TOKENIZER_FILES, quiet_transformers
from acttail.model.names import PackedSource
from acttail.model.opened import Opened, open_model
from acttail.model.weights import WeightSource
from acttail.plan import SparsityPlan
from acttail.sparse.policy import PrefillPolicy

# What a conversion writes, and what an earlier one may have left.
_OWNED = (
    "config.json", "engine.json", "generation.json", "generation_config.json", "weights.safetensors", LIGHT, SKETCHES,
    *TOKENIZER_FILES,
)  # fmt: skip


@dataclass(frozen=True)
class OpenedModel:
    """An opened model as the native engine sees it.

    Attributes:
        opened: the model; what else is needed of it is read there.
        spec: its description.
        weights: read one matrix at a time.
        plan: that a checkpoint saved by acttail carries, else None.
        prefill: its prefill policy, else None.
    """

    opened: Opened
    spec: DecoderSpec
    weights: WeightSource
    plan: SparsityPlan | None
    prefill: PrefillPolicy | None

    @property
    def generation_config(self) -> Any:
        """What names the ends of a sequence: a config, or None."""
        outline = self.opened.outline
        return self.opened.generation_config if outline is None else outline.config

    def tokenizer(self) -> Any:
        """The model's tokenizer: built from a GGUF's header where that is known to be transformers' own.

        Raises:
            ModelError: it cannot be read.
        """
        if self.opened.outline is not None and self.opened.source.gguf is not None:
            header = open_gguf(self.opened.source.gguf)
            light = light_from_header(header, lambda: self.opened.tokenizer)
            if light is not None:
                return light
        return self.opened.tokenizer


def open_for_engine(model: str | os.PathLike[str] | Opened, *, own_blocks: bool) -> OpenedModel:
    """Open a model.

    Args:
        model: Hub id, folder, GGUF file or alias, or what is opened already.
        own_blocks: read a GGUF itself even where a dequantised copy is in the cache, for the engine can
            take its blocks as they are.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: the native engine does not run it.
    """
    opened = open_model(model)
    # Of most GGUF files the header says it all, and transformers is not imported.
    skeleton = opened.skeleton if opened.outline is None else opened.outline
    spec = describe(skeleton)
    plan, prefill = None, None
    carried = opened.quantization if opened.outline is None else {}
    if carried.get("quant_method") == "acttail":
        plan = SparsityPlan.from_dict(carried["plan"])
        prefill = PrefillPolicy.parse(str(carried.get("prefill", "all")))
    weights = opened.stored if own_blocks else opened.weights
    spec = with_own_head(spec, skeleton, weights)
    return OpenedModel(opened, spec, weights, plan, prefill)


def convert_model(
    model: str | os.PathLike[str] | Opened, output: str | os.PathLike[str], *, dtype: str | None = None, plan: Any = None,
    head_dtype: str | None = None, group: int | None = None, progress: Any = None,
) -> Path:  # fmt: skip
    """Write an .acttail folder: packed weights, description, plan, prefill policy and tokenizer.

    Memory stays at one matrix and its packed copy, however large the model is.

    Args:
        model: Hub id, folder, GGUF file, alias or .acttail folder, or what is opened already.
        output: the folder.
        dtype: ``auto`` (the default: as wide as a GGUF has each matrix, else ``bf16``), ``fp32``, ``bf16``, ``int8``
            or ``int4``.
        plan: kept inside; decides the order of fused projections.
        head_dtype: of embedding and output head.
        group: inputs that share a scale.
        progress: called with (matrices done, matrices).

    Returns:
        The folder.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: the native engine does not run it, or not the plan's rule.
        PlanError: the plan was made for another model.
        ActTailError: the folder cannot be written, or an .acttail folder is to be packed another way.
    """
    config = EngineConfig(dtype, head_dtype, group=group)
    check_rule(plan)
    found = open_model(model)
    if isinstance(found.source, PackedSource):
        return _packed_again(found.source, Path(output), config, plan, progress)
    opened = open_for_engine(found, own_blocks=config.own_blocks)
    plan = plan or opened.plan
    check_rule(plan)
    if plan is not None:
        plan.check(opened.weights)
    conversion = Conversion(opened.spec, opened.weights, config, plan=plan)
    rounded = conversion.rounded()
    if rounded is not None:
        warnings.warn(rounded, ActTailWarning, stacklevel=2)
    tokenizer = opened.tokenizer()
    eos = eos_of(opened.generation_config, tokenizer)
    with replacing_folder(output, _OWNED) as folder:
        convert_to_folder(conversion, folder, PrefillPolicy.choose(opened.prefill), progress)
        write_model_text(folder, tokenizer, eos)
        _write_configs(folder, found)
        write_sketches(folder, sketches_of(conversion.weights))
    return Path(output)


def _write_configs(folder: Path, model: Opened) -> None:
    """Write what transformers needs to run the same weights, dequantised."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # the plan is beside
        del config.quantization_config
    with quiet_transformers():
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def _packed_again(
    source: PackedSource, output: Path, config: EngineConfig, plan: SparsityPlan | None, progress: Any
) -> Path:  # fmt: skip
    """The same weights with another plan inside.

    Raises:
        ActTailError: they are packed another way than asked for.
        PlanError: the plan was made for another model.
    """
    weights = PackedWeights(source.name, source.path)
    config.check_folder(source, weights.layout.dtype, weights.layout.head_dtype)
    weights.check(plan)
    packed = read_folder(source.path)
    if plan is not None:
        packed = replace(packed, plan=plan)
    with replacing_folder(output, _OWNED) as folder:
        write_packed(folder, packed)
        for name in _OWNED:
            for file in source.path.glob(name):
                if not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
    if progress is not None:
        progress(1, 1)
    return output


def layout_for(model: str | os.PathLike[str] | Opened, config: EngineConfig) -> Layout:
    """How a model is or would be packed; nothing is.

    Args:
        model: as for :func:`open_for_engine`, or an .acttail folder.
        config: formats and group.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: the native engine does not run it.
        ActTailError: an .acttail folder is packed another way.
    """
    found = open_model(model)
    if isinstance(found.source, PackedSource):
        layout = read_description(found.source.path).layout
        config.check_folder(found.source, layout.dtype, layout.head_dtype)
        return layout
    return _conversion(found, config).layout


def _conversion(model: Opened, config: EngineConfig) -> Conversion:
    """Of the dense model, not begun."""
    opened = open_for_engine(model, own_blocks=config.own_blocks)
    return Conversion(opened.spec, opened.weights, config)


@dataclass(frozen=True)
class Outlay:
    """How large everything of a model is or would be, packed; nothing is.

    Attributes:
        layout: of the dense model.
        other: bytes that a token reads beside the matrices.
        head: name of the output head.
        head_by_inputs: its matrix where a plan drops some of its input.
    """

    layout: Layout
    other: int
    head: str
    head_by_inputs: Shape


def outlay_of(model: str | os.PathLike[str] | Opened, config: EngineConfig) -> Outlay:
    """How large everything of a model is or would be, packed; arguments and errors as for :func:`layout_for`."""
    found = open_model(model)
    if isinstance(found.source, PackedSource):
        layout = layout_for(found, config)
        sizes = {n: t.nbytes for n, t in read_folder(found.source.path).tensors.items()}
        head = PackedWeights(found.source.name, found.source.path).head
        # Packed weights stay as they lie: one that is read by outputs has no rows to drop but in another folder.
        by_inputs = replace(layout.head_shape, output_major=False)
    else:
        conversion = _conversion(found, config)
        layout, head = conversion.layout, conversion.weights.head
        sizes = {
            n: kind.itemsize * math.prod(shape) for n, (kind, shape) in conversion.sizes().items()
        }
        by_inputs = conversion.head_by_inputs()
    assert head is not None  # noqa: S101  (the engine runs no model without one)
    return Outlay(layout, other_bytes(layout, sizes), head.name, by_inputs)


def folder_tokenizer(folder: Path) -> tuple[Any, frozenset[int]]:
    """Tokenizer and end-of-sequence ids of an .acttail folder; (None, none) if it holds none.

    Raises:
        ActTailError: what is there cannot be read.
    """
    if not (folder / "tokenizer_config.json").exists():
        return None, frozenset()
    ends = read_ends(folder)
    try:
        light = read_light(folder)
        tokenizer = light or _whole_tokenizer(folder)
    except ActTailError:
        raise
    except Exception as error:
        raise ActTailError(f"cannot read the tokenizer in {folder}: {reason(error)}") from error
    # Folders with a light tokenizer are of after the ends of turns were kept.
    turns = turn_ends(tokenizer) if light is None else frozenset()
    return tokenizer, ends | turns


def _whole_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
