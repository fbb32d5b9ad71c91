"""What is being written is swept once its process is no more, and not before."""

import os
import subprocess
import sys

import pytest

from acttail.base.files import replacing, write_text
from acttail.base.temporaries import sweep, temporary_file, temporary_folder
from acttail.errors import ActTailError

CODE = """
import sys, time
from acttail.base.files import replacing
from acttail.base.temporaries import temporary_folder
from pathlib import Path
(temporary_folder(Path(sys.argv[1]) / "folder") / "part").write_text("half")
with replacing(Path(sys.argv[1]) / "result.json") as temporary:
    temporary.write_text("half")
    print("there", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills")
def test_what_a_killed_process_left_is_swept_by_the_next_writer(tmp_path):
    write_text(tmp_path / "result.json", "old")
    child = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path)], stdout=subprocess.PIPE)
    child.stdout.readline()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # it lives
    child.kill()
    child.wait()
    child.stdout.close()
    assert len(list(tmp_path.iterdir())) == 3
    write_text(tmp_path / "another.txt", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["another.txt", "result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_nothing_else_is_swept(tmp_path):
    for name in (".result.json.abc", ".x.00000000-999999999-a", "notes.12345678-1-x", ".hidden"):
        (tmp_path / name).write_text("")
    before = sorted(tmp_path.iterdir())
    own = [temporary_file(tmp_path / "a.json"), temporary_folder(tmp_path / "b")]
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*before, *own])
    sweep(tmp_path / "absent")


def test_names_are_of_any_length(tmp_path):
    for name in ("x" * 250, "ä" * 120 + ".json"):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("theirs")
    (tmp_path / "result.txt").symlink_to(outside)
    write_text(tmp_path / "result.txt", "ours")
    assert outside.read_text() == "theirs"
    assert not (tmp_path / "result.txt").is_symlink()


def test_a_failure_leaves_nothing_beside(tmp_path):
    with pytest.raises(ActTailError, match="cannot write"), replacing(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
