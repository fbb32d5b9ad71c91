"""In which dtype products are computed while training."""

from typing import Any

import torch

# Names of torch for instruction sets that multiply bfloat16.
_FAST = ("avx512_bf16", "amx_tile", "amx_bf16", "bf16")


def autocast_for(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None for float32.

    On a processor without bfloat16 products (AVX2 alone) they are emulated, and several times slower.

    Args:
        device: of the model.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if device.type == "cpu":
        # Absent before torch 2.11: then float32, which is right everywhere.
        asked = getattr(torch.cpu, "get_capabilities", dict)
        known: dict[str, Any] = asked()
        return torch.bfloat16 if any(known.get(name) for name in _FAST) else None
    return None
