"""Damaged files of every format: used, or refused in one line. `scripts/fuzz.py` does the same for longer."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

if not sys.platform.startswith("linux"):
    pytest.skip("children are forked", allow_module_level=True)
import resource

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import fuzz
import fuzz_damage
from fuzz_formats import FORMATS, Format, Models

from acttail.errors import ActTailError
from acttail.sparse.backends import cpu

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("damage")
        patch.setenv("ACTTAIL_CACHE", str(folder / "cache"))
        patch.setenv("ACTTAIL_CACHE_LIMIT", "0")
        yield Models(folder)


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_damaged_is_used_or_refused(models, name):
    found = fuzz.run(name, models, 100, seed=16)
    assert found.bad == {}
    assert found.counts["refused"] > 20
    assert found.counts["used"] > 0


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
@pytest.mark.parametrize("name", FORMATS)
def test_without_files_left_opening_is_one_line(models, tmp_path, name):
    (sample, *_) = FORMATS[name].write(models, tmp_path)
    ends = set()
    for spare in (0, 1, 2, 3, 5, 8, 100):

        def use(models, path, rng, spare=spare):
            free = os.open(os.devnull, os.O_RDONLY)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, free + spare))
            FORMATS[name].use(models, path, rng)

        end, said = fuzz.forked(Format(FORMATS[name].write, use), models, sample, random.Random(0))
        assert end in ("used", "refused"), (spare, said)
        ends.add(end)
    assert ends == {"used", "refused"}


def crash(models, path, rng):
    import ctypes

    ctypes.string_at(0)


def hang(models, path, rng):
    while True:
        pass


def leave(models, path, rng):
    sys.exit(0)


def demand(models, path, rng):
    torch.zeros(64 << 30, dtype=torch.uint8)


def break_(models, path, rng):
    raise KeyError("x")


def mumble(models, path, rng):
    raise ActTailError("")


@pytest.mark.parametrize(
    ("use", "end"),
    [(crash, "signal"), (hang, "hang"), (leave, "internal error"), (demand, "internal error"),
     (break_, "internal error"), (mumble, "internal error")],
)  # fmt: skip
def test_what_is_not_as_promised_is_seen(tmp_path, monkeypatch, use, end):
    monkeypatch.setattr(fuzz, "SECONDS", 1 if use is hang else 10)
    kind = Format(lambda models, place: [], use)
    assert fuzz.forked(kind, None, tmp_path, random.Random(0))[0] == end


def test_a_mutation_can_be_made_again(tmp_path):
    sample = tmp_path / "sample.json"
    sample.write_text('{"a": [1, 2, {"b": "c"}], "d": 0.5}')
    made = []
    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
        drawn = [
            fuzz.prepared("plan", [sample], 3, n, tmp_path / str(i))[0].read_bytes()
            for n in range(40)
        ]
        made.append(drawn)
    assert made[0] == made[1]
    assert len(set(made[0])) > 25


def test_a_value_or_key_becomes_raw_text():
    texts = {
        fuzz_damage.damaged_json(random.Random(i), b'{"key": [1.5], "other": "x"}')
        for i in range(3000)
    }
    for wanted in (b'"key": NaN', b'"other": "x", "key": ', b'"key": [-Infinity]', b'["\\ud800"]'):
        assert any(wanted in text for text in texts), wanted
    assert not any("\ue000".encode() in text for text in texts)
