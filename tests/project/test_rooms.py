"""The diagram of CONTRIBUTING.md is that of the code, and no Python package has a circle of imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def room_of(path):
    path = path.relative_to(ROOT / "csrc")
    return "math" if path.as_posix() == "rules/math.h" else "table" if path.parent == Path() else path.parts[0]


def test_the_diagram_is_that_of_the_includes():
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    found = {("momentum_ext", "binding")}
    for path in (ROOT / "csrc").rglob("*.*"):
        for name in INCLUDE.findall(path.read_text()):
            found.add((room_of(path), room_of((path.parent / name).resolve())))
    assert drawn == {(user, used) for user, used in found if user != used}


def imports(path, names):
    """Those of the modules that importing this one needs, in functions too, but not for types alone."""
    tree = ast.parse(path.read_text())
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        words = (getattr(node, "module", None) or "").split(".") + [alias.name for alias in node.names]
        yield from (word for word in words if word in names)


@pytest.mark.parametrize("package", ["momentum_ext", "benchmarks", "examples"])
def test_no_circles(package):
    paths = {path.stem: path for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}
    left = {name: set(imports(path, paths.keys() - {name})) for name, path in paths.items()}
    assert any(left.values())
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]
