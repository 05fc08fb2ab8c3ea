"""The rooms of the package: what each may import, as `docs/architecture.md` states it."""

from __future__ import annotations

import ast
import functools
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOORS = ("jaxquant", "jaxquant.__main__")  # what users enter by: they know every room


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> what it imports anywhere: inside functions and for types alone too."""
    files = {_module(path): path for path in (ROOT / "jaxquant").rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"a relative import in {module}"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= (full & files.keys()) or {node.module}
    return found


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _own() -> dict[str, set[str]]:
    return {module: {i for i in seen if i in imports()} for module, seen in imports().items()}


def test_every_room_imports_only_those_before_it():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("Imports point one way")[2]
    order = re.findall(r"`(\w+)`", text.split("\n\n")[1])
    rooms = {module.split(".")[1] for module in imports() if module not in DOORS}
    assert set(order) == rooms, "docs/architecture.md lists every room once"
    rank = {room: place for place, room in enumerate(order)}
    upwards = [
        (module, seen)
        for module, all_seen in _own().items()
        for seen in all_seen
        if module not in DOORS
        and (seen in DOORS or rank[seen.split(".")[1]] > rank[module.split(".")[1]])
    ]
    assert not upwards


def test_no_module_imports_itself_by_way_of_others():
    try:
        graphlib.TopologicalSorter(_own()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")


def test_jax_internals_are_touched_in_one_room():
    inside = ("jax._src", "jax.interpreters", "jax.extend.core.jaxpr")
    touching = {
        module
        for module, seen in imports().items()
        if any(name.startswith(inside) for name in seen)
    }
    assert touching
    assert all(module.startswith("jaxquant.jax_shim.") for module in touching)
