"""Read files, folders and hub data sets into rows; errors name file, row and field."""

from __future__ import annotations

import gc
from pathlib import Path

from sources.containers import RECORD_KINDS, read_lines
from sources.folders import open_spec
from sources.layouts import RowMaker
from sources.plan import parse_fields
from sources.prose import is_prose
from sources.texts import read_texts
from sources.types import OtherAnswer, Row, Source
from utils import UsageError, log

__all__ = [
    "FILE_KINDS",
    "OtherAnswer",
    "Row",
    "Source",
    "read_records_with_rows",
    "read_rows",
    "read_sources",
    "read_texts",
]
FILE_KINDS = (*RECORD_KINDS, ".txt")


def read_sources(
    specs: list[str], option: str, harm_categories: list[str] | None = None, fields: list[str] | None = None
) -> list[Source]:
    """Read each file, folder or hub data set that an option names. `fields`: own names of fields, as --fields has them.

    A source without a row of `harm_categories` has no rows. Raises UsageError if no source has such a row.
    """
    own = parse_fields(fields)
    sources = [_read_source(spec, option, own) for spec in specs]
    if harm_categories:
        _keep_categories(sources, harm_categories)
    return sources


def read_rows(spec: str, option: str, fields: list[str] | None = None) -> list[Row]:
    """Read one file, folder or hub data set. Raises UsageError if it cannot be read or has no usable row."""
    return _read_source(spec, option, parse_fields(fields)).rows


def _read_source(spec: str, option: str, own: dict[str, list[str]]) -> Source:
    collecting = gc.isenabled()
    gc.disable()  # rows hold no cycles, and looking for some among 300,000 new rows takes as long as reading them
    try:
        opened = open_spec(spec, option, FILE_KINDS)
        if opened.records is None:
            return _read_prompts(spec, opened.files[0], opened.name, option)
        maker, rows = RowMaker(opened.name, option, own), []
        for record in opened.records:
            rows += maker.rows(record)
        notes = opened.notes + maker.finish(rows)
    finally:
        if collecting:
            gc.enable()
    if not rows:
        raise UsageError(f"{option} {spec}: holds no row to use" + "".join(f" ({note})" for note in notes))
    source = Source(spec, rows, dict(maker.unused), notes)
    _check_fields(source, option, maker)
    return source


def read_records_with_rows(spec: str, option: str, fields: list[str] | None = None) -> list[tuple[dict, list[Row]]]:
    """Return (the fields of a record as they stand, the rows that are made of it), of each record of a source; of a
    file of plain prompts, each line as a prompt. Raises UsageError if it cannot be read."""
    opened = open_spec(spec, option, FILE_KINDS)
    if opened.records is None:
        return [({"prompt": line}, [Row(line, source=opened.name)]) for line in read_lines(opened.files[0], option)]
    maker = RowMaker(opened.name, option, parse_fields(fields))
    return [(record.fields, maker.rows(record)) for record in opened.records]


def _read_prompts(spec: str, path: Path, name: str, option: str) -> Source:
    """Read a text file as prompts, a line each. Warns if its lines look like prose."""
    rows = [Row(line, source=name) for line in read_lines(path, option)]
    if not rows:
        raise UsageError(f"{option} {spec}: holds no row to use")
    if is_prose([row.prompt for row in rows]):
        log.warning("%s %s: its %d lines look like prose, and each is read as a prompt; text without prompts goes "
                    "to %s", option, spec, len(rows), option.replace("_data", "_text"))  # fmt: skip
    return Source(spec, rows)


def _check_fields(source: Source, option: str, maker: RowMaker) -> None:
    """Raise UsageError if a name of --fields stands in no row of the source.

    A source that has none of them, and whose answers are all used under names that are known, needs none.
    """
    missing = [(key, names) for key, names in maker.own.items() if not maker.has_field(names)]
    if missing and (len(missing) < len(maker.own) or source.unused_fields):
        key, names = missing[0]
        raise UsageError(f"--fields {key}={names[0]}: no row of {option} {source.spec} has such a field, only "
                         f"{', '.join(map(str, maker.fields))[:160]}")  # fmt: skip


def _keep_categories(sources: list[Source], harm_categories: list[str]) -> None:
    """Keep the rows of these categories, in place. Raises UsageError if there is none."""
    chosen, known = {c.casefold() for c in harm_categories}, {}
    for source in sources:
        for category in {row.category for row in source.rows} - known.keys():
            known[category] = [c.strip() for c in category.split(";") if c.strip()]
    is_chosen = {category: any(c.casefold() in chosen for c in names) for category, names in known.items()}
    if not any(is_chosen.values()):
        existing = sorted({c for names in known.values() for c in names})
        kinds = "its categories are: " + ", ".join(existing[:40]) if existing else "its rows have no category"
        specs = " ".join(source.spec for source in sources)
        raise UsageError(f"--harm_categories {' '.join(harm_categories)}: no row of {specs}; {kinds}")
    for source in sources:
        source.rows = [row for row in source.rows if is_chosen[row.category]]
        if not source.rows:
            log.warning("%s: has no row of --harm_categories and is skipped", source.spec)
