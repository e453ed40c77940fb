"""From a .txt or .jsonl file to the records that TRL takes; everything is checked, and every complaint names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArgumentError

ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Document:
    """One document of the data.

    Attributes:
        line: Where it begins in its file, counted from 1.
        record: {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}.
    """

    line: int
    record: dict[str, Any]


def read_documents(path: Path, field: str | None = None) -> list[Document]:
    """Read and check a whole file.

    Args:
        path: `.txt`: documents separated by blank lines. `.jsonl`: one object a line, all of one of the forms {"text": ...},
            {"prompt": ..., "completion": ...} and {"messages": [{"role": ..., "content": ...}, ...]}; blank lines do
            not count.
        field: Name of the text's field, in place of "text"; then no other form is looked for.

    Returns:
        At least one document, in the order of the file, all with the same keys.

    Raises:
        ArgumentError: the file is missing, empty, of another kind, no UTF-8, or a line is no such document. It names the line.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ArgumentError(f"{path}: data comes as .txt or .jsonl, and this ends in {path.suffix or 'nothing'!r}")
    if path.suffix == ".txt" and field is not None:
        raise ArgumentError(f"{path}: --field {field} names a field of a .jsonl file; leave it out for .txt")
    content = _decoded(path)
    documents = list(_paragraphs(content) if path.suffix == ".txt" else _records(path, content, field))
    if not documents:
        raise ArgumentError(f"{path}: line 1: the file is empty ({path.stat().st_size} bytes): there is nothing to train on")
    return documents


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise ArgumentError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise ArgumentError(f"{path}:{line}: no UTF-8 ({byte}: {error.reason}); convert the file first, say with iconv") from None


def _paragraphs(content: str) -> Iterator[Document]:
    lines: list[str] = []
    # Not splitlines(), which also breaks at form feeds and other characters that a text may hold.
    for number, line in enumerate([*content.split("\n"), ""], 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield Document(number - len(lines), {"text": "\n".join(lines)})
            lines = []


def _records(path: Path, content: str, field: str | None) -> Iterator[Document]:
    fields: dict[str, str] | None = None
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _parsed(line, where)
        if fields is None:  # the first line decides, all others follow it
            fields = _fields_of(record, field, where)
        if missing := next((name for name in fields if name not in record), None):
            raise ArgumentError(f"{where}: no field {missing!r}; {_listed(record)}")
        yield Document(number, {
            own: _messages(record[name], where) if own == "messages" else _text(record[name], f"{where}: field {name!r}")
            for name, own in fields.items()
        })  # fmt: skip


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer that Python will not read
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ArgumentError(f"{where}: broken JSON: {reason}") from None
    if not isinstance(record, dict):
        raise ArgumentError(f'{where}: holds a {type(record).__name__}; each line is an object such as {{"text": "..."}}')
    return record


def _fields_of(record: dict[str, Any], field: str | None, where: str) -> dict[str, str]:
    """What is read of each record, and what TRL calls it."""
    if field is not None or "text" in record:
        return {field or "text": "text"}
    if "prompt" in record or "completion" in record:
        return {"prompt": "prompt", "completion": "completion"}
    if "messages" in record:
        return {"messages": "messages"}
    raise ArgumentError(
        f"{where}: no field 'text'; {_listed(record)}. Name the text's field with --field, or give 'prompt' and 'completion', "
        "or 'messages'"
    )


def _text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise ArgumentError(f"{what} is a {type(text).__name__}, not a string")
    if not text.strip():
        raise ArgumentError(f"{what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{what} holds half of a surrogate pair at character {error.start + 1}, which is no text") from None
    return text


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ArgumentError(f"{where}: 'messages' must be a list of at least one message")
    for index, message in enumerate(messages):
        what = f"{where}: messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ArgumentError(f"{what} must be an object whose 'role' is one of {', '.join(ROLES)}")
        if "content" not in message:
            raise ArgumentError(f"{what} has no 'content'; {_listed(message)}")
        _text(message["content"], f"{what}: 'content'")
    return messages


def _listed(record: dict[str, Any]) -> str:
    return f"the fields are {', '.join(map(repr, record))}" if record else "the object is empty"
