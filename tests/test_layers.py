"""Data flows one way: a module imports only from what stands before it in the flow."""

import ast
from pathlib import Path

import pytest

import gradlr

ROOT = Path(gradlr.__file__).parent
# Each entry may import what stands before it. Rooms of one line do not import each other, except inside a folder.
FLOW = (
    "errors", "files", "deferred", "linalg", "gradient", "rules", "ranks", "views", "parameters", "tracker", "observe", "slots",
    "captures", "guards", "gauge", "skips", "checkpoint", "describe", "report", "write", "watch", "membership", "parallel",
    "state", "projections", "updates", "optimizer", "averaged", "processes", "folders", "storage", "lora", "attach", "memory",
    "__init__", "integrations", "bench", "interrupts", "demo", "finetune", "cli", "__main__",
)  # fmt: skip


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Rooms of gradlr that a file imports, imports for type checkers left out."""
    package = ("gradlr", *path.relative_to(ROOT).parts[:-1])
    tree = ast.parse(path.read_text())
    typing_only = {id(child) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
                   for child in ast.walk(node)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split("."))
            full = tuple(part for part in full if part)
            if full[:1] == ("gradlr",):
                yield from ([full[1]] if len(full) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gradlr."))


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_module_imports_only_from_what_stands_before_it(path):
    own = FLOW.index(room(path))
    for name in imported_rooms(path):
        if name != room(path) and name in FLOW:
            assert FLOW.index(name) < own, f"{path.relative_to(ROOT)} imports {name}, which stands behind it in the flow"


def test_the_check_sees_imports():
    assert {"optimizer", "rules", "errors"} <= set(imported_rooms(ROOT / "attach.py"))
    assert {"errors"} == set(imported_rooms(ROOT / "gradient" / "hook.py"))


def test_every_room_is_in_the_flow():
    assert {room(path) for path in FILES} <= set(FLOW)


def test_no_file_grows_beyond_one_idea():
    assert {str(path): count for path in FILES if (count := len(path.read_text().splitlines())) > 300} == {}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_inputs_are_never_validated_by_assert(path):
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
