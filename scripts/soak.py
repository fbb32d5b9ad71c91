"""Streaming clients that come, listen and leave at random, for minutes: errors, memory and open files of the server.

    python scripts/soak.py [--model smollm2-135m] [--clients 64] [--minutes 10] [--seed 0] [--json results.json]

Starts `acttail serve` on a port of loopback. `--model tiny` is a random model of byte tokens, which is fast: there the
server and not the model is what is loaded. The status is 1 if there was an error, memory grew by more than
`--growth` percent between the first and the last third, or something was left open at the end.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

# Caches of the allocator and what is loaded lazily are there after the first requests.
_SETTLE_SECONDS = 30
_OPTIONS = ("--port", "0", "--threads", "1", "--queue", "256", "--per-client", "256",
            "--wait", "1200", "--max-tokens", "64")  # fmt: skip


def tiny(place: Path) -> str:
    """A folder with a random model of byte tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from byte_tokens import byte_tokenizer
    from families import config

    made = config("llama")
    made.vocab_size, made.max_position_embeddings = 260, 512
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return str(place)


class Load:
    """What the clients do, and what they see.

    Args:
        url: of the server.
        model: its name there.
        seed: of what they do.
    """

    def __init__(self, url: str, model: str, seed: int) -> None:
        self.url, self.model, self.seed = url, model, seed
        self.ends: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.tokens = 0

    async def client(self, index: int, until: float) -> None:
        """One client's requests, one after the other."""
        rng = random.Random(f"{self.seed}/{index}")
        while time.monotonic() < until:
            # Its own connections: a client that leaves closes them.
            async with httpx.AsyncClient(base_url=self.url, timeout=600, verify=False) as http:
                try:
                    self.ends[await self._request(http, rng)] += 1
                except Exception as error:
                    self.errors[f"{type(error).__name__}: {str(error)[:100]}"] += 1

    async def _request(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        wanted = rng.randrange(1, 48)
        body = {
            "model": self.model, "prompt": "The sea is " + "blue and " * rng.randrange(1, 20), "stream": True,
            "max_tokens": wanted, "temperature": 0.8, "seed": rng.randrange(1 << 30),
        }  # fmt: skip
        # A third listens to the end; the others leave in the queue, at the first token, or in the midst.
        leaves = rng.choice((None, None, 0, 1, rng.randrange(2, 32)))
        if leaves == 0:
            task = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(rng.random())
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "left early"
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}: {(await answer.aread())[:100]!r}")
            events = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return "whole"
                if "error" in json.loads(line[6:]):
                    raise RuntimeError(line[:100])
                events += 1
                self.tokens += 1
                if leaves is not None and events >= leaves:
                    return "left amid"
        raise RuntimeError("a stream ended without [DONE]")


async def watched(load: Load, clients: int, seconds: float, process: psutil.Process) -> list[dict]:
    """Run the clients; a sample of the server each second."""
    samples = []

    async def watch() -> None:
        while True:
            with process.oneshot():
                samples.append({
                    "at": time.monotonic(), "memory": process.memory_info().rss, "files": process.num_fds(),
                    "threads": process.num_threads(),
                })  # fmt: skip
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    until = time.monotonic() + seconds
    await asyncio.gather(*(load.client(i, until) for i in range(clients)))
    watcher.cancel()
    return samples


def idle(url: str, process: psutil.Process) -> dict[str, int]:
    """What the server holds once nobody asks for anything."""
    deadline = time.monotonic() + 60
    while True:
        health = httpx.get(f"{url}/health").json()
        if health["running"] + health["waiting"] == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    time.sleep(2)
    return {
        "running": health["running"],
        "waiting": health["waiting"],
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def soak(model: str, clients: int, minutes: float, seed: int) -> tuple[dict, dict[str, int]]:
    """Serve a model and load it: what was seen, and the errors in words."""
    command = [sys.executable, "-m", "acttail", "serve", model, *_OPTIONS]
    with tempfile.TemporaryFile("w+") as said:
        server = subprocess.Popen(command, stderr=said, env=os.environ | {"COLUMNS": "80"})
        try:
            url = None
            while url is None:
                assert server.poll() is None, Path(f"/proc/self/fd/{said.fileno()}").read_text()
                time.sleep(0.1)
                said.seek(0)
                found = re.search(r"API\s+(\S+)/v1\n(?s:.*)Ctrl-C", said.read())
                url = found and found[1]
            process = psutil.Process(server.pid)
            name = httpx.get(f"{url}/about").json()["model"]
            before = idle(url, process)
            load = Load(url, name, seed)
            started = time.monotonic()
            samples = asyncio.run(watched(load, clients, 60 * minutes, process))
            took = time.monotonic() - started
            after = idle(url, process)
        finally:
            server.terminate()
            status = server.wait(60)
        said.seek(0)
        log = [line for line in said.read().splitlines() if line.strip()]
    settled = [s for s in samples if s["at"] - started > min(_SETTLE_SECONDS, took / 3)]
    third = max(1, len(settled) // 3)
    first, last = (
        statistics.median(s["memory"] for s in part) / 1e6
        for part in (settled[:third], settled[-third:])
    )
    return {
        "clients": clients, "minutes": round(took / 60, 1), "requests": load.ends.total(), **load.ends,
        "tokens": load.tokens, "errors": load.errors.total(),
        "memory, first third, MB": round(first), "last third": round(last),
        "files before": before["files"], "at most": max(s["files"] for s in samples), "after": after["files"],
        "threads before": before["threads"], "threads after": after["threads"],
        "left running": after["running"] + after["waiting"], "exit status": status, "lines of log": len(log),
        "tracebacks": sum("Traceback" in line for line in log),
    }, dict(load.errors)  # fmt: skip


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="name, folder, or tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=5, help="percent of memory that is flat")
    parser.add_argument("--json", help="write what was found here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="acttail-soak-") as folder:
        model = tiny(Path(folder) / "tiny") if args.model == "tiny" else args.model
        found, said = soak(model, args.clients, args.minutes, args.seed)
    print(json.dumps(found | {"said": said}, indent=1))
    if args.json:
        report = {"what": "soak", "seed": args.seed, "found": {Path(model).name: found}}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    bad = [
        found["errors"], found["left running"], found["exit status"], found["tracebacks"],
        found["last third"] > (1 + args.growth / 100) * found["memory, first third, MB"],
        found["after"] > found["files before"] + 2, found["threads after"] > found["threads before"] + 2,
    ]  # fmt: skip
    return int(any(bad))


if __name__ == "__main__":
    sys.exit(main())
