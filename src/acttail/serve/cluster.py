"""Replicas of a served model over a Ray cluster: Ray Serve places, watches, scales and replaces them.

The endpoint stays in this process (:mod:`acttail.serve.endpoint`), with the limits of a single server; Ray Serve's own
HTTP proxies are not used.
"""

import logging
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI

from acttail.base.distribute import connected
from acttail.errors import ActTailError
from acttail.serve.endpoint import NoRoomError, ReplicaGoneError
from acttail.serve.replica import Message, Replica, Report
from acttail.serve.server import Options

_ROUTER = "acttail.serve.router.StickyRouter"
# Requests of a replica at which another is worth its weights in memory: what one pass over the weights decodes.
_TARGET = 8
# How often Ray Serve asks a replica how it is, and how long one may be silent: a prompt in emulated bfloat16 holds
# the interpreter for seconds.
_HEALTH_SECONDS = 10.0
_SILENT_SECONDS = 60.0
# A replica that cannot be made fails in the same way again.
_STARTS = 2


@dataclass(frozen=True)
class Bounds:
    """How many replicas there may be.

    Attributes:
        least: that are kept.
        most: that load may bring about.
    """

    least: int = 1
    most: int = 1

    def __str__(self) -> str:
        if self.most == 1:
            return "1 replica"
        return (
            f"{self.least} replicas"
            if self.least == self.most
            else f"{self.least} to {self.most} replicas"
        )

    @classmethod
    def parsed(cls, text: str) -> "Bounds":
        """Of ``N`` or ``MIN-MAX``.

        Raises:
            ActTailError: it is neither, or the bounds are not from 1 upwards.
        """
        least, dash, most = text.partition("-")
        if least.isdecimal() and (most.isdecimal() or not dash):
            found = cls(int(least), int(most or least))
            if 1 <= found.least <= found.most:
                return found
        raise ActTailError(f"--replicas takes N or MIN-MAX from 1 upwards, got {text!r}")


def check_cluster(address: str) -> None:
    """Refuse a cluster over which nothing can be served.

    Raises:
        ActTailError: Ray Serve is not installed, or the address is a client's.
    """
    if address.startswith("ray://"):
        raise ActTailError(
            "--ray: the endpoint must be on a machine of the cluster: run this there, with --ray auto"
        )
    try:
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise ActTailError(
            f"serving over a Ray cluster needs the extra ({error.name} is missing): pip install 'acttail[ray]'"
        ) from error


class RayReplicas:
    """The replicas of one deployment, as an endpoint asks them.

    Args:
        handle: Ray Serve's.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._asked = handle.options(stream=True, method_name="ask")

    async def ask(
        self, scope: dict[str, Any], body: bytes, conversation: str | None
    ) -> AsyncGenerator[Message, None]:
        """Answer a request by one replica; see :class:`acttail.serve.endpoint.Replicas`."""
        from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
        )

        gone = (RayActorError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError)
        response = self._asked.remote(scope, body, conversation=conversation)
        try:
            async for message in response:
                yield message
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise NoRoomError(str(error)) from error
        except gone as error:
            raise ReplicaGoneError(str(error).partition("\n")[0]) from error
        finally:
            response.cancel()

    async def reports(self, *, metrics: bool) -> list[Report]:
        """What each tells of itself; those that cannot are left out."""
        asked = self._handle.broadcast("report", metrics=metrics)
        found = await asked.results_async(return_exceptions=True)
        return [report for report in found if isinstance(report, Report)]

    async def close(self, seconds: float) -> None:
        """Take no more requests; those that run end within so many seconds."""
        await self._handle.broadcast("close", seconds).results_async(return_exceptions=True)


def threads_of(threads: int | None) -> int:
    """Cores of a replica: those asked for, else all of the smallest machine of the cluster.

    Args:
        threads: that were asked for.
    """
    return threads or min(_cores(), default=1)


def _cores() -> list[int]:
    """Cores of each machine of the cluster that has any."""
    import ray

    found = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
    return [cores for cores in found if cores]


def _check_room(bounds: Bounds, threads: int) -> None:
    """Refuse replicas that would wait for a place for ever.

    Raises:
        ActTailError: the least number of them has more threads than the cluster has cores.
    """
    cores = _cores()
    room = sum(n // threads for n in cores)
    if room < bounds.least:
        raise ActTailError(
            f"--replicas: {bounds.least} of {threads} threads do not fit the cluster's cores "
            f"({', '.join(map(str, sorted(cores, reverse=True)))}); give fewer --threads, or fewer replicas"
        )


@contextmanager
def replicated(
    make: Callable[[int], FastAPI], *, address: str, bounds: Bounds, options: Options, threads: int | None = None,
) -> Iterator[RayReplicas]:  # fmt: skip
    """Replicas of a model on a Ray cluster, until the context ends.

    Args:
        make: makes the application of a replica with so many threads, where that is to run; it is pickled.
        address: of the cluster: ``auto``, ``local`` or an address.
        bounds: of the number of replicas.
        options: what a replica allows.
        threads: of a replica; all of the smallest machine's by default.

    Raises:
        ActTailError: the cluster is not reached, has no room, or a replica cannot be made; says why.
    """
    check_cluster(address)
    with connected(address):
        from ray import serve

        # It would tell of an address of its own, at which nothing is.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        cores = threads_of(threads)
        _check_room(bounds, cores)
        name = f"acttail-{os.getpid()}-{secrets.token_hex(4)}"
        serve.start(proxy_location="Disabled")
        try:
            yield RayReplicas(_started(partial(make, cores), name, bounds, options, cores))
        finally:
            # Ray Serve itself stays: others may have come to use it. It goes on deleting where that takes longer.
            with suppress(TimeoutError):
                serve.delete(name)


def _started(
    make: Callable[[], FastAPI], name: str, bounds: Bounds, options: Options, cores: int
) -> Any:
    """Ray Serve's handle of an application whose replicas all run.

    Raises:
        ActTailError: a replica cannot be made.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    number: dict[str, Any] = (
        {"num_replicas": bounds.least}
        if bounds.least == bounds.most
        else {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=bounds.least, max_replicas=bounds.most, target_ongoing_requests=_TARGET
            )
        }
    )
    deployment = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": cores},
        # A replica has a line of its own; the one before all replicas is for when each is full.
        max_ongoing_requests=options.slots + options.queue,
        max_queued_requests=options.queue,
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=_SILENT_SECONDS,
        # One that is no longer needed ends what it has begun.
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=options.wait_seconds + options.run_seconds,
        max_constructor_retry_count=_STARTS,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        **number,
    )(Replica)
    try:
        # No route: proxies of another application of this cluster would serve it without our limits.
        return serve.run(deployment.bind(make, _own_name), name=name, route_prefix=None)
    except RuntimeError as error:
        raise ActTailError(f"the replicas do not start: {_why(name) or error}") from error


def _own_name() -> str:
    """Of the replica that this runs in."""
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def _why(name: str) -> str:
    """The last line of what Ray Serve says of an application, which is the error that a replica met."""
    from ray import serve

    found = serve.status().applications.get(name)
    told = [d.message for d in found.deployments.values()] if found else []
    lines = [line.strip() for line in "\n".join(told).splitlines() if "Error: " in line]
    return lines[-1].partition("Error: ")[2] if lines else ""
