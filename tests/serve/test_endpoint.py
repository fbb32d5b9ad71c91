"""The endpoint before several replicas, in one process: routing, what is lost and what is not. test_cluster.py has Ray."""

import json
import re
import threading
import time
from contextlib import aclosing, contextmanager

import httpx
import pytest
import uvicorn
from serving import MESSAGES, NAME, error_of, post

from acttail.errors import ActTailError
from acttail.serve import Options, create_app
from acttail.serve.cluster import Bounds, check_cluster
from acttail.serve.endpoint import NoRoomError, ReplicaGoneError, create_endpoint
from acttail.serve.replica import Replica
from acttail.serve.run import config_of, listen
from acttail.serve.sticky import LEAD, chosen, conversation_of, ranked


class Here:
    """Replicas of this process; `lost` says after how many messages those of the next requests die."""

    def __init__(self, engine, number):
        self.replicas = [
            Replica(
                lambda: create_app(engine, Options(name=NAME, max_tokens=2000)), lambda i=i: f"r{i}"
            )
            for i in range(number)
        ]
        self.asked, self.lost, self.full, self.silent = [], [], False, False

    async def ask(self, scope, body, conversation):
        if self.full:
            raise NoRoomError
        names = [str(i) for i in range(len(self.replicas))]
        own = int(chosen(conversation, dict.fromkeys(names, 0)))
        at = self.asked[-1] + 1 if self.lost else own
        self.asked.append(at % len(names))
        left = self.lost.pop(0) if self.lost else None
        async with aclosing(self.replicas[self.asked[-1]].ask(scope, body, conversation)) as answer:
            async for message in answer:
                if left == 0:
                    raise ReplicaGoneError("it died")
                left = None if left is None else left - 1
                yield message

    async def reports(self, *, metrics):
        if self.silent:
            raise OSError("nobody there")
        return [r.report(metrics=metrics) for r in self.replicas]

    async def close(self, seconds):
        for replica in self.replicas:
            replica.close(seconds)


@contextmanager
def endpoint(replicas, **options):
    app = create_endpoint(replicas, Options(name=NAME, **options))
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(config_of(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@pytest.fixture
def here(engine):
    found = Here(engine, 2)
    found.asked.append(0)
    yield found
    for replica in found.replicas:
        replica._server.scheduler.stop()


@pytest.fixture
def url(here):
    with endpoint(here, max_body=20_000, hosts=("127.0.0.1",)) as found:
        yield found


def chat(**more):
    return {"model": NAME, "messages": MESSAGES, "max_tokens": 8, "temperature": 0, **more}


def events(answer):
    return [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]


def counted(url, name):
    page = httpx.get(f"{url}/metrics").text
    return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


def test_answers_as_a_single_server(url, engine):
    whole = post(url, chat()).json()
    assert whole["usage"]["completion_tokens"] == 8
    streamed = events(post(url, chat(stream=True)))
    assert streamed.pop() == "[DONE]"
    text = "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in streamed)
    assert text == whole["choices"][0]["message"]["content"]
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == NAME
    assert "<html" in httpx.get(f"{url}/").text.lower()


def test_tools_are_called_through_it(url):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    tool = {"type": "function", "function": {"name": "say", "parameters": schema}}
    body = chat(tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=80)
    (choice,) = post(url, body).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert set(json.loads(call["function"]["arguments"])) == {"yes"}


def test_a_stream_comes_token_by_token(url):
    seen = []
    body = chat(stream=True, max_tokens=2000)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line:
                seen.append(httpx.get(f"{url}/health").json()["running"])
            if len(seen) == 3:
                break
    assert seen[1:] == [1, 1]  # while it is read, it still runs


def test_who_leaves_frees_the_slot(url):
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=chat(stream=True, max_tokens=1900)
    ) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/health").json()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert counted(url, "acttail_generated_tokens_total") < 1900


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1])
def test_nothing_is_lost_that_has_not_begun(url, here, stream, after):
    want = post(url, chat()).json()["choices"][0]["message"]["content"]
    here.lost = [after, after]  # the head of a response alone is nothing to the client
    answer = post(url, chat(stream=stream))
    assert answer.status_code == 200
    if stream:
        found = events(answer)
        assert found[-1] == "[DONE]"
        deltas = [json.loads(e)["choices"][0]["delta"] for e in found[:-1]]
        assert [d["role"] for d in deltas if "role" in d] == ["assistant"]
        assert "".join(d.get("content", "") for d in deltas) == want
    else:
        assert answer.json()["choices"][0]["message"]["content"] == want
    assert counted(url, "acttail_endpoint_retries_total") == 2


def test_a_stream_that_has_begun_ends_with_an_error(url, here):
    here.lost = [2]
    found = events(post(url, chat(stream=True, max_tokens=500)))
    assert "[DONE]" not in found
    assert json.loads(found[-1])["error"]["message"].startswith(
        "the replica that answered was lost"
    )
    assert counted(url, "acttail_endpoint_broken_streams_total") == 1
    assert counted(url, "acttail_endpoint_retries_total") == 0


def test_a_stream_that_has_said_all_is_whole(url, here):
    """One token comes as one text, `[DONE]` with it; what is lost is the word that it was all."""
    here.lost = [2]
    found = events(post(url, chat(stream=True, max_tokens=0)))
    assert found[-1] == "[DONE]"
    assert counted(url, "acttail_endpoint_broken_streams_total") == 0


def test_what_takes_replicas_down_is_not_tried_for_ever(url, here):
    here.lost = [0] * 5
    answer = post(url, chat())
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "replicas_lost"
    assert len(here.lost) == 2


def test_no_room(url, here):
    here.full = True
    answer = post(url, chat())
    assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
    assert answer.headers["Retry-After"] == "5"


def test_refuses_before_a_replica_is_asked(url, here):
    asked = len(here.asked)
    long = chat(messages=[{"role": "user", "content": "x" * 30_000}])
    assert post(url, long).status_code == 413
    assert httpx.get(f"{url}/", headers={"Host": "elsewhere"}).status_code == 421
    assert httpx.post(f"{url}/v1/completions", content=b"x").status_code == 415
    assert len(here.asked) == asked


def test_a_key_stays_at_the_endpoint(here):
    with endpoint(here, api_keys=("secret",)) as url:
        assert post(url, chat()).status_code == 401
        assert post(url, chat(), headers={"Authorization": "Bearer secret"}).status_code == 200


def test_health_and_metrics_tell_of_each_replica(url, here):
    post(url, chat())
    found = httpx.get(f"{url}/health").json()
    assert [r["replica"] for r in found["replicas"]] == ["r0", "r1"]
    assert counted(url, "acttail_replicas") == 2
    page = httpx.get(f"{url}/metrics").text
    tokens = re.findall(r'acttail_generated_tokens_total{replica="(r\d)"} (\S+)', page)
    assert sorted(float(count) for _, count in tokens) == [0, 8]
    assert page.count("# TYPE acttail_generated_tokens_total counter") == 1
    here.silent = True
    answer = httpx.get(f"{url}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "no replica answers")


def test_health_of_a_replica(here):
    replica = here.replicas[0]
    replica.check_health()
    replica._server.scheduler.stop()
    with pytest.raises(ActTailError, match="thread has ended"):
        replica.check_health()


def turns(*contents):
    roles = ("system", "user", "assistant", "user")
    found = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return json.dumps({"messages": found}).encode()


def test_a_conversation_keeps_its_name():
    first = conversation_of("me", turns("be kind", "hi"))
    assert first == conversation_of("me", turns("be kind", "hi", "hello", "and now?"))
    others = [
        conversation_of("you", turns("be kind", "hi")),
        conversation_of("me", turns("be kind", "ho")),
        conversation_of("me", turns("be rude", "hi")),
    ]
    assert len({first, *others}) == 4
    long = "a" * 1000
    assert conversation_of("me", json.dumps({"prompt": long}).encode()) == conversation_of(
        "me", json.dumps({"prompt": long + "b"}).encode()
    )
    ids = json.dumps({"prompt": [1, 2, 3]}).encode()
    assert conversation_of("me", ids) is not None


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"messages": 3}', b'{"prompt": ""}', b"[" * 100_000, b"\xff"],
)
def test_what_is_no_conversation(body):
    assert conversation_of("me", body) is None


def test_replicas_that_go_move_their_own_conversations_alone():
    names = [f"r{i}" for i in range(5)]
    before = {str(c): ranked(str(c), names)[0] for c in range(500)}
    assert {sum(v == n for v in before.values()) > 50 for n in names} == {True}
    after = {c: ranked(c, names[1:])[0] for c in before}
    assert {c for c in before if before[c] != after[c]} == {c for c in before if before[c] == "r0"}


def test_a_busy_replica_lends_its_conversations():
    own = ranked("c", ["a", "b"])[0]
    other = "ab".replace(own, "")
    assert chosen("c", {own: LEAD - 1, other: 0}) == own
    assert chosen("c", {own: LEAD, other: 0}) == other
    assert chosen(None, {own: 1, other: 0}) == other


@pytest.mark.parametrize(("text", "want"), [("3", (3, 3)), ("1-4", (1, 4)), ("2-2", (2, 2))])
def test_bounds(text, want):
    found = Bounds.parsed(text)
    assert (found.least, found.most) == want


@pytest.mark.parametrize("text", ["", "0", "-1", "0-2", "3-2", "1-", "x", "1-2-3", "1.5", "²"])
def test_bounds_refused(text):
    with pytest.raises(ActTailError, match="--replicas takes N or MIN-MAX"):
        Bounds.parsed(text)


def test_options_that_do_not_go_together(run, roomy_folder):
    code, _, err = run("serve", roomy_folder, "--replicas", "2")
    assert (code, err) == (2, "acttail: --replicas is about --ray: give that too\n")


def test_a_client_of_a_cluster_is_no_place_for_an_endpoint():
    with pytest.raises(ActTailError, match="--ray auto"):
        check_cluster("ray://head:10001")
