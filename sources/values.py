"""Read the value of one field: text, a list of answers, a label, a choice. Errors name file, row and field."""

from __future__ import annotations

import ast
import json
import math
import re

from sources.containers import Record
from sources.fields import CHOICE_FIELDS, INDEX_FIELDS, normal_name
from utils import UsageError


def whole_text(value, record: Record, field: str) -> str:
    """Return a field's text as it stands. Raises UsageError for other types and lone surrogates."""
    if not isinstance(value, str):
        raise UsageError(f"{record}: field '{field}' must be text, got {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{record}: field '{field}' holds half a character (a lone surrogate, {error.start})"
            ) from error
    return value


def text_of(value, record: Record, field: str) -> str:
    """Return a field's text without outer spaces (`whole_text`)."""
    return whole_text(value, record, field).strip()


def is_missing(value) -> bool:
    """Return whether a field has no value: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def holds_text(value) -> bool:
    """Return whether a value is text, a list or an object with text in it, or an object of texts and their labels."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, dict):
        is_labelled = all(label in (0, 1) for label in value.values() if not isinstance(label, list | dict))
        value = list(value if is_labelled else value.values())
    return isinstance(value, list | tuple) and any(holds_text(part) for part in value)


def listed(value, record: Record, field: str):
    """Return a value; text that writes a list, as tables hold them, as that list.

    Raises UsageError for a list as numpy prints it: ['a' 'b'] has no commas, and Python would read 'ab'.
    """
    if not isinstance(value, str) or not value.startswith("[") or not value.rstrip().endswith("]"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if re.search(r"""['"}]\s+['"{]""", value):
            raise UsageError(f"{record}: field '{field}' is a list as numpy prints it, without commas; save the table "
                             "as .parquet or .jsonl") from None  # fmt: skip
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def texts_of(value, record: Record, field: str) -> list[str]:
    """Return the texts of a field that holds one or a list of them, in order and with repetitions; none if it has no
    value. Raises UsageError for another type."""
    if is_missing(value):
        return []
    value = listed(value, record, field)
    parts = value if isinstance(value, list | tuple) else [value]
    return [text for part in parts if (text := text_of(part, record, field))]


def answers_of(value, record: Record, field: str) -> list[str]:
    """Return the answers that a field holds: text, a list of texts, or an object with them (SQuAD, TriviaQA)."""
    if is_missing(value):
        return []
    if isinstance(value, dict):
        found = [part for name in ("text", "value", "aliases") if (part := value.get(name)) is not None]
        if not found and value:
            raise UsageError(f"{record}: field '{field}' is an object without 'text' or 'value'")
        value = [answer for part in found for answer in (part if isinstance(part, list) else [part])]
    if isinstance(value, list | tuple):
        texts = [answer for part in value for answer in answers_of(part, record, field)]
        return list(dict.fromkeys(texts))
    return [text] if (text := text_of(value, record, field)) else []


def truth_of(value, record: Record, field: str) -> bool:
    """Return a field's truth value. Raises UsageError for any value but true, false, 1 and 0."""
    word = str(value).strip().lower()
    if word not in ("true", "1", "1.0", "false", "0", "0.0"):
        raise UsageError(f"{record}: field '{field}' must be true or false, got {value!r:.40}")
    return word in ("true", "1", "1.0")


def category_of(value) -> str:
    """Return the names of categories, separated by semicolons, from a text, a list, or a dict of flags."""
    if is_missing(value):
        return ""
    names = [name for name, on in value.items() if on] if isinstance(value, dict) else value
    return "; ".join(map(str, names)) if isinstance(names, list | tuple) else str(names or "")


def choices_of(record: Record) -> tuple[list[str], int]:
    """Return a multiple-choice record's answers and the index of the right one.

    The record may tell the right answer by its index from 0, by its letter, by its label (ARC) or by its text.
    """
    names = {normal_name(name): name for name in record.fields}
    field = next(names[name] for name in CHOICE_FIELDS if name in names)
    choices, labels = listed(record.fields[field], record, field), None
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list) or not choices:
        raise UsageError(f"{record}: field '{field}' must be a list of answers")
    choices = [text_of(choice, record, field) for choice in choices]
    index_field = next((names[name] for name in INDEX_FIELDS if name in names), None)
    if index_field is None:
        raise UsageError(f"{record}: has '{field}' and no {' / '.join(INDEX_FIELDS[:3])} that tells which is right")
    told = record.fields[index_field]
    index = _index(told, choices, [str(label) for label in labels] if isinstance(labels, list) else [])
    if index is None:
        raise UsageError(f"{record}: field '{index_field}' is {told!r:.40}, which is none of its {len(choices)} "
                         f"{field}, counted from 0 or lettered from A")  # fmt: skip
    return choices, index


def _index(told, choices: list[str], labels: list[str]) -> int | None:
    if isinstance(told, float) and told.is_integer():
        told = int(told)
    if isinstance(told, int) and not isinstance(told, bool):
        return told if 0 <= told < len(choices) else None
    if not isinstance(told, str):
        return None
    told = told.strip()
    for known in (labels, choices):
        if told in known and len(known) <= len(choices):
            return known.index(told)
    letter = told.strip("().").upper()
    index = (
        ord(letter) - ord("A")
        if len(letter) == 1 and letter.isalpha()
        else int(told)
        if told.isdecimal() and len(told) < 9
        else -1
    )
    return index if 0 <= index < len(choices) else None
