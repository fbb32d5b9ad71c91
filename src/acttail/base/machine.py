"""What machine this is, in words."""

import platform
from contextlib import suppress
from pathlib import Path


def processor_name() -> str:
    """The processor's name as the system tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
