"""The server under load: many streaming clients for two minutes; errors, memory, percentiles.

Starts `acttail serve smollm2-135m` on a port of loopback and drives it with the official openai client, which runs
on the same cores. With `--revision` an older revision serves by turns with this tree, with `--llama-server` llama.cpp's
server of the same model in Q8_0 with as many slots. Appends to serve_load.csv and fills the table of docs/howto/serving.md.

    python benchmarks/serve_load.py [--clients 64] [--seconds 120] [--dtype int8] [--sparsity 0.5] [--slots 64]
        [--revision REV [--tree FOLDER] [--old-slots 8]] [--llama-server PATH] [--rounds 1] [--table-only]
"""

import asyncio
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import psutil
from common import HERE, On, Rows, fill, label, options
from revisions import checked_out

import acttail
from acttail.evaluate.llama_cpp import quantised
from acttail.model.names import resolve

NEW_TOKENS = 24
# llama-server shares a context among its slots; a question and its answer take a tenth of this.
THEIR_WIDTH, THEIR_CONTEXT = "Q8_0", 512
# Settling: caches of the allocator and lazily loaded code are there after the first requests.
SETTLE_SECONDS = 15


async def client_loop(client, model, index, until, seen):
    turn = 0
    while time.monotonic() < until:
        turn += 1
        started = time.monotonic()
        times = []
        try:
            stream = await client.chat.completions.create(
                model=model, max_tokens=NEW_TOKENS, temperature=0.8, seed=1000 * index + turn, stream=True,
                messages=[{"role": "user", "content": f"Client {index}, turn {turn}: tell me about the sea."}],
            )  # fmt: skip
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    times.append(time.monotonic())
        except Exception as error:
            seen["errors"].append(repr(error))
            continue
        if times:
            seen["first"].append(times[0] - started)
            seen["gaps"] += [b - a for a, b in itertools.pairwise(times)]
            seen["tokens"] += len(times)
        seen["requests"] += 1


async def drive(url, model, clients, seconds, process):
    seen = {"errors": [], "first": [], "gaps": [], "tokens": 0, "requests": 0}
    memory = []

    async def watch():
        while True:
            memory.append((time.monotonic(), process.memory_info().rss))
            await asyncio.sleep(1)

    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    started = time.monotonic()
    watcher = asyncio.create_task(watch())
    await asyncio.gather(
        *(client_loop(client, model, i, started + seconds, seen) for i in range(clients))
    )
    watcher.cancel()
    settled = [m for at, m in memory if at - started > min(SETTLE_SECONDS, seconds / 3)]
    third = max(1, len(settled) // 3)
    seen["seconds"] = time.monotonic() - started
    seen["memory_first"] = statistics.median(settled[:third]) / 1e6
    seen["memory_last"] = statistics.median(settled[-third:]) / 1e6
    return seen


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# A server of another tree: before the editable install's own finder, which would lead back to this one.
SERVER = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, sys.argv.pop(1))
import acttail
assert acttail.__file__.startswith(sys.path[0]), acttail.__file__
from acttail.__main__ import main
main()
"""


@contextmanager
def ours(args, source, slots):
    """(url, process) of the package of a source tree, or of this one."""
    with tempfile.TemporaryDirectory() as folder:
        more = []
        if args.sparsity:
            plan = Path(folder) / "plan.json"
            acttail.make_plan(args.model, args.sparsity).save(plan)
            more = ["--plan", str(plan)]
        start = ["-m", "acttail"] if source is None else ["-c", SERVER, str(source)]
        command = [sys.executable, *start, "serve", args.model, *more, "--dtype", args.dtype, "--port", "0",
                   "--slots", str(slots), "--threads", str(args.threads)]  # fmt: skip
        env = os.environ if source is None else os.environ | {"PYTHONPATH": str(source)}
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        try:
            url = next(line.split()[-1] for line in server.stderr if line.startswith("API"))
            yield url, server
        finally:
            server.terminate()
            server.wait(30)


@contextmanager
def theirs(args):
    """(url, process) of llama-server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = quantised(resolve(args.model).gguf, f"MOSTLY_{THEIR_WIDTH}")
    command = [args.llama_server, "-m", str(path), "-np", str(args.slots), "-c", str(args.slots * THEIR_CONTEXT),
               "-t", str(args.threads), "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{base}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        else:
            raise SystemExit("llama-server does not answer")
        yield f"{base}/v1", server
    finally:
        server.terminate()
        server.wait(30)


def serve_once(args, started):
    """What the clients of one server saw."""
    with started as (url, server):
        process = psutil.Process(server.pid)
        seen = asyncio.run(drive(url, Path(args.model).name, args.clients, args.seconds, process))
    return seen | {"status": server.returncode}


def measure(args, rows):
    own = {
        "dtype": args.dtype,
        "sparsity": args.sparsity,
        "clients": args.clients,
        "slots": args.slots,
    }
    servers = {"": (lambda: ours(args, None, args.slots), own)}
    if args.llama_server:
        servers["llama-server"] = (
            lambda: theirs(args),
            own | {"dtype": THEIR_WIDTH, "sparsity": 0.0},
        )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as after:
        if args.revision:
            place = Path(folder) / "old"
            source = args.tree / "src" if args.tree else checked_out(args.revision, place)
            servers = {
                args.revision: (
                    lambda: ours(args, source, args.old_slots),
                    own | {"slots": args.old_slots},
                )
            } | servers
            if not args.tree:
                gone = ["git", "-C", str(HERE.parent), "worktree", "remove", "--force", str(place)]
                after.callback(subprocess.run, gone, check=False)
        for i in range(args.rounds):
            for name in list(servers)[:: 1 if i % 2 == 0 else -1]:
                start, what = servers[name]
                note(args, rows, {"revision": name} | what, serve_once(args, start()))


def note(args, rows, what, seen):
    rows.append({
        **what, "new_tokens": NEW_TOKENS, "seconds": round(seen["seconds"], 1), "requests": seen["requests"],
        "errors": len(seen["errors"]), "tokens_per_second": round(seen["tokens"] / seen["seconds"], 1),
        **{f"first_token_p{p}": round(percentile(seen["first"], p / 100), 3) for p in (50, 95, 99)},
        **{f"token_p{p}": round(percentile(seen["gaps"], p / 100), 4) for p in (50, 95, 99)},
        "memory_first_third_mb": round(seen["memory_first"], 1), "memory_last_third_mb": round(seen["memory_last"], 1),
        "exit_status": seen["status"],
    }, On(label(args.model), "questions of the script"))  # fmt: skip
    print(seen["errors"][:3], flush=True)


def table(found):
    lines = [
        "| revision | clients | slots | weights | S | requests | errors | tokens/s in all | first token, s: median, 95 %, 99 % "
        "| between tokens, ms: median, 95 %, 99 % | memory, first and last third |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found.values():
        first = ", ".join(f"{float(r[f'first_token_p{p}']):.2f}" for p in (50, 95, 99))
        gaps = ", ".join(f"{1000 * float(r[f'token_p{p}']):.0f}" for p in (50, 95, 99))
        lines.append(
            f"| {r['revision'] or 'this'} | {r['clients']} | {r['slots']} | {r['dtype']} | {r['sparsity']} | {r['requests']} | {r['errors']} | {r['tokens_per_second']} "
            f"| {first} | {gaps} | {float(r['memory_first_third_mb']):.0f} MB, {float(r['memory_last_third_mb']):.0f} MB |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "table")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--revision", default="", help="an older one, by turns with this tree")
    parser.add_argument("--tree", type=Path, help="where it is checked out and compiled already")
    parser.add_argument("--old-slots", type=int, default=8, help="of the older one")
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server, by turns too")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    rows = Rows("serve_load", args.out)
    if not args.table_only:
        measure(args, rows)
    found = rows.latest("revision", "clients", "slots", "dtype", "sparsity")
    fill(args.out, "docs/howto/serving.md", "load", table(found))


if __name__ == "__main__":
    main()
