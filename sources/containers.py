"""Open files (plain or .gz) and give their records one after another, without knowing what a field means.

A container is read as a stream where it allows that, so the records never stand in memory beside the rows made of them.
JSON and CSV are read here and not by `datasets`, which copies every file into its cache, refuses cells and fields whose
type changes between rows, and cannot name the line of an error.
"""

from __future__ import annotations

import codecs
import collections
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet as pq

from sources.fields import PROMPT_FIELDS, normal_name
from utils import UsageError

RECORD_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_KINDS = (".txt", ".md")
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the usual one first
EMPTY_ROW = object()  # a row of a table without any text: it counts and gives no record
BATCH_ROWS = 1000  # rows of a parquet file or data set that are turned into Python objects at a time
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip
csv.field_size_limit(2**31 - 1)  # the module's own limit is 131,072 characters a cell


class Record(NamedTuple):
    """One object of a container, and where it stands: the file, and its number from 1."""

    place: str
    number: int
    fields: dict

    def __str__(self) -> str:
        return f"{self.place}, row {self.number}"


def kind_of(path: Path) -> str:
    """Return a file's kind as its lower-case suffix, without .gz: ".jsonl" of "a.jsonl.gz"."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def stem_of(path: Path) -> str:
    """Return a file's name without its kind."""
    return path.name[: -len(".gz")].rpartition(".")[0] if path.name.lower().endswith(".gz") else path.stem


def read_records(path: Path, option: str) -> Iterator[Record]:
    """Yield the records of a file. Raises UsageError, with file and row, where it cannot be read."""
    place, kind = f"{option} {path}", kind_of(path)
    try:
        with open_text(path, newline="" if kind in SEPARATORS else None) as file:
            if kind == ".parquet":
                objects = _parquet_objects(path)
            elif kind in SEPARATORS:
                objects = _csv_objects(file, path, place)
            else:
                objects = _json_objects(file, place, may_be_columns=kind == ".json")
            for number, fields in enumerate(objects, 1):
                if fields is EMPTY_ROW:
                    continue
                if not isinstance(fields, dict):
                    raise UsageError(f"{place}, row {number}: must be an object with fields, got {fields!r:.40}")
                yield Record(place, number, fields)
    except (csv.Error, ValueError, OSError, EOFError, RecursionError, zlib.error, pyarrow.ArrowException) as error:
        raise _unreadable(path, place, error) from error


def read_lines(path: Path, option: str) -> Iterator[str]:
    """Yield every line of a text file that is not empty, without outer spaces."""
    try:
        with open_text(path) as file:
            yield from filter(None, map(str.strip, file))
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, f"{option} {path}", error) from error


def read_document(path: Path, option: str) -> str:
    """Return the whole text of a file, every line end as "\\n"."""
    try:
        with open_text(path) as file:
            return file.read()
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, f"{option} {path}", error) from error


def _unreadable(path: Path, place: str, error: Exception) -> UsageError:
    kind = kind_of(path)
    if isinstance(error, UnicodeDecodeError) and kind != ".parquet":
        return UsageError(f"{place}: not {error.encoding.upper()} text ({error.reason}); convert it to UTF-8")
    if isinstance(error, FileNotFoundError):
        return UsageError(f"{place}: no such file")
    return UsageError(f"{place}: cannot be read as {kind[1:]} ({' '.join(str(error).split())})")


# ----------------------------------------------------------------------------------------------- encoding
def _open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open a text file, plain or .gz, in the encoding that its first bytes show."""
    file = _open_bytes(path)
    return io.TextIOWrapper(file, encoding=_encoding(file.peek(4096)), newline=newline)


def _encoding(start: bytes) -> str:
    """Return UTF-8, or what a byte order mark says; without one, UTF-16 shows by its zero bytes, which text has not."""
    for mark, encoding in ENCODINGS:
        if start.startswith(mark):
            return encoding
    even, odd = start[::2].count(0), start[1::2].count(0)
    return "utf-8" if even == odd else "utf-16-le" if odd > even else "utf-16-be"


# --------------------------------------------------------------------------------------------------- JSON
def _json_objects(file: io.TextIOWrapper, place: str, may_be_columns: bool) -> Iterator:
    """Yield the objects of a JSON file: one a line, or the elements of the one value that it holds."""
    values = _json_values(file, place)
    first = list(itertools.islice(values, 2))
    if len(first) != 1:
        yield from itertools.chain(first, values)
    else:
        objects = _objects_within(first.pop(), place, may_be_columns)
        objects.reverse()
        while objects:  # the list gives up its records as their rows are made
            yield objects.pop()


def _json_values(file: io.TextIOWrapper, place: str) -> Iterator:
    """Yield the JSON values of a file, each on a line of its own or over several lines."""
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # a value over several lines, if it is one
            yield from _values_over_lines(line + file.read(), number, place, error)
            return
        yield value


def _values_over_lines(text: str, first_line: int, place: str, line_error: Exception) -> Iterator:
    """Yield the JSON values of a text that begins at line `first_line`. `line_error`: why this line alone is none."""
    decoder, start, is_first = json.JSONDecoder(), 0, True
    while (start := re.compile(r"\s*").match(text, start).end()) < len(text):
        try:
            value, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            after_whole_lines = is_first and first_line > 1
            line = first_line if after_whole_lines else first_line + text.count("\n", 0, getattr(error, "pos", 0))
            reason = line_error if after_whole_lines else error
            raise UsageError(f"{place}, line {line}: not valid JSON ({getattr(reason, 'msg', str(reason))})") from error
        is_first = False
        yield value


def _objects_within(value, place: str, may_be_columns: bool) -> list:
    """Return the records of a file's only JSON value: a list; an object around a list; columns; or one record."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    wrapped = [key for key, inner in value.items() if _is_list_of_records(inner)]
    has_prompt = any(normal_name(key) in PROMPT_FIELDS and isinstance(inner, str) for key, inner in value.items())
    if wrapped and not has_prompt:
        if len(wrapped) > 1:
            raise UsageError(f"{place}: holds {len(wrapped)} lists of rows ({', '.join(wrapped)[:80]}); write each to "
                             "a file of its own")  # fmt: skip
        return value[wrapped[0]]
    if not may_be_columns:  # the only line of a .jsonl file is a record
        return [value]
    columns = list(value.values())
    if all(isinstance(column, dict) and column for column in columns) and columns:
        if not any(normal_name(key) in PROMPT_FIELDS for key in value):
            return columns  # records by their ids
        value = {key: list(column.values()) for key, column in value.items()}  # pandas' columns by row ids
    elif not columns or not all(isinstance(column, list) and not _is_talk(column) for column in columns):
        return [value]
    if len({len(column) for column in value.values()}) > 1:
        counts = ", ".join(f"{key} {len(column)}" for key, column in value.items())
        raise UsageError(f"{place}: its columns differ in length ({counts[:80]})")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _is_list_of_records(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value) and not _is_talk(value)


def _is_talk(value: list) -> bool:
    """Return whether a list is one talk: its elements are turns."""
    return all(isinstance(turn, dict) and ("role" in turn or {"from", "value"} <= turn.keys()) for turn in value)


# -------------------------------------------------------------------------------------------- CSV, parquet
def _csv_objects(file: io.TextIOWrapper, path: Path, place: str) -> Iterator:
    """Yield a dict a line of a table. The header shows the separator; a line without any text is no row."""
    separators, header_line = SEPARATORS[kind_of(path)], next((line for line in file if not line.isspace()), "")
    if told := re.fullmatch(r"sep=(.)\s*", header_line):  # Excel's own first line
        separators, header_line = told[1], next(file, "")
    headers = [_cells([header_line], separator) for separator in separators]
    ranks = [(any(normal_name(name) in PROMPT_FIELDS for name in names), len(names)) for names in headers]
    separator = separators[ranks.index(max(ranks))]
    quoting = _tab_quoting(path) if separator == "\t" else csv.QUOTE_MINIMAL
    cells = csv.reader(itertools.chain([header_line], file), delimiter=separator, strict=True, quoting=quoting)
    header = next(cells, [])
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UsageError(f"{place}: two columns are called {twice[0]!r}; rename one")
    for row in cells:
        if any(row[len(header) :]):
            raise UsageError(f"{place}, line {cells.line_num}: has {len(row)} cells and the header {len(header)}; put "
                             f"cells that hold {separator!r} in quotes")  # fmt: skip
        if row:  # a short row lacks its last cells
            yield dict(zip(header, row, strict=False)) if any(row) else EMPTY_ROW


def _tab_quoting(path: Path) -> int:
    """Return how a table separated by tabs is quoted. Many know no quotes: a cell may begin with one and not end so."""
    try:
        with open_text(path, newline="") as file:
            collections.deque(csv.reader(file, delimiter="\t", strict=True), maxlen=0)
    except csv.Error:
        with open_text(path, newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if len({len(row) for row in rows if row}) == 1:
                return csv.QUOTE_NONE
    return csv.QUOTE_MINIMAL


def _cells(lines: list[str], separator: str) -> list[str]:
    try:
        return next(csv.reader(lines, delimiter=separator), [])
    except csv.Error:
        return []


def _parquet_objects(path: Path) -> Iterator[dict]:
    """Yield the rows of a parquet file in small batches; `datasets` would first write a copy of the file."""
    source = pyarrow.BufferReader(gzip.decompress(path.read_bytes())) if path.name.lower().endswith(".gz") else path
    for batch in pq.ParquetFile(source).iter_batches(batch_size=BATCH_ROWS):
        yield from batch.to_pylist()
