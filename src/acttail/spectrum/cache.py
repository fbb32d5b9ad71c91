"""Spectra kept by the content of their matrix."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from acttail.base.files import cache_dir
from acttail.base.tensors import write_tensors
from acttail.errors import ActTailError
from acttail.spectrum.esd import esd, farms_esd

# Raised when spectra of the same bytes would come out different.
_CACHE_VERSION = 1


def _digest(weight: torch.Tensor) -> str:
    data = weight.detach().to("cpu").contiguous()
    head = f"{_CACHE_VERSION} {tuple(data.shape)} {data.dtype}".encode()
    digest = hashlib.sha256(head)
    array: Any = data.view(torch.uint8).numpy()
    digest.update(array)  # in place: a copy would double what a large matrix holds
    return digest.hexdigest()


def spectrum_of(weight: torch.Tensor, form: str, folder: Path | None) -> torch.Tensor:
    """The spectrum of one weight, from the cache where its content is known.

    Args:
        weight: [d_out, d_in].
        form: ``plain`` or ``farms``.
        folder: of the cache; None for none.
    """
    path = None
    if folder is not None:
        path = folder / f"{form}-{_digest(weight)}.safetensors"
        if path.exists():
            with suppress(Exception):  # a damaged cache entry is computed again
                return load_file(path)["eigenvalues"]
    values = farms_esd(weight) if form == "farms" else esd(weight)
    if path is not None:
        with suppress(ActTailError):
            write_tensors(path, {"eigenvalues": values})
    return values


def spectra_folder() -> Path | None:
    """Where spectra are kept by content; None where nothing can be written."""
    folder = cache_dir() / "spectra"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a read-only home is no reason to fail
    return folder
