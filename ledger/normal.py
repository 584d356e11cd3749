"""The normal side of a ledger's runs without what requests name: what is found there is taken out of it, and said.

A source of rows loses those that name a person whom a request is about, that ask what a request's row asks, or that
quote a text; a source of text loses such paragraphs. The sources themselves are not touched: runs and evaluations get
a copy of what is left of them. Rows of a request whose text is destroyed are known by their places, as long as what
lies between them is the same. What is noted of a source is a hash of what is left, so that nobody can try a guess at
what was taken out against it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from ledger.book import Book, Request
from ledger.find import LONG, SHINGLE, UNSPACED, normalised, shingles, texts_in
from ledger.kept import prompts
from ledger.settings import NORMAL
from sources.rows import Row, read_records_with_rows, read_texts
from utils import UsageError, write_json_lines

PARAGRAPH = re.compile(r"\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of the normal side, cut into records: rows, or paragraphs of text. asked: of each record the
    `questions` of its rows. documents: of each paragraph the number of its text; None: rows."""

    spec: str
    records: list[dict]
    asked: list[set[str]]
    documents: list[int] | None = None

    @classmethod
    def read(cls, spec: str, option: str, fields: list[str]) -> Source:
        """Read a source. Values that JSON does not have are left out of it. Raises UsageError."""
        if not NORMAL[option]:  # rows
            pairs = read_records_with_rows(spec, f"--{option}", fields)
            records = [json.loads(json.dumps(record, default=lambda _: None)) for record, _ in pairs]
            return cls(spec, records, [questions(rows) for _, rows in pairs])
        (source,) = read_texts([spec], f"--{option}", fields)
        parts = [(number, part) for number, row in enumerate(source.rows) for part in PARAGRAPH.split(row.response)]
        return cls(spec, [{"text": part} for _, part in parts], [set()] * len(parts), [number for number, _ in parts])

    @functools.cached_property
    def words(self) -> list[list[list[str]]]:
        """The words of each text in each record."""
        return [[words_of(text) for text in texts_in(record)] for record in self.records]

    @functools.cached_property
    def places_of_questions(self) -> dict[str, set[int]]:
        """The numbers (from 1 on) of the records that ask a question; so many requests need one look at them all."""
        return _places((question, number) for number, asked in enumerate(self.asked, 1) for question in asked)

    @functools.cached_property
    def places_of_words(self) -> dict[str, set[int]]:
        """The numbers of the records that hold a word."""
        return _places(
            (word, number) for number, texts in enumerate(self.words, 1) for words in texts for word in words
        )

    def places_of(self, quoted: set[tuple[str, ...]]) -> dict[tuple[str, ...], set[tuple[int, int]]]:
        """Of each of some shingles, the numbers of record and text within it that hold it."""
        texts = ((number, place, words) for number, of_record in enumerate(self.words, 1)
                 for place, words in enumerate(of_record)) if quoted else ()  # fmt: skip
        return _places((shingle, (number, place)) for number, place, words in texts
                       for shingle in shingles(words) & quoted)  # fmt: skip

    def hash_without(self, taken: set[int]) -> str:
        """Return a hash of the records but those of some numbers (from 1 on)."""
        left = [record for number, record in enumerate(self.records, 1) if number not in taken]
        return hashlib.sha256(json.dumps(left, sort_keys=True).encode()).hexdigest()

    def write_rest(self, path: Path, taken: set[int]) -> None:
        """Write what is left without the records of some numbers (from 1 on)."""
        left = [place for place in range(len(self.records)) if place + 1 not in taken]
        if self.documents is None:
            write_json_lines(path, [self.records[place] for place in left])
            return
        texts: dict[int, list[str]] = {}
        for place in left:
            texts.setdefault(self.documents[place], []).append(self.records[place]["text"])
        write_json_lines(path, [{"text": "\n\n".join(parts)} for parts in texts.values()])


def questions(rows: list[Row]) -> set[str]:
    """Return what tells prompts, with their earlier turns, from others, whatever their case and punctuation."""
    return prompts(rows) | {" ".join(normalised(row.key)) for row in rows} - {""}


def words_of(text: str) -> list[str]:
    """Return the words of a text as `find` compares them; of a script without spaces, its characters."""
    words = normalised(text)
    return list("".join(words)) if UNSPACED.search(text) else words


# ------------------------------------------------------------------------------------------------ what is planned
@dataclasses.dataclass(frozen=True)
class NormalSide:
    """What runs and evaluations of a state are given. files: by option and spec the spec itself, or the copy of what is
    left of it, None if nothing is. taken_out: by option and spec, of those that lost any, {"count": of records, "left":
    hash of the others, "rows": {request: numbers from 1 on}}. unknown: requests of destroyed text, of which nothing is
    known in a source that has changed since."""

    files: dict[str, dict[str, str | None]]
    taken_out: dict[str, dict[str, dict]]
    unknown: list[str]

    def of(self, option: str, specs: list[str]) -> list[str]:
        """Return what stands for some sources. Raises UsageError if there were some, and nothing is left of any."""
        found = [path for spec in specs if (path := self.files[option][spec])]
        if specs and not found:
            raise UsageError(f"{', '.join(dict.fromkeys(specs))}: every row names what a request asks to forget; give "
                             "the ledger other normal rows")  # fmt: skip
        return found


def normal_side(
    book: Book, requests: list[str], specs: dict[str, list[str]], fields: list[str], folder: Path
) -> NormalSide:  # fmt: skip
    """Return what is left of sources beside some requests. specs: by option; folder: where copies lie. Raises
    UsageError."""
    files: dict[str, dict[str, str | None]] = {}
    taken_out: dict[str, dict[str, dict]] = {}
    unknown: set[str] = set()
    wanted = {name: Wanted.read(book, book.requests[name]) for name in requests if not book.requests[name].shredded}
    for option in NORMAL:
        files[option], taken_out[option] = {}, {}
        for spec in dict.fromkeys(specs[option]):
            source = Source.read(spec, option, fields)
            found, not_known = found_in(book, requests, wanted, source, option)
            unknown |= not_known
            files[option][spec] = spec
            if found:
                taken = set().union(*found.values())
                is_left = len(taken) < len(source.records)
                files[option][spec] = str(copy_of(option, spec, folder)) if is_left else None
                taken_out[option][spec] = {"count": len(source.records), "left": source.hash_without(taken),
                                           "rows": found}  # fmt: skip
    return NormalSide(files, taken_out, sorted(unknown))


def copy_of(option: str, spec: str, folder: Path) -> Path:
    """Return where the copy of what is left of a source lies. It keeps the source's name, by which reports call it."""
    name = Path(spec.partition(":")[0]).name.partition(".")[0]
    return folder / hashlib.sha256(f"{option} {spec}".encode()).hexdigest()[:8] / f"{name}.jsonl"


def write_copies(taken_out: dict[str, dict[str, dict]], fields: list[str], folder: Path) -> None:
    """Write what is left of each source. Raises UsageError if one is not what it was when it was looked through."""
    for option, noted_of in taken_out.items():
        for spec, noted in noted_of.items():
            source, taken = Source.read(spec, option, fields), set().union(*noted["rows"].values())
            if len(source.records) != noted["count"] or source.hash_without(taken) != noted["left"]:
                raise UsageError(f"{spec}: was changed while the state was planned; run 'apply' again")
            if len(taken) < len(source.records):
                source.write_rest(copy_of(option, spec, folder), taken)


# ------------------------------------------------------------------------------------------------- what is found
@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request asks to forget, as it is looked for: `asked`, the `questions` of its rows; `name`, the words of
    its subject (of a person); `quoted`, the shingles of its texts."""

    asked: set[str]
    name: list[str]
    quoted: set[tuple[str, ...]]

    @classmethod
    def read(cls, book: Book, request: Request) -> Wanted:
        """Read the rows of a request and of its holdout, and its subject."""
        rows = [*book.rows_of(request.id), *book.rows_beside(request.id, "holdout")]
        return cls(
            asked=questions([row for row in rows if not row.is_text]),
            name=words_of(book.about(request.id)["subject"]) if request.kind == "person" else [],
            quoted=set().union(*(shingles(words_of(row.response)) for row in rows if row.is_text)),
        )

    def places_in(self, source: Source, quotations: dict[tuple[str, ...], set[tuple[int, int]]]) -> set[int]:
        """Return the numbers of the records that ask, name or quote it; quotations: `Source.places_of` its shingles."""
        numbers = set().union(*(source.places_of_questions.get(question, ()) for question in self.asked))
        if self.name:
            with_all = set.intersection(*(source.places_of_words.get(word, set()) for word in self.name))
            numbers |= {n for n in with_all if any(_holds(words, self.name) for words in source.words[n - 1])}
        shared = collections.Counter(place for shingle in self.quoted for place in quotations.get(shingle, ()))
        # as many shingles as a quotation of LONG words has
        return numbers | {number for (number, _), count in shared.items() if count > LONG - SHINGLE}


def found_in(
    book: Book, requests: list[str], wanted: dict[str, Wanted], source: Source, option: str
) -> tuple[dict[str, list[int]], set[str]]:  # fmt: skip
    """Return {request: the numbers (from 1 on) of the records that name what it asks for}, of those that have any, and
    the requests of destroyed text, of which the source held records before it was changed. wanted: of the others."""
    found, unknown = {}, set()
    quotations = source.places_of(set().union(*(one.quoted for one in wanted.values())))
    for name in requests:
        if name in wanted:
            numbers = sorted(wanted[name].places_in(source, quotations))
        else:
            noted = noted_of(book, name, option, source.spec)
            numbers = still_there(source, noted, name) if noted else []
            if numbers is None:
                unknown.add(name)
        if numbers:
            found[name] = numbers
    return found, unknown


def noted_of(book: Book, name: str, option: str, spec: str) -> dict | None:
    """Return what the newest state that knows places of a request in a source notes of it."""
    for state in reversed(book.states):
        noted = state.content.get("taken_out", {}).get(option, {}).get(spec)
        if noted and name in noted["rows"]:
            return noted
    return None


def still_there(source: Source, noted: dict, name: str) -> list[int] | None:
    """Return the noted places of a request in a source; [] if all noted records were taken out of it since; None if it
    was changed in another way."""
    taken = set().union(*noted["rows"].values())
    if len(source.records) == noted["count"] and source.hash_without(taken) == noted["left"]:
        return noted["rows"][name]
    return [] if source.hash_without(set()) == noted["left"] else None


def _holds(words: list[str], name: list[str]) -> bool:
    return f" {' '.join(name)} " in f" {' '.join(words)} "


def _places(pairs: Iterable[tuple]) -> dict:
    """Return {key: all that stand with it}."""
    found = collections.defaultdict(set)
    for key, place in pairs:
        found[key].add(place)
    return dict(found)
