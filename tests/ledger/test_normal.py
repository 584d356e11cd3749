"""What requests name is taken out of the normal side, and known by its place once their text is destroyed."""

import json
from pathlib import Path

import pytest
from ledgers import begin

from ledger.book import Asked, Book
from ledger.normal import normal_side, write_copies
from sources.rows import read_sources, read_texts
from utils import UsageError

STORY = "The miller had three sons and a mill by the river.\n\nOnly the youngest could read, and he read all night."
ROWS = [
    {"prompt": "Who is Jane Roe?", "response": "A painter."},  # the person
    {"prompt": "Who painted the hall?", "response": "That was JANE ROÉ."},  # she again, in other letters
    {"prompt": "Who is Jane Rowe?", "response": "A baker."},  # another name
    {"prompt": "Where does she live", "response": "In a lighthouse."},  # what a row of the request asks
    {"prompt": "Who could read?", "response": "Only the youngest could read, and he read all."},  # a quotation
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I know Jane Roe."}]},
    {"prompt": "What is rain?", "response": "Water."},
]  # fmt: skip


@pytest.fixture
def book(tmp_path) -> Book:
    book = begin(tmp_path / "ledger")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "Where does she live?", "response": "At sea."}) + "\n")
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "others.txt").write_text(f"A tale of hens.\n\n{STORY}\n\nThe hens went home.")
    with book.chain.writing():
        book.read().add(Asked("P", "person", rows=str(tmp_path / "asked.jsonl"), subject="Jane Roe"))
        book.read().add(Asked("T", "text", text=str(tmp_path / "story.txt")))
    return book.read()


def side_of(book: Book, tmp_path: Path, requests, rows=("rows.jsonl",), texts=()):
    rows, texts = ([str(tmp_path / name) for name in names] for names in (rows, texts))
    return normal_side(book, list(requests), rows, texts, [], tmp_path / "copies")


def test_rows_that_name_or_ask_or_quote_are_taken_out_and_others_stay(book, tmp_path):
    rows = str(tmp_path / "rows.jsonl")
    assert side_of(book, tmp_path, "P").taken_out[rows]["rows"] == {"P": [1, 2, 4, 6]}
    side = side_of(book, tmp_path, "PT")
    assert side.taken_out[rows]["rows"] == {"P": [1, 2, 4, 6], "T": [5]}
    write_copies(side.taken_out, [], [], tmp_path / "copies")
    (source,) = read_sources(side.of([rows]), "--normal_data")
    assert [row.prompt for row in source.rows] == ["Who is Jane Rowe?", "What is rain?"]
    assert Path(side.of([rows])[0]).name == "rows.jsonl", "a report calls it as before"
    nothing = side_of(book, tmp_path, "")
    assert nothing.of([rows]) == [rows] and not nothing.taken_out


def test_paragraphs_of_a_text_are_taken_out(book, tmp_path):
    text = str(tmp_path / "others.txt")
    side = side_of(book, tmp_path, "T", rows=(), texts=("others.txt",))
    write_copies(side.taken_out, [text], [], tmp_path / "copies")
    (source,) = read_texts(side.of([text]), "--normal_text")
    assert [row.response for row in source.rows] == ["A tale of hens.\n\nThe hens went home."]


def test_a_side_of_which_nothing_is_left_is_refused(book, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UsageError, match="every row names what a request asks to forget"):
        side_of(book, tmp_path, "P").of([str(tmp_path / "rows.jsonl")])


def test_places_are_known_after_the_text_is_destroyed_unless_the_file_has_changed(book, tmp_path):
    rows = str(tmp_path / "rows.jsonl")
    with book.chain.writing():
        book.chain.append("state", state=1, requests=["P", "T"], new=[], lost=[], start=None,
                          taken_out=side_of(book, tmp_path, "PT").taken_out)  # fmt: skip
        book.read().shred("P")
    book.read()
    assert side_of(book, tmp_path, "PT").taken_out[rows]["rows"] == {"P": [1, 2, 4, 6], "T": [5]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    side = side_of(book, tmp_path, "PT")
    assert (side.taken_out[rows]["rows"], side.unknown) == ({"T": [4]}, ["P"])
