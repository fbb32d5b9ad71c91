"""Which width a device multiplies fastest."""

from typing import Any

import torch

# Names of torch for instruction sets that multiply bfloat16.
_FAST = ("avx512_bf16", "amx_tile", "amx_bf16", "bf16")


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32.

    On a processor without bfloat16 products (AVX2 alone) they are emulated: 1,024 tokens of SmolLM2-135M
    take minutes, in float32 seconds.

    Args:
        device: where the model is to be.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if kind == "cpu":
        # Absent before torch 2.11: then float32, which is right everywhere.
        asked = getattr(torch.cpu, "get_capabilities", dict)
        known: dict[str, Any] = asked()
        return torch.bfloat16 if any(known.get(name) for name in _FAST) else torch.float32
    return torch.float32
