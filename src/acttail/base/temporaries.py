"""What is being written, beside where it will be: named after its process, so that what a killed one left is swept."""

import hashlib
import os
import re
import shutil
import socket
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

# Of the target's name no more than leaves room for the rest.
_NAME = 100


def temporary_file(target: Path) -> Path:
    """An empty file beside the target, for its owner alone.

    Raises:
        OSError: it cannot be made.
    """
    sweep(target.parent)
    descriptor, name = tempfile.mkstemp(
        prefix=_prefix(target), suffix=target.suffix or ".tmp", dir=target.parent
    )
    os.close(descriptor)
    return Path(name)


def temporary_folder(target: Path) -> Path:
    """An empty folder beside the target, for its owner alone.

    Raises:
        OSError: it cannot be made.
    """
    sweep(target.parent)
    return Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))


def sweep(folder: Path) -> None:
    """Remove the temporaries in a folder whose processes, of this machine, are no more."""
    made = re.compile(rf"\..*\.{_machine()}-(\d+)-.*", re.DOTALL)
    with suppress(OSError):
        for left in folder.iterdir():
            found = made.fullmatch(left.name)
            if found is None or _alive(int(found[1])):
                continue
            with suppress(OSError):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink()


def _prefix(target: Path) -> str:
    name = target.name.encode()[:_NAME].decode(errors="ignore")
    return f".{name}.{_machine()}-{os.getpid()}-"


@cache
def _machine() -> str:
    """What process ids mean something within: this machine and, in containers, this one of them."""
    within = ""
    with suppress(OSError):
        within = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {within}".encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
