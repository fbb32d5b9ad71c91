"""Running tests again under another instruction set of the native kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Those below the best one, which every run takes.
OTHERS = ["portable", "avx2", "avx512"]
_PROBE = "from acttail.sparse.backends import cpu; print(cpu.status().isa)"


def environment(isa):
    """What tells a process to use it; the test is skipped where this machine has none such."""
    # What the tests share is found there as it is here.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"ACTTAIL_ISA": isa, "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", _PROBE], env=env, capture_output=True, text=True)
    if found.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    return env


def passes(isa, *files):
    """The quick tests of some files pass in a process that uses it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *map(str, files)],
        env=environment(isa), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
