"""What `acttail serve` serves: one application here, or the same in each replica of a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from acttail.cli.engines import open_engine
from acttail.cli.judge import check_of_use
from acttail.cli.lossless import made_lossless
from acttail.errors import ActTailError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from acttail.calibrate.curves import SensitivityCurves
    from acttail.model.opened import Opened
    from acttail.plan import SparsityPlan
    from acttail.serve import Options
    from acttail.serve.cluster import Bounds
    from acttail.sparse.policy import PrefillPolicy


@dataclass(frozen=True)
class Served:
    """A model and how it is served; it can be pickled.

    Attributes:
        model: its name, which every machine knows it by.
        plan: that it decodes under.
        options: what is allowed.
        engine: of --engine.
        dtype: of --dtype.
        threads: of --threads.
        policy: of --prefill.
        drafters: of --lossless.
        curves: for requests that choose their sparsity.
        trust_remote_code: of --trust-remote-code.
    """

    model: str
    plan: "SparsityPlan | None"
    options: "Options"
    engine: str = "auto"
    dtype: str | None = None
    threads: int | None = None
    policy: "PrefillPolicy | None" = None
    drafters: dict[str, bool] | None = None
    curves: "SensitivityCurves | None" = None
    trust_remote_code: bool = False

    def opened(self, opened: "Opened") -> "tuple[FastAPI, Any, Any]":
        """The application, the engine that decodes and the one that speaks.

        Args:
            opened: the model.

        Raises:
            ActTailError: it cannot be served so.
        """
        from acttail.serve import create_app

        runner = open_engine(
            opened, self.plan, engine=self.engine, dtype=self.dtype, prefill=self.policy, threads=self.threads,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
        speaker = made_lossless(runner, self.drafters)
        app = create_app(speaker, self.options, curves=self.curves)
        check_of_use(self.curves, app.state.server.variants.fixed)
        return app, runner, speaker

    def replica(self, threads: int) -> "FastAPI":
        """The application of a replica with so many threads."""
        from acttail.model.opened import open_model

        here = replace(self, threads=threads)
        return here.opened(open_model(self.model, trust_remote_code=self.trust_remote_code))[0]


@contextmanager
def endpoint_of(
    served: Served, opened: "Opened", ray: str, bounds: "Bounds"
) -> "Iterator[FastAPI]":
    """One endpoint before replicas on a Ray cluster, which end with the context.

    Raises:
        ActTailError: see :func:`acttail.serve.cluster.replicated`.
    """
    from acttail.serve.cluster import replicated
    from acttail.serve.endpoint import create_endpoint

    # Keys, names and proxies are the endpoint's: no secret goes over the cluster.
    inner = replace(served.options, api_keys=(), hosts=None, proxies=(), origins=())
    guarded = replace(served, model=opened.findable, options=inner)
    with replicated(
        guarded.replica, address=ray, bounds=bounds, options=served.options, threads=served.threads
    ) as replicas:
        yield create_endpoint(replicas, served.options)


def bounds_of(ray: str | None, replicas: str | None) -> "Bounds | None":
    """How many replicas were asked for; None for a server of this process alone.

    Raises:
        ActTailError: they do not go together, or Ray Serve is not there; names the option.
    """
    if ray is None:
        if replicas is not None:
            raise ActTailError("--replicas is about --ray: give that too")
        return None
    from acttail.serve.cluster import Bounds, check_cluster

    check_cluster(ray)
    return Bounds.parsed(replicas or "1")
