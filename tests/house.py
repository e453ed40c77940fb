"""Prints the figures of the house, each with its target: `python tests/house.py`; with `calls`, each call of one update instead.

Information first, limits second; tests/test_house.py holds those that are limits. What is read off the sources comes from `ast`
and `tokenize`: nothing of the package is imported for it.
"""

import ast
import functools
import io
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "gradlr"
BESIDE_THE_CORE = ("apps", "integrations", "__main__")

# A module imports from layers before its own, and from its own without a circle.
LAYERS = (
    ("errors", "tensors", "linalg"),
    ("layers",),
    ("gradient",),
    ("rules", "ranks", "tracker"),
    ("params",),
    ("engine",),
    ("capture", "distributed", "report"),
    ("optimizer",),
    ("attach", "checkpoint"),
    ("__init__",),
    ("integrations",),
    ("apps", "__main__"),
)


@functools.cache
def sources():
    """path → source, of every module."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


@functools.cache
def trees():
    return {path: ast.parse(source) for path, source in sources().items()}


def room(path):
    """A folder or a loose module at the top of the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def core():
    return [path for path in sources() if room(path) not in BESIDE_THE_CORE]


# -- lines -------------------------------------------------------------------------------------------------------------------


def lines(paths):
    """All lines, blank ones and docstrings included."""
    return sum(len(sources()[path].splitlines()) for path in paths)


@functools.cache
def code_lines(path):
    """Numbers of the lines that hold code: neither blank, nor comment, nor docstring."""
    docstrings = {line for node in ast.walk(trees()[path]) for line in _docstring_lines(node)}
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in _tokens(path) if token.type not in skipped]
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings


def _docstring_lines(node):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
        return range(node.body[0].lineno, node.body[0].end_lineno + 1)
    return ()


def _tokens(path):
    return tokenize.generate_tokens(io.StringIO(sources()[path]).readline)


def comment_share():
    """Lines that hold nothing but a comment, per line of code."""
    comments = sum(line.lstrip().startswith("#") for source in sources().values() for line in source.splitlines())
    return comments / sum(len(code_lines(path)) for path in sources())


def ifs():
    """`if` and `elif`, as statements, as expressions and in comprehensions, per 100 lines of code."""
    count = sum(
        1 for path in sources() for token in _tokens(path) if token.type == tokenize.NAME and token.string in ("if", "elif")
    )
    return 100 * count / sum(len(code_lines(path)) for path in sources())


def body_lines():
    """Mean number of lines of code in a function, without its signature; inner functions count for both."""
    bodies = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0].lineno
                bodies.append(len(code_lines(path) & set(range(first, node.end_lineno + 1))))
    return statistics.mean(bodies)


def documented_share():
    """Of modules' functions and classes, and of these classes' methods, whose names do not begin with an underscore."""
    public = [node for tree in trees().values() for node in _public(tree)]
    return sum(ast.get_docstring(node) is not None for node in public) / len(public)


def _public(scope):
    for node in scope.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


# -- imports -----------------------------------------------------------------------------------------------------------------


@functools.cache
def imports():
    """path → modules of the package that it imports: anywhere in the file, in functions and for type checkers too.

    Of the package's own `__init__`, what it tells type checkers alone is left out: the names that it loads on first use, among
    them those of the apps.
    """
    return {path: frozenset(_imported(path, tree)) - {path} for path, tree in trees().items()}


def _imported(path, tree):
    package = ("gradlr", *path.relative_to(ROOT).parts[:-1])
    on_first_use = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = {child for node in on_first_use for child in ast.walk(node)} if path == ROOT / "__init__.py" else set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            start += tuple((node.module or "").split(".")) if node.module else ()
            names = [(*start, alias.name) for alias in node.names]
        else:
            continue
        yield from (_module(name[1:]) for name in names if name[0] == "gradlr")


def _module(names):
    """The file that `gradlr.` + names leads to, where the last name may be something inside it."""
    for end in (len(names), max(len(names) - 1, 0)):
        path = ROOT.joinpath(*names[:end])
        if path.with_suffix(".py").is_file() and end:
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return ROOT / "__init__.py"


def circles(graph):
    """Groups of nodes that lead to each other."""
    reached = {node: _reached(graph, node) for node in graph}
    groups = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return [group for group in groups if group]


def _reached(graph, start):
    seen, left = set(), list(graph[start])
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += graph[node]
    return seen


def import_circles():
    """Of modules, as lists of names."""
    return [sorted(str(path.relative_to(ROOT)) for path in group) for group in circles(imports())]


def rooms():
    """room → rooms that it imports from."""
    graph = {room(path): set() for path in sources()}
    for path, others in imports().items():
        graph[room(path)] |= {room(other) for other in others} - {room(path)}
    return graph


def floors():
    """How many rooms stand on each other at most; rooms in a circle share a floor."""
    graph = rooms()
    shared = {node: next((group for group in circles(graph) if node in group), frozenset([node])) for node in graph}

    @functools.cache
    def height(group):
        below = {shared[other] for node in group for other in graph[node]} - {group}
        return 1 + max(map(height, below), default=0)

    return max(height(group) for group in set(shared.values()))


def misplaced_imports():
    """Imports from a later layer, as "file imports file"; rooms that stand in no layer."""
    place = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    unknown = sorted({room(path) for path in sources()} - place.keys())
    wrong = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path, others in imports().items()
        for other in sorted(others)
        if place.get(room(other), 0) > place.get(room(path), 0)
    ]
    return unknown + wrong


# -- classes -----------------------------------------------------------------------------------------------------------------


@functools.cache
def classes():
    """name → (names of the classes of the package that it inherits from, names of its own methods)."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    known = {node.name for node in nodes}
    found = {}
    for node in nodes:
        bases = [ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases]
        methods = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
        found[node.name] = ([base for base in bases if base in known and base != node.name], methods)
    return found


def methods():
    """class → number of its methods, those of its bases in the package included."""

    def of(name):
        bases, own = classes()[name]
        return own.union(*map(of, bases))

    return {name: len(of(name)) for name in classes()}


def depths():
    """class → classes of the package in its longest line of inheritance, itself included."""

    def of(name):
        return 1 + max(map(of, classes()[name][0]), default=0)

    return {name: of(name) for name in classes()}


def largest(numbers):
    name = max(numbers, key=numbers.get)
    return f"{numbers[name]} ({name})"


# -- running it --------------------------------------------------------------------------------------------------------------


def calls(apply):
    """(file, function) of each call inside the package in one step of one `nn.Linear(64, 48)`, warmed up.

    The loop as the README writes it: the tracker's call and backward, and step() where that is what updates; weight and bias.
    Comprehensions and lambdas are no calls. Warm: all modules are walked at the first losses only, and ever more rarely.
    """
    import torch

    import gradlr

    torch.manual_seed(0)
    model, tracker, x = torch.nn.Linear(64, 48), gradlr.LossTracker(), torch.randn(8, 64)
    opt = gradlr.attach(model, tracker, rank=4, apply=apply)
    called = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and not code.co_name.startswith("<"):
            called.append((str(Path(code.co_filename).relative_to(ROOT)), code.co_name))

    for step in range(25):
        loss = model(x).square().mean()
        sys.setprofile(note if step == 24 else None)
        try:
            tracker(loss).backward()
            if apply == "step":
                opt.step()
        finally:
            sys.setprofile(None)
    opt.detach()
    return called


def import_seconds():
    """Seconds that `import gradlr` adds to `import torch`: the median of five fresh processes."""
    script = "import time, torch; start = time.perf_counter(); import gradlr; print(time.perf_counter() - start)"
    return statistics.median(float(_run("-c", script)) for _ in range(5))


def imports_dynamo():
    """Whether `import gradlr` imports torch._dynamo."""
    return _run("-c", "import sys, gradlr; print('torch._dynamo' in sys.modules)").strip() == "True"


def mypy_errors():
    """Of the whole package, with the repository's settings; None without mypy."""
    if _run("-c", "import importlib.util as u; print(u.find_spec('mypy') is not None)").strip() != "True":
        return None
    return _run("-m", "mypy", "gradlr", checks=False).count(": error:")


def _run(*arguments, checks=True):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT.parent, capture_output=True, text=True, check=checks)
    return done.stdout


def figures():
    """(name, value, target or "") one by one."""
    yield "core lines (without apps, integrations, __main__)", lines(core()), "<= 6600"
    yield "all lines", lines(sources()), "<= 12500"
    yield "loose files", sum(path.is_file() for path in ROOT.iterdir()), "<= 9"
    yield "rooms", len(rooms()), "<= 20"
    yield "floors", floors(), "<= 11"
    yield "import circles", len(import_circles()), "0"
    yield "imports against the layers", len(misplaced_imports()), "0"
    yield "methods of the largest class", largest(methods()), "<= 20"
    yield "depth of inheritance", largest(depths()), "<= 2"
    for apply, most, files in (("backward", 70, 10), ("step", 110, 12)):
        called = calls(apply)
        yield f"calls of one update, apply={apply!r}", len(called), f"<= {most}"
        yield f"files they lie in, apply={apply!r}", len({file for file, _ in called}), f"<= {files}"
    yield "seconds of import on top of torch", f"{import_seconds():.2f}", "<= 0.4"
    yield "torch._dynamo imported", imports_dynamo(), "False"
    errors = mypy_errors()
    yield "mypy errors", "not installed" if errors is None else errors, "0"
    yield "comments per line of code", f"{comment_share():.1%}", ">= 4%"
    yield "ifs per 100 lines of code", f"{ifs():.1f}", "<= 9"
    yield "lines of a function body", f"{body_lines():.1f}", "6 to 9"
    yield "public names documented", f"{documented_share():.0%}", "100%"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT.parent))
    if "calls" in sys.argv:
        for apply in ("backward", "step"):
            print(f"apply={apply!r}", *(f"    {file:<32} {function}" for file, function in calls(apply)), sep="\n")
        sys.exit()
    for name, value, target in figures():
        print(f"{name:<52} {value!s:<28} {target}", flush=True)
