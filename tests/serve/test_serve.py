"""The server, through the clients people use, on a real engine and a real socket."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from browser import needs_browser, page_of
from serving import MESSAGES, NAME, error_of, post, serving

import acttail
from acttail.allocate.replan import replan
from acttail.calibrate.curves import SensitivityCurves
from acttail.engine import Sampling
from acttail.engine.variants import Variants
from acttail.errors import BudgetError, PlanError
from acttail.serve.run import listen
from acttail.serve.scheduler import Job, Scheduler


def ask(client, **fields):
    fields = {"max_tokens": 20, "temperature": 0} | fields
    messages = [{"role": "user", "content": "The fox"}]
    return client.chat.completions.create(model=NAME, messages=messages, **fields)


def test_chat_is_what_the_engine_says(client, engine):
    expected = engine.generate("The fox", chat=True, max_new_tokens=20)
    answer = ask(client)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == expected.prompt_tokens + 20
    told = answer.model_extra["acttail"]
    assert told["engine"] == "native"
    assert told["sparsity"] == 0.5
    assert told["realised_sparsity"] == pytest.approx(engine.plan.realised_sparsity, abs=1e-3)


def test_stream_adds_up_to_the_whole(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_stop_strings_seeds_and_choices(client):
    text = ask(client).choices[0].message.content
    cut = ask(client, stop=[text[5:8]])
    assert cut.choices[0].message.content == text[: text.index(text[5:8])]
    assert cut.choices[0].finish_reason == "stop"
    hot = {"temperature": 1.5, "seed": 3}
    a, b = ask(client, **hot), ask(client, **hot)
    assert a.choices[0].message.content == b.choices[0].message.content
    several = ask(client, n=3, **hot)
    contents = [c.message.content for c in several.choices]
    assert contents[0] == a.choices[0].message.content
    assert len(set(contents)) == 3
    assert [c.index for c in several.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, stream=True, **hot):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == contents
    assert several.usage.prompt_tokens == a.usage.prompt_tokens
    assert several.usage.completion_tokens == 60
    drawn = {ask(client, temperature=1.5, seed=-1).choices[0].message.content for _ in range(3)}
    assert len(drawn) > 1
    choices = ask(client, temperature=1.5, seed=-1, n=3).choices
    assert (
        choices[1].message.content
        != ask(client, temperature=1.5, seed=0).choices[0].message.content
    )
    two = client.completions.create(model=NAME, prompt=["ab", "ab"], n=2, max_tokens=3)
    assert (
        two.usage.prompt_tokens
        == 2 * client.completions.create(model=NAME, prompt="ab", max_tokens=1).usage.prompt_tokens
    )


def test_penalties_and_bias_change_the_answer(client, engine):
    plain = ask(client).choices[0].message.content
    assert ask(client, frequency_penalty=2.0).choices[0].message.content != plain
    forced = ask(client, logit_bias={"65": 100})
    assert forced.choices[0].message.content == engine.tokenizer.decode([65] * 20)


def test_log_probabilities(client, engine):
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        # Greedy: the token is the likeliest of the three, and all are what the model gives.
        assert token.logprob == token.top_logprobs[0].logprob
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
    ids = engine.encode_chat([{"role": "user", "content": "The fox"}])
    logits = engine.new_sequence(512).feed(ids)
    assert content[0].logprob == pytest.approx(float(logits.log_softmax(0).max()), abs=1e-4)
    streamed = list(ask(client, logprobs=True, max_tokens=5, stream=True))
    values = [
        t.logprob
        for c in streamed
        if c.choices and c.choices[0].logprobs
        for t in c.choices[0].logprobs.content
    ]
    assert values == [t.logprob for t in content]


def test_completions(client, engine):
    def complete(prompt, **fields):
        return client.completions.create(
            model=NAME, prompt=prompt, temperature=0, **({"max_tokens": 8} | fields)
        )

    one = complete("The fox").choices[0].text
    assert one == engine.generate("The fox", max_new_tokens=8).text
    ids = engine.encode("The fox").tolist()
    assert complete(ids).choices[0].text == one
    both = complete(["The fox", "A dog"], echo=True)
    assert [c.index for c in both.choices] == [0, 1]
    assert both.choices[0].text == "The fox" + one
    assert both.choices[1].text.startswith("A dog")
    scored = complete("The fox", logprobs=2).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == 8
    assert all(len(t) == 2 for t in scored.top_logprobs)
    assert scored.text_offset[:2] == [0, len(scored.tokens[0])]
    text = "".join(c.choices[0].text for c in complete("The fox", stream=True))
    assert text == one
    assert complete("The fox", max_tokens=None).usage.completion_tokens == 16


def test_models_health_metrics_and_pages(client, url):
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "acttail"
    ask(client)
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 0, "running": 0}
    metrics = httpx.get(f"{url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    assert float(values["acttail_generated_tokens_total"]) >= 20
    assert float(values["acttail_tokens_per_second"]) > 0
    assert 0.4 < float(values["acttail_realised_sparsity"]) < 0.6
    assert float(values["acttail_first_token_seconds_count"]) >= 1
    page = httpx.get(url)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/", "/chat.js", "/chat.css"):
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert "http" not in answer.text.replace("http-equiv", ""), (
            "the page loads nothing from elsewhere"
        )
    about = httpx.get(f"{url}/about").json()
    assert about["adjustable"]
    assert about["model"] == NAME


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"model": "other"}, 404, "not served here"),
        ({"temperature": 3}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "assistant cannot begin"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format"),
        ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
        ({"top_logprobs": 3}, 400, "needs logprobs"),
        ({"stream_options": {}}, 400, "stream"),
        ({"logit_bias": {"99999": 1}}, 400, "99999"),
        ({"messages": [{"role": "user", "content": "y" * 8000}]}, 400, "context"),
        ({"sparsity": 1.5}, 400, "sparsity"),
    ],
)
def test_bad_requests_name_the_field(url, fields, status, says):
    answer = post(url, {"model": NAME, "messages": MESSAGES, "max_tokens": 5} | fields)
    assert answer.status_code == status
    assert says in error_of(answer)["message"]


def test_what_is_refused_before_it_is_parsed(url):
    body = {"model": NAME, "messages": [{"role": "user", "content": "y" * 30_000}]}
    assert post(url, body).status_code == 413
    chunked = httpx.post(
        f"{url}/v1/chat/completions",
        content=(b"x" * 4096 for _ in range(10)),
        headers={"Content-Type": "application/json"},
    )
    assert chunked.status_code == 413
    error_of(chunked)
    plain = httpx.post(
        f"{url}/v1/completions", content="{}", headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 415
    broken = httpx.post(
        f"{url}/v1/completions", content="{", headers={"Content-Type": "application/json"}
    )
    assert broken.status_code == 400
    error_of(broken)
    for path in ("/nothing", "/../../etc/passwd", "/chat.js/../../etc/passwd", "/docs"):
        answer = httpx.get(url + path)
        assert answer.status_code == 404
        error_of(answer)
    assert httpx.get(f"{url}/v1/completions").status_code == 405


def test_key_and_host(engine):
    with serving(engine, api_keys=("secret",), hosts=("127.0.0.1",)) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        body = {"model": NAME, "messages": MESSAGES, "max_tokens": 2}
        assert post(url, body).status_code == 401
        assert post(url, body, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert post(url, body, headers={"Authorization": "Bearer secret"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 421


def test_queue_limits(engine):
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 1000, "temperature": 0}
    with serving(engine, slots=1, queue=1) as url, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(url, body, timeout=60), range(8)))
        codes = sorted(a.status_code for a in answers)
        assert set(codes) == {200, 503}
        full = next(a for a in answers if a.status_code == 503)
        assert error_of(full)["code"] == "overloaded"
        assert int(full.headers["retry-after"]) > 0
        assert (
            len({a.text.split('"message"')[1][:200] for a in answers if a.status_code == 200}) == 1
        )
    with serving(engine, slots=1, per_client=2) as url, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(url, body, timeout=60), range(8)))
        assert {a.status_code for a in answers} == {200, 429}
    with serving(engine, slots=1, wait_seconds=0.05) as url, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post(url, body, timeout=60), range(4)))
        late = [a for a in answers if a.status_code == 503]
        assert late
        assert "slot" in error_of(late[0])["message"]
    with serving(engine, run_seconds=0.05) as url:
        cut = post(url, body).json()
        assert cut["choices"][0]["finish_reason"] == "length"
        assert 0 < cut["usage"]["completion_tokens"] < 1000


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(engine, stream):
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 1800, "stream": stream}
    with serving(engine, slots=1) as url:
        before = time.monotonic()
        if stream:
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=body | {"n": 16}
            ) as answer:
                for _, _line in zip(range(20), answer.iter_lines(), strict=False):
                    pass
        else:
            with pytest.raises(httpx.ReadTimeout):
                post(url, body | {"n": 16}, timeout=0.2)
        while httpx.get(f"{url}/health").json() != {"status": "ok", "waiting": 0, "running": 0}:
            assert time.monotonic() - before < 30
            time.sleep(0.05)
        metrics = httpx.get(f"{url}/metrics").text
        made = next(
            x for x in metrics.splitlines() if x.startswith("acttail_generated_tokens_total")
        )
        assert float(made.split()[1]) < 1800 * 16


def test_turns_go_round_the_clients(engine):
    order, ended, all_asked = [], threading.Event(), threading.Event()
    scheduler = Scheduler(slots=1)

    def job(client):
        def emit(event):
            all_asked.wait(60)  # the first answer ends after the second client has come
            if isinstance(event, str):
                order.append(client)
                if len(order) == 7:
                    ended.set()

        return Job(
            engine=engine, prompt=torch.arange(3, 20), emit=emit, client=client, max_new_tokens=30
        )

    assert scheduler.submit([job("many") for _ in range(6)])
    assert scheduler.submit([job("one")])
    all_asked.set()
    assert ended.wait(60)
    scheduler.stop()
    # One was running and may be followed by another before the second client's turn comes.
    assert order.index("one") <= 2


def test_a_job_that_is_cancelled_ends_between_two_steps(engine):
    events, ended = [], threading.Event()

    def emit(event):
        events.append(event)
        if len(events) == 3:
            job.cancel()
        if isinstance(event, str):
            ended.set()

    scheduler = Scheduler(slots=1)
    job = Job(engine=engine, prompt=torch.arange(3, 20), emit=emit, max_new_tokens=500)
    assert scheduler.submit([job])
    assert ended.wait(60)
    scheduler.stop()
    assert job.result.finish == "cancelled"
    assert len(job.result.tokens) == 3
    assert events[-1] == "done"


def test_sparsity_of_a_request(client, url, engine, plan):
    sparser = replan(plan, 0.7)
    assert sparser.realised_sparsity == pytest.approx(0.7, abs=0.02)
    expected = engine.with_plan(sparser).generate("The fox", chat=True, max_new_tokens=20).text
    answer = ask(client, extra_body={"sparsity": 0.7})
    assert answer.choices[0].message.content == expected
    assert answer.model_extra["acttail"]["sparsity"] == 0.7
    dense = ask(client, extra_body={"sparsity": 0})
    assert (
        dense.choices[0].message.content
        == engine.with_plan(None).generate("The fox", chat=True, max_new_tokens=20).text
    )


def test_a_conversation_goes_on_from_its_cache(engine):
    messages = [{"role": "user", "content": "The quick brown fox jumps"}]
    with serving(engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def say():
            return client.chat.completions.create(
                model=NAME, messages=messages, max_tokens=30, temperature=0
            )

        first = say()
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        again = say()
        assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
        assert again.choices[0].message.content == first.choices[0].message.content
        messages.append({"role": "assistant", "content": first.choices[0].message.content})
        messages.append({"role": "user", "content": "And then?"})
        second = say()
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
        expected = engine.generate(engine.encode_chat(messages), max_new_tokens=30)
        assert second.choices[0].message.content == expected.text
        other = client.completions.create(model=NAME, prompt="zzz", max_tokens=3)
        assert other.usage.prompt_tokens_details.cached_tokens == 0
    with serving(engine, keep_prefixes=False) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for _ in range(2):
            assert ask(client).usage.prompt_tokens_details.cached_tokens == 0


def test_replanning_equals_planning(roomy_folder, plan):
    for allocator in ("acttail", "uniform", "depth"):
        made = acttail.make_plan(str(roomy_folder), 0.5, allocator=allocator)
        again = acttail.make_plan(str(roomy_folder), 0.65, allocator=allocator)
        found = replan(made, 0.65)
        assert {n: e.k for n, e in found.projections.items()} == {
            n: e.k for n, e in again.projections.items()
        }
    from dataclasses import replace

    with pytest.raises(PlanError, match="thresholds were calibrated"):
        replan(replace(plan, rule="threshold"), 0.6)
    with pytest.raises(PlanError, match="--curves"):
        replan(replace(plan, allocator="sensitivity", arguments={}), 0.6)


def curves_of_a(plan):
    grid = np.array([0.0, 0.5, 0.9, 0.99])
    values = {n: (1 + i % 3) * grid**2 for i, n in enumerate(plan.projections)}
    return SensitivityCurves(grid, values, {"loss": "fisher"})


def test_a_variant_solved_by_curves_says_so(engine, plan):
    curves = curves_of_a(plan)
    found = Variants(engine, curves)
    assert found.fixed is None
    assert found.at(None).plan.allocator == "acttail"
    sparser = found.at(0.7).plan
    assert (sparser.allocator, sparser.arguments["loss"]) == ("sensitivity", "fisher")
    assert all(e.alpha is None for e in sparser.projections.values())
    # Without curves the plan's own allocator solves it.
    assert Variants(engine).at(0.7).plan == replan(plan, 0.7)
    other = SensitivityCurves(curves.grid, {"elsewhere": curves.grid}, curves.about)
    assert "another model" in Variants(engine, other).fixed


def test_curves_are_enough_for_a_model_started_dense(engine, plan):
    dense = engine.with_plan(None)
    assert Variants(dense).fixed == "the model was started without a plan"
    found = Variants(dense, curves_of_a(plan))
    assert (found.fixed, found.default, found.at(None)) == (None, 0.0, dense)
    sparser = found.at(0.6).plan
    assert sparser.allocator == "sensitivity"
    assert sparser.solved_sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_plan_of_narrow_reach_can_still_be_changed(roomy_folder, engine):
    """Whether a sparsity can be changed is asked at one the plan can have."""
    made = acttail.make_plan(str(roomy_folder), 0.3, allocator="ffn-only", rule="topk")
    found = Variants(engine.with_plan(made))
    assert found.fixed is None
    assert found.at(0.2).plan.sparsity == 0.2
    with pytest.raises(BudgetError, match="at most"):
        found.at(0.95)


def test_sampling_without_seed_differs(engine):
    texts = {
        engine.generate("x", max_new_tokens=20, sampling=Sampling(temperature=2.0)).text
        for _ in range(3)
    }
    assert len(texts) > 1


def test_command_line_serves_and_ends_gracefully(roomy_folder, tmp_path, plan):
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "acttail", "serve", str(roomy_folder), "--plan", str(tmp_path / "plan.json"),
               "--port", "0", "--threads", "1"]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        url = next(x.split()[-1] for x in lines if x.startswith("API"))
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        (model,) = client.models.list()
        assert model.id == roomy_folder.name
        answer = client.completions.create(model=model.id, prompt="The fox", max_tokens=4)
        assert answer.usage.completion_tokens <= 4
        # llm, the command-line client of Datasette's author, through its own configuration.
        (tmp_path / "extra-openai-models.yaml").write_text(
            f"- model_id: here\n  model_name: {model.id}\n  api_base: {url}\n  completion: true\n"
        )
        said = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "here", "-o", "max_tokens", "4", "The fox"],
            capture_output=True, text=True, check=False,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none", "LLM_LOAD_PLUGINS": ""},
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def test_a_taken_port_is_one_line(tiny_folder):
    with listen("127.0.0.1", 0) as bound:
        port = str(bound.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "acttail", "serve", str(tiny_folder), "--port", port],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert port in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_openapi_describes_the_routes(url):
    described = httpx.get(f"{url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(
        described["paths"]
    )
    json.dumps(described)


@needs_browser
def test_chat_page_in_a_browser(url, engine):
    with page_of(url, width=390, scheme="dark") as (page, said):
        page.locator("#about", has_text="native engine").wait_for()
        assert page.locator("#sparsity").is_enabled()
        page.locator("#sparsity").fill("0.7")
        assert page.locator("#sparsity-value").inner_text() == "0.70"
        page.locator("#temperature").fill("0")
        page.locator("#prompt").fill("The fox")
        page.keyboard.press("Enter")
        page.locator("li.assistant small", has_text="tokens/s, sparsity 0.70").wait_for()
        expected = engine.with_plan(replan(engine.plan, 0.7)).generate(
            "The fox", chat=True, max_new_tokens=200
        )
        shown = page.locator("li.assistant span").inner_text()
        assert shown.replace("\n", "").strip()[:40] == expected.text.replace("\n", "").strip()[:40]
        # A second turn sends the first along; escape stops it.
        page.locator("#prompt").fill("And then?")
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        page.locator("#send:enabled").wait_for()
        assert page.locator("li.user").count() == 2
        page.locator("#clear").click()
        assert page.locator("#log li").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert said == []


@needs_browser
def test_chat_page_asks_for_the_key_and_shows_errors(engine):
    with serving(engine, api_keys=("secret",)) as url, page_of(url) as (page, _):
        page.locator("#about", has_text="native engine").wait_for()
        page.locator("#prompt").fill("The fox")
        page.locator("#send").click()
        page.locator("li.error", has_text="API key").wait_for()
        assert page.locator("#prompt").input_value() == "The fox", "what was written is not lost"
        page.locator("#key").fill("secret")
        page.locator("#send").click()
        page.locator("li.assistant small").wait_for()
