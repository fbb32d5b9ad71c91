"""Plans made on request, kept beside the converted models: the second start neither solves nor calibrates again.

A plan is found by what it was made of: the model's files (or the Hub's commit), the request, and the code that makes
plans. ``ACTTAIL_CACHE_LIMIT=0`` keeps none.
"""

import hashlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from acttail.base.files import cache_dir, cache_lasts
from acttail.base.schema import read_kept
from acttail.engine import kept
from acttail.errors import ActTailError
from acttail.model.names import HubSource
from acttail.model.opened import Opened
from acttail.plan import SparsityPlan

# A plan is some hundred kilobytes; what was used longest ago goes.
_MOST = 256
_ROOMS = ("allocate", "calibrate", "engine", "evaluate", "maths", "model", "sparse", "spectrum")


def place_of(model: Opened, request: str) -> Path | None:
    """Where the plan of a request is or would be kept; None if it is not.

    Args:
        model: that it is for.
        request: digest of all that it depends on beside the model.

    Raises:
        ActTailError: the limit of the cache is no size.
        ModelError: the model cannot be reached.
    """
    if kept.limit() == 0 or model.trust_remote_code or not cache_lasts():
        return None
    identity = kept.identity(model.source)
    if identity is None and isinstance(model.source, HubSource):
        commit = getattr(model.config, "_commit_hash", None)
        identity = commit and f"{model.source.hub_id}@{commit}"
    if identity is None:
        return None
    whole = hashlib.sha256(f"{identity} {request} {kept.code(_ROOMS)}".encode())
    return _folder() / f"{whole.hexdigest()[:32]}.json"


def read(place: Path | None) -> SparsityPlan | None:
    """The plan kept at a place; None if there is none, or it is damaged."""
    if place is None or not place.exists():
        return None
    try:
        found = SparsityPlan.load(place)
    except ActTailError:
        with suppress(OSError):
            place.unlink(missing_ok=True)
        return None
    kept.touch(place)
    return found


def keep(place: Path | None, plan: SparsityPlan) -> None:
    """Keep a plan, whole or not at all; a cache that cannot be written is no failure."""
    if place is None:
        return
    with suppress(OSError, ActTailError):
        place.parent.mkdir(parents=True, exist_ok=True)
        plan.save(place)
        ordered = sorted(place.parent.glob("*.json"), key=lambda f: -f.stat().st_mtime)
        for file in ordered[_MOST:]:
            file.unlink(missing_ok=True)


def clear(models: Collection[str] | None = None) -> int:
    """Throw away plans.

    Args:
        models: names of those whose plans go; None for all.

    Returns:
        How many went.
    """
    gone = 0
    with suppress(OSError):
        for file in sorted(_folder().glob("*.json")):
            if models is None or _model_of(file) in models:
                file.unlink(missing_ok=True)
                gone += 1
    return gone


def count() -> int:
    """How many plans are kept."""
    with suppress(OSError):
        return len(list(_folder().glob("*.json")))
    return 0


def _model_of(file: Path) -> str:
    return str((read_kept(file, dict[str, Any]) or {}).get("model"))


def _folder() -> Path:
    return cache_dir() / "plans"
