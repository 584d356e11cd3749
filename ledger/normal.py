"""The normal side of a ledger's runs without what requests name: what is found there is taken out of it, and said.

A file of rows loses the rows that name a person whom a request is about, that ask what a request's row asks, or that
quote a text; a file of text loses such paragraphs. The files themselves are not touched: runs and evaluations get a
copy of what is left of them. Rows of a request whose text is destroyed are known by their places in a file that has
not changed since.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from ledger.book import Book, Request
from ledger.find import LONG, find, normalised, read_records, texts_in
from sources.rows import read_texts
from utils import UsageError, write_json_lines

PARAGRAPH = re.compile(r"\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of the normal side, cut into records: rows, or paragraphs of text with the document of each."""

    spec: str
    records: list[dict]
    documents: list[int] | None = None  # None: rows

    @classmethod
    def read(cls, spec: str, fields: list[str], *, is_text: bool) -> Source:
        """Read a source. Raises UsageError."""
        if not is_text:
            return cls(spec, read_records(spec))
        (source,) = read_texts([spec], "--normal_text", fields)
        parts = [(number, part) for number, row in enumerate(source.rows) for part in PARAGRAPH.split(row.response)]
        return cls(spec, [{"text": part} for _, part in parts], [number for number, _ in parts])

    @property
    def hash(self) -> str:
        """A hash of its records, which tells whether the places in it are still the same."""
        return hashlib.sha256(json.dumps(self.records, sort_keys=True).encode()).hexdigest()

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


# ------------------------------------------------------------------------------------------------ what is planned
@dataclasses.dataclass(frozen=True)
class NormalSide:
    """What runs and evaluations of a state are given. files: {spec: the spec itself, or the copy of what is left of it,
    None if nothing is}; taken_out: {spec: {"hash": of its records, "rows": {request: numbers from 1 on}}} of those that
    lost any; unknown: requests of destroyed text, of which nothing is known in a source that has changed."""

    files: dict[str, str | None]
    taken_out: dict[str, dict]
    unknown: list[str]

    def of(self, specs: list[str]) -> list[str]:
        """Return what stands for some sources. Raises UsageError if there were some, and nothing is left of any."""
        found = [path for spec in specs if (path := self.files[spec])]
        if specs and not found:
            raise UsageError(f"{', '.join(dict.fromkeys(specs))}: every row names what a request asks to forget; give "
                             "the ledger other normal rows")  # fmt: skip
        return found


def normal_side(
    book: Book, requests: list[str], rows: list[str], texts: list[str], fields: list[str], folder: Path
) -> NormalSide:  # fmt: skip
    """Return what is left of sources of rows and of text beside some requests. folder: where copies lie. Raises
    UsageError."""
    files: dict[str, str | None] = {}
    taken_out, unknown = {}, []
    for specs, is_text in ((rows, False), (texts, True)):
        for spec in dict.fromkeys(specs):
            source = Source.read(spec, fields, is_text=is_text)
            found, not_known = found_in(book, requests, source)
            unknown += not_known
            files[spec] = spec
            if found:
                taken = set().union(*found.values())
                files[spec] = str(copy_of(spec, folder)) if len(taken) < len(source.records) else None
                taken_out[spec] = {"hash": source.hash, "rows": found}
    return NormalSide(files, taken_out, sorted(set(unknown)))


def copy_of(spec: str, folder: Path) -> Path:
    """Return where the copy of what is left of a source lies. It keeps the source's name, by which reports call it."""
    name = Path(spec.partition(":")[0]).name.partition(".")[0]
    return folder / hashlib.sha256(spec.encode()).hexdigest()[:8] / f"{name}.jsonl"


def write_copies(taken_out: dict[str, dict], texts: list[str], fields: list[str], folder: Path) -> None:
    """Write what is left of each source. texts: those sources that are text."""
    for spec, noted in taken_out.items():
        source = Source.read(spec, fields, is_text=spec in texts)
        source.write_rest(copy_of(spec, folder), set().union(*noted["rows"].values()))


# ------------------------------------------------------------------------------------------------- what is found
def found_in(book: Book, requests: list[str], source: Source) -> tuple[dict[str, list[int]], list[str]]:
    """Return {request: the numbers (from 1 on) of the records that name what it asks for}, of those that have any, and
    the requests of destroyed text, of which the source held records before it was changed."""
    found, unknown = {}, []
    for name in requests:
        request = book.requests[name]
        if request.shredded:
            noted = next((of[source.spec] for state in reversed(book.states)
                          if source.spec in (of := state["taken_out"])), None)  # fmt: skip
            numbers = noted["rows"].get(name, []) if noted else []
            if numbers and noted["hash"] != source.hash:
                unknown.append(name)
                continue
        else:
            numbers = sorted(named_in(book, request, source.records))
        if numbers:
            found[name] = numbers
    return found, unknown


def named_in(book: Book, request: Request, records: list[dict]) -> set[int]:
    """Return the numbers of the records that name what a request asks for."""
    rows, terms = [*book.rows_of(request.id), *book.holdout_of(request.id)], []
    if request.kind == "person" and normalised(subject := book.about(request.id)["subject"]):
        terms.append(subject)
    if request.added["is_text"]:  # a shorter part, as a heading, is no quotation
        parts = [part for row in rows if row.is_text for part in PARAGRAPH.split(row.response)]
        terms += [part for part in parts if len(normalised(part)) >= LONG]
    numbers = {hit.number for hit in find(terms, records, near=False)}
    asked = {tuple(normalised(row.prompt)) for row in rows if not row.is_text} - {()}
    return numbers | {number for number, record in enumerate(records, 1)
                      if any(tuple(normalised(text)) in asked for text in texts_in(record))}  # fmt: skip
