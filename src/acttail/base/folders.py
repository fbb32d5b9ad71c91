"""Writing folders that are either the old one or the new one, whole."""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from acttail.base.files import cannot_write, make_ordinary
from acttail.base.temporaries import temporary_folder
from acttail.errors import ActTailError

# linux/fs.h: exchange two names in one step (renameat2(2)).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing_folder(path: str | os.PathLike[str], owned: tuple[str, ...]) -> Iterator[Path]:
    """Give an empty folder beside `path`; exchange the two if the body succeeds.

    What the old folder holds beside the writer's own files is carried over. On any failure, an interrupt or a
    full disk included, the old folder stays as it was; where the system exchanges names in one step (Linux), a
    kill leaves the old one or the new one, too. What a killed process left beside is swept by the next.

    Args:
        path: the folder to be; made if absent.
        owned: patterns of the names that the writer replaces, stale ones among them.

    Raises:
        ActTailError: the folder cannot be written, or is a link; names it and the reason.
    """
    target = Path(path)
    if target.is_symlink():
        raise ActTailError(f"{target} is a link: name the folder that it leads to")
    if target.exists() and not target.is_dir():
        raise ActTailError(f"cannot write {target}: it is no folder")
    temporary: Path | None = None
    try:
        # Of "a/b/." and the like, too.
        target = target.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_folder(target)
        yield temporary
        if target.exists():
            _carry(target, temporary, owned)
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _sync(file)
        _sync(temporary)
        make_ordinary(temporary, 0o777)
        if target.exists():
            _exchange(temporary, target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise cannot_write(target, error.strerror or str(error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _carry(old: Path, new: Path, owned: tuple[str, ...]) -> None:
    """Put what is not the writer's into the new folder, by a second name where the file system has such."""
    for entry in old.iterdir():
        place = new / entry.name
        if os.path.lexists(place) or any(fnmatch(entry.name, pattern) for pattern in owned):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, place, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(entry), str(place))


def _link_or_copy(source: str, place: str) -> str:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        shutil.copy2(source, place, follow_symlinks=False)
    return place


def _exchange(new: Path, old: Path) -> None:
    """The two folders change names, in one step where the system can."""
    if sys.platform.startswith("linux"):
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is not None:
            names = (os.fsencode(new), os.fsencode(old))
            if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
                return
    aside = temporary_folder(old)
    old.rename(aside / old.name)
    try:
        new.rename(old)
    except OSError:
        (aside / old.name).rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Put a file or a folder's names on the disk; folders only where a system opens them."""
    with suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
