"""Which backend the user forces by ACTTAIL_BACKEND."""

import functools
import os

from acttail.errors import ActTailError

NAMES = ("reference", "cpu", "triton")


@functools.cache
def forced() -> str | None:
    """The backend named by ACTTAIL_BACKEND, None if it is not set.

    Raises:
        ActTailError: it names none of :data:`NAMES`, or Triton where it cannot run; says why.
    """
    name = os.environ.get("ACTTAIL_BACKEND") or None
    if name is not None and name not in NAMES:
        raise ActTailError(f"ACTTAIL_BACKEND={name} is no backend: use {', '.join(NAMES)}")
    if name == "triton":
        from acttail.sparse.backends import triton

        if not triton.status().available:
            raise ActTailError(f"ACTTAIL_BACKEND=triton cannot run: {triton.status().reason}")
    return name


def wanted(name: str, *, default: bool = True) -> bool:
    """Whether a backend may be used.

    Args:
        name: one of :data:`NAMES`.
        default: the answer where nothing is forced.
    """
    found = forced()
    return default if found is None else found == name
