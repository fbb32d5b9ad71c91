"""Choice by measurement: which kernel is faster on this machine.

A table of the times of each matrix shape and dtype, measured once on one thread and kept in the cache. It says from which
density on the dense kernel is taken, which reads every row of a masked vector and needs no list of rows; and from how many
vectors on rows are read once for all of them where their lists differ. The results are the same.
"""

import ctypes
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acttail.base.files import cache_dir, write_json
from acttail.base.machine import processor_name
from acttail.base.progress import Progress
from acttail.engine.layout import Layout
from acttail.engine.native import library
from acttail.engine.shapes import Shape
from acttail.engine.store import allocate
from acttail.engine.transcode import matrix_struct
from acttail.errors import ActTailError
from acttail.plan import SparsityPlan
from acttail.sparse.backends import abi, cpu
from acttail.sparse.backends.abi import Matrix

VERSION = 3
_DENSITIES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2, 0.1)
# Vectors with lists of their own at this density; native code takes eight at a time.
_BATCHES = (2, 4, 8)
_BATCH_DENSITY = 0.5
# What the dense kernel's time counts against one: sparse must be this much slower, for less is noise.
_MARGIN = 1.02
# Copies of a matrix are spread over more memory than the caches hold.
_SPREAD_BYTES = 64 << 20
_ROUNDS = 5
_SHARED_ROUNDS = 3


@dataclass(frozen=True)
class Crossover:
    """Where one shape changes kernels.

    Attributes:
        shape: of the matrix.
        density: the dense kernel is faster above it; 1 if it never is.
        ratios: density -> time of sparse over dense, medians.
        seconds: of the dense kernel over one matrix, median.
        together: vectors from which on rows are read once for all whose lists differ; `abi.NEVER` for none.
        shared: vectors -> time of that over one vector after the other, medians.
    """

    shape: Shape
    density: float
    ratios: dict[float, float]
    seconds: float
    together: int
    shared: dict[int, float]


def machine() -> str:
    """Hash of what the measurements depend on: processor, instruction set, cores."""
    status = cpu.status()
    described = (processor_name(), status.isa, os.cpu_count(), VERSION)
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _file() -> Path:
    return cache_dir() / "tune" / f"{machine()}.json"


def _key(shape: Shape) -> str:
    return f"{shape.dtype} {shape.rows}x{shape.columns} group {shape.group} {shape.asymmetric}"


def table() -> dict[str, float]:
    """What has been measured on this machine: key of a shape -> density of the crossover."""
    return {key: float(entry["density"]) for key, entry in _entries().items()}


def _entries() -> dict[str, dict[str, Any]]:
    """What the file holds. It is a cache: none is no table, and what is damaged is measured again."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if _whole(v)} if isinstance(found, dict) else {}


def _whole(entry: Any) -> bool:
    density = entry.get("density") if isinstance(entry, dict) else None
    return isinstance(density, int | float) and 0 < density <= 1


def spread(shape: Shape, size: int) -> tuple[list[Matrix], object]:
    """Copies of a matrix of ones that fill memory, so that no cache holds what a kernel reads next.

    Args:
        shape: of an input-major matrix.
        size: bytes to fill; at least two copies and at most 4,096 are made.

    Returns:
        The copies, and what must be kept for as long as they are read.
    """
    copies = max(2, min(4096, size // max(shape.rows * shape.row_bytes, 1)))
    sizes = {f"{i}.{k}": v for i in range(copies) for k, v in shape.tensors().items()}
    tensors, arena = allocate(sizes)
    for tensor in tensors.values():
        tensor.fill_(1)
    found = [
        matrix_struct({k: tensors[f"{i}.{k}"] for k in shape.tensors()}, shape)
        for i in range(copies)
    ]
    return found, (tensors, arena)


def measure(shape: Shape) -> Crossover:
    """Time the sparse kernel against the dense one over densities, by turns.

    Args:
        shape: of an input-major matrix.

    Raises:
        ActTailError: no native library.
    """
    lib = library()
    structs, _memory = spread(shape, _SPREAD_BYTES)
    y = torch.zeros(shape.columns)
    generator = torch.Generator().manual_seed(0)

    def run(index: torch.Tensor | None, x: torch.Tensor) -> float:
        started = time.perf_counter()
        for struct in structs:
            lib.acttail_add_rows(
                ctypes.byref(struct), index.data_ptr() if index is not None else None, x.data_ptr(),
                len(x), 0, shape.columns, y.data_ptr(), 1, 0,
            )  # fmt: skip
        return time.perf_counter() - started

    full = torch.randn(shape.rows, generator=generator)
    ratios: dict[float, float] = {}
    dense: list[float] = []
    run(None, full)
    for density in _DENSITIES:
        count = max(1, round(density * shape.rows))
        kept = torch.randperm(shape.rows, generator=generator)[:count].sort().values
        index, x = kept.to(torch.int32), full[kept].contiguous()
        pairs = [(run(index, x), run(None, full)) for _ in range(_ROUNDS)]
        dense += [whole for _, whole in pairs]
        ratios[density] = statistics.median(part / whole for part, whole in pairs)
    shared = {n: _shared(structs, shape, n, generator) for n in _BATCHES}
    return Crossover(
        shape, crossing(ratios), ratios, statistics.median(dense) / len(structs), joining(shared), shared
    )  # fmt: skip


def _shared(structs: list[Matrix], shape: Shape, n: int, generator: torch.Generator) -> float:
    """Time of reading rows once for n vectors with lists of their own over one vector after the other."""
    lib, count = library(), max(1, round(_BATCH_DENSITY * shape.rows))
    lists = [
        torch.randperm(shape.rows, generator=generator)[:count].sort().values for _ in range(n)
    ]
    index = torch.stack(lists).to(torch.int32).contiguous()
    x, y = torch.randn(n, count, generator=generator), torch.zeros(n, shape.columns)

    def run(together: int) -> float:
        for struct in structs:
            struct.together = together
        started = time.perf_counter()
        for struct in structs:
            lib.acttail_add_lists(
                ctypes.byref(struct), index.data_ptr(), x.data_ptr(), count, 0, shape.columns, y.data_ptr(), n,
                shape.columns,
            )  # fmt: skip
        return time.perf_counter() - started

    run(abi.NEVER)
    return statistics.median(run(1) / run(abi.NEVER) for _ in range(_SHARED_ROUNDS))


def joining(ratios: Mapping[int, float]) -> int:
    """From how many vectors on it pays to read rows once for all of them.

    Args:
        ratios: vectors -> time of that over one vector after the other.

    Returns:
        The least number from which on it wins every time; `abi.NEVER` if it never does.
    """
    found = abi.NEVER
    for n in sorted(ratios, reverse=True):
        if ratios[n] * _MARGIN > 1:
            break
        found = n
    return found


def crossing(ratios: Mapping[float, float]) -> float:
    """From which density on the dense kernel costs least over all that were measured.

    A single ratio that noise raised moves it only if what lies above loses too.

    Args:
        ratios: density -> time of sparse over dense. That of density 1 says nothing: no list is made there.

    Returns:
        One of the densities; 1 if sparse never loses.
    """
    best, lost, found = 0.0, 0.0, 1.0
    for density in sorted((d for d in ratios if d < 1), reverse=True):
        lost += ratios[density] - _MARGIN
        if lost > best:
            best, found = lost, density
    return found


def tune(shapes: Iterable[Shape], progress: Progress | None = None) -> list[Crossover]:
    """Measure the shapes that are not in the table yet, or all again, and keep the results.

    Args:
        shapes: input-major matrices; equal ones are measured once.
        progress: called with (shapes done, shapes).

    Raises:
        ActTailError: no native library.
    """
    wanted = list({_key(s): s for s in shapes}.values())
    done = []
    for i, shape in enumerate(wanted, 1):
        done.append(measure(shape))
        if progress is not None:
            progress(i, len(wanted))
    found = _entries()
    for c in done:
        ratios = {str(d): round(r, 4) for d, r in c.ratios.items()}
        found[_key(c.shape)] = {
            "density": c.density, "sparse_over_dense": ratios, "dense_seconds": c.seconds,
            "together": c.together, "together_over_alone": {str(n): round(r, 4) for n, r in c.shared.items()},
        }  # fmt: skip
    with suppress(OSError, ActTailError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), found)
    return done


def measured(shapes: Iterable[Shape], progress: Progress | None = None) -> list[Crossover]:
    """What the table says of each shape; what it lacks is measured now, about a second each, and kept.

    Args:
        shapes: input-major matrices.
        progress: called with (shapes done, shapes to measure).

    Raises:
        ActTailError: no native library.
    """
    wanted = list(shapes)
    entries = _entries()
    lacking = [s for s in wanted if "dense_seconds" not in entries.get(_key(s), {})]
    new = {_key(c.shape): c for c in tune(lacking, progress)}
    return [new.get(_key(s)) or _crossover(s, entries[_key(s)]) for s in wanted]


def _crossover(shape: Shape, entry: dict[str, Any]) -> Crossover:
    ratios = {float(d): float(r) for d, r in entry["sparse_over_dense"].items()}
    shared = {int(n): float(r) for n, r in entry["together_over_alone"].items()}
    return Crossover(
        shape, float(entry["density"]), ratios, float(entry["dense_seconds"]), int(entry["together"]), shared
    )  # fmt: skip


def read_together(layout: Layout) -> dict[str, int]:
    """Matrices of which this machine's table says from how many vectors on lists that differ are read as one.

    Args:
        layout: of the packed model.
    """
    found = {key: entry.get("together") for key, entry in _entries().items()}
    told = {name: found.get(_key(layout.shapes[name])) for name in layout.segments}
    return {
        name: n for name, n in told.items() if isinstance(n, int) and 0 < n <= abi.NEVER
    }  # fmt: skip


def dense_kernels(layout: Layout, plan: SparsityPlan | None) -> frozenset[str]:
    """Projections of a plan that the dense kernel takes: by this machine's table, or by the format where that has none.

    Args:
        layout: of the packed model.
        plan: of the engine.
    """
    if plan is None:
        return frozenset()
    measured, chosen = table(), set()
    for name, segments in layout.segments.items():
        shape = layout.shapes[name]
        limit = measured.get(_key(shape), shape.dense_from)
        for s in segments:
            entry = plan.projections.get(s.name)
            if entry is not None and limit < 1 and 1 - entry.realised_sparsity >= limit > 0:
                chosen.add(s.name)
    return frozenset(chosen)
