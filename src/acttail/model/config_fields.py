"""What acttail and transformers read of a model's config, each field with the values it may have.

Other fields pass: every family has its own. The bounds are those beyond which building the modules would take
minutes, and which no model has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le, Len

from acttail.base.schema import OPEN, Count, Name, NotNegative, SchemaError, Size, checked
from acttail.errors import ModelError

Blocks = Annotated[int, Ge(1), Le(512)]
Heads = Annotated[int, Ge(1), Le(1 << 16)]
HeadSize = Annotated[int, Ge(1), Le(1 << 14)]
Experts = Annotated[int, Ge(0), Le(1 << 12)]
Positive = Annotated[float, Ge(1e-9)]
Ids = Count | Annotated[list[Count], Len(0, 1 << 16)] | None
# Experts of all blocks, each with matrices of its own.
_MOST_EXPERTS = 1 << 17


@dataclass(frozen=True)
class ConfigFields:
    """The fields by their names in config.json; None where a config leaves one out."""

    __pydantic_config__ = OPEN

    model_type: Name | None = None
    architectures: list[Name] | None = None
    dtype: Name | None = None
    torch_dtype: Name | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    layer_types: list[Name] | None = None
    tie_word_embeddings: bool | None = None
    is_encoder_decoder: bool | None = None
    hidden_act: Name | None = None
    hidden_activation: Name | None = None
    activation_function: Name | None = None
    num_hidden_layers: Blocks | None = None
    n_layer: Blocks | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    n_head: Heads | None = None
    head_dim: HeadSize | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    moe_intermediate_size: Size | None = None
    shared_expert_intermediate_size: Size | None = None
    n_embd: Size | None = None
    n_inner: Size | None = None
    ffn_dim: Size | None = None
    vocab_size: Size | None = None
    max_position_embeddings: Size | None = None
    n_positions: Size | None = None
    original_max_position_embeddings: Size | None = None
    sliding_window: Count | None = None
    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    n_routed_experts: Experts | None = None
    num_experts_per_tok: Experts | None = None
    rms_norm_eps: NotNegative | None = None
    layer_norm_eps: NotNegative | None = None
    layer_norm_epsilon: NotNegative | None = None
    norm_epsilon: NotNegative | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: NotNegative | None = None
    query_pre_attn_scalar: Positive | None = None
    attn_logit_softcapping: NotNegative | None = None
    final_logit_softcapping: NotNegative | None = None
    bos_token_id: Ids = None
    eos_token_id: Ids = None
    text_config: dict[str, Any] | None = None

    @property
    def blocks(self) -> int:
        """Decoder blocks, 0 where the config leaves it to the family."""
        return self.num_hidden_layers or self.n_layer or 0

    @property
    def experts(self) -> int:
        """Experts of a block, 0 for none."""
        return self.num_experts or self.num_local_experts or self.n_routed_experts or 0


def check_fields(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a config with a field that no model has so, before modules are built of it.

    Args:
        name: of the model.
        config: its config.json, or a GGUF's header in the same words.

    Raises:
        ModelError: names the first such field.
    """
    try:
        fields = checked(ConfigFields, dict(config))
    except SchemaError as error:
        raise ModelError(f"the config of {name} is not that of a model: {error}") from None
    if fields.blocks * fields.experts > _MOST_EXPERTS:
        raise ModelError(
            f"the config of {name} is not that of a model: {fields.experts} experts in each of {fields.blocks} blocks"
        )
    if fields.layer_types is not None and fields.blocks not in (0, len(fields.layer_types)):
        raise ModelError(
            f"the config of {name} is not that of a model: {len(fields.layer_types)} layer_types for "
            f"{fields.blocks} blocks"
        )
    if fields.text_config is not None:
        check_fields(name, fields.text_config)
