"""`acttail serve`: an OpenAI-compatible server and a chat page."""

import math
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from acttail.cli.console import note, warn
from acttail.cli.dtypes import AnyDtype
from acttail.cli.engines import EngineName, Threads, check_engine
from acttail.cli.judge import check_of_use, curves_of, policy_of
from acttail.cli.lossless import (
    DENSE_TEXT,
    Drafts,
    Lossless,
    drafters_of,
    how_it_runs,
)
from acttail.cli.options import CalibrationText, Model, PlanFile, Prefill, TrustRemoteCode
from acttail.cli.planning import (
    Allocator,
    MaxKl,
    MaxLoss,
    ReadShare,
    Sparsity,
    Speedup,
    engine_of,
    opened_plan,
    plan_or_request,
)
from acttail.cli.progress import work
from acttail.cli.serving import Served, bounds_of, endpoint_of
from acttail.cli.sizes import parsed_bytes
from acttail.errors import ActTailError


def serve(
    model: Model,
    plan: PlanFile = None,
    sparsity: Sparsity = None,
    read_share: ReadShare = None,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    max_kl: MaxKl = None,
    allocator: Allocator = None,
    calibration_text: CalibrationText = None,
    curves: Annotated[
        str | None,
        typer.Option(help="Sensitivity curves, so that each request may choose its sparsity."),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", metavar="N")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Ask for this key; better in the variable.", envvar="ACTTAIL_API_KEY"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name clients may call this server by; may be repeated.", metavar="NAME"
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A page (https://name) that may call from a browser, or *; may be repeated.",
            metavar="ORIGIN",
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            help="A proxy whose X-Forwarded-For names the client; may be repeated.",
            metavar="ADDRESS",
        ),
    ] = None,
    connections: Annotated[
        int, typer.Option(help="Connections at once.", metavar="N", min=1)
    ] = 1024,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens",
            help="Take special tokens in a message for what they are, not as text.",
        ),
    ] = False,
    slots: Annotated[
        int, typer.Option(help="Generations at once.", metavar="N", min=1, max=256)
    ] = 64,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of all KV caches, as 2G or 512M; a quarter of the machine's by default.",
            metavar="SIZE",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", metavar="N", min=0)] = 128,
    per_client: Annotated[
        int, typer.Option(help="Requests of one client, waiting or running.", metavar="N", min=1)
    ] = 128,
    wait: Annotated[
        float, typer.Option(help="Longest wait for a slot, seconds.", metavar="N", min=0)
    ] = 300,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Longest generation, seconds; then it ends as it is.", metavar="N", min=1
        ),
    ] = 600,
    keep_prefixes: Annotated[bool, typer.Option("--keep-prefixes", hidden=True)] = True,
    no_keep_prefixes: Annotated[
        bool,
        typer.Option("--no-keep-prefixes", help="Keep no KV caches for requests that begin alike."),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(help="New tokens of a request at most.", metavar="N", min=1)
    ] = 2048,
    max_body: Annotated[
        int, typer.Option(help="Bytes of a request at most.", metavar="N", min=1024)
    ] = 1 << 20,
    engine: EngineName = "auto",
    dtype: AnyDtype = None,
    threads: Threads = None,
    prefill: Prefill = None,
    lossless: Lossless = False,
    drafts: Drafts = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Replicas over a Ray cluster: auto, local, or an address.", metavar="ADDRESS"
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(help="How many with --ray: N, or MIN-MAX as load asks for.", metavar="N"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model over OpenAI's API, with a chat page at /; Ctrl-C ends it.

    With --ray each replica has the limits of one server; the model must be known by its name on every machine.
    """
    from acttail.model.opened import open_model

    try:
        from acttail.serve import Options, run
        from acttail.serve.limits import LOOPBACK, check_proxies
        from acttail.serve.run import listen
    except ModuleNotFoundError as error:
        raise ActTailError(
            f"serving needs the extra ({error.name} is missing): pip install 'acttail[serve]'"
        ) from error
    policy = policy_of(prefill)
    drafters = drafters_of(lossless, drafts, engine=engine, prefill=prefill)
    check_engine(engine, dtype, trust_remote_code=trust_remote_code)
    bounds = bounds_of(ray, replicas)
    if not 0 <= port <= 65535:
        raise ActTailError(f"--port takes a number from 0 to 65535, got {port}")
    for option, seconds in (("--wait", wait), ("--time-limit", time_limit)):
        if not math.isfinite(seconds):
            raise ActTailError(f"{option} takes a number of seconds, got {seconds}")
    try:
        check_proxies(trusted_proxy or ())
    except ValueError as error:
        raise ActTailError(f"--trusted-proxy takes an address or a network: {error}") from error
    for origin in cors_origin or ():
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ActTailError(
                f"--cors-origin takes * or http(s)://name without a path, got {origin}"
            )
    kv_bytes = None if kv_memory is None else parsed_bytes(kv_memory, "--kv-memory")
    found = curves_of(curves)
    made = plan is None and (sparsity, read_share, speedup, max_loss, max_kl) != (None,) * 5
    asked = plan_or_request(
        plan, sparsity=sparsity, read_share=read_share, speedup=speedup, max_loss=max_loss, max_kl=max_kl, allocator=allocator, text=calibration_text,
        engine=engine_of(dtype, threads),
        curves=curves if made else None,
    )  # fmt: skip
    if lossless:
        # No request changes the sparsity: all that curves can do is make the plan.
        check_of_use(found, None if made else DENSE_TEXT)
        found = None
    local = host in LOOPBACK or host.startswith("127.")
    # A name that is not listed could be another site's, pointed at this machine.
    hosts = (*LOOPBACK, host, *(allow_host or ())) if local or allow_host else None
    options = Options(
        # A folder's last part: clients have no business with paths of this machine.
        name=name or (Path(model).name if Path(model).exists() else model), api_keys=(api_key,) if api_key else (), hosts=hosts, slots=slots, kv_bytes=kv_bytes, queue=queue,
        per_client=per_client, wait_seconds=wait, run_seconds=time_limit, max_body=max_body,
        max_tokens=max_tokens, keep_prefixes=keep_prefixes and not no_keep_prefixes,
        proxies=tuple(trusted_proxy or ()), origins=tuple(cors_origin or ()), special_tokens=special_tokens,
    )  # fmt: skip
    with listen(host, port) as bound, ExitStack() as held:
        opened = open_model(model, trust_remote_code=trust_remote_code)
        served = Served(
            model, opened_plan(opened, asked), options, engine, dtype, threads, policy, drafters, found,
            trust_remote_code,
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{bound.getsockname()[1]}"
        if bounds is None or ray is None:
            app, runner, speaker = served.opened(opened)
            how = f"{runner.name} engine, {runner.dtype}, {how_it_runs(runner, speaker)}"
            said = f"{runner.source}: {how}"
        else:
            with work("starting replicas"):
                app = held.enter_context(endpoint_of(served, opened, ray, bounds))
            said = f"{options.name}: {bounds} on Ray ({ray})"

        def ready() -> None:
            note(said, None)
            note(f"chat page   {url}/\nAPI         {url}/v1\nmetrics     {url}/metrics", None)
            note("Ctrl-C ends", None)
            if not local and not api_key:
                warn("anyone who reaches this port can use the model: give --api-key")

        if os.environ.get("ACTTAIL_DEBUG") == "1":
            import logging

            logging.basicConfig(level=logging.INFO)
        run(app, bound, ready=ready, connections=connections)
