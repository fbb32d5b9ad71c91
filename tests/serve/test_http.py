"""HTTP beneath the API: deadlines, limits, lengths, who is asking, and the end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import pytest
from serving import MESSAGES, NAME, error_of, post, serving

from acttail.serve.limits import CLIENT, Gate
from acttail.serve.protocol import Deadlines

CHAT = {"model": NAME, "messages": MESSAGES}


def connect(url):
    found = urlsplit(url)
    made = socket.create_connection((found.hostname, found.port), timeout=60)
    made.settimeout(60)
    return made


def exchange(url, *parts):
    """All that comes for raw bytes until the server closes."""
    with connect(url) as made:
        for part in parts:
            made.sendall(part)
        return received(made)


def received(made):
    found = b""
    while more := made.recv(65536):
        found += more
    return found


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def counted(url, path, status):
    name = f'acttail_requests_total{{path="{path}",status="{status}"}} '
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next((x[len(name) :] for x in lines if x.startswith(name)), 0))


def test_slow_headers_bodies_and_idle_connections_are_cut(engine):
    deadlines = Deadlines(header=0.3, idle=1, write=60)
    with serving(engine, deadlines=deadlines, body_seconds=0.3) as url:
        for sent in (b"", b"POST /v1/chat/compl", HEAD):
            answer = exchange(url, sent)
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        answer = exchange(url, HEAD + b"Content-Length: 100\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        # Kept alive, and closed without an answer when nothing more comes.
        answer = exchange(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1
        # A second request on the connection has its own deadline.
        with connect(url) as made:
            made.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert made.recv(65536).startswith(b"HTTP/1.1 200")
            made.sendall(b"GET /hea")
            assert b"HTTP/1.1 408" in received(made)
        assert counted(url, "other", 408) == 4
        assert counted(url, "/v1/chat/completions", 408) == 1


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        b"Content-Length: 2\r\nContent-Length: 3\r\n",
        b"Content-Length: -2\r\n",
        b"Content-Length: 2x\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Bad Name: 1\r\n",
    ],
)
def test_what_has_two_lengths_or_none_is_refused_and_closed(url, head):
    answer = exchange(url, HEAD + head + b"\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"501", b"413")
    assert b"}HTTP/1.1" not in answer, "nothing behind it is read as a request"
    assert "message" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_every_refusal_is_counted(url):
    asked = [
        ("/v1/chat/completions", 400, lambda: post(url, CHAT | {"temperature": 9})),
        ("/v1/chat/completions", 404, lambda: post(url, CHAT | {"model": "other"})),
        ("/v1/completions", 405, lambda: httpx.get(f"{url}/v1/completions")),
        ("/v1/completions", 415, lambda: httpx.post(f"{url}/v1/completions", content="{}")),
        ("/v1/completions", 413, lambda: post(url, {"prompt": "x" * 30_000}, "/v1/completions")),
        ("other", 404, lambda: httpx.get(f"{url}/nothing")),
        ("other", 400, lambda: exchange(url, b"nonsense\r\n\r\n")),
    ]
    for path, status, ask in asked:
        before = counted(url, path, status)
        ask()
        assert counted(url, path, status) == before + 1, (path, status)


def test_health_takes_head(url):
    answer = httpx.head(f"{url}/health")
    assert answer.status_code == 200
    assert answer.content == b""


def test_pages_of_named_origins_alone_may_call(engine):
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with serving(engine, origins=("https://good.example",), api_keys=("k",)) as url:
        for origin, status in (("https://good.example", 200), ("https://bad.example", 400)):
            answer = httpx.options(f"{url}/v1/chat/completions", headers=ask | {"Origin": origin})
            assert answer.status_code == status
            assert (answer.headers.get("access-control-allow-origin") == origin) == (status == 200)
        refused = post(url, CHAT, headers={"Origin": "https://good.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://good.example"
    with serving(engine) as url:
        answer = httpx.get(f"{url}/health", headers={"Origin": "https://good.example"})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("proxies", "keys", "peer", "headers", "client"),
    [
        ((), (), "10.0.0.1", {"x-forwarded-for": "1.2.3.4"}, "address 10.0.0.1"),
        ((), (), "10.0.0.1", {"authorization": "Bearer a"}, "address 10.0.0.1"),
        (("10.0.0.0/8",), (), "10.0.0.1", {"x-forwarded-for": "1.2.3.4"}, "address 1.2.3.4"),
        (("10.0.0.0/8",), (), "10.0.0.1", {"x-forwarded-for": "6.6.6.6, 1.2.3.4, 10.0.0.2"}, "address 1.2.3.4"),
        (("10.0.0.0/8",), (), "9.0.0.1", {"x-forwarded-for": "1.2.3.4"}, "address 9.0.0.1"),
        (("10.0.0.0/8",), (), "10.0.0.1", {"x-forwarded-for": "nonsense"}, "address 10.0.0.1"),
        (("10.0.0.0/8",), (), "10.0.0.1", {}, "address 10.0.0.1"),
        ((), ("a", "b"), "10.0.0.1", {"authorization": "Bearer b"}, "key 1"),
        ((), ("a", "b"), "10.0.0.1", {"authorization": "Bearer c"}, "address 10.0.0.1"),
    ],
)  # fmt: skip
def test_whom_a_request_is_counted_for(proxies, keys, peer, headers, client):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope[CLIENT])

    gate = Gate(app, max_body=10, body_seconds=1, api_keys=keys, hosts=None, proxies=proxies)
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health",
        "headers": raw,
        "client": (peer, 1),
    }
    asyncio.run(gate(scope, None, None))
    assert seen == [client]


def test_clients_do_not_share_what_a_cache_holds(engine):
    body = CHAT | {
        "messages": [{"role": "user", "content": "a secret that is long enough"}],
        "max_tokens": 2,
    }
    with serving(engine, api_keys=("a", "b")) as url:

        def cached(key):
            answer = post(url, body, headers={"Authorization": f"Bearer {key}"})
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("a") == 0
        assert cached("b") == 0
        assert cached("a") > 0
        assert cached("b") > 0


def test_too_many_connections_are_answered_and_then_served(engine):
    with serving(engine, connections=4) as url:
        held = [connect(url) for _ in range(4)]
        refused = exchange(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after" in refused.lower()
        for made in held:
            made.close()
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline


_SERVE = """
import resource, sys
from acttail.cli import main
if sys.argv[1] != "0":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["acttail", "serve", sys.argv[2], "--port", "0", "--threads", "1", "--slots", "1", *sys.argv[3:]]
main()
"""


class Process:
    """A server of its own."""

    def __init__(self, folder, *options, files=0):
        command = [sys.executable, "-c", _SERVE, str(files), str(folder), *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"}
        )

    def __enter__(self):
        for line in self.process.stderr:
            if line.startswith("API"):
                self.url = line.split()[-1].removesuffix("/v1")
            if "Ctrl-C" in line:
                return self
        raise AssertionError("the server did not start")

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def test_no_files_left_is_no_flood_and_no_end(roomy_folder):
    with Process(roomy_folder, files=160) as server:
        held = []
        for _ in range(400):
            try:
                held.append(connect(server.url))
            except OSError:
                break
        assert len(held) > 100
        for made in held:
            made.close()
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{server.url}/health", timeout=20).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        said = server.process.stderr.read()
        assert len(said.splitlines()) < 10, said[:2000]


def test_a_signal_ends_streams_with_an_error_and_queued_requests_with_503(roomy_folder):
    code = _SERVE.replace(
        "main()\n",
        "import acttail.serve\nacttail.serve.run.__kwdefaults__['grace'] = 0.2\nmain()\n",
    )
    server = Process.__new__(Process)
    command = [sys.executable, "-c", code, "0", str(roomy_folder), "--max-tokens", "100000"]
    server.process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    with server:
        from concurrent.futures import ThreadPoolExecutor

        name = httpx.get(f"{server.url}/about").json()["model"]
        # A token that never ends: the answer takes as long as the context lasts.
        body = {"model": name, "prompt": "x", "max_tokens": 2000, "logit_bias": {"2": -100}, "n": 8}
        with (
            ThreadPoolExecutor(4) as pool,
            httpx.stream(
                "POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60
            ) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            queued = [
                pool.submit(post, server.url, body, "/v1/completions", timeout=60) for _ in range(3)
            ]
            while httpx.get(f"{server.url}/health").json()["waiting"] < 7 + 3 * 8:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            answers = [q.result() for q in queued]
            events = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
        assert events[-1]["error"]["code"] == "shutting_down"
        for answer in answers:
            assert answer.status_code == 503
            assert error_of(answer)["code"] == "shutting_down"
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.process.stderr.read()
