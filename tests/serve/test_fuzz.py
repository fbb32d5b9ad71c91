"""Requests drawn from the server's own OpenAPI schema, and from what is near it: an answer or a 4xx, never a 5xx."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import NAME, serving

# What a field may be sent beside what its schema says.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("\ud800"), st.just(2**63),
    st.just(-1), st.just([]), st.just({}), st.lists(st.integers(-1, 300), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)  # fmt: skip


def drawn(schema, parts):
    """Values that fit a JSON schema as FastAPI writes it."""
    if "$ref" in schema:
        return drawn(parts[schema["$ref"].rsplit("/", 1)[1]], parts)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([drawn(s, parts) for s in schema["anyOf"]])
    kind = schema.get("type")
    low, high = schema.get("minimum"), schema.get("maximum")
    if kind == "integer":
        # Short answers: the model is real.
        return st.integers(
            -3 if low is None else max(low, -3), 12 if high is None else min(high, 12)
        )
    if kind == "number":
        low = schema.get("exclusiveMinimum", low)
        return st.floats(-2 if low is None else low, 2 if high is None else high)
    if kind == "array":
        return st.lists(
            drawn(schema["items"], parts), min_size=schema.get("minItems", 0), max_size=4
        )
    if kind == "object" and "properties" in schema:
        needed = set(schema.get("required", ()))
        fields = {n: drawn(s, parts) for n, s in schema["properties"].items()}
        return st.fixed_dictionaries(
            {n: s for n, s in fields.items() if n in needed},
            optional={n: s for n, s in fields.items() if n not in needed},
        )
    simple = {"boolean": st.booleans(), "null": st.none(), "string": st.text(max_size=12)}
    return simple.get(kind, st.dictionaries(st.text(max_size=4), st.integers(0, 9), max_size=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
)
def test_no_request_is_an_internal_error(engine, path):
    with (
        serving(engine, max_tokens=8, prompt_seconds=5) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        described = client.get("/openapi.json").json()
        parts = described["components"]["schemas"]
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]
        names = list(parts[body["$ref"].rsplit("/", 1)[1]]["properties"])
        statuses = []

        @settings(
            max_examples=150, deadline=None, derandomize=True, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(
            drawn(body, parts),
            st.dictionaries(st.sampled_from(names), ODD, max_size=1),
            st.binary(max_size=3),
        )
        def ask(base, odd, cut):
            fields = base | ({"model": NAME} if "model" in names else {}) | odd
            # What is ours is chosen by the test of sparsity; variants are slow to make.
            fields.pop("sparsity", None)
            content = json.dumps(fields).encode()
            if cut[:1] == b"\x00":
                content = content[: len(content) // 2] + cut
            answer = client.post(
                path, content=content, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code < 500, (content, answer.text)
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                inner = fields.get("chat_template_kwargs")
                known = {*names, *fields, *(inner if isinstance(inner, dict) else ())}
                assert error["param"] is None or error["param"].split(".")[0] in known, error

        ask()
        assert 200 in statuses
        assert 400 in statuses
        health = client.get("/health").json()
        assert health["running"] + health["waiting"] == 0
