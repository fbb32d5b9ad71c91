"""The library and the package agree on every struct, and a disagreement is a state, not a crash."""

import ctypes

import pytest

from acttail.sparse.backends import abi, cpu

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")


def found():
    """The status of a load that has not happened before."""
    library, status = cpu._load.__wrapped__()
    assert (library is None) == (not status.available)
    return status


def test_every_struct_is_laid_out_alike():
    assert abi.mismatch(cpu.library()) is None
    assert found().available


# What follows the pointers of the struct.
REST = (("rectified", ctypes.c_int32), ("padding", ctypes.c_int32))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ((("weight", ctypes.c_void_p),), "acttail_norm"),
        ((("bias", ctypes.c_void_p), ("weight", ctypes.c_void_p), *REST), "acttail_norm.bias"),
        ((("weight", ctypes.c_void_p), ("shift", ctypes.c_void_p), *REST), "acttail_norm.shift"),
        ((("weight", ctypes.c_void_p), ("bias", ctypes.c_int64), *REST), None),
        (
            (
                ("weight", ctypes.c_void_p),
                ("bias", ctypes.c_int32),
                ("more", ctypes.c_int32),
                *REST,
            ),
            "acttail_norm.bias",
        ),
    ],
)
def test_a_mirror_that_differs_is_a_reason(monkeypatch, fields, named):
    mirror = type("Norm", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setitem(abi.STRUCTS, "norm", mirror)
    status = found()
    if named is None:  # another name for eight bytes at the same place
        assert status.available
        return
    assert not status.available
    assert f"{named} out differently" in status.reason
    assert "reinstall acttail" in status.reason


def test_another_version_is_a_reason(monkeypatch):
    monkeypatch.setattr(abi, "VERSION", abi.VERSION + 1)
    status = found()
    assert not status.available
    assert f"speaks ABI {abi.VERSION - 1}, this package {abi.VERSION}" in status.reason


def test_names_that_do_not_exist_are_refused():
    offset, size = ctypes.c_int64(), ctypes.c_int64()
    ask = cpu.library().acttail_layout
    assert ask(b"nothing", None, ctypes.byref(offset), ctypes.byref(size)) == abi.BAD_ARGUMENT
    assert ask(b"norm", b"nothing", ctypes.byref(offset), ctypes.byref(size)) == abi.BAD_ARGUMENT
