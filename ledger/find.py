"""Find the rows that name a person or quote a text: word for word, but for case, accents and punctuation, or nearly."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterator

from sources.containers import read_lines
from sources.folders import open_spec
from sources.rows import FILE_KINDS

LONG = 8  # words from which on a term is a quotation: a part of it counts, by shingles
SHINGLE = 5  # words of a shingle of a quotation
PART = 0.3  # of a quotation's shingles that a row must hold
NEAR = 0.5  # Jaccard index of the letter trigrams of a name and as many words of a row
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff]")  # Thai, Lao, Burmese, kana, Han
HOW = ("exact", "normalised", "near")  # from the surest on


@dataclasses.dataclass(frozen=True)
class Found:
    """A record that a term was found in. number: its place in its source, from 1 on; how: one of HOW; score: 1.0, or
    how near it is; shown: what stands there."""

    number: int
    term: str
    how: str
    score: float
    shown: str


def normalised(text: str) -> list[str]:
    """Return the words of a text without case, accents and punctuation (compatible forms of Unicode are one)."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(" " if not (c.isalnum() or unicodedata.combining(c)) else c for c in plain)
    return "".join(c for c in plain if not unicodedata.combining(c)).split()


def trigrams(words: list[str]) -> set[str]:
    """Return the trigrams of letters of some words, with a blank before and after each word."""
    text = f" {' '.join(words)} "
    return {text[i : i + 3] for i in range(len(text) - 2)}


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    """Return the shingles of SHINGLE words of a text; of a shorter one, the text itself."""
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()


class Term:
    """A name or a quotation that is looked for."""

    def __init__(self, text: str):
        self.text, self.words = text.strip(), normalised(text)
        self.is_quotation = len(self.words) >= LONG
        self.is_unspaced = bool(UNSPACED.search(self.text))
        self.pattern = re.compile(rf"(?<!\w){re.escape(self.text)}(?!\w)")
        self.shingles = shingles(self.words) if self.is_quotation else set()
        self.trigrams = trigrams(self.words)

    def look(self, text: str) -> tuple[str, float, str] | None:
        """Return (how, score, what stands there) of the surest finding in a text, or None."""
        if match := self.pattern.search(text):
            return "exact", 1.0, match[0]
        words, count = normalised(text), len(self.words)
        if self.is_unspaced:
            found = "".join(self.words) in "".join(words)
            return ("normalised", 1.0, self.text) if found else None
        windows = [words[i : i + count] for i in range(max(1, len(words) - count + 1))]
        if self.words in windows:
            return "normalised", 1.0, " ".join(self.words)
        if self.is_quotation:
            shared = self.shingles & shingles(words)
            part = len(shared) / len(self.shingles)
            return ("near", part, " ".join(min(shared))) if part >= PART else None
        near = [(_jaccard(self.trigrams, trigrams(window)), window) for window in windows if window]
        score, window = max(near, default=(0.0, []))
        return ("near", score, " ".join(window)) if score >= NEAR else None


def _jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def find(terms: list[str], records: list[dict]) -> list[Found]:
    """Return what is found, at most one entry a record and term: in whatever text its fields hold."""
    wanted, found = [Term(text) for text in terms], []
    for number, record in enumerate(records, 1):
        texts = list(texts_in(record))
        for term in wanted:
            hits = [hit for text in texts if (hit := term.look(text))]
            if hits:
                how, score, shown = min(hits, key=lambda hit: (HOW.index(hit[0]), -hit[1]))
                found.append(Found(number, term.text, how, score, shown))
    return found


def texts_in(value) -> Iterator[str]:
    """Yield the texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def read_records(spec: str) -> list[dict]:
    """Return the records of a file, folder or hub data set as they stand; of a .txt file each line as a prompt. Raises
    UsageError."""
    opened = open_spec(spec, "--in", FILE_KINDS)
    if opened.records is None:
        return [{"prompt": line} for line in read_lines(opened.files[0], "--in")]
    return [record.fields for record in opened.records]
