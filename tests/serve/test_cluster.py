"""Replicas on a Ray cluster of two nodes: what is lost when one is killed, draining, sticking, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from serving import TEMPLATE
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow
TOKENS = 400
# Seconds after which something hangs, on a machine that has much else to do.
_PATIENCE = 600
_EOS = {"2": -100}


@pytest.fixture(scope="module")
def folder(roomy_folder):
    """The roomy model with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(roomy_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(roomy_folder)
    return roomy_folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one core each, as Ray has them on one machine."""
    pytest.importorskip("ray")
    pytest.importorskip("ray.serve", exc_type=ImportError)
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("ACTTAIL_CACHE", str(tmp_path_factory.mktemp("cluster") / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        found = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        found.add_node(num_cpus=1)
        ray.init(found.address, log_to_driver=False, include_dashboard=False, namespace="serve")
        try:
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


def command(cluster, folder, *arguments):
    return [
        sys.executable, "-m", "acttail", "serve", str(folder), "--ray", cluster.address, "--port", "0",
        "--dtype", "fp32", "--threads", "1", *arguments,
    ]  # fmt: skip


@contextmanager
def served(cluster, folder, *arguments):
    """(address, process) of `acttail serve` over the cluster."""
    process = subprocess.Popen(
        command(cluster, folder, *arguments),
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("Ctrl-C ends"):
                break
        found = re.search(r"API\s+(http://\S+)/v1", "".join(said))
        assert found is not None, "".join(said)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1], process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(_PATIENCE) == 0


def replicas():
    """Name of each replica -> its actor."""
    import ray

    names = [n["name"] for n in ray.util.list_named_actors(all_namespaces=True)]
    return {
        name.rpartition("#")[2]: ray.get_actor(name, namespace="serve")
        for name in names
        if name.startswith("SERVE_REPLICA::acttail-")
    }


def body(content, **more):
    return {
        "model": "roomy", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS,
        "logit_bias": _EOS, **more,
    }  # fmt: skip


def counted(url, name):
    """Name of a replica -> what it counts; of the endpoint under an empty name."""
    found = {}
    page = ""
    while not re.search(r"^acttail_replicas [1-9]", page, re.MULTILINE):  # they may be slow to tell
        page = httpx.get(f"{url}/metrics", timeout=_PATIENCE).text
    for line in page.splitlines():
        if match := re.match(rf"{name}(?:{{(.*)}})? (\S+)$", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
            key = labels.get("replica", "")
            found[key] = found.get(key, 0.0) + float(match[2])
    return found


class Load:
    """Requests of as many threads, half of them streams."""

    def __init__(self, url, number, tokens=TOKENS):
        self.url, self.number, self.tokens = url, number, tokens
        self.begun, self.ended = set(), {}
        self.threads = [threading.Thread(target=self.ask, args=(i,)) for i in range(number)]
        for thread in self.threads:
            thread.start()

    def ask(self, i):
        asked = body(f"conversation {i}", stream=i % 2 == 0, max_tokens=self.tokens)
        address = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", address, json=asked, timeout=_PATIENCE) as answer:
            text = ""
            for part in answer.iter_text():
                self.begun.add(i)
                text += part
        # Not by lines: a random model says what some take for the end of one.
        self.ended[i] = (answer.status_code, text)

    def result(self):
        """Of those whose answer is whole, and of those that broke off with an error."""
        for thread in self.threads:
            thread.join(_PATIENCE)
        assert len(self.ended) == self.number
        whole, broken = set(), set()
        for i, (status, text) in self.ended.items():
            assert status == 200, text
            last = text.rstrip("\n").rpartition("\n\n")[2]
            if i % 2:
                assert json.loads(text)["usage"]["completion_tokens"] == self.tokens
                whole.add(i)
            elif last == "data: [DONE]":
                whole.add(i)
            else:
                assert "was lost" in json.loads(last.removeprefix("data: "))["error"]["message"]
                broken.add(i)
        return whole, broken


def busiest(url):
    """The replica that runs most, once each has something to run."""
    while True:
        found = httpx.get(f"{url}/health", timeout=_PATIENCE).json()["replicas"]
        if len(found) == 2 and all(r["running"] == 2 and r["waiting"] for r in found):
            return max(found, key=lambda r: r["waiting"])["replica"]
        time.sleep(0.01)


def test_a_killed_replica_loses_nothing_that_has_not_begun(cluster, folder):
    import ray

    # Two slots each: most of the load waits when the replica goes.
    with served(cluster, folder, "--replicas", "2", "--slots", "2") as (url, _):
        load = Load(url, 24)
        actors = replicas()
        assert len(actors) == 2
        killed = busiest(url)
        begun = set(load.begun)
        ray.kill(actors[killed])
        whole, broken = load.result()
        # No more than ran there; what broke off had begun, or began in the moment before the kill.
        assert len(broken) <= 2
        assert whole | broken == set(range(24))
        assert sum(counted(url, "acttail_endpoint_retries_total").values()) >= 1
        assert counted(url, "acttail_endpoint_broken_streams_total")[""] == len(broken)
        assert begun <= whole | broken
        deadline = time.monotonic() + _PATIENCE
        while len(now := httpx.get(f"{url}/health", timeout=_PATIENCE).json()["replicas"]) < 2:
            assert time.monotonic() < deadline, now
            time.sleep(0.2)
        assert killed not in [r["replica"] for r in now]  # another has taken its place
    assert not replicas()


def test_a_conversation_stays_and_others_spread(cluster, folder):
    with served(cluster, folder, "--replicas", "2") as (url, _):
        post = lambda **more: httpx.post(  # noqa: E731
            f"{url}/v1/chat/completions", json=body("", **more), timeout=_PATIENCE
        ).json()
        messages = [{"role": "user", "content": "hi"}]
        cached = []
        for _ in range(4):
            answer = post(messages=messages, max_tokens=8)
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "go on"}]
        assert cached[0] == 0
        assert min(cached[1:]) > 0
        assert sorted(counted(url, "acttail_generated_tokens_total").values()) == [0, 32]
        for i in range(20):
            post(messages=[{"role": "user", "content": f"another {i}"}], max_tokens=1)
        assert min(counted(url, "acttail_generated_tokens_total").values()) > 0


def test_draining(cluster, folder):
    with served(cluster, folder, "--replicas", "2") as (url, process):
        # They have ten seconds, on whatever machine.
        load = Load(url, 6, tokens=100)
        # What has not reached a replica by then is refused, and rightly.
        while httpx.get(f"{url}/health").json()["running"] + len(load.ended) < 6:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        whole, broken = load.result()
        assert (len(whole), len(broken)) == (6, 0)
        assert process.wait(_PATIENCE) == 0
    assert not replicas()


def test_what_cannot_start_says_why(cluster, folder):
    def refused(*arguments):
        done = subprocess.run(
            command(cluster, folder, *arguments), capture_output=True, text=True, timeout=_PATIENCE
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("acttail: ")]
        assert done.returncode == 2
        assert len(lines) == 1
        return lines[0]

    assert refused("--replicas", "3") == (
        "acttail: --replicas: 3 of 1 threads do not fit the cluster's cores (1, 1); give fewer --threads, "
        "or fewer replicas"
    )
    assert re.fullmatch(
        r"acttail: the replicas do not start: 1 bytes of KV memory hold 0 tokens; .* \(--kv-memory\)",
        refused("--kv-memory", "1"),
    )
    assert not replicas()


def test_a_machine_goes_away(cluster, folder):
    """The last test: the cluster has one node after it."""
    with served(cluster, folder, "--replicas", "2", "--slots", "2") as (url, _):
        load = Load(url, 24)
        busiest(url)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        whole, broken = load.result()
        assert len(broken) <= 2
        assert whole | broken == set(range(24))
        assert len(counted(url, "acttail_running")) == 1
    assert not replicas()
