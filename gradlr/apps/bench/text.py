"""Real text without downloads: the source code and documentation of Python's own standard library."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import itertools
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE_HALF, DOCUMENTATION_HALF = 0, 1
VALIDATION_FRACTION = 0.1
MINIMUM_BYTES = 100_000
MINIMUM_DOCSTRING = 80

# Besides packages that are not the library itself and its tests: encodings and pydoc_data are generated tables.
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data",
}  # fmt: skip
# Build settings of one machine, not text that every installation shares.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class TextNotFoundError(RuntimeError):
    """The running Python's standard library holds too little readable source code."""


@dataclass(frozen=True)
class Corpus:
    """A text as bytes, split by whole documents.

    Attributes:
        name: What the text is, for tables and checkpoints.
        train: 1-D uint8 CPU tensor, about the first 90 % of the bytes.
        validation: 1-D uint8 CPU tensor, the remaining documents.
    """

    name: str
    train: Tensor
    validation: Tensor


@functools.cache
def library_sources() -> Corpus:
    """Source code, without docstrings, of one half of the standard library (about 4 MB); the same for each installed Python.

    Raises:
        TextNotFoundError: there are less than 100 kB.
    """
    return _corpus("library sources", SOURCE_HALF, _without_docstrings)


@functools.cache
def documentation() -> Corpus:
    """Docstrings of the half of the standard library that library_sources() leaves out (about 0.8 MB); otherwise the same."""
    return _corpus("documentation", DOCUMENTATION_HALF, _docstrings)


def library_folder() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_name(path: Path) -> str:
    """Name of the top-level module or package that a standard-library file belongs to."""
    return path.relative_to(library_folder()).parts[0].removesuffix(".py")


def module_files(half: int) -> list[Path]:
    """Python files of one half (0 or 1) of the top-level modules, sorted; a name's half never changes."""
    root, files = library_folder(), list[Path]()
    for entry in root.iterdir() if root.is_dir() else ():
        # Skipped here as well as below, because large folders such as site-packages are better never walked.
        is_text = entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith(_SKIPPED_PREFIXES)
        if is_text and zlib.crc32(module_name(entry).encode()) % 2 == half:
            files += entry.rglob("*.py") if entry.is_dir() else [entry] if entry.suffix == ".py" else []
    return sorted(path for path in files if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))


def sources(half: int) -> Iterator[tuple[Path, str]]:
    """The files of one half with what they say, those left out that cannot be read."""
    for path in module_files(half):
        with contextlib.suppress(OSError, ValueError):
            yield path, path.read_text(encoding="utf-8")


def batches(
    data: Tensor, *, batch_size: int, length: int, steps: int, seed: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows for training steps `start` to `steps - 1`.

    Args:
        data: 1-D uint8 tensor.
        batch_size, length: Windows a batch, and bytes a window.
        steps, seed, start: Batch i depends on (seed, i) alone, so `start=i` resumes without replaying.

    Returns:
        Pairs (inputs, targets), each int64 of shape (batch_size, length); targets are the inputs moved on by one byte.

    Raises:
        ValueError: data holds no whole window.
    """
    places = _window_places(data, length)

    def draw(step: int) -> Tensor:
        return torch.randint(places, (batch_size,), generator=generator_of(seed, step))

    return (_windows(data, draw(step), length) for step in range(start, steps))


def mixed_seed(seed: int, what: object) -> int:
    """A seed of 63 bits for one of the things that follow from `seed`."""
    # A digest, because neighbouring seeds of the generator itself may give related first numbers.
    return int.from_bytes(hashlib.blake2b(f"{seed}:{what}".encode(), digest_size=8).digest(), "little") >> 1


def generator_of(seed: int, what: object) -> torch.Generator:
    """A generator for one of the things that follow from `seed`, on the CPU."""
    return torch.Generator().manual_seed(mixed_seed(seed, what))


def validation_batches(data: Tensor, *, batch_size: int, length: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of fixed windows spread evenly over data; shapes, dtypes and errors as for batches()."""
    places = _window_places(data, length)
    starts = torch.arange(count * batch_size) * (places - 1) // max(count * batch_size - 1, 1)
    return (_windows(data, chunk, length) for chunk in starts.view(count, batch_size))


def _window_places(data: Tensor, length: int) -> int:
    places = data.numel() - length
    if data.dim() != 1 or places < 1:
        raise ValueError(f"need a 1-D text of more than {length} bytes, got shape {tuple(data.shape)}")
    return places


def _windows(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    window = data[starts[:, None] + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]


def _corpus(name: str, half: int, extract: Callable[[str, ast.Module], str]) -> Corpus:
    documents = []
    for _, source in sources(half):
        # Of the library's own files, some are no Python on purpose.
        with contextlib.suppress(ValueError, SyntaxError):
            documents.append(extract(source, _parse(source)).encode())
    documents = [document for document in documents if document]
    sizes = [len(document) for document in documents]
    if (total := sum(sizes)) < MINIMUM_BYTES:
        raise TextNotFoundError(
            f"{name}: found {total} bytes in {library_folder()}, need {MINIMUM_BYTES}; use a Python whose standard "
            "library is installed as plain .py files (not zipped, stripped or compiled only)"
        )
    cut = _split_index(sizes)
    train, validation = (
        torch.frombuffer(bytearray(b"\n\n".join(part)), dtype=torch.uint8) for part in (documents[:cut], documents[cut:])
    )
    return Corpus(name, train, validation)


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        # Old modules hold escapes that newer parsers warn about.
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _split_index(sizes: list[int]) -> int:
    """Number of leading documents that hold the training bytes; at least one document stays on each side."""
    budget = (1 - VALIDATION_FRACTION) * sum(sizes)
    fitting = sum(used <= budget for used in itertools.accumulate(sizes))
    return min(max(fitting, 1), len(sizes) - 1)


def _documented_nodes(tree: ast.Module) -> list[tuple[_Documented, str]]:
    """Nodes with a docstring, and that, in the order of the text."""
    nodes = [(node, ast.get_docstring(node)) for node in ast.walk(tree) if isinstance(node, _Documented)]
    return sorted(((node, text) for node, text in nodes if text), key=lambda found: found[0].body[0].lineno)


def _docstrings(source: str, tree: ast.Module) -> str:
    return "\n\n".join(text for _, text in _documented_nodes(tree) if len(text) > MINIMUM_DOCSTRING)


def _without_docstrings(source: str, tree: ast.Module) -> str:
    cut: set[int] = set()
    for node, _ in _documented_nodes(tree):
        first = node.body[0]
        cut.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    # Split at "\n" only: splitlines() also splits at form feeds, which the parser does not count as lines.
    return "\n".join(line for number, line in enumerate(source.split("\n"), 1) if number not in cut)
