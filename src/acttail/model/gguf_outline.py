"""A GGUF model's config and modules from its header alone: what the native engine asks of transformers' own.

To read a config and make a skeleton transformers imports for one to two seconds and 200 MB. Families whose blocks are
these are outlined here, in the same names and shapes; tests hold an outline to transformers' skeleton. Whatever else a
header says is left to transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from acttail.model.gguf_config import complete
from acttail.model.gguf_header import Header


@dataclass(frozen=True)
class _Family:
    """A family as llama.cpp and transformers name it.

    Attributes:
        model_type: transformers'.
        settings: of its config that no key gives.
        biases: projections with a bias.
        norms: role in a file -> module of a block.
        own_head_dim: whether its config gives the size of a head.
        pattern: every how many blocks one sees everything; 0: all do.
        permuted: q and k are stored with each head's halves interleaved.
        shifted: 1 is added to norms in the file.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()
    norms: Mapping[str, str] = field(
        default_factory=lambda: {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        }
    )  # fmt: skip
    own_head_dim: bool = True
    pattern: int = 0
    permuted: bool = False
    shifted: bool = False


_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "head_dim": 256,
    "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
_QWEN = {"hidden_act": "silu", "sliding_window": None, "eos_token_id": None, "bos_token_id": None}
# GGUF's architecture -> its family.
_FAMILIES = {
    "llama": _Family(
        "llama", {"hidden_act": "silu", "head_dim": None, "eos_token_id": 2, "bos_token_id": 1}, permuted=True,
    ),
    "qwen2": _Family("qwen2", _QWEN, frozenset("qkv"), own_head_dim=False),
    "qwen3": _Family(
        "qwen3", _QWEN | {"head_dim": 128},
        norms={"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"} | _HEAD_NORMS,
    ),
    "gemma2": _Family(
        "gemma2", _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norms=_FOUR_NORMS, pattern=2, shifted=True,
    ),
    "gemma3": _Family(
        "gemma3_text", _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        norms=_FOUR_NORMS | _HEAD_NORMS, pattern=6, shifted=True,
    ),
}  # fmt: skip
_NUMBERS = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
}  # fmt: skip
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
# What a rotary embedding may be here, of gguf_config's.
_ROPES = ("default", "linear", "longrope")


class PlainConfig(SimpleNamespace):
    """The part of a transformers config that an engine reads, under the same names."""

    def get_text_config(self) -> "PlainConfig":
        """Itself, as of models that are text alone."""
        return self


def outline(header: Header, name: str) -> "Outline | None":
    """The config and the modules of a GGUF model; None where transformers is needed to tell them.

    Args:
        header: of the file.
        name: of the model, for errors.

    Raises:
        ModelError: see :func:`acttail.model.gguf_config.complete`.
    """
    config = _config(header, name)
    return (
        None if config is None else Outline(config, _FAMILIES[header.get("general.architecture")])
    )


def _config(header: Header, name: str) -> PlainConfig | None:
    architecture = header.get("general.architecture")
    family = _FAMILIES.get(architecture) if isinstance(architecture, str) else None
    # transformers takes a llama of this very name for a mistral.
    if family is None or header.get("general.name") == "mistral":
        return None
    numbers = {own: header.get(f"{architecture}.{key}") for key, own in _NUMBERS.items()}
    vocabulary = header.get(f"{architecture}.vocab_size")
    if vocabulary is None and "tokenizer.ggml.tokens" in header.fields:
        vocabulary = len(header.fields["tokenizer.ggml.tokens"])
    epsilon = header.get(f"{architecture}.attention.layer_norm_rms_epsilon")
    if not all(type(n) is int and n > 0 for n in (*numbers.values(), vocabulary)):
        return None
    if not isinstance(epsilon, float) or numbers["hidden_size"] % numbers["num_attention_heads"]:
        return None
    config = PlainConfig(
        **family.settings, **numbers, model_type=family.model_type, vocab_size=vocabulary, rms_norm_eps=epsilon,
        tie_word_embeddings=all(t.name != "output.weight" for t in header.tensors), is_encoder_decoder=False,
        pad_token_id=None,
    )  # fmt: skip
    key = "rope.dimension_count" if architecture == "llama" else "attention.key_length"
    if family.own_head_dim:
        config.head_dim = header.get(f"{architecture}.{key}", config.head_dim)
    if architecture in ("gemma2", "gemma3"):
        config.sliding_window = header.get(f"{architecture}.attention.sliding_window", 4096)
    held = config.hidden_size // config.num_attention_heads
    if family.own_head_dim and not config.head_dim:
        config.head_dim = held
    if architecture != "llama":
        blocks, every = config.num_hidden_layers, family.pattern
        config.layer_types = [
            "sliding_attention" if every and (i + 1) % every else "full_attention"
            for i in range(blocks)
        ]
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    nested = {kind: dict(plain) for kind in ("full_attention", "sliding_attention")}
    config.rope_parameters = nested if architecture == "gemma3" else plain
    complete(config, header, name)
    ropes = (
        config.rope_parameters.values() if architecture == "gemma3" else [config.rope_parameters]
    )
    return config if all(rope["rope_type"] in _ROPES for rope in ropes) else None


class Outline(nn.Module):
    """A decoder's modules on the meta device, named as transformers names them.

    Args:
        config: of :func:`outline`.
        family: that it is of.
    """

    def __init__(self, config: PlainConfig, family: _Family) -> None:
        super().__init__()
        self.config, self.family = config, family
        hidden, vocabulary = config.hidden_size, config.vocab_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(
            vocabulary, hidden, _weight=_meta(vocabulary, hidden)
        )
        self.model.layers = nn.ModuleList(
            _block(config, family) for _ in range(config.num_hidden_layers)
        )
        self.model.norm = _Norm(hidden)
        self.model.rotary_emb = Rotary(config)
        self.lm_head = _linear(hidden, vocabulary)
        self.all_tied_weights_keys: dict[str, str] = {}
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def get_decoder(self) -> nn.Module:
        """As of transformers."""
        return self.model

    def get_input_embeddings(self) -> Any:
        """As of transformers."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        """As of transformers."""
        return self.lm_head


def _block(config: PlainConfig, family: _Family) -> nn.Module:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes = {
        "q": (hidden, q), "k": (hidden, kv), "v": (hidden, kv), "o": (q, hidden), "gate": (hidden, inner),
        "up": (hidden, inner), "down": (inner, hidden),
    }  # fmt: skip
    block = nn.Module()
    block.self_attn, block.mlp = nn.Module(), nn.Module()
    for kind, (d_in, d_out) in shapes.items():
        owner = block.self_attn if kind in "qkvo" else block.mlp
        owner.add_module(f"{kind}_proj", _linear(d_in, d_out, bias=kind in family.biases))
    for path in family.norms.values():
        owner_path, _, leaf = path.rpartition(".")
        size = head_dim if owner_path else hidden
        block.get_submodule(owner_path).add_module(leaf, _Norm(size))
    return block


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_meta(size))


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _linear(d_in: int, d_out: int, *, bias: bool = False) -> nn.Linear:
    # Made without the initialisation of its constructor, which there is nothing for.
    found = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(found)
    found.in_features, found.out_features = d_in, d_out
    found.weight = nn.Parameter(_meta(d_out, d_in))
    found.register_parameter("bias", nn.Parameter(_meta(d_out)) if bias else None)
    return found


class Rotary(nn.Module):
    """Frequencies of the rotary embedding, in the attributes that transformers' own has them in.

    Formulas of transformers' modeling_rope_utils (default, linear, and longrope within its original context).

    Args:
        config: of :func:`outline`.
    """

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        nested = "full_attention" in config.rope_parameters
        by_prefix = config.rope_parameters.items() if nested else [("", config.rope_parameters)]
        for kind, parameters in by_prefix:
            prefix = f"{kind}_" if kind else ""
            setattr(self, f"{prefix}inv_freq", _frequencies(parameters, head_dim))
            scaling = parameters.get("attention_factor", 1.0)
            setattr(self, f"{prefix}attention_scaling", scaling)


def _frequencies(parameters: Mapping[str, Any], dim: int) -> torch.Tensor:
    theta = float(parameters["rope_theta"])
    powers: torch.Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    if parameters["rope_type"] == "longrope":
        powers = torch.tensor(parameters["short_factor"], dtype=torch.float32) * powers
    found = torch.ones_like(powers) / powers
    return found / parameters["factor"] if parameters["rope_type"] == "linear" else found


class OutlineNames:
    """How a GGUF's tensors are named and arranged in an outline; see :class:`acttail.model.hf.GgufNames`.

    Args:
        model: the outline.
    """

    def __init__(self, model: Outline) -> None:
        self._family, self._config = model.family, model.config
        leaves = _PROJECTIONS | dict(model.family.norms)
        found = {
            "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }  # fmt: skip
        for i in range(model.config.num_hidden_layers):
            for leaf, module in leaves.items():
                for kind in ("weight", "bias"):
                    found[f"blk.{i}.{leaf}.{kind}"] = f"model.layers.{i}.{module}.{kind}"
        held = {key for key, _ in model.named_parameters(remove_duplicate=False)}
        self.parameters = {stored: name for stored, name in found.items() if name in held}

    def arranged(self, values: Any, name: str) -> Any:
        """A tensor of the file as the model wants it.

        Args:
            values: numpy array as the file holds it.
            name: of the tensor in the file.
        """
        if self._family.shifted and "norm.weight" in name:
            return values - 1
        heads = {
            ".attn_q.": self._config.num_attention_heads,
            ".attn_k.": self._config.num_key_value_heads,
        }
        count = next((n for leaf, n in heads.items() if leaf in name), 0)
        if not self._family.permuted or not count:
            return values
        halves = np.reshape(values, (count, values.shape[0] // count // 2, 2, *values.shape[1:]))
        return halves.swapaxes(2, 1).reshape(values.shape)
