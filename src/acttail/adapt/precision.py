"""In which dtype products are computed while training."""

import torch

from acttail.model.precision import fast_dtype


def autocast_for(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None for float32.

    Args:
        device: of the model.
    """
    found = fast_dtype(device)
    return None if found is torch.float32 else found
