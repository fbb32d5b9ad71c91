"""Work shared out: in this process, in several, or as tasks on a Ray cluster.

It knows nothing of what the work is: a function of plain arguments that can be pickled by name.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, TypeVar

from acttail.errors import ActTailError

T = TypeVar("T")
# A machine of the same network answers in milliseconds.
_REACH_SECONDS = 10.0
Runner = Callable[[Mapping[str, tuple[Any, ...]]], Iterator[tuple[str, Any]]]


def check_ray(address: str | None) -> None:
    """Refuse a Ray cluster that could not be used.

    Raises:
        ActTailError: one was asked for and Ray is not installed.
    """
    if address is not None and find_spec("ray") is None:
        raise ActTailError("a Ray cluster needs the extra: pip install 'acttail[ray]'")


@contextmanager
def runner(
    work: Callable[..., Any], *, jobs: int = 1, ray_address: str | None = None, threads: int = 1, memory: int = 0
) -> Iterator[Runner]:  # fmt: skip
    """A function that runs `work` for each entry of {key: arguments} and yields (key, result) as they end.

    Args:
        work: called as ``work(*arguments, threads=n)``; a function of a module.
        jobs: processes on this machine, each with its share of the cores; 1 stays in this process, in
            the order given and with all threads (``threads=None``).
        ray_address: ``auto``, ``local`` or an address; runs the work as Ray tasks instead.
        threads: cores of such a task.
        memory: bytes that Ray sets aside for one.

    Raises:
        ActTailError: Ray was asked for and is not installed or not reached, or no machine of the cluster has so much.
    """
    if ray_address is not None:
        with _ray(work, ray_address, threads, memory) as run:
            yield run
    elif jobs <= 1:
        yield lambda todo: (
            (key, work(*arguments, threads=None)) for key, arguments in todo.items()
        )
    else:
        with _processes(work, jobs) as run:
            yield run


@contextmanager
def _processes(work: Callable[..., Any], jobs: int) -> Iterator[Runner]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # spawn: a forked torch inherits locked thread pools.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:

        def parallel(todo: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
            futures = {
                pool.submit(work, *arguments, threads=threads): key
                for key, arguments in todo.items()
            }
            for future in as_completed(futures):
                yield futures[future], future.result()

        try:
            yield parallel
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a Ray cluster for as long as the context lasts; one that is there already is left as it is.

    Args:
        address: ``auto``, ``local`` (a cluster of this machine alone, which ends with the context) or an address.

    Raises:
        ActTailError: Ray is not installed, or the cluster is not reached.
    """
    check_ray(address)
    import ray

    started = not ray.is_initialized()
    if started:
        _check_reached(address)
        try:
            ray.init(
                address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
            )
        except (ConnectionError, ValueError) as error:
            raise ActTailError(f"cannot reach the Ray cluster {address!r}: {error}") from error
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _check_reached(address: str) -> None:
    """Refuse an address at which nobody listens: Ray itself tries for a quarter of an hour.

    Raises:
        ActTailError: names the address.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # auto, local, and what only Ray knows
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise ActTailError(f"cannot reach the Ray cluster {address!r}: {error}") from error


@contextmanager
def _ray(work: Callable[..., Any], address: str, threads: int, memory: int) -> Iterator[Runner]:
    with connected(address):
        _check_room(threads, memory)
        yield _tasks(work, threads, memory)


def _check_room(threads: int, memory: int) -> None:
    """Refuse tasks that would wait for a machine for ever.

    Raises:
        ActTailError: none has the cores, or the memory.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(n.get("CPU", 0) >= threads and n.get("memory", 0) >= memory for n in nodes):
        raise ActTailError(
            f"no machine of the Ray cluster has {threads} cores and {memory / 2**30:.1f} GiB for a task; "
            "give it a larger one, or this process fewer threads (OMP_NUM_THREADS)"
        )


def _tasks(work: Callable[..., Any], threads: int, memory: int) -> Runner:
    import ray

    task = ray.remote(work).options(num_cpus=threads, memory=memory)

    def distributed(todo: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        waiting = {task.remote(*arguments, threads=threads): key for key, arguments in todo.items()}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                key = waiting.pop(reference)
                try:
                    yield key, ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    # The cause, not Ray's account of it, says what to do.
                    cause = getattr(error, "cause", None)
                    raise cause if isinstance(cause, ActTailError) else error from error

    return distributed
