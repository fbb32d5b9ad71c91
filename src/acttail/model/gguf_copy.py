"""The dequantised copy of a GGUF in the cache, by content.

transformers parses a GGUF in Python (20 s for SmolLM2-135M); from the copy the next load takes a second.
"""

import shutil
from pathlib import Path
from typing import Any

from acttail.base.files import cache_dir, cache_lasts
from acttail.base.temporaries import temporary_folder
from acttail.model.gguf_file import content_hash, gguf_files
from acttail.model.hf import quiet_transformers
from acttail.model.names import FolderSource, ModelSource

# Up to this size a copy is kept.
_KEEP_BYTES = 1 << 30
# Raised when acttail reads more out of a file than before (2: rope scaling, ends of turns).
_VERSION = 2


def nearest(source: ModelSource) -> ModelSource:
    """The copy of a GGUF if there is one, else the source itself."""
    folder = copy_folder(source.gguf) if source.gguf is not None else None
    return FolderSource(source.name, folder) if folder is not None and folder.exists() else source


def copy_folder(path: Path) -> Path | None:
    """Where the copy of a GGUF is or would be; None if the file is too large to have one."""
    if not cache_lasts() or sum(part.stat().st_size for part in gguf_files(path)) > _KEEP_BYTES:
        return None
    from transformers import __version__

    return cache_dir() / "gguf" / f"{content_hash(path)[:32]}-{_VERSION}-transformers-{__version__}"


def keep_copy(source: ModelSource, model: Any, tokenizer: Any) -> ModelSource:
    """Keep what was loaded from a GGUF, whole or not at all.

    Args:
        source: of the GGUF.
        model: loaded from it, in float32.
        tokenizer: of the same file.

    Returns:
        The copy; the source itself if it is no GGUF, is too large, or nothing can be written.
    """
    folder = copy_folder(source.gguf) if source.gguf is not None else None
    if folder is None:
        return source
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_folder(folder)
    except OSError:
        return source  # a read-only home is no reason to fail
    try:
        with quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    except Exception:  # any failure to cache leaves the slow way open
        return source
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return FolderSource(source.name, folder)
