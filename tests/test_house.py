"""What the package keeps to as a whole: the order of its layers, small classes, short ways, a quick import (see house.py)."""

import ast

import house
import pytest


def test_a_module_imports_only_from_layers_before_its_own():
    assert house.misplaced_imports() == []


def test_no_modules_import_each_other_in_a_circle():
    assert house.import_circles() == []


def test_imports_of_every_form_are_seen():
    name = lambda path: path.relative_to(house.ROOT).as_posix()  # noqa: E731
    seen = {name(path): set(map(name, others)) for path, others in house.imports().items()}
    assert {"errors.py", "tracker.py", "rules/__init__.py"} <= seen["attach.py"]  # names of a module, modules by name
    assert "apps/cli.py" in seen["__main__.py"] and "rules/__init__.py" in seen["__init__.py"]
    assert any("checkpoint/atomic.py" in others for name, others in seen.items() if name.startswith("apps/"))
    assert house.circles({1: {2}, 2: {3}, 3: {2}, 4: {1}}) == [{2, 3}]


def test_a_class_has_at_most_twenty_methods():
    assert {name: count for name, count in house.methods().items() if count > 20} == {}


def test_classes_inherit_over_two_levels_at_most():
    """Classes of torch's are not counted."""
    assert {name: depth for name, depth in house.depths().items() if depth > 2} == {}


def test_few_files_lie_loose():
    assert sum(path.is_file() for path in house.ROOT.iterdir()) <= 9


# 70 and 110 are wanted: see house.py. What has been reached is held.
@pytest.mark.parametrize(("apply", "most"), [("backward", 105), ("step", 185)])
def test_one_update_takes_few_calls(apply, most):
    assert 0 < len(house.calls(apply)) <= most


def test_importing_the_package_does_not_import_torchs_compiler():
    assert not house.imports_dynamo()


def test_inputs_are_never_validated_by_assert():
    asserts = [
        f"{path.relative_to(house.ROOT)}:{node.lineno}"
        for path, tree in house.trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []
