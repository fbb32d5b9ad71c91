"""The dense model's logits of every window of a text, kept in a file that is mapped, not in memory.

Tokens times vocabulary is too much to hold: 8,192 tokens of a model with 262,144 tokens are 8.6 GB in float32.
"""

import mmap
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from acttail.base.files import cache_dir
from acttail.errors import ActTailError, ActTailWarning


@dataclass(frozen=True)
class _Held:
    """Where in the file a window's logits lie."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class DenseLogits:
    """Runs the dense model once per window, so that the next plan of a comparison need not.

    Valid for one model, text and protocol. The file has no name (or goes with the process where files
    must have one), so nothing is left behind however the process ends. A window that does not fit, within the
    limit or on the disk, is computed again each time: the numbers are the same.

    Attributes:
        limit: bytes that it may keep on disk.
        held_bytes: bytes that it keeps.
    """

    def __init__(self, limit: int = 64 << 30) -> None:
        self.limit = limit
        self.held_bytes = 0
        self._held: dict[int, _Held] = {}
        self._file: IO[bytes] | None = None

    def get(self, window: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The logits [T, vocabulary] of a window, from the file or by running the dense model.

        Args:
            window: its number.
            run: gives the logits.

        Returns:
            On the CPU if they come from the file, in the dtype they were made in; read only.
        """
        if window in self._held:
            return self._read(self._held[window])
        logits = run()
        size = logits.numel() * logits.element_size()
        if size and self.held_bytes + size <= self.limit:
            self._keep(window, logits)
        return logits

    def _keep(self, window: int, logits: torch.Tensor) -> None:
        whole = logits.detach().cpu().contiguous()
        data = memoryview(whole.flatten().view(torch.uint8).numpy().data).cast("B")
        # A mapping starts at a page.
        offset = -(-self.held_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            if self._file is None:
                self._file = _nameless()
            self._file.seek(offset)
            left = data
            # Unbuffered: what is mapped is on the disk, or in the page cache with room kept for it.
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            # What is there stays good, the rest is computed when it is asked for.
            self.limit = self.held_bytes
            warnings.warn(
                f"the dense model's logits are not all kept ({error.strerror or error} after "
                f"{self.held_bytes / 1e9:,.1f} GB): it runs again for every plan on the other windows",
                ActTailWarning,
                stacklevel=3,
            )
            return
        self._held[window] = _Held(offset, tuple(logits.shape), logits.dtype)
        self.held_bytes = offset + len(data)

    def _read(self, held: _Held) -> torch.Tensor:
        assert self._file is not None  # noqa: S101 (a window is held, so the file is open)
        size = torch.Size(held.shape).numel() * held.dtype.itemsize
        # Private, for torch knows no tensors that cannot be written; unmapped with the last tensor over it.
        mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=held.offset)
        return torch.frombuffer(mapped, dtype=held.dtype).reshape(held.shape)


def _nameless() -> IO[bytes]:
    """An empty file that vanishes with the process, beside the cache, for /tmp is memory on many machines."""
    folder: Path | None = None
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            folder = None
    except (OSError, ActTailError):  # one that cannot be written
        folder = None
    return tempfile.TemporaryFile(dir=folder, buffering=0)
