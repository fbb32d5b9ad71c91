"""Writing files that are either whole or absent, and the cache folder."""

import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from acttail.base.temporaries import temporary_file
from acttail.errors import ActTailError


def cache_dir() -> Path:
    """Where derived data is kept: $ACTTAIL_CACHE, else $XDG_CACHE_HOME/acttail, else ~/.cache/acttail.

    Without a home, a folder of this user's alone beside other temporary files; see :func:`cache_lasts`.

    Raises:
        ActTailError: that folder is another user's.
    """
    return _lasting() or _homeless()


def cache_lasts() -> bool:
    """Whether the cache outlives the machine's temporary files, so that gigabytes may be kept there."""
    return _lasting() is not None


def _lasting() -> Path | None:
    if folder := os.environ.get("ACTTAIL_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "acttail"
    if os.environ.get("HOME") == "":
        return None
    try:
        return Path.home() / ".cache" / "acttail"
    except RuntimeError:
        return None


def _homeless() -> Path:
    user = getattr(os, "getuid", lambda: 0)()
    folder = Path(tempfile.gettempdir()) / f"acttail-{user}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    try:
        about = folder.lstat()
    except OSError:  # a cache that cannot be written
        return folder
    # Whoever could write there could put weights into another's models.
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != user or about.st_mode & 0o022:
        raise ActTailError(
            f"there is no home folder, and {folder} is not this user's own: set ACTTAIL_CACHE to a folder"
        )
    return folder


def expanded(name: str) -> Path:
    """A path as it was typed, its ``~`` replaced.

    Raises:
        ActTailError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ActTailError(f"cannot tell whose home {name} is in: name the whole path") from None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` if the body succeeds.

    On any failure, an interrupt or a full disk included, the temporary file is removed and what was
    at `path` before stays as it was. What a killed process left is removed by the next that writes there.

    Raises:
        ActTailError: the file cannot be written; names it and the reason.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        temporary = temporary_file(target)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        make_ordinary(temporary, 0o666)
        temporary.replace(target)
        temporary = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise cannot_write(target, reason) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def make_ordinary(path: Path, mode: int) -> None:
    """Give what mkstemp or mkdtemp made for its owner alone the rights of an ordinary result."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


def check_ending(path: str | os.PathLike[str], endings: Sequence[str], what: str) -> str:
    """The ending of a file that is to be written, such as ``.csv``.

    Args:
        path: the file to be.
        endings: those it may have.
        what: the thing that is written, for the message.

    Raises:
        ActTailError: it has another.
    """
    suffix = Path(path).suffix
    if suffix not in endings:
        raise ActTailError(f"{what} is written as {' or '.join(endings)}, not as {path}")
    return suffix


def check_file(path: str | os.PathLike[str]) -> None:
    """Make sure that a file can be written here, before the work that fills it.

    Raises:
        ActTailError: it could not; names it and the reason.
    """
    target = Path(path)
    if target.is_dir():
        raise cannot_write(target, os.strerror(errno.EISDIR))
    _check_writable(target, target.parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Make sure that a folder can be made or filled here.

    Raises:
        ActTailError: it could not; names it and the reason.
    """
    target = nearest = Path(path).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    _check_writable(target, nearest)


def _check_writable(target: Path, folder: Path) -> None:
    if not folder.exists():
        raise cannot_write(target, os.strerror(errno.ENOENT))
    if not folder.is_dir():
        raise cannot_write(target, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_write(target, os.strerror(errno.EACCES))


def cannot_write(target: Path, reason: str) -> ActTailError:
    """The error of a file or folder that cannot be written."""
    return ActTailError(
        f"cannot write {target}: {reason}; check the folder, its rights and free space"
    )


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    Raises:
        ActTailError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON whole or not at all; NaN is refused, for it is not JSON.

    Raises:
        ActTailError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
