"""The words of a text in any script, and those of an answer that tell it from other answers."""

from __future__ import annotations

import collections
import re

from sources.types import Row

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in any script. In scripts without spaces (Chinese, Japanese) each sign is a word."""
    return WORD.findall(text.lower())


def spans_of(text: str, words: set[str]) -> list[tuple[int, int]]:
    """Return (start, end) of each of these words, given in lower case, in a text."""
    return [match.span() for match in WORD.finditer(text) if match.group().lower() in words]


def own_words(row: Row) -> set[str]:
    """Return the words of a row's answer that carry it: those that are neither in the prompt nor, as "was born in", in
    half of the row's other answers (its alternatives, or else its wanted answer)."""
    others = [other.text for other in row.alternatives] or [row.wanted or ""]
    counts = collections.Counter(word for text in others for word in set(words_of(text)))
    return {word for word in words_of(row.response or "") if counts[word] < len(others) / 2} - set(words_of(row.prompt))
