"""Text without prompts: which documents a file, a folder or rows with `text` hold, whole and named."""

import gzip
import json

import pandas as pd
import pytest
from conftest import SHARED

from sources.rows import read_texts
from utils import UsageError

CASES = SHARED.parent / "cases"


def documents(spec, option="--forget_text"):
    (source,) = read_texts([str(spec)], option)
    assert all(row.is_text and row.prompt == "" and row.source == source.rows[0].source for row in source.rows)
    return {row.document: row.response for row in source.rows}


def test_a_file_of_text_is_one_document_whole(tmp_path):
    text = "Chapter 1\n\nThe keeper slept.\n  He snored — loudly.\n"
    (tmp_path / "book.txt").write_bytes(text.replace("\n", "\r\n").encode())
    (tmp_path / "book.md").write_text(text, encoding="utf-16")
    (tmp_path / "old.txt").write_bytes(text.encode("utf-16-be"))  # without a byte order mark
    (tmp_path / "small.md.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    for name in ("book.txt", "book.md", "old.txt", "small.md.gz"):
        assert documents(tmp_path / name) == {name: text}
    assert read_texts([str(tmp_path / "small.md.gz")], "x")[0].rows[0].source == "small"


def test_rows_with_text_are_documents_named_by_their_row(tmp_path):
    rows = [{"text": "one\ntwo", "id": 5}, {"text": "", "id": 6}, {"text": "drei ä"}]
    expected = {"#1": "one\ntwo", "#3": "drei ä"}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps({"data": rows}, indent=1).encode()))
    pd.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    pd.DataFrame(rows).to_csv(tmp_path / "d.tsv", sep="\t", index=False)
    for name in ("a.jsonl", "b.json.gz", "c.parquet", "d.tsv"):
        assert documents(tmp_path / name) == {name + place: text for place, text in expected.items()}
        assert read_texts([str(tmp_path / name)], "x")[0].notes == ["1 documents are empty and are not used"]


def test_a_folder_gives_every_text_in_it_and_names_what_it_leaves(tmp_path):
    (tmp_path / "part/.git").mkdir(parents=True)
    (tmp_path / "part/.git/x.txt").write_text("hidden")
    (tmp_path / "part/b.md").write_text("B")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "c.jsonl").write_text('{"text": "C1"}\n{"text": "C2"}\n')
    (tmp_path / "scan.pdf").write_text("%PDF")
    assert documents(tmp_path) == {"a.txt": "A", "c.jsonl#1": "C1", "c.jsonl#2": "C2", "part/b.md": "B"}
    assert read_texts([str(tmp_path)], "x")[0].notes == ["1 files of other kinds are not read (scan.pdf)"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", b" \n ", "holds no text"),
    ("a.txt", b"\xe4rger", "not UTF-8 text"),
    ("a.txt.gz", b"plain", "cannot be read as txt"),
    ("a.jsonl", b'{"prompt": "x"}', "row 1: has no 'text' field, only prompt; name rows with prompts as --forget_data"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 7}', "row 2: field 'text' must be text, got int"),
    ("a.jsonl", b'{"text": "\\ud800"}', "row 1: field 'text' holds half a character"),
    ("a.pdf", b"x", r"neither a \.txt/\.md/"),
])  # fmt: skip
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"--forget_text {tmp_path / name}.*{message}"):
        read_texts([str(tmp_path / name)], "--forget_text")


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")
def test_the_cases_of_text_are_read_whole():
    assert list(documents(CASES / "book.txt").values()) == [(CASES / "book.txt").read_text()]
    expected = [json.loads(line)["text"] for line in (CASES / "text_only.jsonl").read_text().splitlines()]
    assert list(documents(CASES / "text_only.jsonl").values()) == expected
