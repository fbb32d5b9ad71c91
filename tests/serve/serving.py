"""A server on a real socket, for the tests beside it."""

import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from acttail.serve import Options, create_app
from acttail.serve.run import config_of, listen

TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('an assistant cannot begin') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
NAME = "tiny"
MESSAGES = [{"role": "user", "content": "x"}]


@contextmanager
def serving(engine, *, deadlines=None, connections=1024, **options):
    app = create_app(engine, Options(name=NAME, **options))
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(config_of(app, deadlines=deadlines, connections=connections))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        while not server.started:
            time.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def post(url, body, path="/v1/chat/completions", **arguments):
    return httpx.post(url + path, json=body, **arguments)


def error_of(answer):
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]
