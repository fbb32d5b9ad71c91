"""A model's transformers config: read it, and check that it is a decoder."""

from typing import Any

from acttail.errors import ModelError
from acttail.model.config_fields import check_fields
from acttail.model.gguf_config import complete, header_fields
from acttail.model.gguf_file import open_gguf
from acttail.model.hf import reading, refused_code, unread_architecture
from acttail.model.names import ModelSource
from acttail.model.quantised import check_method


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Read the model's transformers config and check that it is a decoder.

    Raises:
        ModelError: the config cannot be read, or the model is not a causal decoder, or its weights are
            quantised in a way that acttail does not read.
    """
    from transformers import AutoConfig

    where, arguments = source.location()
    source.check()
    check_fields(source.name, _raw(source))
    try:
        with reading(source.gguf):
            config = AutoConfig.from_pretrained(
                where, trust_remote_code=trust_remote_code, **arguments
            )
    except Exception as error:
        raise (
            refused_code(source.name, error)
            or unread_architecture(source.name, error)
            or source.failure(error)
        ) from error
    _check_decoder(source, config)
    if source.gguf is not None:
        complete(config, open_gguf(source.gguf), source.name)
    check_method(source.name, quantization_of(config))
    return config


def _raw(source: ModelSource) -> dict[str, Any]:
    """What a config says before anything is made of it.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import PreTrainedConfig

    if source.gguf is not None:
        return header_fields(open_gguf(source.gguf))
    where, arguments = source.location()
    try:
        with reading():
            found, _ = PreTrainedConfig.get_config_dict(where, **arguments)
    except Exception as error:
        raise source.failure(error) from error
    if not isinstance(found, dict):
        raise ModelError(f"the config of {source.name} is not a JSON object")
    return found


def quantization_of(config: Any) -> dict[str, Any]:
    """The quantization config that a checkpoint carries, such as a plan; empty if none."""
    carried = getattr(config, "quantization_config", None) or {}
    return carried if isinstance(carried, dict) else vars(carried)


def _check_decoder(source: ModelSource, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    remote = bool(getattr(config, "auto_map", None))
    named = getattr(config, "architectures", None) or []
    causal = any(a.endswith(("CausalLM", "LMHeadModel", "ForConditionalGeneration")) for a in named)
    if getattr(config, "is_encoder_decoder", False) or not (
        remote or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (causal or not named))
    ):
        kind = named[0] if named else config.model_type
        raise ModelError(
            f"{source.name} is not a decoder language model ({kind}); acttail needs a causal LM"
        )
