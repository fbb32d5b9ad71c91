"""Load a model and its tokenizer: the door of the library, `acttail.load`."""

import os
from typing import Any

import torch

from acttail.base.progress import Progress
from acttail.model.opened import Opened, open_model


def load(
    model: str | os.PathLike[str] | Opened,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[str | int, str] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer, ready for evaluation.

    A GGUF file is dequantised; up to 1 GiB the result is kept in the cache folder, by content.

    Args:
        model: Hub id, folder, GGUF file, or the alias ``smollm2-135m``; or what
            :func:`acttail.model.opened.open_model` made, whose revision and trust then count.
        dtype: ``auto`` (the checkpoint's own), ``fast`` (bfloat16 where the device multiplies it, else
            float32), ``float32``, ``bfloat16``, ``float16``, their short names ``fp32``, ``bf16``, ``fp16``,
            or a dtype.
        revision: Hub revision.
        trust_remote_code: run code that the model's repository ships; off unless you say so.
        device: where to put it.
        device_map: spread it over devices, main memory and disk instead, as accelerate does (``auto``,
            ``balanced``, or module -> device); calibration and evaluation run block by block on it.
        max_memory: device -> what it may take, such as {"cpu": "8GiB"}; the rest goes to disk.
        progress: called with (tensors done, tensors), once more where a GGUF is dequantised first.

    Returns:
        (model, tokenizer), both of transformers; the model in eval mode, with its source noted in
        ``model.acttail_source``.

    Raises:
        ModelError: unknown, unreadable, truncated, or not a decoder.
    """
    return open_model(model, revision, trust_remote_code=trust_remote_code).load(
        dtype=dtype, device=device, device_map=device_map, max_memory=max_memory, progress=progress
    )
