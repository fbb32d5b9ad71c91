"""What a command needs of a model it reads once: header, config, tokenizer, every matrix."""

import contextlib
from collections import Counter

import gguf
import pytest
import torch
import transformers
from families import build
from gguf_files import blocky, write_gguf
from typer.testing import CliRunner

from acttail.allocate import make_plan
from acttail.cli import app
from acttail.engine import Engine
from acttail.errors import ModelError, PlanError
from acttail.model import gguf_file
from acttail.model.gguf import GgufWeights
from acttail.model.load import load
from acttail.model.opened import Opened, as_weights, open_model
from acttail.model.shards import SafetensorsWeights
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan


@pytest.fixture
def reads(monkeypatch):
    """Counts what is really read, while it is read: name -> times."""
    counted = Counter()

    def count(owner, name, label):
        real = getattr(owner, name)

        def counting(*args, **named):
            counted[label(args) if callable(label) else label] += 1
            return real(*args, **named)

        monkeypatch.setattr(owner, name, counting)

    count(transformers.AutoConfig, "from_pretrained", "config")
    count(transformers.AutoTokenizer, "from_pretrained", "tokenizer")
    count(transformers.AutoModelForCausalLM, "from_config", "skeleton")
    count(gguf_file, "read_header", "header")
    count(gguf.GGUFReader, "__init__", "gguf's reader")
    for kind in (SafetensorsWeights, GgufWeights):
        count(kind, "weight", lambda args: args[1].name)
    count(GgufWeights, "stored", lambda args: args[1].name)
    gguf_file._open_gguf.cache_clear()
    gguf_file._content_hash.cache_clear()
    return counted


@pytest.fixture(params=["folder", "gguf"])
def place(request, tmp_path, tokenizer):
    """A tiny llama as a folder of safetensors or as one GGUF file."""
    if request.param == "gguf":
        write_gguf(tmp_path / "tiny.gguf", blocky(), "Q4_0", tokenizer)
        return tmp_path / "tiny.gguf"
    blocky().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def matrices(place):
    return [p.name for p in as_weights(place).projections]


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def assert_read_once(reads, place, matrices, *, config=True):
    """Each once: a config not at all where a GGUF's header says it."""
    is_gguf = place.suffix == ".gguf"
    assert {name: reads[name] for name in matrices} == dict.fromkeys(matrices, 1)
    assert reads["config"] == int(config or not is_gguf)
    assert reads["header"] == int(is_gguf)
    assert reads["gguf's reader"] == 0
    assert gguf_file._content_hash.cache_info().misses <= int(is_gguf)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_generate_under_a_plan(place, dtype, reads, tmp_path):
    names = matrices(place)
    make_plan(place, 0.5, allocator="uniform").save(tmp_path / "plan.json")
    gguf_file._open_gguf.cache_clear()
    gguf_file._content_hash.cache_clear()
    reads.clear()
    run(
        "generate", place, "--prompt", "abc", "--plan", tmp_path / "plan.json", "--engine", "native",
        "--dtype", dtype, "--max-new-tokens", 2,
    )  # fmt: skip
    assert_read_once(reads, place, names, config=False)
    of_transformers = int(place.suffix != ".gguf")
    assert reads["tokenizer"] == of_transformers
    assert reads["skeleton"] == of_transformers


@pytest.mark.parametrize("command", [
    ("plan", "--sparsity", "0.5"), ("plan", "--sparsity", "0.5", "--set", "estimator=ks"),
    ("analyze",), ("analyze", "--estimator", "farms"),
])  # fmt: skip
def test_planning_and_analysing(place, command, reads):
    names = matrices(place)
    gguf_file._open_gguf.cache_clear()
    gguf_file._content_hash.cache_clear()
    reads.clear()
    run(command[0], place, *command[1:])
    assert_read_once(reads, place, names, config=False)
    assert reads["tokenizer"] == 0


def test_converting(place, reads, tmp_path):
    names = matrices(place)
    plan = make_plan(place, 0.5, allocator="uniform")
    plan.save(tmp_path / "plan.json")
    gguf_file._open_gguf.cache_clear()
    gguf_file._content_hash.cache_clear()
    reads.clear()
    run("convert", place, "--plan", tmp_path / "plan.json", "-o", tmp_path / "packed")
    # The folder that is written holds a config of transformers, too.
    assert_read_once(reads, place, names)
    assert reads["tokenizer"] == int(place.suffix != ".gguf")


def test_another_models_plan_is_refused_before_a_matrix_is_read(place, reads, tmp_path):
    other = blocky(seed=1)
    plan = make_plan(other, 0.5, allocator="uniform")
    names = matrices(place)
    reads.clear()
    with pytest.raises(PlanError, match=r"the weights of model\.layers\.0.* differ"):
        Engine.from_pretrained(place, plan, native=True)
    assert not [name for name in names if reads[name]]


def test_what_the_native_engine_refuses_is_handed_on(reads, tmp_path, tokenizer):
    """transformers takes what was opened: no second config, no second tokenizer."""
    build("neox").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    reads.clear()
    with pytest.warns(match="transformers runs it instead"):
        engine = Engine.from_pretrained(tmp_path / "m")
    assert engine.name == "transformers"
    assert (reads["config"], reads["tokenizer"]) == (1, 1)


def test_opened_is_taken_wherever_a_name_is(place):
    from acttail.engine.source import convert_model
    from acttail.spectrum.analysis import analyze

    opened = open_model(place)
    assert open_model(opened) is opened
    assert as_weights(opened) is opened.weights
    plan = make_plan(opened, 0.5)
    assert plan == make_plan(place, 0.5)
    assert [f.fit for f in analyze(opened)] == [f.fit for f in analyze(place)]
    model, tokenizer = load(opened, dtype="float32")
    assert tokenizer("abc").input_ids == opened.tokenizer("abc").input_ids
    for p in LoadedWeights(model).projections:
        torch.testing.assert_close(LoadedWeights(model).weight(p), opened.weights.weight(p))
    assert Engine.from_pretrained(opened, plan, native=True).plan == plan
    assert convert_model(opened, place.parent / "packed", dtype="fp32").is_dir()


def test_workers_find_what_is_opened(place):
    from acttail.spectrum.analysis import analyze

    alone = analyze(place, cache=False)
    assert analyze(open_model(place), jobs=2, cache=False) == alone


def test_the_plan_a_checkpoint_carries(tmp_path, tokenizer):
    from acttail.sparse.apply import sparsify_

    model = blocky()
    plan = make_plan(model, 0.5)
    sparsify_(model, plan).save_pretrained(tmp_path / "sparse")
    carried = open_model(tmp_path / "sparse").quantization
    assert SparsityPlan.from_dict(carried["plan"]) == plan
    blocky().save_pretrained(tmp_path / "dense")
    assert open_model(tmp_path / "dense").quantization == {}


def test_a_gguf_is_hashed_and_parsed_again_when_it_changes(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, blocky())
    first, digest = gguf_file.open_gguf(path), gguf_file.content_hash(path)
    assert gguf_file.open_gguf(path) is first
    write_gguf(path, blocky(seed=1), "F16")
    assert gguf_file.open_gguf(path) is not first
    assert gguf_file.content_hash(path) != digest


def test_loading_a_gguf_tells_how_far_it_is_and_draws_nothing(tmp_path, tokenizer, capfd):
    """The bars of transformers and tqdm belong to them; ours gets their steps."""
    write_gguf(tmp_path / "tiny.gguf", blocky(), "Q8_0", tokenizer)
    steps = []
    model, _ = load(tmp_path / "tiny.gguf", progress=lambda *step: steps.append(step))
    assert capfd.readouterr() == ("", "")
    tensors = len(list(gguf.GGUFReader(str(tmp_path / "tiny.gguf")).tensors))
    assert steps[:tensors] == [(i + 1, tensors) for i in range(tensors)]
    assert all(0 < done <= total for done, total in steps)
    steps.clear()
    load(tmp_path / "tiny.gguf")
    assert (steps, capfd.readouterr()) == ([], ("", ""))
    assert model.acttail_source.gguf == tmp_path / "tiny.gguf"


def test_what_was_lent_to_transformers_is_given_back(tmp_path):
    from transformers import modeling_gguf_pytorch_utils as theirs
    from transformers.utils import logging

    from acttail.model.hf import reading

    write_gguf(tmp_path / "tiny.gguf", blocky())
    before = gguf.GGUFReader, theirs.tqdm, logging.is_progress_bar_enabled()
    with contextlib.suppress(KeyError), reading(tmp_path / "tiny.gguf", lambda *_: None):
        assert gguf.GGUFReader is not before[0]
        raise KeyError
    assert (gguf.GGUFReader, theirs.tqdm, logging.is_progress_bar_enabled()) == before


def test_an_architecture_that_no_gguf_is_read_of_is_named_with_what_would_work(tmp_path, tokenizer):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, blocky(), tokenizer=tokenizer)
    path.write_bytes(path.read_bytes().replace(b"llama", b"zorba"))
    says = r"tiny\.gguf holds the architecture zorba, which is not read from GGUF \(read are .*qwen2.*\); take the model's safe"
    with pytest.raises(ModelError, match=says) as error:
        open_model(path).config  # noqa: B018
    assert "fetch it again" not in str(error.value)


def test_a_vocabulary_without_a_tokenizer_says_what_would_work(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", blocky())
    with pytest.raises(
        ModelError, match=r"cannot read the tokenizer of tiny\.gguf: .*; take a folder or a GGUF"
    ):
        open_model(tmp_path / "tiny.gguf").tokenizer  # noqa: B018


def test_a_broken_tokenizer_is_one_line(tmp_path):
    blocky().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the tokenizer") as error:
        Opened(open_model(tmp_path).source, "x").tokenizer  # noqa: B018
    assert "\n" not in str(error.value)
