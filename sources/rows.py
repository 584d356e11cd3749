"""Read files and hub data sets into rows; errors name file, row and field."""

from __future__ import annotations

import csv
import json
import re
import urllib.request
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from sources.texts import read_texts as read_texts
from sources.types import Row, Source
from utils import UsageError, atomic_write_text, log

TRUTHFULQA_URL = "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
PROMPT_FIELDS = ("prompt", "question", "instruction", "goal")
RESPONSE_FIELDS = ("response", "best answer", "answer", "output", "right_answer")


def read_sources(specs: list[str], option: str, harm_categories: list[str] | None = None) -> list[Source]:
    """Read each file or hub data set that an option names.

    A source without a row of `harm_categories` has no rows. Raises UsageError if no source has such a row.
    """
    sources = [read_rows(spec, option) for spec in specs]
    if harm_categories:
        chosen = {c.casefold() for c in harm_categories}
        matching = [[row for row in rows if chosen & {c.casefold() for c in _categories(row)}] for rows in sources]
        if not any(matching):
            existing = sorted({c for rows in sources for row in rows for c in _categories(row)})
            known = "its categories are: " + ", ".join(existing[:40]) if existing else "its rows have no category"
            raise UsageError(f"--harm_categories {' '.join(harm_categories)}: no row of {' '.join(specs)}; {known}")
        for spec in (spec for spec, rows in zip(specs, matching, strict=True) if not rows):
            log.warning("%s: has no row of --harm_categories and is skipped", spec)
        sources = matching
    return [Source(spec, rows) for spec, rows in zip(specs, sources, strict=True)]


def _categories(row: Row) -> list[str]:
    """Return the names of a row's categories."""
    return [c.strip() for c in row.category.split(";") if c.strip()]


def read_rows(spec: str, option: str) -> list[Row]:
    """Read one file or hub data set. Raises UsageError if it cannot be read or has no usable row."""
    path = Path(spec)
    if path.suffix.lower() in FILE_KINDS:
        if path.name == "TruthfulQA.csv" and not path.exists():
            _fetch_truthfulqa(path, option)
        source, records = path.stem, _read_file(path, option)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and not path.exists():
        source, records = spec.partition(":")[0].rpartition("/")[2], _read_hub(spec, option)
    else:
        raise UsageError(f"{option} {spec}: neither a {'/'.join(FILE_KINDS)} file nor a hub name like owner/name")
    is_forget = option == "--forget_data"
    rows = [
        row for number, record in records
        for row in _rows_of(record, source, f"{option} {spec}, row {number}", is_forget)
    ]  # fmt: skip
    if not rows:
        raise UsageError(f"{option} {spec}: holds no row to use")
    return rows


def _read_file(path: Path, option: str) -> list[tuple[int, dict]]:
    """Read a local file; return [(row number from 1, record)]. A JSON file may be a list or one object a line."""
    if not path.is_file():
        raise UsageError(f"{option} {path}: no such file")
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            records = pq.read_table(path).to_pylist()
        elif kind == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                records = list(csv.DictReader(file, strict=True))
        else:
            text = path.read_text(encoding="utf-8-sig")
            if kind == ".txt":
                records = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
            elif kind == ".json" and text.lstrip().startswith("["):
                records = json.loads(text)
            else:
                records = []
                for number, line in enumerate(text.split("\n"), 1):
                    if line.strip():
                        try:
                            records.append(json.loads(line))
                        except (ValueError, RecursionError) as error:
                            reason = getattr(error, "msg", str(error))
                            raise UsageError(f"{option} {path}, line {number}: not valid JSON ({reason})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except (csv.Error, ValueError, OSError, RecursionError, pyarrow.ArrowException) as error:
        raise UsageError(f"{option} {path}: cannot be read as {kind[1:]} ({' '.join(str(error).split())})") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UsageError(f"{option} {path}, row {number}: must be an object with a 'prompt', got {record!r:.40}")
    return list(enumerate(records, 1))


def _read_hub(spec: str, option: str) -> list[tuple[int, dict]]:
    """Download a hub data set; return [(row number from 1, record)]."""
    import datasets  # slow to import, and only hub names need it

    name, _, split = spec.partition(":")
    datasets.disable_progress_bars()
    try:
        records = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises errors of many libraries; each means that the download failed
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UsageError(
            f"data set {name} cannot be downloaded: save it as data/{name.rpartition('/')[2]}.jsonl "
            f"and pass {option}=data/{name.rpartition('/')[2]}.jsonl ({reason})"
        ) from error
    return list(enumerate(records, 1))


def _fetch_truthfulqa(path: Path, option: str) -> None:
    try:
        with urllib.request.urlopen(TRUTHFULQA_URL, timeout=20) as response:
            atomic_write_text(path, response.read().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option} {path}: missing, and it cannot be fetched ({error}); put TruthfulQA.csv from "
            f"github.com/sylinrl/TruthfulQA there, or name other normal data such as --normal_data data/benign.jsonl"
        ) from error


def _rows_of(record: dict, source: str, where: str, is_forget: bool) -> list[Row]:
    """Return the rows of one record, usually one.

    If responses are labelled as safe or unsafe (PKU-SafeRLHF's pairs, BeaverTails), unsafe responses give forget rows
    and safe responses give normal rows.
    """
    lower = {str(key).strip().lower(): value for key, value in record.items()}
    prompt_field = next((f for f in PROMPT_FIELDS if f in lower), None)
    if prompt_field is None:
        raise UsageError(f"{where}: has no {' / '.join(PROMPT_FIELDS)} field, only {', '.join(map(str, lower))[:80]}")
    prompt = _text(lower[prompt_field], where, prompt_field)
    if not prompt:
        raise UsageError(f"{where}: field '{prompt_field}' is empty")
    context = lower.get("input") or lower.get("context")  # the text that an instruction is about (Alpaca, Dolly)
    if prompt_field == "instruction" and isinstance(context, str) and context.strip():
        prompt = f"{prompt}\n\n{_text(context, where, 'input')}"
    row_id = str(lower.get("id", "") if lower.get("id") is not None else "")

    if "is_response_0_safe" in lower:
        rows = []
        for i in (0, 1):
            missing = [field for field in (f"is_response_{i}_safe", f"response_{i}") if field not in lower]
            if missing:
                raise UsageError(f"{where}: is a pair of responses without '{missing[0]}'")
            if _truth(lower[f"is_response_{i}_safe"], where, f"is_response_{i}_safe") != is_forget:
                response = _text(lower[f"response_{i}"], where, f"response_{i}") or None
                category = _category(lower.get(f"response_{i}_harm_category"))
                rows.append(Row(prompt, response, category, row_id, source))
        return rows
    if "is_safe" in lower and _truth(lower["is_safe"], where, "is_safe") == is_forget:
        return []
    response_field = next((f for f in RESPONSE_FIELDS if lower.get(f) is not None), None)
    response = _text(lower[response_field], where, response_field) if response_field else None
    correct = str(lower.get("correct answers") or "")
    true_answers = [response or "", *(part.strip() for part in correct.split(";"))]
    category = _category(lower.get("category") or lower.get("semanticcategory"))
    wanted = _text(lower["wanted"], where, "wanted") if lower.get("wanted") is not None else None
    true_answers = tuple(dict.fromkeys(filter(None, true_answers)))
    return [Row(prompt, response or None, category, row_id, source, true_answers, wanted=wanted or None)]


def _text(value, where: str, field: str) -> str:
    """Return a field's text without outer spaces. Raises UsageError for other types and lone surrogates."""
    if not isinstance(value, str):
        raise UsageError(f"{where}: field '{field}' must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: field '{field}' holds half a character (a lone surrogate, {error.start})"
        ) from error
    return value.strip()


def _truth(value, where: str, field: str) -> bool:
    """Return a field's truth value. Raises UsageError for any value but true, false, 1 and 0."""
    word = str(value).strip().lower()
    if word not in ("true", "1", "1.0", "false", "0", "0.0"):
        raise UsageError(f"{where}: field '{field}' must be true or false, got {value!r:.40}")
    return word in ("true", "1", "1.0")


def _category(value) -> str:
    """Return the names of categories, separated by semicolons, from a text, a list, or a dict of flags."""
    names = [name for name, on in value.items() if on] if isinstance(value, dict) else value
    return "; ".join(map(str, names)) if isinstance(names, list | tuple) else str(names or "")
