"""A conversation: its KV cache, its sparsity, its messages and the file they are kept in."""

import json
import math
import re

import numpy as np
import pytest
import torch
from byte_tokens import byte_tokenizer
from families import config
from transformers import AutoModelForCausalLM

import acttail
from acttail.calibrate.curves import SensitivityCurves
from acttail.chat.commands import Leave, run
from acttail.chat.conversation import Conversation
from acttail.chat.transcript import load_messages, save_messages
from acttail.engine import Engine
from acttail.errors import ActTailError

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
# As templates that leave an earlier turn's thoughts out.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: "
    "{{ m.content[:2] if m.role == 'assistant' else m.content }}\n{% endfor %}assistant:"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    cfg = config("llama")
    cfg.vocab_size, cfg.max_position_embeddings = 260, 2048
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(cfg).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def started(folder):
    found = Engine.from_pretrained(folder, dtype="fp32", threads=1)
    found.eos = frozenset()  # a random model would end at its first end-of-sequence token
    return found


@pytest.fixture
def engine(started):
    started.tokenizer.chat_template = TEMPLATE
    return started


def talk(engine, **options):
    return Conversation(engine, **({"max_new_tokens": 12} | options))


def say(conversation, text):
    return "".join(conversation.ask(text))


def test_only_new_tokens_are_computed_and_the_answer_is_the_same(engine):
    one = talk(engine)
    first = say(one, "The fox")
    earlier = list(one.messages)
    second = say(one, "jumps")
    fresh = talk(engine)
    fresh.resume(earlier)
    assert second == say(fresh, "jumps")
    assert fresh.turns[0].held == 0
    # All that was fed before: a byte's token is the same however it is read, but for what is no character.
    assert one.turns[1].held >= one.turns[0].prompt_tokens > one.turns[0].held == 0
    assert one.messages == fresh.messages
    assert [m["role"] for m in one.messages] == ["user", "assistant"] * 2
    assert one.messages[1]["content"] == first


def test_a_template_that_rewrites_a_turn_costs_the_rest(engine):
    engine.tokenizer.chat_template = FORGETFUL
    one = talk(engine)
    say(one, "The fox")
    earlier = list(one.messages)
    second = say(one, "jumps")
    prompt = len(engine.encode_chat(earlier[:1]))
    assert prompt <= one.turns[1].held < prompt + one.turns[0].tokens - 1
    fresh = talk(engine)
    fresh.resume(earlier)
    assert second == say(fresh, "jumps")


def test_a_conversation_that_outgrows_its_cache(engine):
    one = talk(engine, max_new_tokens=5)
    say(one, "a")
    say(one, "b" * 1100)
    assert one.turns[1].held == 0
    say(one, "c")
    assert one.turns[2].held > 1100
    with pytest.raises(ActTailError, match=r"\d{4} tokens, the model's context 2048: clear it"):
        say(one, "d" * 2000)
    assert len(one.messages) == 6
    assert say(one, "e")


def test_a_lossless_conversation_is_the_dense_one_at_any_sparsity(engine):
    dense, one = (
        talk(engine, max_new_tokens=40),
        talk(engine, max_new_tokens=40, speaker=Engine.lossless),
    )
    for sparsity, text in ((None, "The fox"), (0.3, "jumps"), (0.6, "over"), (0, "the dog")):
        if sparsity is not None:
            one.at(sparsity)
        assert say(one, text) == say(dense, text)
        drafts = one.turns[-1].drafts
        assert drafts.rounds + drafts.plain + drafts.accepted == one.turns[-1].tokens - 1
        assert "tokens plain" in run(one, "/stats")
    assert [turn.sparsity for turn in one.turns] == [0, 0.3, 0.6, 0]
    # What a round leaves is a dense cache, which the next answer goes on from.
    say(one, "and")
    assert one.turns[-1].held > 40
    assert dense.turns[-1].drafts is None


def test_sparsity_changes_between_turns(engine, folder):
    one = talk(engine)
    say(one, "The fox")
    assert one.turns[0].read_share == 1
    one.at(0.5)
    say(one, "jumps")
    assert one.turns[1].held == 0  # another plan, another cache
    assert one.turns[1].read_share == pytest.approx(0.5, abs=0.02)
    plan = acttail.make_plan(str(folder), 0.5, allocator="uniform")
    of_file = Engine.from_pretrained(folder, plan, dtype="fp32", threads=1)
    of_file.eos = frozenset()
    of_file.tokenizer.chat_template = TEMPLATE
    same = talk(of_file)
    same.resume(one.messages[:2])
    assert say(same, "jumps") == one.messages[-1]["content"]
    one.at(0)
    assert one.sparsity == 0
    say(one, "over")
    assert one.turns[2].read_share == 1
    with pytest.raises(ActTailError, match="sparsity"):
        one.at(1.5)


def test_curves_make_the_plan(engine):
    names = [s.name for segments in engine.packed.layout.segments.values() for s in segments]
    grid = np.array([0.0, 0.5, 0.99])
    curves = {n: grid * (1 + i) for i, n in enumerate(names)}
    one = talk(engine, curves=SensitivityCurves(grid, curves, {}))
    one.at(0.4)
    assert one.engine.plan.allocator == "sensitivity"
    assert one.engine.plan.solved_sparsity == pytest.approx(0.4, abs=1e-3)


def test_transformers_keeps_its_plan(folder):
    engine = Engine.from_pretrained(folder, dtype="fp32", native=False)
    engine.eos = frozenset()
    engine.tokenizer.chat_template = TEMPLATE
    one = talk(engine)
    assert say(one, "The fox")
    assert say(one, "jumps")
    with pytest.raises(ActTailError, match="sparsity cannot be changed"):
        one.at(0.5)


def test_stopping_keeps_what_was_said(engine):
    one = talk(engine, max_new_tokens=1000)
    said = []
    assert not one.stop()
    for piece in one.ask("The fox"):
        said.append(piece)
        if len(said) == 3:
            assert one.stop()
            assert not one.stop()
    assert one.turns[0].finish == "cancelled"
    assert one.turns[0].tokens < 20
    assert one.messages[-1] == {"role": "assistant", "content": "".join(said)}
    whole = one.turns[0]
    pieces = one.ask("jumps")
    next(pieces)
    pieces.close()
    assert one.turns[1].held >= whole.prompt_tokens
    assert len(one.messages) == 4
    say(one, "over")
    assert one.turns[2].held >= one.turns[1].prompt_tokens


def test_an_interrupt_within_the_engine_drops_the_cache(engine, monkeypatch):
    one = talk(engine)
    say(one, "The fox")
    before = list(one.messages)

    def interrupted(batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(one, "jumps")
    monkeypatch.undo()
    assert one.messages == before
    assert one.tokens_held == 0
    say(one, "jumps")
    assert one.turns[1].held == 0


def test_a_model_without_a_template(engine):
    engine.tokenizer.chat_template = None
    with pytest.raises(ActTailError, match="no chat template"):
        talk(engine)


def test_commands(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = talk(engine)
    assert run(one, "hello") is None
    assert run(one, "/usr/bin is full") is None
    assert run(one, " /stats") is None
    for name in ("/sparsity", "/stats", "/system", "/clear", "/save", "/load", "/quit", "Ctrl-C"):
        assert name in run(one, "/help")
    assert max(map(len, run(one, "/help").splitlines())) < 80
    assert "dense" in run(one, "/sparsity")
    assert run(one, "/sparsity 0.3") == "sparsity 0.3, a plan of uniform"
    assert "none yet" in run(one, "/stats")
    say(one, "The fox")
    assert re.search(r"7\d\.\d% of the weights' bytes read", run(one, "/stats"))
    assert "tokens/s" in run(one, "/stats")
    assert run(one, "/system Be brief.\nAnd kind.") == "system message: Be brief.\nAnd kind."
    assert [m["role"] for m in one.messages] == ["system", "user", "assistant"]
    assert run(one, "/save talk.json") == "3 messages written to talk.json"
    kept = json.loads((tmp_path / "talk.json").read_text())
    assert kept["messages"] == one.messages
    assert "forgotten" in run(one, "/clear")
    assert [m["role"] for m in one.messages] == ["system"]
    assert run(one, "/load talk.json") == "3 messages read from talk.json"
    assert one.messages == kept["messages"]
    assert run(one, "/system none") == "no system message"
    assert len(one.messages) == 2
    with pytest.raises(Leave):
        run(one, "/quit")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/foo", "no command /foo"),
        ("/sparsity much", "from 0 to 0.99, got 'much'"),
        ("/sparsity nan", "got 'nan'"),
        ("/sparsity 1.5", "got '1.5'"),
        ("/stats now", "takes nothing"),
        ("/save", "name of a file"),
        ("/save a.json", "nothing has been said"),
        ("/load missing.json", "cannot read missing.json"),
    ],
)
def test_bad_commands_are_one_line(engine, line, says):
    with pytest.raises(ActTailError, match=says) as found:
        run(talk(engine), line)
    assert "\n" not in str(found.value)


def test_a_full_disk_leaves_the_old_file(engine, tmp_path):
    one = talk(engine)
    say(one, "The fox")
    path = tmp_path / "folder" / "talk.json"
    with pytest.raises(ActTailError, match="cannot write"):
        run(one, f"/save {path}")
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ('{"talk": []}', 'no list of "messages"'),
        ("[1]", "message 1 is no object"),
        ('[{"role": "king", "content": "x"}]', "role 'king'"),
        ('[{"role": "user", "content": null}]', "message 1 has content that is not text"),
        ('[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]', "message 2"),
    ],
)
def test_files_that_are_no_conversation(tmp_path, content, says):
    path = tmp_path / "talk.json"
    path.write_text(content)
    with pytest.raises(ActTailError, match=says) as found:
        load_messages(path)
    assert str(path) in str(found.value)


def test_files_of_others(tmp_path):
    path = tmp_path / "talk.json"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path.write_text(
        json.dumps([{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    )
    found = load_messages(path)
    assert found == [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
    save_messages(path, "m", found)
    assert load_messages(path) == found


def test_speed_of_nothing_is_not_a_number(engine):
    one = talk(engine, max_new_tokens=1)
    say(one, "The fox")
    assert math.isnan(one.turns[0].read_share)
    assert "too short to time" in run(one, "/stats")
