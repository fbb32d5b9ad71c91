"""`acttail serve`: an OpenAI-compatible server and a chat page."""

import os
from pathlib import Path
from typing import Annotated

import typer

from acttail.cli.common import Model, Prefill, TrustRemoteCode, err
from acttail.cli.engines import AnyDtype, EngineName, Threads, open_engine
from acttail.errors import ActTailError


def serve(
    model: Model,
    plan: Annotated[str | None, typer.Option(help="Plan file; dense without one.")] = None,
    curves: Annotated[
        str | None,
        typer.Option(help="Sensitivity curves, so that each request may choose its sparsity."),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Ask for this key; better in the variable.", envvar="ACTTAIL_API_KEY"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name clients may call this server by; may be repeated."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Generations at once.", min=1, max=256)] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=0)] = 128,
    per_client: Annotated[
        int, typer.Option(help="Requests of one client, waiting or running.", min=1)
    ] = 128,
    wait: Annotated[float, typer.Option(help="Longest wait for a slot, seconds.", min=0)] = 300,
    time_limit: Annotated[
        float, typer.Option(help="Longest generation, seconds; then it ends as it is.", min=1)
    ] = 600,
    keep_prefixes: Annotated[
        bool, typer.Option(help="Keep KV caches for requests that begin alike (conversations).")
    ] = True,
    max_tokens: Annotated[int, typer.Option(help="New tokens of a request at most.", min=1)] = 2048,
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.", min=1024)] = 1 << 20,
    engine: EngineName = "auto",
    dtype: AnyDtype = "bf16",
    threads: Threads = None,
    prefill: Prefill = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model over OpenAI's API, with a chat page at /; Ctrl-C ends it."""
    from acttail.curves import SensitivityCurves
    from acttail.plan import SparsityPlan
    from acttail.prefill import PrefillPolicy

    try:
        from acttail.serve import Options, create_app, run
        from acttail.serve.limits import LOOPBACK
        from acttail.serve.run import listen
    except ModuleNotFoundError as error:
        raise ActTailError(
            f"serving needs the extra ({error.name} is missing): pip install 'acttail[serve]'"
        ) from error
    policy = PrefillPolicy.parse(prefill or "all")
    loaded = SparsityPlan.load(plan) if plan else None
    found = SensitivityCurves.load(curves) if curves else None
    local = host in LOOPBACK or host.startswith("127.")
    # A name that is not listed could be another site's, pointed at this machine.
    hosts = (*LOOPBACK, host, *(allow_host or ())) if local or allow_host else None
    with listen(host, port) as bound:
        runner = open_engine(
            model, loaded, engine=engine, dtype=dtype, prefill=policy, threads=threads,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        options = Options(
            # A folder's last part: clients have no business with paths of this machine.
            name=name or Path(model).name if Path(model).exists() else name or model, api_keys=(api_key,) if api_key else (), hosts=hosts, slots=slots, queue=queue,
            per_client=per_client, wait_seconds=wait, run_seconds=time_limit, max_body=max_body,
            max_tokens=max_tokens, keep_prefixes=keep_prefixes,
        )  # fmt: skip
        app = create_app(runner, options, curves=found)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{bound.getsockname()[1]}"

        def ready() -> None:
            how = f"sparsity {runner.plan.sparsity:g}" if runner.plan else "dense"
            err.print(f"{runner.source}: {runner.name} engine, {runner.dtype}, {how}")
            err.print(f"chat page   {url}/\nAPI         {url}/v1\nmetrics     {url}/metrics")
            err.print("Ctrl-C ends")
            if not local and not api_key:
                err.print(
                    "[yellow]anyone who reaches this port can use the model: give --api-key[/yellow]"
                )

        if os.environ.get("ACTTAIL_DEBUG") == "1":
            import logging

            logging.basicConfig(level=logging.INFO)
        run(app, bound, ready=ready)
