"""Writing files of tensors that are either whole or absent."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from acttail.base.files import cannot_write, replacing
from acttail.errors import reason


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    about: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors, whole or not at all.

    Args:
        path: the file.
        tensors: name -> tensor, contiguous.
        about: text kept in the file's header.

    Raises:
        ActTailError: the file cannot be written.
    """
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(about) if about is not None else None)
        except SafetensorError as error:  # of a full disk, too
            raise cannot_write(Path(path), reason(error)) from error
