"""Writers that are killed, or whose disk is full, leave the old or the new result. `scripts/kill.py` does so for longer."""

import random
import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("children are forked", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import kill

from acttail.base.folders import replacing_folder
from acttail.engine.kept import write_model_text
from acttail.errors import ActTailError
from acttail.sparse.backends import cpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cpu.status().available, reason="no native library"),
]


@pytest.mark.parametrize("name", kill.WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path, name):
    found = kill.tried(name, kill.Scene(tmp_path), 3, random.Random(16), full=False)
    assert found["old"] + found["new"] == 3
    assert found["left behind"] == 0


@pytest.mark.parametrize("name", kill.WRITERS)
def test_a_full_disk_leaves_the_old_and_one_line(tmp_path, name):
    found = kill.tried(name, kill.Scene(tmp_path), 3, random.Random(16), full=True)
    assert found == {"old": 3, "one line": 3, "left behind": 0}


@pytest.mark.parametrize("limit", [0, 100, 2000])
def test_a_tokenizer_that_does_not_fit_is_one_line(tmp_path, tokenizer, limit):
    def write(scene, target, version):
        with replacing_folder(target, ()) as folder:
            write_model_text(folder, tokenizer, frozenset())

    writer, target = kill.Writer(write, lambda scene, target: "new"), tmp_path / "out"
    assert kill.ended(kill.started(None, writer, target, "new", limit)) == 2
    assert list(tmp_path.iterdir()) == []
    assert kill.ended(kill.started(None, writer, target, "new", None)) == 0


def half(scene, target, version):
    """A writer that does not do as it should."""
    for name in ("a", "b"):
        (target / name).write_text(version)
        # Long beside what starting takes on a busy machine, or no kill meets it.
        kill.time.sleep(0.3)


def late(scene, target, version):
    with replacing_folder(target, ("a", "b")) as folder:
        half(scene, folder, version)


def whole(scene, target):
    found = {(target / name).read_text() for name in ("a", "b")}
    if len(found) != 1:
        raise ActTailError("half")
    return found.pop()


@pytest.mark.parametrize(("write", "neither"), [(half, True), (late, False)])
def test_a_half_written_result_is_seen(tmp_path, monkeypatch, write, neither):
    scene = kill.Scene(tmp_path)
    (scene.target.parent / "half").mkdir()
    monkeypatch.setitem(kill.WRITERS, "half", kill.Writer(write, whole))
    found = kill.tried("half", scene, 5, random.Random(1), full=False)
    assert (found["neither"] > 0) == neither
