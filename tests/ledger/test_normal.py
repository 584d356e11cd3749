"""What requests name is taken out of the normal side, and known by its place once their text is destroyed."""

import hashlib
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
    specs = {option: [str(tmp_path / name) for name in names]
             for option, names in (("normal_data", rows), ("normal_text", texts))}  # fmt: skip
    return normal_side(book, list(requests), specs, [], tmp_path / "copies")


def rows_taken(side, tmp_path: Path) -> dict:
    return side.taken_out["normal_data"][str(tmp_path / "rows.jsonl")]["rows"]


def test_rows_that_name_or_ask_or_quote_are_taken_out_and_others_stay(book, tmp_path):
    rows = str(tmp_path / "rows.jsonl")
    assert rows_taken(side_of(book, tmp_path, "P"), tmp_path) == {"P": [1, 2, 4, 6]}
    side = side_of(book, tmp_path, "PT")
    assert rows_taken(side, tmp_path) == {"P": [1, 2, 4, 6], "T": [5]}
    write_copies(side.taken_out, [], tmp_path / "copies")
    (source,) = read_sources(side.of("normal_data", [rows]), "--normal_data")
    assert [row.prompt for row in source.rows] == ["Who is Jane Rowe?", "What is rain?"]
    assert Path(side.of("normal_data", [rows])[0]).name == "rows.jsonl", "a report calls it as before"
    nothing = side_of(book, tmp_path, "")
    assert nothing.of("normal_data", [rows]) == [rows] and not nothing.taken_out["normal_data"]


def test_paragraphs_of_a_text_are_taken_out_and_a_source_of_both_kinds_is_two(book, tmp_path):
    """A folder may be given as rows and as text: what is found of one kind is none of the other's."""
    text = str(tmp_path / "others.txt")
    side = side_of(book, tmp_path, "T", rows=("others.txt",), texts=("others.txt",))
    assert [noted["rows"]["T"] for noted in (side.taken_out[option][text] for option in side.taken_out)] == [
        [2, 3], [2, 3]
    ]  # fmt: skip
    write_copies(side.taken_out, [], tmp_path / "copies")
    (source,) = read_texts(side.of("normal_text", [text]), "--normal_text")
    assert [row.response for row in source.rows] == ["A tale of hens.\n\nThe hens went home."]
    (source,) = read_sources(side.of("normal_data", [text]), "--normal_data")
    assert [row.prompt for row in source.rows] == ["A tale of hens.", "The hens went home."]


def test_a_turn_of_a_talk_is_no_question_of_its_own(book, tmp_path):
    """A talk that ends with `Why?` takes out the same talk, and none that holds `Why?` somewhere."""
    talk = [{"role": "user", "content": "I met her."}, {"role": "assistant", "content": "Where?"},
            {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]  # fmt: skip
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    with book.chain.writing():
        book.read().add(Asked("Q", "fact", rows=str(tmp_path / "talk.jsonl")))
    book.read()
    others = [{"prompt": "Why?", "response": "For fun."}, {"messages": talk}, {"prompt": "Ask me.", "response": "Why?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    assert rows_taken(side_of(book, tmp_path, "Q"), tmp_path) == {"Q": [2]}


def test_a_side_of_which_nothing_is_left_is_refused(book, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UsageError, match="every row names what a request asks to forget"):
        side_of(book, tmp_path, "P").of("normal_data", [str(tmp_path / "rows.jsonl")])


def test_a_source_that_changes_after_it_was_looked_through_is_refused(book, tmp_path):
    side = side_of(book, tmp_path, "P")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    with pytest.raises(UsageError, match="was changed while the state was planned"):
        write_copies(side.taken_out, [], tmp_path / "copies")


def test_places_are_known_after_the_text_is_destroyed_unless_the_file_has_changed(book, tmp_path):
    def note(number: int) -> None:
        with book.chain.writing():
            book.chain.append("state", state=number, requests=["P", "T"], new=[], lost=[], start=None,
                              taken_out=side_of(book, tmp_path, "PT").taken_out)  # fmt: skip
        book.read()

    def write(rows) -> None:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    note(1)
    with book.chain.writing():
        book.read().shred("P")
    book.read()
    assert rows_taken(side_of(book, tmp_path, "PT"), tmp_path) == {"P": [1, 2, 4, 6], "T": [5]}
    write(ROWS[1:])
    for number in (2, 3):  # the warning stands until the file is as it was: a later state's notes do not hide it
        side = side_of(book, tmp_path, "PT")
        assert (rows_taken(side, tmp_path), side.unknown) == ({"T": [4]}, ["P"])
        note(number)
    write(ROWS)
    assert rows_taken(side_of(book, tmp_path, "PT"), tmp_path) == {"P": [1, 2, 4, 6], "T": [5]}
    write([ROWS[2], ROWS[6]])  # the user took all of them out
    side = side_of(book, tmp_path, "PT")
    assert not side.taken_out["normal_data"] and not side.unknown
    held = book.chain.path.read_text()
    assert hashlib.sha256(json.dumps([ROWS[0]], sort_keys=True).encode()).hexdigest() not in held
