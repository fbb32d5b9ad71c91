"""Sums of the curves so far, in the cache, so that a run that was killed goes on where it stopped."""

from contextlib import suppress

import torch
from safetensors import safe_open

from acttail.base.files import cache_dir
from acttail.base.tensors import write_tensors
from acttail.calibrate.energies import EnergySums
from acttail.errors import ActTailError


class PartialSums:
    """A file of sums, rewritten whole after each window.

    Args:
        key: names the run: model, text and protocol.
    """

    def __init__(self, key: str) -> None:
        self._path = cache_dir() / "curves" / f"{key}.safetensors"

    def read(self, into: EnergySums) -> int:
        """Fill the sums; return the number of windows they hold."""
        if not self._path.exists():
            return 0
        try:
            with safe_open(self._path, framework="pt") as file:
                done = int((file.metadata() or {})["windows"])
                sums = {name: file.get_tensor(name) for name in into.sums}
                scales = file.get_tensor("scale").tolist()
        except Exception:  # a damaged cache entry is computed again
            return 0
        into.sums.update(sums)
        into.scale.update(zip(into.sums, scales, strict=True))
        return done

    def write(self, done: int, sums: EnergySums) -> None:
        """Replace the file; a cache that cannot be written costs only the resume."""
        with suppress(OSError, ActTailError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scales = torch.tensor([sums.scale[n] for n in sums.sums], dtype=torch.float64)
            write_tensors(self._path, {**sums.sums, "scale": scales}, {"windows": str(done)})
