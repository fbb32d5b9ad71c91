"""A folder is the old one or the new one, whole, whatever happens to who writes it."""

import signal
import subprocess
import sys
import time

import pytest

from acttail.base import folders
from acttail.base.folders import replacing_folder
from acttail.errors import ActTailError

OWNED = ("*.bin",)


def fill(folder, text):
    for i in range(3):
        (folder / f"{i}.bin").write_text(text)


def held(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}  # fmt: skip


@pytest.fixture(params=["in one step", "by two renames"])
def exchange(request, monkeypatch):
    """Both ways that two folders change names."""
    if request.param == "by two renames":
        monkeypatch.setattr(folders.sys, "platform", "elsewhere")


def test_what_is_not_the_writers_is_carried_over(tmp_path, exchange):
    target = tmp_path / "out"
    (target / "notes" / "deep").mkdir(parents=True)
    (target / "notes" / "deep" / "mine.txt").write_text("mine")
    (target / "stale.bin").write_text("old")
    with replacing_folder(target, OWNED) as folder:
        fill(folder, "new")
        assert held(target) == {"notes/deep/mine.txt": "mine", "stale.bin": "old"}
    assert held(target) == {"notes/deep/mine.txt": "mine", **{f"{i}.bin": "new" for i in range(3)}}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])  # fmt: skip
def test_a_failure_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    expected = ActTailError if isinstance(error, OSError) else error

    def write():
        with replacing_folder(target, OWNED) as folder:
            (folder / "0.bin").write_text("new")
            raise error

    with pytest.raises(expected) as raised:
        write()
    if expected is ActTailError:
        assert str(target) in str(raised.value)
    assert held(target) == {f"{i}.bin": "old" for i in range(3)}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_written_through_a_link(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "out").symlink_to(real)
    with pytest.raises(ActTailError, match="is a link"), replacing_folder(tmp_path / "out", OWNED):
        raise AssertionError("reached")
    assert not list(real.iterdir())


def test_a_link_inside_is_kept_and_not_followed(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("theirs")
    target = tmp_path / "out"
    target.mkdir()
    (target / "0.bin").symlink_to(outside)
    (target / "other").symlink_to(outside)
    with replacing_folder(target, OWNED) as folder:
        fill(folder, "new")
    assert outside.read_text() == "theirs"
    assert (target / "other").is_symlink()
    assert not (target / "0.bin").is_symlink()


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="names are exchanged in one step on Linux"
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    code = """
import sys
from acttail.base.folders import replacing_folder
n = 0
while True:
    n += 1
    with replacing_folder(sys.argv[1], ("*.bin",)) as folder:
        for i in range(3):
            (folder / f"{i}.bin").write_text(str(n))
    print(n, flush=True)
"""
    target = tmp_path / "out"
    for i in range(20):
        child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.001 * i)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert len(set(held(target).values())) == 1
        assert len(held(target)) == 3
    with replacing_folder(target, OWNED) as folder:
        fill(folder, "last")
    # What the killed ones left beside is gone.
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ActTailError, match="cannot write"), replacing_folder(tmp_path / "file" / "out", OWNED):  # fmt: skip
        raise AssertionError("reached")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
