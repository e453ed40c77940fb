"""What every file of the package keeps to."""

import ast
from pathlib import Path

import gradlr

ROOT = Path(gradlr.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def test_inputs_are_never_validated_by_assert():
    asserts = {
        str(path): lines
        for path in FILES
        if (lines := [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)])
    }
    assert asserts == {}
