"""What a GGUF's header says of its model and transformers leaves out, put into the config.

The rules are llama.cpp's (llama-model.cpp, llama-context.cpp, ggml_rope_ext); what a transformers config
cannot say is refused by name.
"""

import math
from typing import Any

from acttail.errors import ModelError

# Keys of an architecture -> attributes of the config, where it has them.
_NUMBERS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_ENDS = ("eos", "eot", "eom")
_SCALINGS = ("none", "linear", "yarn", "longrope")
# Of llama.cpp, where the file has none.
_THETA = 10_000.0


# Keys of an architecture -> the config's field, for what is judged before a config is made.
_FIELDS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "context_length": "max_position_embeddings", "vocab_size": "vocab_size",
    "expert_count": "num_experts", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps", "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
}  # fmt: skip


def header_fields(reader: Any) -> dict[str, Any]:
    """What a GGUF's header says of its model's sizes, in the words of a config.

    Args:
        reader: gguf's, of the file.
    """
    header = _Header(reader, "")
    found: dict[str, Any] = {}
    for key, field in _FIELDS.items():
        value = header.get(key)
        # A list has one number for every block, of which the largest counts.
        if isinstance(value, list) and value and all(type(v) in (int, float) for v in value):
            value = max(value)
        if value is not None:
            found[field] = value
    for end in ("bos", "eos"):
        found[f"{end}_token_id"] = header.token(end)
    return found


def complete(config: Any, reader: Any, name: str) -> None:
    """Change a config to what the file says.

    Args:
        config: as transformers reads it from the file.
        reader: gguf's, of the file.
        name: of the model, for errors.

    Raises:
        ModelError: the file's rotary embedding, or its blocks of experts, are none that transformers has for this
            family.
    """
    header = _Header(reader, name)
    experts = header.get("expert_count")
    # Mixtral's calls itself a llama, and transformers makes it one.
    if type(experts) is int and experts > 0 and not hasattr(config, "num_experts_per_tok"):
        raise header.refuse(f"{experts} experts in blocks of {config.model_type}")
    ends = [header.token(end) for end in _ENDS]
    ids = sorted({i for i in ends if i is not None})
    if ids:
        config.eos_token_id = ids[0] if len(ids) == 1 else ids
    bos = header.token("bos")
    if bos is not None:
        config.bos_token_id = bos
    # Not the family's default, which may lie outside of this vocabulary.
    config.pad_token_id = header.token("padding")
    for key, attribute in _NUMBERS.items():
        value = header.get(key)
        if value is not None and not isinstance(value, list) and hasattr(config, attribute):
            setattr(config, attribute, value)
    if config.model_type in _OWN_ATTENTION or not getattr(config, "rope_parameters", None):
        return
    if header.get("attention.sliding_window") is None and config.model_type in _WINDOWED:
        config.sliding_window = None
    head_dim = _head_dim(config, header)
    if config.model_type in _WIDEST_GEMMA:
        # No key says it: llama.cpp tells the largest by its depth.
        widest = config.num_hidden_layers == _WIDEST_GEMMA[config.model_type]
        scale = config.hidden_size // config.num_attention_heads if widest else head_dim
        config.query_pre_attn_scalar = scale
    _rope(config, header, head_dim)


# Heads of two sizes, or scaled as transformers' own reader does it.
_OWN_ATTENTION = ("gemma4_text", "gpt_oss", "lfm2")
# Their windows are the file's, not their config's default.
_WINDOWED = ("mistral", "phi3", "starcoder2")


# Blocks of the 27B, whose attention is scaled by another width than its heads'.
_WIDEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}


class _Header:
    """The fields of a GGUF, by their names within its architecture."""

    def __init__(self, reader: Any, name: str) -> None:
        self.name = name
        self._fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._architecture = reader.fields["general.architecture"].contents()

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(f"{self._architecture}.{key}")
        return default if field is None else field.contents()

    def token(self, which: str) -> int | None:
        field = self._fields.get(f"tokenizer.ggml.{which}_token_id")
        return None if field is None else int(field.contents())

    def factors(self, name: str) -> list[float] | None:
        """A tensor of numbers, None if there is none."""
        from gguf import dequantize

        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        return [float(x) for x in dequantize(tensor.data, tensor.tensor_type).reshape(-1)]

    def refuse(self, what: str) -> ModelError:
        return ModelError(
            f"the GGUF of {self.name} has {what}, which acttail does not run; run it with llama.cpp, or take "
            "the model as safetensors"
        )


def _head_dim(config: Any, header: _Header) -> int:
    """Size of a head, which transformers takes from elsewhere or from the family's default."""
    held = config.hidden_size // config.num_attention_heads
    size = int(header.get("attention.key_length", held))
    values = int(header.get("attention.value_length", size))
    if values != size:
        raise header.refuse(f"values of {values} per head and keys of {size}")
    if size != (getattr(config, "head_dim", None) or held):
        config.head_dim = size
    return size


def _rope(config: Any, header: _Header, head_dim: int) -> None:
    parameters = config.rope_parameters
    nested = "full_attention" in parameters
    target = parameters["full_attention"] if nested else parameters
    rotated = int(header.get("rope.dimension_count", head_dim))
    if rotated != head_dim or target.get("partial_rotary_factor") is not None:
        if "partial_rotary_factor" not in target or int(head_dim * (rotated / head_dim)) != rotated:
            raise header.refuse(f"a rope.dimension_count of {rotated} for heads of {head_dim}")
        target["partial_rotary_factor"] = rotated / head_dim
    target["rope_theta"] = float(header.get("rope.freq_base", _THETA))
    if nested and "sliding_attention" in parameters:
        theta = float(header.get("rope.freq_base_swa", _THETA))
        parameters["sliding_attention"] = {"rope_type": "default", "rope_theta": theta}
    kept = {k: target[k] for k in ("rope_theta", "partial_rotary_factor") if k in target}
    scaling = _scaling(config, header, rotated)
    original = scaling.get("original_max_position_embeddings")
    if original is not None and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    target.clear()
    target |= kept | scaling


def _scaling(config: Any, header: _Header, rotated: int) -> dict[str, Any]:
    """The rope parameters of a file's scaling.

    Raises:
        ModelError: it is none of transformers'.
    """
    context = int(config.max_position_embeddings)
    kind = str(header.get("rope.scaling.type", "linear"))
    if kind not in _SCALINGS:
        raise header.refuse(f"a rope.scaling.type of {kind}")
    for key, plain in (
        ("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0), ("alpha", 0.0),
    ):  # fmt: skip
        value = header.get(f"rope.scaling.{key}")
        if value is not None and not math.isclose(float(value), plain):
            raise header.refuse(f"a rope.scaling.{key} of {value}")
    factor = float(header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0)
    factor = 1.0 if kind == "none" else factor
    if not (math.isfinite(factor) and factor > 0):
        raise header.refuse(f"a rope.scaling.factor of {factor}")
    attention = float(header.get("rope.scaling.attn_factor", 1.0))
    original = int(header.get("rope.scaling.original_context_length", 0)) or context
    freqs = header.factors("rope_freqs.weight")
    short, long = (header.factors(f"rope_factors_{which}.weight") for which in ("short", "long"))
    if (short is None) != (long is None):
        raise header.refuse("one of rope_factors_short and rope_factors_long and not the other")
    if kind == "longrope" and short is None and freqs is None:
        raise header.refuse("a rope.scaling.type of longrope without rope_factors")
    if kind == "yarn":
        if freqs or short:
            raise header.refuse("factors of its rope beside a rope.scaling.type of yarn")
        return {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "attention_factor": attention * (1 + 0.1 * math.log(factor)),
            "beta_fast": float(header.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(header.get("rope.scaling.yarn_beta_slow", 1.0)),
        }  # fmt: skip
    if freqs is not None:  # as llama.cpp: before the pair of tables
        short = long = freqs
        original = context
    if short is None and attention == 1.0:
        default: dict[str, Any] = {"rope_type": "default"}
        return default if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    # Longrope says any factors: Llama 3's, which a file keeps as numbers, too.
    tables = [[f * factor for f in table or [1.0] * (rotated // 2)] for table in (short, long)]
    if any(len(table) != rotated // 2 for table in tables):
        raise header.refuse(f"{len(tables[0])} factors of its rope for {rotated // 2} frequencies")
    return {
        "rope_type": "longrope", "short_factor": tables[0], "long_factor": tables[1],
        "attention_factor": attention, "original_max_position_embeddings": original,
    }  # fmt: skip
