"""Data files: the forms that are read, and complaints that name file and line."""

import pytest
from finetune.tiny import jsonl_file

from gradlr import ArgumentError
from gradlr.apps.finetune.reading import read_documents


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_blank_lines_separate_the_documents_of_a_text(tmp_path):
    path = written(tmp_path, "a.txt", "\n\none\r\n two\x0c \n \n\nthree\n\n")
    found = read_documents(path)
    assert [document.record for document in found] == [{"text": "one\n two\x0c "}, {"text": "three"}]
    assert [document.line for document in found] == [3, 7]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read_documents(written(tmp_path, "a.txt", b"\xef\xbb\xbfx"))[0].record == {"text": "x"}


def test_forms_of_jsonl(tmp_path):
    path = jsonl_file(tmp_path / "a.jsonl", [{"text": "a\u2028b"}, "", {"text": "c", "more": 1}])
    found = [(document.line, document.record) for document in read_documents(path)]
    assert found == [(1, {"text": "a\u2028b"}), (3, {"text": "c"})]
    assert read_documents(jsonl_file(path, [{"body": "x"}]), "body")[0].record == {"text": "x"}
    pair = {"prompt": "p", "completion": "c"}
    assert read_documents(jsonl_file(path, [{**pair, "more": 1}]))[0].record == pair
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    assert read_documents(jsonl_file(path, [talk]))[0].record == talk


def test_characters_that_look_like_line_ends_are_none(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"text": "a\u2028b\x85"}\n{"text": "c"}')
    assert [document.line for document in read_documents(path)] == [1, 2]


FINE = '{"text": "fine"}'
BAD = {
    "broken": ([*[FINE] * 6, '{"text": "x'], r"a\.jsonl:7: broken JSON: Unterminated string starting at at column 10"),
    "not an object": ([FINE, "[1]"], r"a\.jsonl:2: holds a list"),
    "deep": ([FINE, "[" * 100_000], r"a\.jsonl:2: broken JSON"),
    "other field": ([FINE, '{"txt": "x", "id": 1}'], r"a\.jsonl:2: no field 'text'; the fields are 'txt', 'id'"),
    "no known field": (['{"txt": "x"}'], r"a\.jsonl:1: no field 'text'; the fields are 'txt'\. Name .* --field"),
    "no field": ([FINE, "{}"], r"a\.jsonl:2: no field 'text'; the object is empty"),
    "number": ([FINE, "", '{"text": 3}'], r"a\.jsonl:3: field 'text' is a int, not a string"),
    "null": (['{"text": null}'], r"a\.jsonl:1: field 'text' is a NoneType"),
    "blank": ([FINE, '{"text": " "}'], r"a\.jsonl:2: field 'text' is empty"),
    "surrogate": ([FINE, r'{"text": "a\ud800"}'], r"a\.jsonl:2: field 'text' holds half of a surrogate pair at character 2"),
    "no completion": (['{"prompt": "x"}'], r"a\.jsonl:1: no field 'completion'; the fields are 'prompt'"),
    "mixed": (['{"prompt": "x", "completion": "y"}', FINE], r"a\.jsonl:2: no field 'prompt'; the fields are 'text'"),
    "no messages": (['{"messages": []}'], r"a\.jsonl:1: 'messages' must be a list of at least one"),
    "role": (['{"messages": [{"role": "me", "content": "x"}]}'], r"a\.jsonl:1: messages\[0\] must be an object whose 'role'"),
    "content": (['{"messages": [{"role": "user"}]}'], r"a\.jsonl:1: messages\[0\] has no 'content'; the fields are 'role'"),
    "empty": ([""], r"a\.jsonl: line 1: the file is empty"),
}


@pytest.mark.parametrize(("lines", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(tmp_path, lines, message):
    with pytest.raises(ArgumentError, match=message):
        read_documents(jsonl_file(tmp_path / "a.jsonl", lines))


FILES = {
    "empty.txt": (b"", r"empty\.txt: line 1: the file is empty \(0 bytes\)"),
    "blank.txt": (b" \n\n", r"blank\.txt: line 1: the file is empty \(3 bytes\)"),
    "latin.txt": ("a\nb\n\nGrüße".encode("latin-1"), r"latin\.txt:4: no UTF-8 \(byte 0xfc: .*iconv"),
    "table.csv": (b"a,b", r"table\.csv: data comes as \.txt or \.jsonl, and this ends in '\.csv'"),
}


@pytest.mark.parametrize(("name", "content", "message"), [(name, *rest) for name, rest in FILES.items()])
def test_a_bad_file_is_named(tmp_path, name, content, message):
    with pytest.raises(ArgumentError, match=message):
        read_documents(written(tmp_path, name, content))


def test_a_missing_file_a_folder_and_a_field_of_a_text(tmp_path):
    with pytest.raises(ArgumentError, match=r"a\.txt: there is no such file"):
        read_documents(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(ArgumentError, match=r"b\.txt: cannot be read"):
        read_documents(tmp_path / "b.txt")
    with pytest.raises(ArgumentError, match="--field body"):
        read_documents(written(tmp_path, "c.txt", "x"), "body")
