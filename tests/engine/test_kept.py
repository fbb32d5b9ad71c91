"""Converted models that are kept: the second start reads them, and gives the same answers."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gguf_files import blocky, write_gguf

import acttail
from acttail.allocate import make_plan
from acttail.engine import Engine, kept
from acttail.engine.config import EngineConfig
from acttail.engine.light_tokenizer import FILE, LightTokenizer, read_light, write_light
from acttail.errors import ActTailError, ActTailWarning, PlanError
from acttail.model.names import resolve


@pytest.fixture
def model_file(tmp_path, tokenizer):
    return write_model(tmp_path / "tiny.gguf", tokenizer)


def write_model(path, tokenizer, seed=0):
    write_gguf(path, blocky(seed), "Q8_0", tokenizer)
    return path


def logits(engine):
    return engine.new_sequence(16).feed(torch.arange(3, 9))


def only_kept(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was converted again")

    monkeypatch.setattr("acttail.engine.open.open_for_engine", refuse)


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_the_second_start_reads_what_was_kept(model_file, tiny_folder, monkeypatch, form):
    name = model_file if form == "gguf" else tiny_folder
    first = Engine.from_pretrained(name, native=True)
    assert [e.model for e in kept.entries()] == [first.source]
    only_kept(monkeypatch)
    second = Engine.from_pretrained(name, native=True)
    assert torch.equal(logits(first), logits(second))
    assert (second.source, second.eos, second.dtype) == (first.source, first.eos, first.dtype)
    assert isinstance(second.tokenizer, LightTokenizer)
    text = "ab, a b! é"
    assert second.encode(text).tolist() == first.encode(text).tolist()
    assert (
        first.generate("ab", max_new_tokens=6).text == second.generate("ab", max_new_tokens=6).text
    )


def test_one_copy_serves_every_plan(model_file, monkeypatch):
    """And a start without a plan is dense, whatever the first one had."""
    plans = [make_plan(str(model_file), s, allocator="acttail") for s in (0.3, 0.6)]
    first = Engine.from_pretrained(model_file, plans[0], native=True)
    expected = [logits(first.with_plan(p)) for p in (None, *plans)]
    only_kept(monkeypatch)
    for plan, wanted in zip((None, *plans), expected, strict=True):
        engine = Engine.from_pretrained(model_file, plan, native=True)
        assert engine.plan == plan
        assert torch.equal(logits(engine), wanted)
    assert len(kept.entries()) == 1


def test_a_sparse_head_lies_another_way(model_file):
    plan = make_plan(str(model_file), 0.5, allocator="uniform", head=True)
    sparse = Engine.from_pretrained(model_file, plan, native=True)
    dense = Engine.from_pretrained(model_file, native=True)
    assert (sparse.plan, dense.plan) == (plan, None)
    assert len(kept.entries()) == 2
    again = Engine.from_pretrained(model_file, plan, native=True)
    assert torch.equal(logits(sparse), logits(again))


def test_the_plan_of_a_checkpoint_is_kept_with_it(tiny_folder, tmp_path):
    """Though the first start asked for another."""
    own, other = (make_plan(str(tiny_folder), s, allocator="uniform") for s in (0.3, 0.7))
    model, tokenizer = acttail.load(tiny_folder)
    acttail.sparsify_(model, own)
    model.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    for asked in (other, None, other, None):
        assert Engine.from_pretrained(tmp_path / "sparse", asked, native=True).plan == (
            asked or own
        )
    assert len(kept.entries()) == 1


@pytest.mark.parametrize("first", ["dense", "planned"])
def test_a_plan_of_another_model_is_refused_by_what_is_kept(
    model_file, tmp_path, tokenizer, monkeypatch, first
):
    other = make_plan(
        str(write_model(tmp_path / "other.gguf", tokenizer, seed=9)), 0.5, allocator="uniform"
    )
    own = make_plan(str(model_file), 0.5, allocator="uniform")
    whole = Engine.from_pretrained(
        model_file, own if first == "planned" else None, native=True, dtype="int4"
    )
    foreign = replace(other, model=own.model)
    for _ in range(2):
        with pytest.raises(PlanError, match=r"not for tiny\.gguf: the weights of .* differ"):
            Engine.from_pretrained(model_file, foreign, native=True, dtype="int4")
    only_kept(monkeypatch)
    again = Engine.from_pretrained(model_file, own, native=True, dtype="int4")
    if first == "planned":
        assert torch.equal(logits(whole), logits(again))


def test_another_request_is_another_entry(model_file):
    source = resolve(model_file)
    asked = [
        EngineConfig(), EngineConfig("int8"), EngineConfig(head_dtype="bf16"), EngineConfig("int8", group=64),
    ]  # fmt: skip
    places = [kept.place_of(source, config, None) for config in asked]
    assert len(set(places)) == len(asked)
    # What changes no weight changes no entry.
    assert (
        kept.place_of(source, EngineConfig("auto", kv_dtype="int8", threads=1), None) == places[0]
    )


def test_a_changed_file_is_another_entry(model_file, tokenizer):
    before = kept.place_of(resolve(model_file), EngineConfig(), None)
    about = model_file.stat()
    write_model(model_file, tokenizer, seed=1)
    os.utime(model_file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert model_file.stat().st_size == about.st_size
    assert kept.place_of(resolve(model_file), EngineConfig(), None) != before


def test_a_damaged_entry_is_made_again(model_file):
    first = logits(Engine.from_pretrained(model_file, native=True))
    entry = kept.entries()[0]
    weights = entry.folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert torch.equal(first, logits(Engine.from_pretrained(model_file, native=True)))
    assert kept.entries()[0].bytes == entry.bytes


def test_the_longest_unused_goes_first(tmp_path, tokenizer, monkeypatch):
    files = [write_model(tmp_path / f"m{i}.gguf", tokenizer, i) for i in range(3)]
    for at, file in enumerate(files[:2]):
        Engine.from_pretrained(file, native=True)
        os.utime(kept.place_of(resolve(file), EngineConfig(), None), (at, at))
    Engine.from_pretrained(files[0], native=True)  # used again: now the second is the oldest
    monkeypatch.setenv(kept.LIMIT, str(int(2.5 * kept.entries()[0].bytes)))
    Engine.from_pretrained(files[2], native=True)
    assert {e.model for e in kept.entries()} == {"m0.gguf", "m2.gguf"}


def test_nothing_is_kept_under_a_limit_of_nothing(model_file, monkeypatch):
    monkeypatch.setenv(kept.LIMIT, "0")
    Engine.from_pretrained(model_file, native=True)
    assert kept.entries() == []


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5e8), ("1.5 GiB", 1.5e9), ("20g", 2e10), ("7", 7)]
)
def test_a_limit_is_a_size(monkeypatch, text, size):
    monkeypatch.setenv(kept.LIMIT, text)
    assert kept.limit() == size


def test_a_limit_that_is_no_size_is_named(model_file, monkeypatch):
    monkeypatch.setenv(kept.LIMIT, "much")
    with pytest.raises(ActTailError, match=r"ACTTAIL_CACHE_LIMIT is a size such as .* not 'much'"):
        Engine.from_pretrained(model_file, native=True)


def test_a_cache_that_cannot_be_written_is_said_and_no_failure(model_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACTTAIL_CACHE", str(tmp_path / "file"))
    with pytest.warns(ActTailWarning, match=re.escape("the converted weights are not kept in")):
        engine = Engine.from_pretrained(model_file, native=True)
    assert logits(engine).isfinite().all()


def test_without_a_home_nothing_is_kept(model_file, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ACTTAIL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert kept.place_of(resolve(model_file), EngineConfig(), None) is None
    assert kept.entries() == []


def test_two_at_once_keep_one(model_file, tmp_path):
    first = Engine.from_pretrained(model_file, native=True)
    place = kept.entries()[0].folder
    before = sorted(f.name for f in place.iterdir())
    kept.keep(place, first.packed, first.tokenizer, first.eos)  # as the slower of two does
    assert sorted(f.name for f in place.iterdir()) == before
    assert [f.name for f in place.parent.iterdir()] == [place.name]


def test_entries_go_by_name(tmp_path, tokenizer):
    for i in range(2):
        Engine.from_pretrained(write_model(tmp_path / f"m{i}.gguf", tokenizer, i), native=True)
    with pytest.raises(ActTailError, match=re.escape("nothing is kept of m7.gguf")):
        kept.clear(["m0.gguf", "m7.gguf"])
    assert len(kept.entries()) == 2
    assert [e.model for e in kept.clear(["m0.gguf"])] == ["m0.gguf"]
    assert [e.model for e in kept.clear()] == ["m1.gguf"]
    assert kept.entries() == []


def test_the_second_start_imports_no_transformers(model_file):
    Engine.from_pretrained(model_file, native=True)
    script = (
        "import sys; from acttail.engine import Engine\n"
        "e = Engine.from_pretrained(sys.argv[1], native=True); e.generate('ab', max_new_tokens=2)\n"
        "print('transformers' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(model_file)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def chatty(tokenizer, template):
    import copy

    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] | tojson }}\n  {% if m.role == 'system' %}!{% endif %}\n"
    "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<s>a{% endif %}"
)


def test_chats_are_those_of_transformers(tmp_path, tokenizer):
    whole = chatty(tokenizer, TEMPLATE)
    whole.save_pretrained(tmp_path)
    assert write_light(tmp_path, whole)
    light = read_light(tmp_path)
    messages = [
        {"role": "system", "content": " b\u00e9 "},
        {"role": "user", "content": "<x> & 'y'"},
    ]
    named = {"add_generation_prompt": True, "return_dict": True}
    expected = whole.apply_chat_template(messages, **named)["input_ids"]
    assert light.apply_chat_template(messages, **named)["input_ids"] == expected
    # Not what an engine asks, so transformers' own answers.
    assert light.convert_ids_to_tokens(5) == whole.convert_ids_to_tokens(5)
    assert light.apply_chat_template(messages, tokenize=False) == whole.apply_chat_template(
        messages, tokenize=False
    )


def test_what_transformers_does_another_way_is_left_to_it(tmp_path, tokenizer):
    whole = chatty(tokenizer, None)
    whole.clean_up_tokenization_spaces = True
    whole.save_pretrained(tmp_path)
    assert not write_light(tmp_path, whole)
    assert not (tmp_path / FILE).exists()
    assert read_light(tmp_path) is None
