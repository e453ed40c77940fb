"""The site: every public name has its place in the reference, every page in the navigation, and every link a target."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import gradlr

ROOT = Path(gradlr.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
# The functions have the names of their modules, by which the reference finds them.
ENTRIES = {
    "gradlr.attach.attach": "gradlr.attach",
    "gradlr.capture.linear_cross_entropy.linear_cross_entropy": "gradlr.linear_cross_entropy",
}
# Pages of their own.
MODULES = {"gradlr.linalg", "gradlr.rules"}
INTEGRATIONS = ("accelerate", "lightning", "transformers")


def public_names():
    yield from (f"gradlr.{name}" for name in gradlr.__all__)
    for module in (gradlr.rules, gradlr.linalg, gradlr.gradient):
        yield from (f"{module.__name__}.{name}" for name in module.__all__)
    for name in INTEGRATIONS:  # read, not imported: each needs a package of its own
        tree = ast.parse((ROOT / "gradlr" / "integrations" / f"{name}.py").read_text(encoding="utf-8"))
        defined = (node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
        yield from (f"gradlr.integrations.{name}.{one}" for one in defined if not one.startswith("_"))


def test_the_reference_holds_every_public_name_once_and_no_other():
    entries = [entry for page in PAGES.values() for entry in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)]
    named = [ENTRIES.get(entry, entry) for entry in entries]
    assert sorted(named) == sorted(set(public_names()) - MODULES)


@pytest.mark.parametrize("name", sorted(set(public_names()) - MODULES))
def test_every_public_name_is_documented(name):
    if name.startswith("gradlr.integrations."):
        module, _, one = name.rpartition(".")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        (node,) = (node for node in tree.body if getattr(node, "name", None) == one)
        assert ast.get_docstring(node)
        return
    found = gradlr
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    # Of constants and aliases the class says what they are.
    assert found.__doc__


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\nplugins:")[0]
    assert sorted(re.findall(r"[\w/-]+\.md", navigation)) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_its_links_and_anchors_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", PAGES[page]):
        if "://" in target:
            continue
        path = (DOCS / page).parent / target if target else DOCS / page
        assert path.resolve().is_relative_to(DOCS.resolve()), f"{target}: the site holds docs/ alone"
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def anchors_of(text):
    """The anchors that the site gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def commands():
    texts = [*PAGES.values(), (ROOT / "README.md").read_text(encoding="utf-8")]
    return sorted(
        {one.strip() for text in texts for one in re.findall(r"python -m gradlr ((?:bench|estimate|finetune) [^`#\n]+)", text)}
    )


class _UnderstoodError(Exception):
    """Raised in the place of doing what a command says."""


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_command_line_understands(command, monkeypatch):
    from gradlr.apps import cli

    def run(arguments):
        raise _UnderstoodError

    for module, _ in cli.COMMANDS.values():
        monkeypatch.setattr(module, "run", run)
    with pytest.raises(_UnderstoodError):
        cli.main(shlex.split(command))


@pytest.mark.parametrize(
    "gone", ["ByEnergy", "max_norm_growth", "is_weighed", 'capture="ddp"', "table_lr", "vector_lr", "arithmetic="]
)
def test_what_is_gone_is_not_spoken_of(gone):
    texts = {**PAGES, "README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    assert [name for name, text in texts.items() if gone in text] == []
