"""What `make test` installs is pinned: every requirement, at a version that satisfies it."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def pins():
    path = ROOT / "constraints.txt"
    if not path.exists():
        pytest.skip("no constraints beside the tests")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_each_package_is_pinned_once_and_named_by_nothing_but_its_version():
    found = pins()
    assert len(found) > 100
    assert len({p.name for p in found}) == len(found)
    for pin in found:
        assert pin.url is None
        assert [s.operator for s in pin.specifier] == ["=="]


def test_what_is_asked_for_is_pinned():
    by_name = {canonicalize_name(p.name): p for p in pins()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["test"], *extras["plot"], *extras["docs"], *extras["dev"]]  # fmt: skip
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        elsewhere = requirement.marker is not None and not requirement.marker.evaluate()
        if name in ("torch", "acttail") or elsewhere:
            continue
        (pinned,) = by_name[name].specifier
        assert requirement.specifier.contains(pinned.version), name
