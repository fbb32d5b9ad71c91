"""Data by its schema: what is refused, and that the line says where."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from acttail.base.schema import (
    STRICT,
    Count,
    Name,
    SchemaError,
    Share,
    checked,
    parse,
    read_json,
    read_kept,
)
from acttail.errors import ActTailError, PlanError


@dataclass(frozen=True)
class Part:
    __pydantic_config__ = STRICT
    name: Name
    share: Share = 0.5


@dataclass(frozen=True)
class Whole:
    __pydantic_config__ = STRICT
    parts: dict[Name, Part]
    pair: tuple[float, float]
    count: Count = 0


def whole(**changes):
    return {"parts": {"a": {"name": "x"}}, "pair": [1, 2.5]} | changes


def test_what_fits_becomes_the_dataclass():
    assert checked(Whole, whole()) == Whole({"a": Part("x")}, (1.0, 2.5))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "it is wrong"),
        (whole(hue=1), "it has the unknown key 'hue'"),
        (whole(parts={"a": {"name": "x", "hue": 1}}), "parts.a has the unknown key 'hue'"),
        (whole(parts={"a": {}}), "parts.a lacks the key 'name'"),
        (whole(parts={"a": {"name": ""}}), "parts.a.name is out of range"),
        (whole(parts={"a": {"name": "x\x1b[31m"}}), "parts.a.name is out of range"),
        (whole(parts={"a": {"name": "two\nlines"}}), "parts.a.name is out of range"),
        (whole(parts={"a": {"name": 3}}), "parts.a.name is wrong"),
        (whole(parts={"a": {"name": "x", "share": 1.01}}), "parts.a.share is out of range"),
        (whole(parts={"a": {"name": "x", "share": "0.5"}}), "parts.a.share is wrong"),
        (whole(parts={"a": {"name": "x", "share": True}}), "parts.a.share is wrong"),
        (whole(parts={"a": {"name": "x", "share": float("nan")}}), "not finite"),
        (whole(count=2**63), "count is out of range"),
        (whole(count=1.0), "count is wrong"),
        (whole(pair=[1]), "pair"),
        (whole(pair=[1, 2, 3]), "pair"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(data, says):
    with pytest.raises(SchemaError) as found:
        checked(Whole, data)
    assert says in str(found.value)
    assert "\n" not in str(found.value)
    assert str(found.value).isprintable()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("[" * 50 + "]" * 50, "nested more than"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
)
def test_text_that_is_not_the_json_of_any_format(text, says):
    with pytest.raises(SchemaError, match=says):
        parse(text)


def test_a_lone_surrogate_is_no_text():
    with pytest.raises(SchemaError):
        checked(Whole, parse('{"parts": {"\\ud800": {"name": "x"}}, "pair": [1, 2]}'))


def test_files_are_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(PlanError, match=r"x\.json is not a plan: it is not valid JSON"):
        read_json(path, "a plan", error=PlanError)
    for missing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ActTailError, match="cannot read"):
            read_json(missing, "a plan")
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path, "a plan") == {"a": [1]}


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"name": 3}', '{"name": "a", "more": 1}', "\x00"]
)
def test_what_was_kept_and_is_damaged_is_not_there(tmp_path, text):
    path = tmp_path / "kept.json"
    if text is not None:
        path.write_text(text)
    assert read_kept(path, Part) is None
    path.write_text('{"name": "a"}')
    assert read_kept(path, Part) == Part("a")


def test_the_package_does_not_import_what_it_may_not_need():
    code = "import sys, acttail, acttail.plan; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
