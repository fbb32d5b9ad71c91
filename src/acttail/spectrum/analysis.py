"""Spectra and tail fits of every projection of a model, one matrix at a time, cached by content."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from acttail.base.progress import Progress
from acttail.errors import ActTailError, SpectrumError
from acttail.model.opened import Opened, as_weights, open_model
from acttail.model.projections import Projection
from acttail.model.weights import WeightSource, with_head
from acttail.spectrum.cache import spectra_folder, spectrum_of
from acttail.spectrum.tail import ESTIMATORS, TailFit, check_estimator

# Above this many entries a matrix keeps all cores busy by itself, and two at a time would double the
# memory; below it, one thread per matrix is faster (2.2x on two cores for 576x576).
_PARALLEL_ENTRIES = 4_000_000


@dataclass(frozen=True)
class ProjectionFit:
    """One line of an analysis: a projection and its tail."""

    projection: Projection
    fit: TailFit

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `acttail analyze --json` prints."""
        p, f = self.projection, self.fit
        return {
            "projection": p.name, "block": p.block, "kind": p.kind, "d_in": p.d_in,
            "d_out": p.d_out, "cost": p.cost, "alpha": f.alpha, "xmin": f.xmin,
            "ks_distance": f.ks_distance, "tail_size": f.tail_size, "stderr": f.stderr,
            "flag": f.flag,
        }  # fmt: skip


@contextmanager
def _one_thread_each(workers: int) -> Iterator[None]:
    if workers == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def spectra(
    weights: WeightSource,
    *,
    farms: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The ESD of every projection.

    Args:
        weights: a loaded model or an opened checkpoint.
        farms: pooled spectra of square windows instead of plain ones.
        cache: keep spectra in the cache folder, by content of the weight.
        progress: called with (done, total).
        only: names of the projections wanted; all by default.

    Returns:
        name -> ascending eigenvalues, float64. A matrix without finite entries raises.

    Raises:
        SpectrumError: a weight has NaN or infinite entries; names the projection.
    """
    wanted = [p for p in weights.projections if only is None or p.name in only]
    folder = spectra_folder() if cache else None
    form = "farms" if farms else "plain"

    def work(projection: Projection) -> torch.Tensor:
        try:
            return spectrum_of(weights.weight(projection), form, folder)
        except SpectrumError as error:
            raise SpectrumError(f"{projection.name}: {error}") from error

    cores = min(torch.get_num_threads(), os.cpu_count() or 1)
    small = max((p.d_in * p.d_out for p in wanted), default=0) <= _PARALLEL_ENTRIES
    workers = cores if small else 1
    found: dict[str, torch.Tensor] = {}
    with _one_thread_each(workers), ThreadPoolExecutor(workers) as pool:
        try:
            results = pool.map(work, wanted) if workers > 1 else map(work, wanted)
            for done, (projection, values) in enumerate(zip(wanted, results, strict=True), 1):
                found[projection.name] = values
                if progress is not None:
                    progress(done, len(wanted))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def analyze(
    model: Any,
    *,
    estimator: str = "hill",
    head: bool = False,
    cache: bool = True,
    jobs: int = 1,
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> list[ProjectionFit]:
    """Fit the heavy tail of every projection's spectrum.

    A MODEL name is read one matrix at a time straight from its safetensors or GGUF file, so that a
    model larger than memory can be analysed.

    Args:
        model: a loaded transformers model, an opened WeightSource, or what :func:`acttail.load` takes.
        estimator: ``hill``, ``ks``, ``peak`` or ``farms``; docs/theory.md says what each does.
        head: fit the output head's spectrum, too; it comes last.
        cache: keep spectra in the cache folder, by content.
        jobs: processes; more than one, or a cluster, needs the name of a model.
        ray_address: ``auto``, ``local`` or an address: runs on a Ray cluster, whose machines must find
            the model under the same name.
        progress: called with (done, total).

    Returns:
        One fit per projection, in the model's order. A projection without a tail has alpha None and a
        flag that says why.

    Raises:
        ActTailError: unknown estimator.
        ModelError: the model cannot be read or is not a decoder.
        SpectrumError: a weight has NaN or infinite entries.
    """
    check_estimator(estimator)
    model = open_model(model) if isinstance(model, str | os.PathLike) else model
    weights = with_head(as_weights(model)) if head else as_weights(model)
    farms = estimator == "farms"
    if jobs > 1 or ray_address is not None:
        from acttail.spectrum.jobs import shared_spectra

        if not isinstance(model, Opened):
            raise ActTailError("several processes read the weights themselves: give a model's name")
        found = shared_spectra(
            model.asked, weights, farms=farms, jobs=jobs, ray_address=ray_address, cache=cache, progress=progress
        )  # fmt: skip
    else:
        found = spectra(weights, farms=farms, cache=cache, progress=progress)
    fit = ESTIMATORS[estimator]
    return [ProjectionFit(p, fit(found[p.name])) for p in weights.projections]


def alphas_or_mean(fits: Sequence[TailFit]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Alpha of each fit, [P]; a projection without a tail gets the mean, which moves it nowhere.

    Raises:
        SpectrumError: no projection has a tail.
    """
    known = [f.alpha for f in fits if f.alpha is not None]
    if not known:
        raise SpectrumError("no projection of this model has a spectrum with a tail to fit")
    mean = sum(known) / len(known)
    return np.array([mean if f.alpha is None else f.alpha for f in fits], dtype=np.float64)
