"""Where the cache is, with and without a home."""

import os
from pathlib import Path

import pytest

from acttail.base import files
from acttail.base.files import cache_dir, cache_lasts, expanded
from acttail.errors import ActTailError


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    for name in ("ACTTAIL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", unknown)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_the_variables_go_first(monkeypatch):
    monkeypatch.setenv("ACTTAIL_CACHE", "/a")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("ACTTAIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/acttail")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/acttail")
    assert cache_lasts()


def test_without_a_home_it_is_a_folder_of_one_s_own(homeless):
    found = cache_dir()
    assert found.parent == homeless
    assert found.stat().st_mode & 0o777 == 0o700
    assert not cache_lasts()
    assert cache_dir() == found


def test_an_empty_home_is_none(monkeypatch, tmp_path):
    for name in ("ACTTAIL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_dir().parent == tmp_path


def test_what_another_could_have_put_there_is_not_trusted(homeless):
    folder = cache_dir()
    folder.chmod(0o777)
    with pytest.raises(ActTailError, match="set ACTTAIL_CACHE"):
        cache_dir()
    folder.rmdir()
    (homeless / "elsewhere").mkdir()
    folder.symlink_to(homeless / "elsewhere")
    with pytest.raises(ActTailError, match="set ACTTAIL_CACHE"):
        cache_dir()


def test_a_home_of_nobody():
    if os.name == "nt":
        pytest.skip("Windows guesses")
    with pytest.raises(ActTailError, match="cannot tell whose home"):
        expanded("~nobody-of-this-name/model")
