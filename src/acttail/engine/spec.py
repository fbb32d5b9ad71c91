"""The shared block description: what a decoder of any supported family does with its weights.

Read from the model's modules and config, not from per-family code: a family is a name on the list below
whose blocks are made of these parts.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from acttail.errors import ActTailError
from acttail.projections import Projection, decoder_blocks, find_projections

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3",
)  # fmt: skip
_ACTIVATIONS = {
    "silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2, "relu": 3,
}  # fmt: skip
# Norms of a block by the role they play, for the two ways of naming them.
_TWO_NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "input_norm": "input_layernorm", "attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "output_norm": "post_feedforward_layernorm",
}  # fmt: skip


class UnsupportedModelError(ActTailError):
    """The native engine does not know this family or variant; transformers runs it instead."""


@dataclass(frozen=True)
class BlockSpec:
    """One block.

    Attributes:
        projections: kind -> name, for q, k, v, o, gate, up, down, or the fused qkv and gate_up.
        norms: role (input_norm, attention_norm, mlp_norm, output_norm, q_norm, k_norm) -> parameter.
        window: positions a token sees, itself included; 0 for all.
        rope: index of the rope table.
    """

    projections: dict[str, str]
    norms: dict[str, str]
    window: int
    rope: int


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder. Sizes are numbers of features, heads or tokens.

    Attributes:
        family: transformers' model type.
        ropes: [(inverse frequencies, scale)], one per table.
        context: longest sequence.
        norm_shift: added to every norm's weight (1 for Gemma).
        embedding: parameter name of the embedding.
        head: parameter name of the output head; the embedding's if tied.
        final_norm: parameter name.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    norm_eps: float
    norm_shift: float
    activation: int
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    embedding_scale: float
    embedding: str
    head: str
    final_norm: str
    blocks: tuple[BlockSpec, ...]
    ropes: tuple[tuple[list[float], float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "DecoderSpec":
        """Read what :meth:`to_dict` made.

        Raises:
            ActTailError: a key is missing or unknown.
        """
        known = {f.name for f in fields(cls)}
        if set(data) != known:
            raise ActTailError(f"the engine's description differs in {sorted(set(data) ^ known)}")
        data = dict(data)
        data["blocks"] = tuple(BlockSpec(**b) for b in data["blocks"])
        data["ropes"] = tuple((list(f), float(s)) for f, s in data["ropes"])
        return cls(**data)


def describe(model: Any) -> DecoderSpec:
    """Describe a transformers decoder, loaded or on the meta device.

    Raises:
        UnsupportedModelError: a family or a variant of one that the engine does not run; says which.
    """
    outer = model.config
    config = outer.get_text_config()
    family = config.model_type
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"the native engine does not run {family} models (it runs {', '.join(FAMILIES)})"
        )
    _check_variant(config)
    path, stack = decoder_blocks(model)
    root: Any = model.get_submodule(path.rpartition(".")[0])
    prefix = path.rpartition(".")[0]
    projections: dict[int, dict[str, Projection]] = {}
    for p in find_projections(model):
        projections.setdefault(p.block, {})[p.kind] = p
    tables, index_of = _ropes(root, config)
    blocks = tuple(
        _block(f"{path}.{i}", block, projections[i], config, i, index_of)
        for i, block in enumerate(stack)
    )
    down = projections[0]["down"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UnsupportedModelError("the native engine needs an output head without a bias")
    embedding = _name_of(model, model.get_input_embeddings())
    tied = bool(getattr(outer, "tie_word_embeddings", False))
    gemma = family.startswith("gemma")
    scalar = getattr(config, "query_pre_attn_scalar", None) if gemma else None
    return DecoderSpec(
        family=family, hidden=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads, head_dim=head_dim,
        intermediate=down.d_in, vocabulary=root.embed_tokens.num_embeddings,
        context=_context(config), norm_eps=float(config.rms_norm_eps), norm_shift=1.0 if gemma else 0.0,
        activation=_activation(config), attention_scale=(scalar or head_dim) ** -0.5,
        attention_softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0)
        if family == "gemma2" else 0.0,
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        embedding_scale=math.sqrt(config.hidden_size) if gemma else 1.0,
        embedding=embedding, head=embedding if tied else _name_of(model, head),
        final_norm=f"{prefix}.norm.weight", blocks=blocks, ropes=tables,
    )  # fmt: skip


def _check_variant(config: Any) -> None:
    for key, why in (
        ("use_bidirectional_attention", "bidirectional attention"),
        ("alibi", "ALiBi"),
    ):
        if getattr(config, key, None):
            raise UnsupportedModelError(f"the native engine does not run {why}")


def _context(config: Any) -> int:
    """Longest sequence for which the rope tables stay as they are."""
    longest = int(config.max_position_embeddings)
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "longrope":
        original: Any = parameters.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", longest
        )
        return min(longest, int(original))
    return longest


def _activation(config: Any) -> int:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"the native engine does not know the activation {name}")
    return _ACTIVATIONS[name]


def _ropes(
    root: Any, config: Any
) -> tuple[tuple[tuple[list[float], float], ...], dict[str | None, int]]:
    """Rope tables, and layer type (None: every layer) -> index."""
    with torch.device("cpu"):
        rotary = type(root.rotary_emb)(config=config)
    if hasattr(rotary, "inv_freq"):
        table = (rotary.inv_freq.float().tolist(), float(rotary.attention_scaling))
        return (table,), {None: 0}
    tables: list[tuple[list[float], float]] = []
    index: dict[str | None, int] = {}
    for layer_type in sorted(set(config.layer_types)):
        frequencies = getattr(rotary, f"{layer_type}_inv_freq", None)
        if frequencies is None:
            raise UnsupportedModelError(f"the {layer_type} blocks have no rotary embedding")
        index[layer_type] = len(tables)
        scale = float(getattr(rotary, f"{layer_type}_attention_scaling"))
        tables.append((frequencies.float().tolist(), scale))
    return tuple(tables), index


def _window(config: Any, attention: Any, index: int) -> int:
    """Positions a token of this block sees; 0 for all."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return 0
    layer_types: Any = getattr(config, "layer_types", None)
    if layer_types is not None:
        return int(window) if layer_types[index] == "sliding_attention" else 0
    # Mistral and Phi-3 mask every block; the Qwen family says per block.
    own = getattr(attention, "sliding_window", window)
    return int(own) if own else 0


def _block(
    path: str, block: Any, projections: dict[str, Projection], config: Any, index: int,
    index_of: dict[str | None, int],
) -> BlockSpec:  # fmt: skip
    kinds = set(projections)
    whole = [
        a | m
        for a in ({"q", "k", "v", "o"}, {"qkv", "o"})
        for m in ({"gate", "up", "down"}, {"gate_up", "down"})
    ]
    if kinds not in whole or any(p.expert is not None for p in projections.values()):
        raise UnsupportedModelError(
            f"the native engine does not run a block of {', '.join(sorted(kinds))} (block {index})"
        )
    names = _FOUR_NORMS if hasattr(block, "pre_feedforward_layernorm") else _TWO_NORMS
    norms = {role: f"{path}.{name}.weight" for role, name in names.items()}
    attention = block.self_attn
    for role in ("q_norm", "k_norm"):
        if getattr(attention, role, None) is not None:
            norms[role] = f"{path}.self_attn.{role}.weight"
    if not hasattr(block, "input_layernorm"):
        raise UnsupportedModelError(f"block {index} has no input norm the engine knows")
    layer_types: Any = getattr(config, "layer_types", None)
    rope = index_of[None] if None in index_of else index_of[layer_types[index]]
    return BlockSpec(
        {kind: p.name for kind, p in projections.items()},
        norms,
        _window(config, attention, index),
        rope,
    )


def _name_of(model: nn.Module, wanted: Any) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return f"{name}.weight"
    raise UnsupportedModelError("the model's embedding is not one of its modules")
