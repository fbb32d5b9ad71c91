"""What is asked of an engine is judged in one place, and nothing of it is dropped silently."""

import warnings
from dataclasses import FrozenInstanceError

import pytest
import torch
from families import build

from acttail import make_plan
from acttail.engine import Engine, TransformersEngine
from acttail.engine.config import EngineConfig
from acttail.engine.source import convert_model
from acttail.errors import ActTailError, ActTailWarning
from acttail.sparse.backends import cpu
from acttail.sparse.policy import PrefillPolicy

native = pytest.mark.skipif(not cpu.status().available, reason="no native library")
# The native engine does not run these blocks, whatever the machine.
FOREIGN = "neox"


def test_names_and_policies_are_read_once():
    config = EngineConfig("bfloat16", "float32", "float32", prefill="first_dense=4")
    assert (config.dtype, config.head_dtype, config.kv_dtype) == ("bf16", "fp32", "fp32")
    assert config.prefill == PrefillPolicy("first_dense", 4)
    with pytest.raises(FrozenInstanceError):
        config.dtype = "int8"


@pytest.mark.parametrize(
    ("dtype", "head", "kv"),
    [(None, "int8", "bf16"), ("fp32", "fp32", "fp32"), ("bf16", "int8", "bf16"), ("int8", "int8", "bf16"),
     ("int4", "int8", "bf16")],
)  # fmt: skip
def test_what_is_not_asked_for_follows_from_the_weights(dtype, head, kv):
    config = EngineConfig(dtype)
    assert (config.head.name, config.kv(config.weights).name) == (head, kv)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "fp8"}, "unknown engine dtype 'fp8': use fp32"),
        ({"head_dtype": "int2"}, "unknown engine dtype 'int2': use fp32"),
        ({"kv_dtype": "int4"}, "unknown KV cache dtype 'int4': use fp32"),
        ({"group": 20}, "a multiple of 32 inputs, not 20"),
        ({"group": -32}, "a multiple of 32 inputs, not -32"),
        ({"threads": 0}, "at least one thread, not 0"),
        ({"prefill": "some"}, "unknown prefill policy 'some'"),
    ],
)
def test_bad_values_are_named_before_a_model_is_looked_for(wrong, message):
    with pytest.raises(ActTailError, match=message):
        Engine.from_pretrained("no/such-model", **wrong)


@pytest.fixture(scope="module")
def foreign_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    build(FOREIGN).save_pretrained(folder)
    from byte_tokens import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)
    return folder


ASKED = [
    ({"dtype": "int8"}, "dtype=int8"), ({"kv_dtype": "int8"}, "kv_dtype=int8"),
    ({"head_dtype": "int4"}, "head_dtype=int4"), ({"group": 64}, "group=64"),
    ({"dtype": "int4", "group": 32}, "dtype=int4, group=32"),
]  # fmt: skip


@pytest.mark.parametrize("choice", [None, False])
@pytest.mark.parametrize(("asked", "named"), ASKED)
def test_transformers_refuses_what_it_would_drop(foreign_folder, asked, named, choice):
    for open_ in (
        lambda: Engine.from_pretrained(foreign_folder, native=choice, **asked),
        lambda: Engine.from_model(build(FOREIGN), native=choice, **asked),
    ):
        with pytest.raises(ActTailError) as caught:
            open_()
        message = str(caught.value)
        assert message.endswith(f"leave out {named}")
        assert "transformers runs this model in " in message
        assert "\n" not in message


def test_a_loaded_model_is_not_run_in_another_dtype_than_was_asked_for():
    model = build(FOREIGN)  # float32
    with pytest.raises(ActTailError, match="in fp32 alone: leave out dtype=bf16"):
        Engine.from_model(model, dtype="bfloat16", native=False)
    engine = Engine.from_model(model, dtype="fp32", kv_dtype="fp32", native=False)
    assert engine.dtype == "float32"


def test_the_default_goes_on_with_a_warning_that_names_the_dtype(foreign_folder):
    with pytest.warns(ActTailWarning, match="transformers runs it instead, in bfloat16"):
        engine = Engine.from_pretrained(foreign_folder)
    assert isinstance(engine, TransformersEngine)
    assert engine.dtype == "bfloat16"
    with pytest.warns(ActTailWarning, match="transformers runs it instead, in float32") as caught:
        Engine.from_model(build(FOREIGN))
    assert {w.filename for w in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActTailWarning)
        Engine.from_model(build(FOREIGN), native=False)  # it was asked for


def test_a_dtype_that_transformers_has_is_run_by_it(foreign_folder):
    with pytest.warns(ActTailWarning, match="in float32"):
        engine = Engine.from_pretrained(foreign_folder, dtype="fp32", kv_dtype="float32")
    assert engine.model.dtype == torch.float32


@native
def test_an_engine_folder_refuses_what_it_does_not_hold(tiny_folder, tmp_path):
    folder = convert_model(str(tiny_folder), tmp_path / "packed", dtype="int8")
    for asked, named in (
        ({"dtype": "bf16"}, "dtype=bf16"),
        ({"head_dtype": "fp32"}, "head_dtype=fp32"),
        ({"group": 32}, "group=32"),
    ):
        message = f"packed holds int8 weights with a head in int8; .* leave out {named}$"
        with pytest.raises(ActTailError, match=message):
            Engine.from_pretrained(folder, **asked)
    engine = Engine.from_pretrained(folder, dtype="int8", head_dtype="int8", kv_dtype="fp32")
    assert engine.dtype == "int8"
    assert engine.decoder.kv_dtype == "fp32"


@native
def test_another_plan_keeps_what_was_asked_for():
    model = build("llama")
    engine = Engine.from_model(
        model, dtype="fp32", kv_dtype="int8", threads=2, prefill="decode_only", native=True
    )
    other = engine.with_plan(make_plan(model, 0.5))
    assert (other.decoder.kv_dtype, other.threads, other.policy.name) == ("int8", 2, "decode_only")
    changed = engine.with_plan(None, threads=1, kv_dtype="float32", prefill="all")
    assert (changed.decoder.kv_dtype, changed.threads, changed.policy.name) == ("fp32", 1, "all")
