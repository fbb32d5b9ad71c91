"""The native library's C ABI: its structs, and the signatures of its functions (native/*.h).

Knows nothing of models. :func:`mismatch` compares every mirror with the library before anything is called.
"""

import ctypes
from typing import Any

VERSION = 16
_pointer, _int, _i32, _i64, _f32 = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_int32, ctypes.c_int64, ctypes.c_float,
)  # fmt: skip
BAD_ARGUMENT = 1
MOST_TOGETHER = 128  # tokens of one acttail_engine_step
NEVER = 1 << 30  # of Matrix.together
_REASONS = {BAD_ARGUMENT: "bad arguments", 2: "out of memory", 3: "the system refused a thread"}


class Matrix(ctypes.Structure):
    """struct acttail_matrix: rows are inputs of an input-major matrix, outputs of an output-major one."""

    _fields_ = (
        ("format", _i32), ("group", _i32), ("rows", _i64), ("columns", _i64), ("data", _pointer),
        ("scale", _pointer), ("minimum", _pointer), ("plane", _pointer), ("sub_scale", _pointer),
        ("sub_minimum", _pointer), ("together", _i32), ("padding", _i32),
    )  # fmt: skip


class Segment(ctypes.Structure):
    """struct acttail_segment."""

    _fields_ = (
        ("begin", _i64), ("end", _i64), ("outputs", _i64), ("k", _i64), ("score_scale", _pointer),
        ("threshold", _f32), ("rule", _i32), ("dense_kernel", _i32), ("padding", _i32),
    )  # fmt: skip


class Fused(ctypes.Structure):
    """struct acttail_fused."""

    _fields_ = (
        ("matrix", Matrix * 3), ("segment", Segment * 3), ("bias", _pointer), ("segments", _i32),
        ("matrices", _i32),
    )  # fmt: skip


class Norm(ctypes.Structure):
    """struct acttail_norm."""

    _fields_ = (
        ("weight", _pointer), ("bias", _pointer), ("rectified", _i32), ("padding", _i32),
    )  # fmt: skip


class Mlp(ctypes.Structure):
    """struct acttail_mlp."""

    _fields_ = (
        ("gate_up", Fused), ("down", Fused), ("gate_offset", _i64), ("up_offset", _i64), ("intermediate", _i64),
    )  # fmt: skip


class Block(ctypes.Structure):
    """struct acttail_block."""

    _fields_ = (
        ("qkv", Fused), ("o", Fused), ("mlp", Mlp),
        ("input_norm", Norm), ("attention_norm", Norm), ("mlp_norm", Norm), ("output_norm", Norm),
        ("q_norm", Norm), ("k_norm", Norm),
        ("q_offset", _i64), ("k_offset", _i64), ("v_offset", _i64), ("window", _i64),
        ("router", Matrix), ("expert", ctypes.POINTER(Mlp)), ("experts", _i64), ("active", _i64),
        ("rope", _i32), ("parallel", _i32), ("normalised", _i32), ("shared_gate", _i32),
    )  # fmt: skip


class Rope(ctypes.Structure):
    """struct acttail_rope."""

    _fields_ = (("inv_freq", _pointer), ("half", _i64), ("scale", _f32), ("padding", _i32))


class Model(ctypes.Structure):
    """struct acttail_model."""

    _fields_ = (
        ("block", ctypes.POINTER(Block)), ("rope", ctypes.POINTER(Rope)), ("embedding", Matrix),
        ("head", Matrix), ("head_input", Fused), ("final_norm", Norm), ("head_bias", _pointer), ("position", _pointer),
        ("blocks", _i64), ("ropes", _i64), ("hidden", _i64), ("heads", _i64), ("kv_heads", _i64),
        ("head_dim", _i64), ("intermediate", _i64), ("vocabulary", _i64), ("positions", _i64),
        ("norm_eps", _f32), ("attention_scale", _f32), ("attention_softcap", _f32),
        ("logit_softcap", _f32), ("embedding_scale", _f32), ("residual_scale", _f32), ("logit_scale", _f32),
        ("layer_norm", _i32), ("activation", _i32), ("kv_format", _i32), ("padding", _i32),
    )  # fmt: skip


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "matrix": Matrix, "segment": Segment, "fused": Fused, "norm": Norm, "mlp": Mlp, "block": Block,
    "rope": Rope, "model": Model,
}  # fmt: skip

_matrix = ctypes.POINTER(Matrix)
# Function -> (result, arguments); no result named: a status.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "acttail_isa": (ctypes.c_char_p, []),
    "acttail_topk_mask_f32": (_int, [_pointer, _pointer, _i64, _i64, _i64, _int]),
    "acttail_topk_mask_16": (_int, [_pointer, _pointer, _i64, _i64, _i64, ctypes.c_uint16, _int]),
    "acttail_curves_f32": (
        _int, [_pointer, _pointer, _i64, _i64, _i64, _pointer, _i64, _pointer, _int],
    ),
    "acttail_read_seconds": (ctypes.c_double, [_pointer, _i64, _int]),
    "acttail_sparse_linear": (_int, [_matrix, _pointer, _i64, _i64, _pointer, _int]),
    "acttail_decode_rows": (_int, [_matrix, _i64, _i64, _i64, _i64, _int, _pointer, _int]),
    "acttail_add_rows": (
        _int, [_matrix, _pointer, _pointer, _i64, _i64, _i64, _pointer, _i64, _i64],
    ),
    "acttail_add_lists": (
        _int, [_matrix, _pointer, _pointer, _i64, _i64, _i64, _pointer, _i64, _i64],
    ),
    "acttail_gather_columns": (_int, [_matrix, _pointer, _i64, _pointer, _int]),
    "acttail_transcode": (_int, [_matrix, _i64, _i32, _pointer, _i64, _pointer, _int]),
    "acttail_refit": (_int, [_matrix, _i64, _i32, _pointer, _int]),
    "acttail_fit": (_int, [_matrix, _i64, _pointer, _i64, _int]),
    "acttail_dot_rows": (_int, [_matrix, _pointer, _pointer]),
    "acttail_engine_new": (_int, [ctypes.POINTER(Model), _int, ctypes.POINTER(_pointer)]),
    "acttail_engine_free": (None, [_pointer]),
    "acttail_engine_forward": (
        _int, [_pointer, _pointer, _pointer, _i64, _int, _pointer, ctypes.POINTER(ctypes.c_double)],
    ),
    "acttail_engine_step": (_int, [_pointer, _pointer, _pointer, _i64, _pointer, _pointer]),
    "acttail_pool_new": (_int, [ctypes.POINTER(_pointer)]),
    "acttail_pool_free": (None, [_pointer]),
    "acttail_pool_bytes": (_i64, [_pointer]),
    "acttail_cache_new": (_int, [_pointer, _pointer, _i64, ctypes.POINTER(_pointer)]),
    "acttail_cache_fork": (_int, [_pointer, _i64, _i64, ctypes.POINTER(_pointer)]),
    "acttail_cache_free": (None, [_pointer]),
    "acttail_cache_length": (_i64, [_pointer]),
    "acttail_cache_bytes": (_i64, [_pointer]),
    "acttail_cache_lacks": (_i64, [_pointer, _i64]),
    "acttail_cache_truncate": (_int, [_pointer, _i64]),
    "acttail_cache_set_length": (_int, [_pointer, _i64]),
    "acttail_cache_write": (_int, [_pointer, _i64, _i64, _i64, _pointer, _pointer]),
    "acttail_cache_read": (_int, [_pointer, _i64, _i64, _i64, _pointer, _pointer]),
}  # fmt: skip


def mismatch(library: Any) -> str | None:
    """Why this package cannot speak to a library, None if it can.

    Compares the version, then the size of every struct and the offset and size of every field.

    Args:
        library: a loaded ``ctypes.CDLL``.

    Raises:
        AttributeError: it lacks a function that every version has.
    """
    found = library.acttail_abi()
    if found != VERSION:
        return f"the library speaks ABI {found}, this package {VERSION}; reinstall acttail"
    ask = library.acttail_layout
    ask.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_i64), ctypes.POINTER(_i64)]
    offset, size = _i64(), _i64()
    for name, struct in STRUCTS.items():
        mirrored: list[tuple[str | None, int, int]] = [(None, 0, ctypes.sizeof(struct))]
        for described in struct._fields_:
            field = getattr(struct, described[0])
            mirrored.append((described[0], field.offset, field.size))
        for part, at, length in mirrored:
            unknown = ask(
                name.encode(),
                part.encode() if part else None,
                ctypes.byref(offset),
                ctypes.byref(size),
            )
            if unknown or (offset.value, size.value) != (at, length):
                what = f"acttail_{name}" + (f".{part}" if part else "")
                return f"the library and this package lay {what} out differently; reinstall acttail"
    return None


def declare(library: Any) -> None:
    """Tell ctypes the signatures of every function.

    Args:
        library: a loaded ``ctypes.CDLL`` that :func:`mismatch` found nothing against.

    Raises:
        AttributeError: it lacks one of them.
    """
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def reason(status: int) -> str:
    """A status of the library in words."""
    return _REASONS.get(status, f"status {status}")
