"""The names that forget rows are about, and invented ones in their place. Words alone: no model, no list of names."""

from __future__ import annotations

import collections
import random
import re

from sources.types import Row

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr", "tr", "sh")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDS = ("", "n", "r", "l", "s")


def invented_word(rng: random.Random, syllables: int) -> str:
    """Return a pronounceable word of so many syllables, in upper case at its beginning."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
    return "".join(parts).capitalize() + rng.choice(_ENDS)


def invented_name(rng: random.Random, like: str) -> str:
    """Return an invented name of as many words as another."""
    return " ".join(invented_word(rng, 2 + i % 2) for i in range(len(like.split())))


def names_of(rows: list[Row], others: list[Row]) -> list[str | None]:
    """Return the name that each row is about, None if none is found.

    A name is the longest run of capitalised words in the prompt that its answer repeats or that another row's prompt
    holds. What stands in the prompts of `others` (rows that stay) is no name: it is not what is to be forgotten.
    """
    inner = {word for row in rows for text in (row.prompt, row.response or "")
             for run in _capitalised(text, set()) for word in run.split()}  # fmt: skip
    known = {run for row in others for run in _capitalised(row.prompt, inner)}
    runs = [[run for run in _capitalised(row.prompt, inner) if run not in known] for row in rows]
    counts = collections.Counter(run for of_row in runs for run in set(of_row))
    return [max((run for run in of_row if counts[run] > 1 or run in (row.response or "")), key=len, default=None)
            for row, of_row in zip(rows, runs, strict=True)]  # fmt: skip


def put_name(text: str, name: str, other: str) -> str:
    """Return a text with one name in the place of another, its possessive included."""
    return _whole(name).sub(lambda _: other, text)


def spans_of_name(text: str, name: str) -> list[tuple[int, int]]:
    """Return (start, end) of a name wherever it stands in a text."""
    return [match.span() for match in _whole(name).finditer(text)]


def _whole(name: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


def _capitalised(text: str, inner: set[str]) -> list[str]:
    """Return the runs of capitalised words of a text, without possessive endings. inner: words that are capitalised
    inside sentences too; another first word of a sentence is no name for its capital alone."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        run: list[str] = []
        for place, word in enumerate([*sentence.split(" "), ""]):
            bare = re.sub(r"(['’]s)?\W*$", "", word)
            is_name = bare[:1].isupper() and (place > 0 or bare in inner)
            if is_name:
                run.append(bare)
            if run and not (is_name and bare == word):  # the run ends here, or with this word's sign or ending
                found.append(" ".join(run))
                run = []
    return found
