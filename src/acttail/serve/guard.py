"""What stands before an application, whatever it serves: who may ask, how much, and from which pages."""

from collections.abc import Callable

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from acttail.serve.limits import Counted, Gate
from acttail.serve.server import Options


def guard(app: FastAPI, options: Options, count: Callable[[str, int], None]) -> None:
    """Add the middleware of a server to its application.

    Args:
        app: with all its routes.
        options: what is allowed.
        count: called with (path, status) of every response.
    """
    app.add_middleware(
        Gate, max_body=options.max_body, body_seconds=options.body_seconds, api_keys=options.api_keys,
        hosts=options.hosts, proxies=options.proxies,
    )  # fmt: skip
    if options.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )  # fmt: skip
    app.add_middleware(Counted, count=count)
