"""The native backend: loads the C++ library with ctypes and calls its plain C ABI.

A missing or unusable library is a state that :func:`status` describes and `acttail doctor` prints,
never an ImportError: everything still runs on the reference backend.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch  # first, so that the library shares torch's OpenMP runtime

from acttail import _native
from acttail.sparse.backends import abi

_INFINITY_16 = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native library is in use, and if not, why and what to do."""

    available: bool
    isa: str | None
    path: str | None
    reason: str | None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, NativeStatus]:
    if os.environ.get("ACTTAIL_NATIVE") == "0":
        return None, NativeStatus(False, None, None, "switched off by ACTTAIL_NATIVE=0")
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    candidates = [Path(folder) / f"{prefix}acttail_native{suffix}" for folder in _native.__path__]
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        reason = "the library was not built; install a C++17 compiler and reinstall acttail"
        return None, NativeStatus(False, None, None, reason)
    try:
        library = ctypes.CDLL(str(path))
        differs = abi.mismatch(library)
        if differs is not None:
            return None, NativeStatus(False, None, str(path), differs)
        abi.declare(library)
        isa = library.acttail_isa().decode()
    except (OSError, AttributeError) as error:
        return None, NativeStatus(False, None, str(path), f"the library does not load: {error}")
    return library, NativeStatus(True, isa, str(path), None)


def status() -> NativeStatus:
    """Say whether the native library is in use, on which instruction set, and if not, why."""
    return _load()[1]


def supports(x: torch.Tensor) -> bool:
    """Whether the native kernels take this tensor: float32, bfloat16 or float16 on a CPU."""
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.float32 or x.dtype in _INFINITY_16)
        and _load()[0] is not None
    )


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is not available; says why.
    """
    loaded, found = _load()
    if loaded is None:
        raise RuntimeError(f"the native backend is not available: {found.reason}")
    return loaded


def topk_mask(x: torch.Tensor, k: int) -> torch.Tensor:
    """Native counterpart of :func:`acttail.sparse.backends.reference.topk_mask`, bit for bit the same.

    Args:
        x: [..., d], float32, bfloat16 or float16, on the CPU.
        k: how many entries of the last dimension stay, 1 <= k <= d.

    Raises:
        RuntimeError: the library refused the arguments or ran out of memory.
    """
    lib = library()
    x = x.contiguous()
    y = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    threads = torch.get_num_threads()
    if x.dtype == torch.float32:
        code = lib.acttail_topk_mask_f32(x.data_ptr(), y.data_ptr(), rows, columns, k, threads)
    else:
        code = lib.acttail_topk_mask_16(
            x.data_ptr(), y.data_ptr(), rows, columns, k, _INFINITY_16[x.dtype], threads
        )
    if rows:
        _check(code, f"topk_mask (rows={rows}, columns={columns}, k={k})")
    return y


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"native {what}: {abi.reason(code)}")


def partial_energies(
    x: torch.Tensor, vectors: Sequence[torch.Tensor], dropped: torch.Tensor
) -> torch.Tensor:
    """Native counterpart of :func:`acttail.sparse.backends.reference.partial_energies`.

    Args:
        x: [rows, d] float32 on the CPU.
        vectors: n tensors [rows, d] float32.
        dropped: [G] int64, ascending.

    Returns:
        [n, G] float64.

    Raises:
        RuntimeError: the library refused the arguments or ran out of memory.
    """
    lib = library()
    x = x.contiguous()
    held = [v.contiguous() for v in vectors]
    pointers = (ctypes.c_void_p * len(held))(*(v.data_ptr() for v in held))
    dropped = dropped.to(torch.int64).contiguous()
    sums = torch.zeros(len(held), dropped.numel(), dtype=torch.float64)
    code = lib.acttail_curves_f32(
        x.data_ptr(), pointers, len(held), x.shape[0], x.shape[1], dropped.data_ptr(),
        dropped.numel(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _check(code, f"curves (rows={x.shape[0]}, columns={x.shape[1]})")
    return sums


# Columns of an input-major matrix come in blocks of this many (native/formats.hpp).
_BLOCK = 64
_LINEAR_FORMATS = {torch.float32: 0, torch.bfloat16: 1}


def to_input_major(weight: torch.Tensor) -> torch.Tensor:
    """The same [d_out, d_in] matrix over memory in which each input's weights are one run.

    Args:
        weight: [d_out, d_in], any dtype and device.

    Returns:
        A view with strides (1, d_out rounded up to 64).
    """
    d_out, d_in = weight.shape
    rows = torch.zeros(d_in, -(-d_out // _BLOCK) * _BLOCK, dtype=weight.dtype, device=weight.device)
    rows[:, :d_out] = weight.T
    return rows[:, :d_out].T


def input_major(weight: torch.Tensor) -> bool:
    """Whether a weight is laid out by :func:`to_input_major` and the library can run it."""
    return (
        weight.dim() == 2
        and weight.dtype in _LINEAR_FORMATS
        and weight.device.type == "cpu"
        and weight.stride(0) == 1
        and weight.stride(1) == -(-weight.shape[0] // _BLOCK) * _BLOCK
        and _load()[0] is not None
    )


def sparse_linear(x: torch.Tensor, weight: torch.Tensor, k: int) -> torch.Tensor:
    """TopK(x) Wᵀ of 1 to 8 rows, reading only the kept columns of W.

    Args:
        x: [..., d_in], the weight's dtype.
        weight: [d_out, d_in], input-major.
        k: entries to keep.

    Returns:
        [..., d_out] in x's dtype.

    Raises:
        RuntimeError: the library refused the arguments or ran out of memory.
    """
    lib = library()
    d_out, d_in = weight.shape
    columns = weight.stride(1)
    rows = x.numel() // d_in
    flat = x.reshape(rows, d_in).float().contiguous()
    y = torch.empty(rows, columns)
    matrix = abi.Matrix(
        _LINEAR_FORMATS[weight.dtype], 0, d_in, columns, weight.data_ptr(), None, None
    )
    code = lib.acttail_sparse_linear(
        ctypes.byref(matrix), flat.data_ptr(), rows, k, y.data_ptr(), torch.get_num_threads()
    )
    _check(code, f"sparse_linear (rows={rows}, {d_in} -> {d_out}, k={k})")
    return y[:, :d_out].to(x.dtype).reshape(*x.shape[:-1], d_out)
