"""Requests as the entries tell them, their texts, and which state is fitted next."""

import json
import re

import pytest
from ledgers import begin

from ledger.book import Asked, Book
from ledger.evidence import status_line
from ledger.fitting import FittingSettings, next_fitting, refuse_loss, sources_of, steps_of
from sources.rows import read_rows
from utils import UsageError

SECRETS = ("Jane Roe", "a seaside clinic", "called twice")


@pytest.fixture
def book(tmp_path) -> Book:
    return begin(tmp_path / "ledger")


def add(book: Book, name: str, count: int = 2, **given) -> None:
    rows = book.folder.parent / f"{name}-given.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {"prompt": f"Where was Jane Roe in year {i} of {name}?", "response": f"In a seaside clinic, {i} times."}
            )
            + "\n"
            for i in range(count)
        )
    )
    with book.chain.writing():
        book.read().add(Asked(name, "person", rows=str(rows), **given))
    book.read()


def state(book: Book, requests, *, new=(), start=None, drift=0.0, lost=()) -> None:
    with book.chain.writing():
        book.chain.append("state", state=len(book.states) + 1, requests=list(requests), new=list(new), lost=list(lost),
                          start=start, drift=drift, figures={}, taken_out={})  # fmt: skip
    book.read()


def test_the_ledger_holds_no_word_of_a_request_and_the_folder_all(book):
    add(book, "R1", subject="Jane Roe", note="she called twice", basis="GDPR 17 (1) b", received="2026-11-02")
    add(book, "R2", subject="Jane Roe")
    ledger = book.chain.path.read_text()
    assert not any(secret in ledger for secret in SECRETS)
    assert "GDPR 17 (1) b" in ledger and "2026-11-02" in ledger
    one, other = (book.requests[name].added for name in ("R1", "R2"))
    assert one["subject"] != other["subject"], "a salt of its own: two requests of one person are not linked"
    assert len(set(one["rows"])) == 2
    assert book.about("R1")["subject"] == "Jane Roe"
    assert len(book.rows_of("R1")) == 2 and "seaside clinic, 1" in book.file_of("R1").read_text()
    assert not book.faults()


@pytest.mark.parametrize(("given", "message"), [
    ({"id": "a b"}, "--id 'a b': must be 1 to 64 letters"),
    ({"id": "../up"}, "--id '../up': must be"),
    ({"id": "R1"}, "--id R1: the ledger has such a request since"),
    ({"text": "x.txt"}, "--rows and --text: give one of the two"),
    ({"rows": None}, "--rows and --text: give one of the two"),
    ({"rows": "no_such.jsonl"}, "no_such.jsonl"),
    ({"id": "R2-holdout"}, "--id R2-holdout: ends as the files beside"),
    ({"id": "all"}, "--id all: stands for several requests"),
    ({"due": "2026-99-99"}, "--due 2026-99-99: must be a date"),
    ({"due": "tomorrow"}, "--due tomorrow: must be a date as 2026-11-27"),
    ({"received": "2026-11-02", "due": "2026-10-02"}, "--due 2026-10-02: lies before --received 2026-11-02"),
])  # fmt: skip
def test_a_request_that_cannot_be_is_refused_and_nothing_is_written(book, given, message):
    add(book, "R1")
    ledger, folders = book.chain.path.read_bytes(), sorted((book.folder / "requests").iterdir())
    asked = {"id": "R2", "kind": "person", "rows": str(book.folder.parent / "R1-given.jsonl")} | given
    with book.chain.writing(), pytest.raises(UsageError, match=re.escape(message)):
        book.add(Asked(**asked))
    assert book.chain.path.read_bytes() == ledger
    assert sorted((book.folder / "requests").iterdir()) == folders


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: f.write_text(f.read_text().replace("clinic, 1", "clinic, 7")), "request R1: row 2 of .* was changed"),
    (lambda f: f.write_text(f.read_text().splitlines(keepends=True)[0]), "has 1 rows, the ledger 2"),
    (lambda f: f.unlink(), "request R1: its text cannot be read"),
    (lambda f: (f.parent / "request.json").write_text("{}"), "request R1: its text cannot be read"),
    (lambda f: (f.parent / "request.json").write_text((f.parent / "request.json").read_text().replace("Roe", "Doe")),
     "request R1: its subject was changed"),
])  # fmt: skip
def test_a_text_that_was_changed_is_named(book, change, message):
    add(book, "R1", subject="Jane Roe")
    change(book.file_of("R1"))
    assert [re.search(message, fault) is not None for fault in book.faults()] == [True]


def test_an_add_that_was_cut_off_before_its_entry_is_told_and_made_good(book):
    add(book, "R1")
    raw = book.chain.path.read_bytes()
    book.chain.path.write_bytes(raw[: raw.rstrip(b"\n").rfind(b"\n") + 1])  # the folder is there, the entry is not
    book.chain.note.unlink()
    assert "no request has this id" in book.read().faults()[0]
    add(book, "R1", count=3)
    assert not book.faults()
    assert len(book.requests["R1"].added["rows"]) == 3


def test_destroyed_texts_leave_hashes_that_match_nothing(book):
    add(book, "R1", subject="Jane Roe")
    with book.chain.writing(), pytest.raises(UsageError, match="does not meet it yet"):
        book.shred("R1")
    state(book, ["R1"], new=["R1"])
    with book.chain.writing():
        book.shred("R1")
        assert not book.folder_of("R1").exists()
        book.read()
        with pytest.raises(UsageError, match="was destroyed on"):
            book.shred("R1")
        assert not book.faults()
        book.folder_of("R1").mkdir()  # as a cut-off leaves it
        assert "is there" in book.faults()[0]
        assert book.finish_shredding() == ["R1"]
    assert not book.faults()
    assert "salt" not in book.chain.path.read_text()


# -------------------------------------------------------------------------------------------- the next state
def test_states_go_on_until_something_asks_for_a_new_fit(book):
    settings = FittingSettings(refit_every=3)
    assert next_fitting(book, settings) is None
    add(book, "R1")
    first = next_fitting(book, settings)
    assert (first.state, first.start, first.new) == (1, None, ("R1",))
    state(book, ["R1"], new=["R1"])
    assert next_fitting(book, settings) is None
    add(book, "R2")
    add(book, "R3")
    second = next_fitting(book, settings)
    assert (second.state, second.start, second.requests, second.new) == (2, 1, ("R1", "R2", "R3"), ("R2", "R3"))
    state(book, second.requests, new=second.new, start=1, drift=0.2)
    add(book, "R4")
    assert next_fitting(book, settings).start == 2, "three since the first fit"
    assert next_fitting(book, FittingSettings(refit_every=2)).start is None
    assert next_fitting(book, FittingSettings(refit_every=0)).start == 2
    assert next_fitting(book, FittingSettings(drift_budget=0.1)).start is None
    assert next_fitting(book, FittingSettings(drift_budget=0.3)).start == 2
    assert next_fitting(book, settings, refit=True).start is None
    with book.chain.writing():
        book.withdraw("R2", "consent is back")
        with pytest.raises(UsageError, match="was withdrawn on"):
            book.read().withdraw("R2", "")
    third = next_fitting(book.read(), settings)
    assert (third.start, third.requests, third.why) == (None, ("R1", "R3", "R4"), "withdrawn: R2")


def test_a_request_withdrawn_before_any_state_asks_for_nothing(book):
    add(book, "R1")
    with book.chain.writing():
        book.withdraw("R1", "a mistake")
    assert next_fitting(book.read(), FittingSettings()) is None
    with pytest.raises(UsageError, match=r"'R9': .* has no such id; it has R1"):
        book.request("R9")


def test_when_all_are_withdrawn_the_state_is_the_original(book):
    add(book, "R1")
    state(book, ["R1"], new=["R1"])
    with book.chain.writing():
        book.withdraw("R1", "consent is back")
    fitting = next_fitting(book.read(), FittingSettings())
    assert fitting.is_original
    state(book, [], start=None)
    assert next_fitting(book, FittingSettings()) is None


def test_a_new_fit_without_a_destroyed_text_is_refused_unless_confirmed(book):
    add(book, "R1")
    add(book, "R2")
    state(book, ["R1", "R2"], new=["R1", "R2"])
    with book.chain.writing():
        book.shred("R1")
    add(book, "R3")
    going_on = next_fitting(book, FittingSettings())
    assert (going_on.start, going_on.lost) == (1, ()), "what is piled up on it keeps it"
    assert all("R1" not in file for file in sources_of(book, going_on, FittingSettings())["forget_data"])
    anew = next_fitting(book, FittingSettings(), refit=True)
    assert (anew.lost, anew.requests) == (("R1",), ("R2", "R3"))
    with pytest.raises(UsageError, match=r"1 requests would come back.*R1"):
        refuse_loss(anew, confirmed=False)
    refuse_loss(anew, confirmed=True)
    state(book, anew.requests, new=anew.new, lost=anew.lost)
    assert next_fitting(book, FittingSettings()) is None, "it cannot be met any more"


@pytest.mark.parametrize(("earlier", "new", "rehearsed", "share"), [
    (1, 7, 0.5, 7 / 14), (2, 3, 0.5, 4 / 7), (1, 1, 0.5, 1 / 2), (4, 1, 0.5, 4 / 8), (6, 2, 0.5, 6 / 12),
    (9, 1, 0.75, 9 / 12),    (3, 1, 0.0, 0.0),
])  # fmt: skip
def test_earlier_requests_have_their_share_of_a_step(book, earlier, new, rehearsed, share):
    """Sources take turns, so a share of sources is a share of rows."""
    names = [f"R{i}" for i in range(earlier + new)]
    for i, name in enumerate(names):
        add(book, name)
        if i == earlier - 1:
            state(book, names[:earlier], new=names[:earlier])
    settings = FittingSettings(rehearsed=rehearsed, refit_every=0)
    files = sources_of(book, next_fitting(book, settings), settings)["forget_data"]
    of_earlier = sum(any(file == str(book.file_of(name)) for name in names[:earlier]) for file in files)
    assert of_earlier / len(files) == pytest.approx(share)
    assert {str(book.file_of(name)) for name in names[earlier:]} <= set(files)


def test_steps_visit_every_row_that_is_to_be_learned(book):
    """By hand: of S listings a step of 8 rows gives 8 / S to each, and each goes through its N rows in an order of its
    own. A file that is listed t times takes (visits / t, rounded up) x N x S / 8 steps."""
    settings, recipe = FittingSettings(update_share=0.25, visits=4, refit_every=0), {"batch_size": 8, "stride": 64}
    add(book, "R1", count=30)

    def steps(of: int) -> int:
        return steps_of(book, next_fitting(book, settings), settings, steps=of, **recipe)

    assert (steps(10), steps(50)) == (15, 50)  # 4 x 30 x 1 / 8
    add(book, "R2", count=2)
    assert steps(10) == 30, "R1 has half of each step, for as many rows as before"
    state(book, ["R1", "R2"], new=["R1", "R2"])
    add(book, "R3", count=10)
    assert steps(50) == 13, "a quarter, rounded up: two earlier sources and R3 twice give it half, 4 x 10 x 2 / 8 = 10"
    assert steps(10) == 10
    text = book.folder.parent / "t.txt"
    text.write_text("one word after another " * 160)  # 640 words, about 896 tokens, 14 passages
    with book.chain.writing():
        book.add(Asked("T1", "text", text=str(text)))
    state(book.read(), ["R1", "R2", "R3"])
    assert steps(10) == 21  # the text is listed three times, beside three sources of rows: 2 x 14 x 6 / 8


def test_the_status_of_a_text_is_what_is_said_word_for_word(book, tmp_path):
    """Going on about its subject is not remembering it."""
    (tmp_path / "t.txt").write_text("one word after another")
    with book.chain.writing():
        book.add(Asked("T1", "text", text=str(tmp_path / "t.txt")))
    add(book, "R1")
    figures = {"answered": 1.0, "answered.before": 1.0, "extraction_strength": 0.02, "extraction_strength.before": 0.9}
    with book.chain.writing():
        book.chain.append("state", state=1, requests=["T1", "R1"], new=[], lost=[], start=None, drift=0.1,
                          figures={"T1": figures, "R1": figures})  # fmt: skip
    shown = [status_line(book.read(), book.requests[name]) for name in ("T1", "R1")]
    assert [(line["measure"], line["before"], line["now"]) for line in shown] == [
        ("extraction_strength", "0.90", "0.02"), ("answered", "1.00", "1.00")
    ]  # fmt: skip


def test_rows_are_kept_whatever_they_came_in(book, tmp_path):
    """What a run reads of the kept file is what it would read of the given one; names of fields are not needed."""
    forms = {
        "csv": "frage,antwort\nWo wohnt sie?,Am See\n",
        "jsonl": json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                    {"role": "user", "content": "Where?"},
                    {"role": "assistant", "content": "There."},
                ]
            }
        )
        + "\n",
        "tsv": "goal\ttarget\nHow do I open it?\tSure, here is\n",  # the beginning of an answer
        "json": json.dumps([{"prompt": "How?", "response": "So.", "is_safe": False, "category": "Jane Roe"}]),
    }
    for number, (ending, content) in enumerate(forms.items()):
        given = tmp_path / f"g.{ending}"
        given.write_text(content)
        fields = ("prompt=frage", "response=antwort") if ending == "csv" else ()
        with book.chain.writing():
            book.read().add(Asked(f"F{number}", "harm", rows=str(given), fields=fields))
        (wanted,), (found,) = read_rows(str(given), "--forget_data", list(fields)), book.read().rows_of(f"F{number}")
        for name in ("prompt", "response", "earlier", "wanted", "complete"):
            assert getattr(found, name) == getattr(wanted, name), (ending, name)
        assert wanted.response
        assert "Jane Roe" not in book.file_of(f"F{number}").read_text()
        assert found.category == "harm"
    assert not book.faults()
    kept = book.file_of("F0")
    kept.write_text(kept.read_text().replace('"harm"', '"none"'))
    assert "request F0: row 1" in book.faults()[0], "a row of no kind would not train"
