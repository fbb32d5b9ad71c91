"""The rooms of src/acttail: imports go downwards, nothing goes in a circle, nothing lies at the root.

The order is pyproject's, which `import-linter` checks too; this also sees imports for type checking, a circle between
a package and its own module, and a file that belongs to no room.
"""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
# The public names, what no room can do without, and what must be there before any room is.
AT_THE_ROOT = {"__init__", "__main__", "_register", "_version", "errors", "plan"}
# Submodules of transformers are not its public interface, except the registration of a quantizer.
ADAPTER = "acttail.model.hf"
PLUG_IN = ("transformers.quantizers", "transformers.utils.quantization_config")


def order():
    """The rooms of pyproject's contract, lowest first."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (rooms,) = (c for c in said["tool"]["importlinter"]["contracts"] if c["id"] == "rooms")
    return rooms["layers"][::-1]


def modules_of(src):
    """Module name -> its syntax tree."""
    found = {}
    for path in (src / "acttail").rglob("*.py"):
        name = ".".join(path.relative_to(src).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree):
    """(module, name or None) of every import of a file, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield "." * node.level + (node.module or ""), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None


def graph_of(modules):
    """Module -> the modules of acttail that it imports."""
    edges = {m: set() for m in modules}
    for module, tree in modules.items():
        for base, name in imports(tree):
            target = f"{base}.{name}" if f"{base}.{name}" in modules else base
            if target in modules and target != module:
                edges[module].add(target)
    return edges


def faults(src, rooms):
    """One line per fault of the tree under `src`."""
    modules = modules_of(src)
    edges = graph_of(modules)
    said = []
    for path in (src / "acttail").glob("*.py"):
        if path.stem not in AT_THE_ROOT:
            said.append(f"stray: {path.name}")

    def height(module):
        room = module.split(".")[1] if "." in module else ""
        return rooms.index(room) if room in rooms else None

    for module, targets in edges.items():
        for base, _ in imports(modules[module]):
            if base.startswith("."):
                said.append(f"relative: {module} -> {base}")
        for target in targets:
            low, high = height(module), height(target)
            if low is not None and high is not None and high > low:
                said.append(f"upward: {module} -> {target}")
    try:
        # The root names its public names for type checkers only; nothing in a room imports the root.
        TopologicalSorter({m: t for m, t in edges.items() if m != "acttail"}).prepare()
    except CycleError as error:
        said.append(f"circle: {' -> '.join(error.args[1])}")
    return sorted(said)


def test_the_house_stands():
    left = "circle: acttail.engine -> acttail.engine.source -> acttail.engine"  # to go with the engine's steps
    assert [f for f in faults(SRC, order()) if f != left] == []


def test_every_folder_is_a_room():
    folders = {p.parent.name for p in (SRC / "acttail").glob("*/__init__.py")}
    assert folders - {"_native"} == set(order()) - {"errors", "plan"}


def test_nothing_in_a_room_imports_the_root():
    edges = graph_of(modules_of(SRC))
    assert [m for m, targets in edges.items() if "acttail" in targets and m != "acttail"] == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"base/a.py": "from acttail.engine import b"}, "upward: acttail.base.a -> acttail.engine.b"),
        ({"base/a.py": "def f():\n    import acttail.engine.b"},
         "upward: acttail.base.a -> acttail.engine.b"),
        ({"base/a.py": "from acttail.plan import x", "plan.py": "x = 1"},
         "upward: acttail.base.a -> acttail.plan"),
        ({"engine/b.py": "from acttail.engine import c", "engine/c.py": "from acttail.engine.b import x"},
         "circle: "),
        ({"engine/__init__.py": "from acttail.engine.b import x", "engine/b.py": "from acttail.engine import y"},
         "circle: "),
        ({"helpers.py": ""}, "stray: helpers.py"),
        ({"engine/b.py": "from . import c"}, "relative: acttail.engine.b -> ."),
    ],
)  # fmt: skip
def test_a_fault_is_seen(tmp_path, files, fault):
    house = {"__init__.py": "", "base/__init__.py": "", "engine/__init__.py": "",
             "engine/b.py": "x = 1", "engine/c.py": "", "base/a.py": ""}  # fmt: skip
    for name, text in (house | files).items():
        path = tmp_path / "acttail" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (said,) = faults(tmp_path, order())
    assert said.startswith(fault)


def test_one_adapter_knows_the_inside_of_transformers():
    strangers = set()
    for module, tree in modules_of(SRC).items():
        for base, name in imports(tree):
            inside = base.startswith("transformers.") and not base.startswith(PLUG_IN)
            private = base == "transformers" and re.match("_[^_]", name or "") is not None
            if (inside or private) and module != ADAPTER:
                strangers.add(f"{module} imports {base}")
    left = "acttail.model.gguf imports transformers.modeling_gguf_pytorch_utils"  # to go with the one opening path
    assert strangers - {left} == set()
