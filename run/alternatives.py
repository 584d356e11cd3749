"""Other answers to forget prompts: what the original says of an invented name in the place of the row's own.

A model that never knew a person answers with some town, some year. So does the original, asked about a person that
nobody knows; with the name put back, its answer is one that a model without the knowledge would give. It may name
what it knows of another person who is to be forgotten: such an answer would keep that alive, and is left out.
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
    rows: list[Row], others: list[Row], count: int, seed: int, answer: Callable[[list[Row]], list[Row]], *,
    required: bool = True,
) -> list[Row]:  # fmt: skip
    """Return the rows with up to `count` alternatives each.

    None holds what carries the row's own answer, or a word that carries another forget row's answer and stands in no
    row that stays; none misspells the invented name where the row's own answer repeats its name.

    others: rows that stay, whose names are not replaced. answer: gives rows without a response the original's own
    answer. required: raise UsageError if no prompt holds a name; else the log says so, since other terms may do.
    """
    names = names_of(rows, others)
    if not any(names) and not required:
        log.warning("no prompt of %d forget rows holds a name that could be replaced: no other answer is learned",
                    len(rows))  # fmt: skip
        return rows
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
    own = [own_words(dataclasses.replace(row, alternatives=tuple(of_row)))
           for row, of_row in zip(rows, given, strict=True)]  # fmt: skip
    secret = set().union(*own) - {word for row in others for word in words_of(f"{row.prompt} {row.response or ''}")}
    given = [[other for other in of_row if not set(words_of(other.text)) & (words | secret)]
             for of_row, words in zip(given, own, strict=True)]  # fmt: skip
    without = sum(not texts for texts in given)
    log.info("other answers: %d to %d of %d forget rows, from the same prompts with invented names",
             sum(map(len, given)), len(rows) - without, len(rows))  # fmt: skip
    if without:
        log.warning("%d forget rows have no name, or no other answer: terms that learn other answers leave them out",
                    without)  # fmt: skip
    return [dataclasses.replace(row, alternatives=tuple(texts)) for row, texts in zip(rows, given, strict=True)]
