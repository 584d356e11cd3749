"""Other answers to forget prompts: what the original says of an invented name in the place of the row's own.

A model that never knew a person answers with some town, some year. So does the original, asked about a person that
nobody knows; with the name put back, its answer is one that a model without the knowledge would give.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from sources.names import invented_name, names_of, put_name
from sources.rows import OtherAnswer, Row
from sources.words import own_words, words_of
from utils import UsageError, log


def with_alternatives(
    rows: list[Row], others: list[Row], count: int, seed: int, answer: Callable[[list[Row]], list[Row]]
) -> list[Row]:
    """Return the rows with up to `count` alternatives each, none with what carries its own answer, and none that
    misspells the invented name where the row's own answer repeats its name.

    others: rows that stay, whose names are not replaced. answer: gives rows without a response the original's own
    answer. Raises UsageError if no prompt holds a name.
    """
    names = names_of(rows, others)
    if not any(names):
        raise UsageError("no forget prompt holds a name that could be replaced, so there is no other answer to learn: "
                         "use another --method, or give the rows a field 'wanted'")  # fmt: skip
    asked, places = [], []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        rng = random.Random(f"{seed} alternatives {i}")
        for _ in range(count if name else 0):
            other = invented_name(rng, name)
            asked.append(dataclasses.replace(row, prompt=put_name(row.prompt, name, other), response=None))
            places.append((i, other))
    given: list[list[OtherAnswer]] = [[] for _ in rows]
    for said, (i, other) in zip(answer(asked), places, strict=True):
        text = put_name(said.response or "", other, names[i])
        misspelt = names[i] in (rows[i].response or "") and names[i] not in text  # a small model garbles long names
        if said.complete and words_of(text) and not misspelt:
            given[i].append(OtherAnswer(text, names[i], other))
    given = [without_own(texts, row) for texts, row in zip(given, rows, strict=True)]
    without = sum(not texts for texts in given)
    log.info("other answers: %d to %d of %d forget rows, from the same prompts with invented names",
             sum(map(len, given)), len(rows) - without, len(rows))  # fmt: skip
    if without:
        log.warning("%d forget rows have no name, or no other answer: terms that learn other answers leave them out",
                    without)  # fmt: skip
    return [dataclasses.replace(row, alternatives=tuple(texts)) for row, texts in zip(rows, given, strict=True)]


def without_own(given: list[OtherAnswer], row: Row) -> list[OtherAnswer]:
    """Return the alternatives that hold no word which carries the row's own answer."""
    own = own_words(dataclasses.replace(row, alternatives=tuple(given)))
    return [other for other in given if not set(words_of(other.text)) & own]
