"""Block families that the native engine runs: one short file each, and a line here per model type."""

from acttail.engine.families import (
    gemma,
    gpt2,
    granite,
    llama,
    mixtral,
    phi,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
)
from acttail.engine.families.family import Family

__all__ = ["FAMILIES", "Family"]

# transformers' model type -> its blocks.
FAMILIES: dict[str, Family] = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "mixtral": mixtral.MIXTRAL,
    "qwen2_moe": qwen.QWEN2_MOE,
    "qwen3_moe": qwen.QWEN3_MOE,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "phi": phi.PHI,
    "phi3": phi.PHI3,
    "starcoder2": starcoder2.STARCODER2,
    "stablelm": stablelm.STABLELM,
    "granite": granite.GRANITE,
    "smollm3": smollm3.SMOLLM3,
    "seed_oss": llama.LLAMA,
    "gpt2": gpt2.GPT2,
    "opt": gpt2.OPT,
}
