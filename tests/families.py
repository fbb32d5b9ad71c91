"""Tiny random models of every family the tests cover, built from configs, without any download."""

import copy
from functools import cache

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

_COMMON = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@cache
def _config(family: str) -> PreTrainedConfig:
    c = _COMMON
    match family:
        case "llama":
            return LlamaConfig(**c)
        case "llama-mqa-tied":
            return LlamaConfig(**{**c, "num_key_value_heads": 1}, tie_word_embeddings=True)
        case "llama-seven-heads":  # one group of more heads than the kernel takes at once
            return LlamaConfig(
                **{**c, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
            )
        case "llama-odd":
            return LlamaConfig(**{**c, "hidden_size": 44, "intermediate_size": 67, "head_dim": 10})
        case "mistral":
            return MistralConfig(**c, sliding_window=8)
        case "qwen2":
            return Qwen2Config(**c)
        case "qwen3":
            return Qwen3Config(**c, head_dim=16)
        case "gemma":
            return GemmaConfig(**c, head_dim=12)
        case "gemma2":
            return Gemma2Config(**c, head_dim=12, sliding_window=8)
        case "gemma3":
            return Gemma3TextConfig(**c, head_dim=12, sliding_window=8)
        case "phi3":
            return Phi3Config(**c)
        case "starcoder2":
            return Starcoder2Config(**c, sliding_window=8)
        case "phi":
            return PhiConfig(**{**c, "num_key_value_heads": 4}, partial_rotary_factor=0.5)
        case "stablelm":
            return StableLmConfig(**c, use_qkv_bias=True, partial_rotary_factor=0.5)
        case "granite":
            return GraniteConfig(
                **c,
                embedding_multiplier=2.0,
                attention_multiplier=0.4,
                residual_multiplier=0.6,
                logits_scaling=3.0,
            )
        case "smollm3":
            return SmolLM3Config(**c, no_rope_layers=[1, 0, 1])
        case "seed-oss":
            return SeedOssConfig(**c, head_dim=12)
        case "gpt2":
            return GPT2Config(
                vocab_size=99, n_embd=48, n_layer=3, n_head=4, n_positions=128,
                bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "opt":
            return OPTConfig(
                vocab_size=99, hidden_size=48, ffn_dim=72, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=48,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "neox":  # which the native engine does not run
            return GPTNeoXConfig(
                vocab_size=99, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "mixtral":
            return MixtralConfig(**c, num_local_experts=4, num_experts_per_tok=2)
        case "qwen2-moe":
            return Qwen2MoeConfig(
                **c, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                shared_expert_intermediate_size=40, decoder_sparse_step=1,
            )  # fmt: skip
        case "qwen3-moe":
            return Qwen3MoeConfig(
                **c, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                decoder_sparse_step=2,
            )  # fmt: skip
    raise KeyError(family)


FAMILIES = [
    "llama", "llama-mqa-tied", "llama-odd", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
    "gemma3", "phi3", "starcoder2", "phi", "stablelm", "granite", "smollm3", "seed-oss", "gpt2", "opt", "mixtral", "qwen2-moe", "qwen3-moe",
]  # fmt: skip
MOE = ["mixtral", "qwen2-moe", "qwen3-moe"]


def config(family: str) -> PreTrainedConfig:
    """One's own, to be changed at will."""
    return copy.deepcopy(_config(family))


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh random model in eval mode; biases are random too, so that a lost one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 3:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.to(dtype).eval()


def tempered(family: str, factor: float, seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny random model in float32 whose matrices are larger, so that its outputs are far from uniform.

    Args:
        family: as of :func:`config`.
        factor: of all matrices.
        seed: of the weights.
        changes: to the family's config.
    """
    base = config(family)
    settings = base.__class__(**{**base.to_dict(), **changes})
    settings._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(factor)
    return model
