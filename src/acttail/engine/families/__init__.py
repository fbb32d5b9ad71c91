"""Block families that the native engine runs: one short file each, and a line here per model type."""

from acttail.engine.families import gemma, llama, phi3, qwen, starcoder2
from acttail.engine.families.family import Family

__all__ = ["FAMILIES", "Family"]

# transformers' model type -> its blocks.
FAMILIES: dict[str, Family] = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "phi3": phi3.PHI3,
    "starcoder2": starcoder2.STARCODER2,
}
