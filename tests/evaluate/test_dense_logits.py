"""The dense model runs once per window; its logits lie in a file, not in memory, and come back bit for bit."""

import errno
import shutil
import subprocess
import sys

import pytest
import torch

from acttail.errors import ActTailError, ActTailWarning
from acttail.evaluate import dense_logits
from acttail.evaluate.dense_logits import DenseLogits


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ACTTAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never():
    raise AssertionError("the dense model ran again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_windows_come_back_as_they_were(dtype, cache):
    held = DenseLogits()
    made = [torch.randn(7, 1013).to(dtype) for _ in range(3)]
    for i, logits in enumerate(made):
        assert held.get(i, lambda logits=logits: logits) is logits
    for i in (2, 0, 1, 0):
        found = held.get(i, never)
        assert found.dtype == dtype
        assert torch.equal(found, made[i])
    assert not list(cache.iterdir())  # nothing with a name is left, whatever happens


def test_what_is_beyond_the_limit_is_computed_again():
    held = DenseLogits(limit=4 * 100)
    runs = []
    for _ in range(2):
        for i in range(2):
            held.get(i, lambda i=i: runs.append(i) or torch.full((10, 10), float(i)))
    assert runs == [0, 1, 1]
    assert float(held.get(0, never)[3, 3]) == 0.0


def test_a_full_disk_costs_time_and_is_said(monkeypatch):
    held = DenseLogits()
    held.get(0, lambda: torch.ones(4, 4))

    class Full:
        def __getattr__(self, name):
            return getattr(whole, name)

        def write(self, data):
            raise OSError(errno.ENOSPC, "no space left on device")

    whole = held._file
    held._file = Full()
    runs = []

    def run():
        runs.append(1)
        return torch.full((4, 4), 2.0)

    with pytest.warns(ActTailWarning, match="not all kept .*it runs again for every plan"):
        found = held.get(1, run)
    assert torch.equal(found, torch.full((4, 4), 2.0))
    assert torch.equal(held.get(1, run), found)  # said once: another warning is an error
    assert len(runs) == 2
    assert torch.equal(held.get(0, never), torch.ones(4, 4))


def test_where_the_cache_is_not_one_s_own_the_temporary_folder_serves(monkeypatch):
    def foreign():
        raise ActTailError("another user's")

    monkeypatch.setattr(dense_logits, "cache_dir", foreign)
    held = DenseLogits()
    held.get(0, lambda: torch.ones(2, 2))
    assert torch.equal(held.get(0, never), torch.ones(2, 2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a tmpfs")
def test_a_really_full_disk(tmp_path, monkeypatch):
    """No SIGBUS when what is held is read: what did not fit was never said to be held."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    monkeypatch.setenv("ACTTAIL_CACHE", str(place))
    try:
        held = DenseLogits()
        made = [torch.randn(100, 1013) for _ in range(4)]
        for i in range(2):
            held.get(i, lambda i=i: made[i])
        with pytest.warns(ActTailWarning, match=r"No space left on device after 0\.0 GB"):
            held.get(2, lambda: made[2])
        for i, logits in enumerate(made):
            assert torch.equal(held.get(i, lambda logits=logits: logits), logits)
        assert len(held._held) == 2
        del held
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_memory_does_not_grow_with_what_is_held(tmp_path):
    """Private memory (not the pages of the file, which the system may take back) after 400 MB of logits."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    code = """
import torch
from acttail.evaluate.dense_logits import DenseLogits
def private():
    return sum(int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith('Private_Dirty')) / 1024
held = DenseLogits()
make = lambda i: torch.full((100, 100_000), float(i))
held.get(0, lambda: make(0))
before = private()
for i in range(1, 10):
    held.get(i, lambda: make(i))
for i in range(10):
    assert float(held.get(i, None).sum()) == i * 1e7
print(private() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
