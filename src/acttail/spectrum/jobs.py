"""Spectra of a model on disk, shared out over processes or a Ray cluster, resumable.

Each worker opens the checkpoint itself and reads one matrix at a time. Finished spectra are kept by
the file they came from, so that a stopped analysis goes on without reading those matrices again.
"""

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits

from acttail.base.distribute import runner
from acttail.base.files import cache_dir
from acttail.base.progress import Progress
from acttail.base.tensors import write_tensors
from acttail.errors import ActTailError, SpectrumError
from acttail.model.opened import open_model
from acttail.model.weights import WeightSource
from acttail.spectrum.cache import spectra_folder, spectrum_of


@lru_cache(maxsize=2)
def _opened(model: str) -> WeightSource:
    return open_model(model).weights


def work(model: str, name: str, form: str, keep: bool, *, threads: int | None) -> Any:
    """The spectrum of one projection, in a worker.

    Args:
        model: its name.
        name: of the projection.
        form: ``plain`` or ``farms``.
        keep: use the worker's cache by content.
        threads: that this worker may use; None for all.

    Returns:
        [N] float64 numpy array.

    Raises:
        SpectrumError: a weight has NaN or infinite entries.
    """
    weights = _opened(model)
    listed = (*weights.projections, weights.head)
    projection = next(p for p in listed if p is not None and p.name == name)
    if threads is not None:
        torch.set_num_threads(threads)
    with threadpool_limits(threads, user_api="blas"):
        try:
            folder = spectra_folder() if keep else None
            return spectrum_of(weights.weight(projection), form, folder).numpy()
        except SpectrumError as error:
            raise SpectrumError(f"{name}: {error}") from error


def _store(weights: WeightSource, form: str) -> Path | None:
    """Folder of the spectra of exactly these files; None if there are none or it cannot be made."""
    files = getattr(weights, "files", None)
    if not files:
        return None
    about = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    digest = hashlib.sha256(repr((form, about)).encode()).hexdigest()[:32]
    folder = cache_dir() / "analysis" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def shared_spectra(
    model: str | os.PathLike[str], weights: WeightSource, *, farms: bool = False, jobs: int = 1,
    ray_address: str | None = None, cache: bool = True, progress: Progress | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """As :func:`acttail.spectrum.analysis.spectra`, over several processes or a cluster.

    Args:
        model: its name, under which every worker finds it.
        weights: the same model, opened here.
        farms: pooled spectra of square windows.
        jobs: processes; each holds one matrix, its Gram matrix and the solver's copy.
        ray_address: of a cluster; instead of processes.
        cache: keep what is finished.
        progress: called with (done, total).

    Raises:
        SpectrumError: a weight has NaN or infinite entries.
        ActTailError: the cluster is not reached.
    """
    form = "farms" if farms else "plain"
    store = _store(weights, form) if cache else None
    found: dict[str, torch.Tensor] = {}

    def path(name: str) -> Path:
        assert store is not None  # noqa: S101
        return store / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    if store is not None:
        for p in weights.projections:
            if path(p.name).exists():
                with suppress(Exception):  # a damaged entry is computed again
                    found[p.name] = load_file(path(p.name))["eigenvalues"]
    # The longest first: the last worker to end then has a short one.
    left = sorted(
        (p for p in weights.projections if p.name not in found),
        key=lambda p: -(min(p.d_in, p.d_out) ** 2) * max(p.d_in, p.d_out),
    )
    total = len(weights.projections)
    if progress is not None:
        progress(len(found), total)
    todo = {p.name: (os.fspath(model), p.name, form, cache) for p in left}
    with runner(work, jobs=jobs, ray_address=ray_address) as run:
        for name, values in run(todo):
            found[name] = torch.from_numpy(np.array(values))
            if store is not None:
                with suppress(ActTailError):
                    write_tensors(path(name), {"eigenvalues": found[name]})
            if progress is not None:
                progress(len(found), total)
    return {p.name: found[p.name] for p in weights.projections}
