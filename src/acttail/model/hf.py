"""The one place that touches names of transformers that are not its documented public interface.

scripts/check_transformers.sh runs the tests against the oldest and the newest release that
pyproject.toml allows; where releases differ, this file asks what is there and nobody else has to.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from acttail.base.controls import clean
from acttail.base.progress import Progress
from acttail.errors import ModelError
from acttail.model.gguf_file import open_gguf
from acttail.model.gguf_header import STRINGS, Field, Header

if TYPE_CHECKING:  # `import acttail` reaches this file and must stay cheap
    from torch import nn

# The module whose import means that quantizers can be registered.
QUANTIZER_REGISTRY = "transformers.quantizers.auto"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and advice while loading: stdout and stderr belong to the caller."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(gguf: Path | None = None, progress: Progress | None = None) -> Iterator[None]:
    """Inside, transformers reads a model silently, and a GGUF's header is not parsed again.

    Args:
        gguf: the file that is read, if it is one.
        progress: called with (done, total) in the place of transformers' own bars.

    Raises:
        ModelError: the file is no GGUF, or truncated.
    """
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        if gguf is not None:
            stack.enter_context(_lent(gguf, open_gguf(gguf)))
        stack.enter_context(_bars_to(progress))
        yield


@contextmanager
def _lent(path: Path, header: Header) -> Iterator[None]:
    """Inside, whoever reads this file's header gets the one that is open.

    transformers reads it once each for the config, the tokenizer and the weights, element by element.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as checkpoint
    from transformers.integrations import gguf as package
    from transformers.integrations.gguf import reader

    make_reader, parse = gguf.GGUFReader, checkpoint._gguf_parse_value
    read_metadata = reader.read_gguf_metadata

    def is_it(wanted: Any) -> bool:
        return Path(wanted).resolve() == path.resolve()

    def reader_of(wanted: Any, *rest: Any, **named: Any) -> Any:
        return _Reader(header) if is_it(wanted) else make_reader(wanted, *rest, **named)

    def parsed(value: Any, kind: Any) -> Any:
        return value.value if isinstance(value, _Parsed) else parse(value, kind)

    def metadata_of(wanted: Any, string_arrays: Any = ()) -> Any:
        if not is_it(wanted):
            return read_metadata(wanted, string_arrays)
        # Lists of strings that are not asked for are told by their lengths.
        found = {
            key: len(field)
            if field.types == STRINGS and key not in string_arrays
            else field.contents()
            for key, field in header.fields.items()
        }
        return found, tuple(t.name for t in header.tensors)

    places = (
        (gguf, "GGUFReader", reader_of), (checkpoint, "_gguf_parse_value", parsed),
        (reader, "read_gguf_metadata", metadata_of), (package, "read_gguf_metadata", metadata_of),
    )  # fmt: skip
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, lent in places:
        setattr(place, name, lent)
    try:
        with _one_name_map():
            yield
    finally:
        for place, name, real in before:
            setattr(place, name, real)


class _Parsed(NamedTuple):
    """A value of a header as gguf's reader would have it parsed."""

    value: Any


class _Reader:
    """A header as transformers looks at gguf's reader."""

    def __init__(self, header: Header) -> None:
        self.tensors = header.tensors
        self.fields = {key: _ReaderField(field) for key, field in header.fields.items()}


class _ReaderField:
    """A value of it: parts, and which of them are data."""

    def __init__(self, field: Field) -> None:
        self.types, self.contents, self._field = list(field.types), field.contents, field

    @property
    def data(self) -> range:
        return range(len(self._field))

    @cached_property
    def parts(self) -> list[_Parsed]:
        found = self._field.contents()
        return [_Parsed(value) for value in (found if isinstance(found, list) else [found])]


@contextmanager
def _one_name_map() -> Iterator[None]:
    """Inside, gguf's table of tensor names is made once per architecture.

    transformers asks for it at every submodule: 397 times and 8 s for SmolLM2-135M.
    """
    import gguf

    real, gguf.get_tensor_name_map = gguf.get_tensor_name_map, cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = real


@contextmanager
def _bars_to(progress: Progress | None) -> Iterator[None]:
    """Inside, what transformers would draw is told to `progress`; with None it is told to nobody."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    def told(items: Iterable[Any], *_: Any, **named: Any) -> Iterator[Any]:
        total = named.get("total") or len(items)  # type: ignore[arg-type]
        for done, item in enumerate(items, 1):
            yield item
            if progress is not None:
                progress(done, total)

    def hook(factory: Callable[..., Any], items: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return told(*items, **named) if items and progress is not None else factory(*items, **named)

    # Absent before transformers 5.2; then only the reading of a GGUF is told.
    set_hook = getattr(logging, "set_tqdm_hook", None)
    drawn = getattr(gguf_reader, "tqdm", None)
    before = set_hook(hook) if set_hook else None
    if drawn is not None:
        gguf_reader.tqdm = told
    try:
        yield
    finally:
        if set_hook:
            set_hook(before)
        if drawn is not None:
            gguf_reader.tqdm = drawn


def meta_model(config: Any, *, trust_remote_code: bool = False) -> "nn.Module":
    """The model's modules on the meta device: shapes without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
            config, trust_remote_code=trust_remote_code
        )


def dequantised() -> dict[str, Any]:
    """Arguments of from_pretrained that make it dequantise a GGUF.

    Releases without GgufConfig know nothing else.
    """
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


class GgufNames:
    """How transformers maps a GGUF's tensors to a model's parameters.

    Args:
        architecture: as the file names it.
        config: of the model.
        model: its modules, on the meta device.
    """

    def __init__(self, architecture: str, config: Any, model: "nn.Module") -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
            config=config.to_dict()
        )
        # GGUF name -> parameter name
        with _one_name_map():
            self.parameters: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)

    def arranged(self, values: Any, name: str) -> Any:
        """A tensor of the file as the model wants it: some architectures store rows in another order.

        Args:
            values: numpy array as the file holds it.
            name: of the tensor in the file.
        """
        return self._processor.process(weights=values, name=name).weights


def activations() -> Any:
    """The table of transformers' activations: the name that a config says -> class of the module."""
    from transformers.activations import ACT2FN

    return ACT2FN


# What save_pretrained of a tokenizer may write, of whatever kind it is.
TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip


def refused_code(name: str, error: BaseException) -> ModelError | None:
    """The error to raise where transformers wanted to run a repository's code; None for any other failure."""
    if "custom code" not in str(error):
        return None
    return ModelError(
        f"{name} ships code of its own, which is not run unless you say so: --trust-remote-code, or "
        "trust_remote_code=True of acttail.load"
    )


def unread_architecture(name: str, error: BaseException) -> ModelError | None:
    """The error to raise for a GGUF of an architecture that transformers does not read; None for another error."""
    found = re.search(r"GGUF model with architecture (\S+) is not supported", str(error))
    if found is None:
        return None
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = sorted({*GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
    return ModelError(
        f"{name} holds the architecture {clean(found[1])}, which is not read from GGUF (read are {', '.join(known)}); "
        "take the model's safetensors, or try a newer transformers"
    )


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the named arguments of a forward pass, or None.

    transformers 5.24 calls it ``cache``, those before ``past_key_values``, and 5.24 still takes that name, too.
    """
    found = arguments.get("cache")
    return arguments.get("past_key_values") if found is None else found


def tied_parameters(model: Any) -> dict[str, list[str]]:
    """Parameter name -> the other names of the same values, by the model's config."""
    groups: dict[str, list[str]] = defaultdict(list)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups[source].append(target)
    found: dict[str, list[str]] = {}
    for source, targets in groups.items():
        names = [source, *targets]
        found |= {name: [n for n in names if n != name] for name in names}
    return found


class ExpectedAbsent(NamedTuple):
    """What may be missing or unread without harm, as tests of a name."""

    missing: Callable[[str], bool]
    unread: Callable[[str], bool]


def expected_absent(model: Any) -> ExpectedAbsent:
    """What a model makes for itself: what its class lists, and buffers such as masks and frequencies."""

    def matches(*patterns: str) -> Callable[[str], bool]:
        found = re.compile("|".join(f"({p})" for p in patterns)) if patterns else None
        return lambda key: found is not None and found.search(key) is not None

    buffers = {name for name, _ in model.named_buffers()}
    listed = matches(
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$",
    )  # fmt: skip
    return ExpectedAbsent(
        matches(*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())),
        lambda key: key in buffers or listed(key),
    )


def is_custom_code(model: Any) -> bool:
    """Whether a model's class came with its repository; its names follow no table of transformers."""
    asked = getattr(model, "is_custom_code", None)
    return bool(asked()) if callable(asked) else False


def checkpoint_parts(model: Any, keys: list[str]) -> dict[str, dict[str, list[str]]]:
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


class Quantizers(NamedTuple):
    """What a quantizer is made and registered with."""

    quantizer: Any
    config: Any
    register_quantizer: Callable[[str], Any]
    register_config: Callable[[str], Any]


def quantizers() -> Quantizers:
    """Base classes and decorators for a quantizer; transformers' registry must be loaded already."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    return Quantizers(
        HfQuantizer, QuantizationConfigMixin, register_quantizer, register_quantization_config
    )


def forget_quantizer(model: Any) -> None:
    """Undo the marks of a quantized model, for weights that are ordinary floats.

    transformers forbids ``.half()``, ``.to(dtype)`` and training for models with those marks.
    """
    model.is_quantized = False
    del model.hf_quantizer
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_is_quantized"):
            module.config._is_quantized = False
