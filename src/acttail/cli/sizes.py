"""Sizes of memory as a user writes them."""

import re

from acttail.errors import ActTailError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parsed_bytes(text: str, option: str) -> int:
    """Bytes of a size like 2G, 1.5g, 512MiB or 1000000 (units of 1,024).

    Args:
        text: the size.
        option: that it was given to.

    Raises:
        ActTailError: it is none, or not positive.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ActTailError(f"{option} takes a size like 2G or 512M, got {text}")
    return size
