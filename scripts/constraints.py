"""Write constraints.txt: the versions that this environment has of all that `acttail[dev]` asks for.

Run it in an environment in which `make test` and `make check` passed. torch is left out, for the Makefile
names its version and its index; a version that needs a newer Python than the oldest one supported is
pinned for the newer ones alone.
"""

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Minor versions of Python 3 that are supported.
OLDEST, NEWEST = 10, 13
LEFT_OUT = {"torch"}
HEADER = """\
# What `make demo` and `make test` install, beside torch: the versions the tests last passed with. Written by
# scripts/constraints.py. `make test CONSTRAINTS=` takes the newest of everything instead.
"""


def asked_for(extra: str) -> list[str]:
    """What acttail requires as it stands here, with an extra; what is installed may be older."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked: list[str] = project["dependencies"]
    return asked + (project["optional-dependencies"][extra] if extra else [])


def needed(package: str, extra: str) -> Iterator[Distribution]:
    """Every installed distribution that a package with an extra leads to."""
    seen: set[tuple[str, str]] = set()
    todo = [(package, extra)]
    given: set[str] = set()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        if name == "acttail":
            texts = asked_for(wanted)
        else:
            try:
                found = distribution(name)
            except PackageNotFoundError:
                continue  # for another platform or Python
            if name not in given:
                given.add(name)
                yield found
            texts = found.requires or []
        for text in texts:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                for e in ("", *requirement.extras):
                    todo.append((canonicalize_name(requirement.name), e))


def line(found: Distribution) -> str:
    """`name==version`, for the Pythons that version runs on."""
    name, version = canonicalize_name(found.metadata["Name"]), Version(found.version)
    pin = f"{name}=={version.public}"
    runs_on = SpecifierSet(found.metadata.get("Requires-Python") or "")
    first = next(m for m in range(OLDEST, NEWEST + 1) if runs_on.contains(f"3.{m}.99"))
    return pin if first == OLDEST else f'{pin} ; python_version >= "3.{first}"'


def main() -> None:
    """Write the file."""
    found = {canonicalize_name(d.metadata["Name"]): d for d in needed("acttail", "dev")}
    lines = [line(found[name]) for name in sorted(found) if name not in LEFT_OUT]
    text = HEADER + "".join(f"{entry}\n" for entry in lines)
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
