"""Prompts that are too long: cut inside what the user said, and counted before anything is trained."""

from __future__ import annotations

import dataclasses

import numpy as np

from prompts.chat_template import Turn
from sources.rows import Row

COUNTED = 10_000  # long texts that are tokenised to be counted; of more, a sample tells
CHUNK = 1024  # texts tokenised at once
TRIES = 1000  # turns left out, and cuts after which a text was put into more tokens than before
NEAR = 8  # tokens by which a text and its template may come to another number together


@dataclasses.dataclass(frozen=True)
class CutCounts:
    """How many prompts and answers are too long. `is_estimate`: counted on a sample of many long ones."""

    prompts: int
    answers: int
    is_estimate: bool = False


def cut_turns(turns: list[Turn], limit: int, formatter, ids_of) -> list[int]:
    """Return the tokens of a conversation, cut to at most `limit`.

    The oldest turn but for system messages is cut at its beginning; if that is not enough, it is left out with the
    answer to it, and the next one is cut. Where system message and markers alone are too long, the tokens lose their
    beginning. ids_of: turns -> their tokens.
    """
    turns, ids = list(turns), ids_of(turns)
    for _ in range(TRIES):
        if len(ids) <= limit:
            return ids
        first = next(i for i, (role, _) in enumerate(turns) if role != "system")
        role, text = turns[first]
        text_ids = formatter.ids(text)
        excess = len(ids) - limit
        if excess < len(text_ids):  # what is left may begin with a part of a character
            turns[first] = (role, formatter.tokenizer.decode(text_ids[excess:]).lstrip("\ufffd"))
        elif first < len(turns) - 1:
            after = next(i for i in range(first + 1, len(turns)) if turns[i][0] == "user")
            turns[first:after] = [turn for turn in turns[first:after] if turn[0] == "system"]
        else:
            break
        ids = ids_of(turns)
    return ids[-limit:]


def count_cut(rows: list[Row], formatter, answer_tokens: int) -> CutCounts:
    """Return how many rows' prompts and answers are longer than their limits.

    A text has no more tokens than bytes in UTF-8, so that few texts need be tokenised.
    """
    frame = len(formatter.full_prompt(Row("")))
    limit = formatter.max_prompt_tokens
    long_prompts = [row for row in rows if _bytes(row) + frame * (1 + len(row.earlier)) > limit]
    answers = [row.response for row in rows if row.response and len(row.response.encode()) >= answer_tokens]
    seen, asked = _sampled(long_prompts), _sampled(answers)
    lengths = _lengths([row.prompt for row in seen], formatter)
    prompts = 0
    for row, length in zip(seen, lengths, strict=True):
        near = row.earlier or abs(length + frame - limit) <= NEAR
        prompts += (len(formatter.full_prompt(row)) if near else length + frame) > limit
    too_long = sum(length > answer_tokens for length in _lengths(asked, formatter))
    return CutCounts(round(prompts * len(long_prompts) / max(len(seen), 1)),
                     round(too_long * len(answers) / max(len(asked), 1)),
                     len(seen) < len(long_prompts) or len(asked) < len(answers))  # fmt: skip


def _bytes(row: Row) -> int:
    return len(row.prompt.encode()) + sum(len(text.encode()) for _, text in row.earlier)


def _sampled(texts: list) -> list:
    """Return the texts, or COUNTED of them drawn with a fixed seed."""
    if len(texts) <= COUNTED:
        return texts
    return [texts[i] for i in np.sort(np.random.default_rng(0).permutation(len(texts))[:COUNTED])]


def _lengths(texts: list[str], formatter) -> list[int]:
    """Return the number of tokens of each text alone."""
    chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
    return [len(ids) for chunk in chunks for ids in formatter.tokenizer(chunk, add_special_tokens=False)["input_ids"]]
