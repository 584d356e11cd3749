"""Read text without prompts: files that are documents, and rows whose `text` is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sources.containers import RECORD_KINDS, TEXT_KINDS, Record, kind_of, read_document, read_records
from sources.fields import PROMPT_FIELDS, TEXT_FIELDS, normal_name
from sources.folders import open_spec
from sources.plan import parse_fields
from sources.types import Row, Source
from sources.values import whole_text
from utils import UsageError


def read_texts(specs: list[str], option: str, fields: list[str] | None = None) -> list[Source]:
    """Read the documents of each file, folder or hub data set that an option names.

    A .txt or .md file is one document, named after the file; a row with `text` is one, named file#row. A row of text
    holds its whole document as its response. `fields`: own names of fields, as --fields has them. Raises UsageError if
    a source cannot be read or holds no text.
    """
    names = (*parse_fields(fields).get("text", ()), *TEXT_FIELDS)
    return [_read_source(spec, option, names) for spec in specs]


def _read_source(spec: str, option: str, names: tuple[str, ...]) -> Source:
    opened = open_spec(spec, option, (*TEXT_KINDS, *RECORD_KINDS))
    rows, empty = [], 0
    for document, text in _documents(opened, Path(spec), option, names):
        if text.strip():
            rows.append(Row("", text, id=document, source=opened.name, is_text=True, document=document))
        else:
            empty += 1
    if not rows:
        raise UsageError(f"{option} {spec}: holds no text")
    notes = opened.notes + ([f"{empty} documents are empty and are not used"] if empty else [])
    return Source(spec, rows, notes=notes)


def _documents(opened, root: Path, option: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document."""
    if not opened.files:
        for record in opened.records:
            yield f"{opened.name}#{record.number}", _text_of(record, option, names)
    for file in opened.files:
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        if kind_of(file) in TEXT_KINDS:
            yield name, read_document(file, option)
        else:
            for record in read_records(file, option):
                yield f"{name}#{record.number}", _text_of(record, option, names)


def _text_of(record: Record, option: str, names: tuple[str, ...]) -> str:
    """Return the text of a record. Raises UsageError for a record without one."""
    fields = {normal_name(name): value for name, value in record.fields.items()} | record.fields
    field = next((name for name in names if name in fields), None)
    if field is None:
        rows_option = option.replace("_text", "_data")
        hint = f"; name rows with prompts as {rows_option}" if fields.keys() & set(PROMPT_FIELDS) else ""
        raise UsageError(f"{record}: has no '{names[0]}' field, only {', '.join(map(str, record.fields))[:80]}{hint}")
    return "" if fields[field] is None else whole_text(fields[field], record, field)
