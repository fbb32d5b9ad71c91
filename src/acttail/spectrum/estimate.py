"""What an analysis will cost, before it starts: seconds and memory, from rates measured on this machine."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import torch

from acttail._version import __version__
from acttail.base.files import cache_dir, write_json
from acttail.base.machine import processor_name
from acttail.base.schema import read_kept
from acttail.errors import ActTailError
from acttail.model.projections import Projection

# Sizes at which the rates are measured: two seconds in all, and large enough that the libraries work in
# blocks as they do on a real matrix.
_SMALL, _LARGE = 512, 1536


@dataclass(frozen=True)
class Rates:
    """Seconds of one matrix of short side n and long side m: gram n^2 m + cubic n^3 + square n^2.

    Attributes:
        gram: of the Gram matrix, seconds per multiply-add.
        cubic: of the eigenvalues, the d^3 term.
        square: of the eigenvalues, the d^2 term.
        threads: they were measured with.
    """

    gram: float
    cubic: float
    square: float
    threads: int

    def seconds(self, d_out: int, d_in: int) -> float:
        """Of one matrix."""
        n, m = min(d_out, d_in), max(d_out, d_in)
        return self.gram * n * n * m + self.cubic * n**3 + self.square * n * n


@dataclass(frozen=True)
class Estimate:
    """The cost of an analysis.

    Attributes:
        seconds: on this machine.
        matrices: how many.
        bytes_per_worker: most that one worker holds at once.
    """

    seconds: float
    matrices: int
    bytes_per_worker: int


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(cubic, square) of least relative squares, neither negative.

    Args:
        sizes: n of symmetric matrices.
        seconds: their eigenvalues took.
    """
    from scipy.optimize import nnls

    n = np.asarray(sizes, dtype=np.float64)
    t = np.asarray(seconds, dtype=np.float64)
    terms = np.stack([n**3 / t, n**2 / t], axis=1)
    (cubic, square), _ = nnls(terms / terms.max(0), np.ones(len(t)))
    top = terms.max(0)
    return float(cubic / top[0]), float(square / top[1])


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def measure() -> Rates:
    """Measure the rates on this machine; takes about two seconds."""
    generator = np.random.default_rng(0)
    eigen = []
    for n in (_SMALL, _LARGE):
        matrix = generator.standard_normal((n, n))
        gram = matrix @ matrix.T
        eigen.append(_best(lambda gram=gram: np.linalg.eigvalsh(gram)))  # type: ignore[misc]
    matrix = generator.standard_normal((_LARGE, _LARGE))
    product = _best(lambda: matrix @ matrix.T)
    cubic, square = fit((_SMALL, _LARGE), eigen)
    return Rates(product / _LARGE**3, cubic, square, torch.get_num_threads())


def rates() -> Rates:
    """The rates of this machine, from the cache or measured."""
    path = cache_dir() / "rates.json"
    key = f"{processor_name()}, {torch.get_num_threads()} threads, acttail {__version__}"
    known = read_kept(path, dict[str, Rates]) or {}
    if key not in known:
        known[key] = measure()
        with suppress(OSError, ActTailError):  # measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {name: asdict(rates) for name, rates in known.items()})
    return known[key]


def matrix_bytes(d_out: int, d_in: int) -> int:
    """Memory of one spectrum: the weight as stored and in float64, its Gram matrix and the solver's copy."""
    n, m = min(d_out, d_in), max(d_out, d_in)
    return n * m * (2 + 8) + 2 * n * n * 8


def estimate(projections: Sequence[Projection]) -> Estimate:
    """The cost of the spectra of these projections on this machine alone.

    Processes share its cores, so more of them change little; a cluster of machines like it divides the
    seconds by their number, down to those of the largest matrix.

    Args:
        projections: of a model; weights are not read.
    """
    known = rates()
    shapes = [(p.d_out, p.d_in) for p in projections]
    return Estimate(
        sum(known.seconds(*s) for s in shapes), len(shapes), max((matrix_bytes(*s) for s in shapes), default=0)
    )  # fmt: skip
