"""Find out what a user named: a file, a folder or a hub data set, and give its records or its documents."""

from __future__ import annotations

import dataclasses
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from hub import why_unreachable
from sources.containers import BATCH_ROWS, RECORD_KINDS, TEXT_KINDS, Record, kind_of, read_records, stem_of
from utils import UsageError, atomic_write_text

TRUTHFULQA_URL = "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"
HUB = re.compile(r"(?P<name>[\w.-]+(?P<owned>/[\w.-]+)?)(?P<config>:[\w.-]+)??(?P<split>:[\w.+-]+(\[[\w:%]*\])?)?")
SPLIT = re.compile(
    r"(train|test|validation|valid|val|dev|eval)\b|(train|test|validation|valid|val|dev|eval)(?=_)", re.I
)


@dataclasses.dataclass
class Opened:
    """What stands behind a name: a file of text, or records in files, in a folder or on the hub.

    `name`: what its rows are called. `files`: the files of a folder, or the one file itself; empty for a data set.
    """

    name: str
    files: list[Path] = dataclasses.field(default_factory=list)
    records: Iterator[Record] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def open_spec(spec: str, option: str, kinds: tuple[str, ...]) -> Opened:
    """Open a file of one of these kinds, a folder of them, or a hub data set. Raises UsageError if it is none."""
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, "", spec, option, kinds)
    if kind_of(path) in kinds:
        if path.name == "TruthfulQA.csv" and not path.exists():
            _fetch_truthfulqa(path, option)
        if not path.is_file():
            raise UsageError(f"{option} {path}: no such file")
        is_text = kind_of(path) in TEXT_KINDS
        return Opened(stem_of(path), [path], None if is_text else read_records(path, option))
    folder, _, split = spec.rpartition(":")
    if folder and Path(folder).is_dir():
        return _open_folder(Path(folder), split, spec, option, kinds)
    hub = HUB.fullmatch(spec)
    if hub and (hub["owned"] or hub["split"]) and not path.exists():
        return Opened(hub["name"].rpartition("/")[2], records=_hub_records(hub, spec, option))
    if kind_of(path) in TEXT_KINDS:
        raise UsageError(f"{option} {spec}: text without prompts goes to {option.replace('_data', '_text')}")
    raise UsageError(f"{option} {spec}: neither a {'/'.join(kinds)} file (also .gz), nor a folder of such files, nor a "
                     "hub name like owner/name")  # fmt: skip


# ------------------------------------------------------------------------------------------------ folders
def _open_folder(folder: Path, split: str, spec: str, option: str, kinds: tuple[str, ...]) -> Opened:
    """Open a folder: one that `datasets.save_to_disk` wrote, or one of files; of several splits, train is taken."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(folder, split, spec, option)
    inside = sorted(file for file in folder.rglob("*") if file.is_file())
    inside = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
    files = [file for file in inside if kind_of(file) in kinds]
    if TEXT_KINDS[1] not in kinds:  # a folder of rows has files of one kind; a README or metadata beside them is none
        files = next((same for kind in (".parquet", ".jsonl", ".csv", ".tsv", ".json")
                      if (same := [file for file in files if kind_of(file) == kind])), [])  # fmt: skip
    notes = []
    splits = {file: _split_named(file.relative_to(folder)) for file in files} if kinds[0] in RECORD_KINDS else {}
    if split or len(set(splits.values())) > 1:
        chosen = _choose_split(sorted(set(splits.values())), split, spec, option)
        others = [file for file in files if splits[file] != chosen]
        files = [file for file in files if splits[file] == chosen]
        if others:
            notes.append(f"of its splits only {chosen} is read; {len(others)} files of other splits are not "
                         f"({others[0].name} ...): name one as {folder}:SPLIT")  # fmt: skip
    if not files:
        raise UsageError(f"{option} {spec}: a folder without a {'/'.join(kinds)} file (also .gz)")
    if TEXT_KINDS[1] in kinds and len(inside) > len(files):
        left = [file for file in inside if file not in set(files)]
        notes.append(f"{len(left)} files of other kinds are not read ({left[0].name}{', ...' if left[1:] else ''})")
    return Opened(folder.name, files, _records_of_files(files, option), notes)


def _records_of_files(files: list[Path], option: str) -> Iterator[Record]:
    for file in files:
        yield from read_records(file, option)


def _split_named(path: Path) -> str:
    """Return the split that a file or its folder is named after, as the hub does: data/test-00000-of-00001.parquet."""
    found = next((match for part in path.parts if (match := SPLIT.match(part))), None)
    return found.group(0).lower() if found else ""


def _choose_split(names: list[str], wanted: str, spec: str, option: str) -> str:
    if wanted not in names and (wanted or "train" not in names):
        shown = ", ".join(name or "(no split)" for name in names)
        raise UsageError(f"{option} {spec}: name one of its splits as FOLDER:SPLIT; it has {shown[:80]}")
    return wanted or "train"


def _open_saved(folder: Path, split: str, spec: str, option: str) -> Opened:
    import datasets  # slow to import, and only data sets need it

    notes = []
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many libraries; each means that the folder is not whole
        raise UsageError(f"{option} {spec}: cannot be read as a saved data set ({_reason(error)})") from error
    if isinstance(saved, dict):
        chosen = _choose_split(sorted(saved), split, spec, option) if split or len(saved) > 1 else next(iter(saved))
        if others := [f"{name} ({len(saved[name])} rows)" for name in saved if name != chosen]:
            notes.append(f"of its splits only {chosen} is read, not {', '.join(others)}: name one as {folder}:SPLIT")
        saved = saved[chosen]
    elif split:
        raise UsageError(f"{option} {spec}: {folder} has no splits; name it without :{split}")
    return Opened(folder.name, records=_records_of_data_set(saved, f"{option} {spec}"), notes=notes)


# ---------------------------------------------------------------------------------------------------- hub
def _hub_records(hub: re.Match, spec: str, option: str) -> Iterator[Record]:
    """Download a hub data set (split train unless one is named) and yield its records."""
    import datasets  # slow to import, and only data sets need it

    name, config, split = hub["name"], (hub["config"] or "")[1:] or None, (hub["split"] or ":train")[1:]
    datasets.disable_progress_bars()
    try:
        if not _is_prepared(name) and (why := why_unreachable(name, "dataset")):
            raise OSError(why)
        data_set = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises errors of many libraries; each means that the download failed
        file = f"data/{name.rpartition('/')[2]}.jsonl"
        raise UsageError(
            f"data set {name} cannot be downloaded: save it as {file} and pass {option}={file}, or name a part that it "
            f"has, as {name}:SPLIT or {name}:CONFIG:SPLIT ({_reason(error)})"
        ) from error
    yield from _records_of_data_set(data_set, f"{option} {spec}")


def _is_prepared(name: str) -> bool:
    """Return whether the data set's tables lie on this machine, whatever became of the files that they were made of."""
    import datasets  # slow to import, and only data sets need it

    *owner, last = name.split("/")
    folder = "___".join([*owner, datasets.naming.camelcase_to_snakecase(last)])
    return Path(datasets.config.HF_DATASETS_CACHE, folder).is_dir()


def _records_of_data_set(data_set, place: str) -> Iterator[Record]:
    """Yield the records of a `datasets.Dataset`. Its own iterator is many times slower than its Arrow tables."""
    number = 0
    for table in data_set.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for fields in table.to_pylist():
            number += 1
            yield Record(place, number, fields)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _fetch_truthfulqa(path: Path, option: str) -> None:
    try:
        with urllib.request.urlopen(TRUTHFULQA_URL, timeout=20) as response:
            atomic_write_text(path, response.read().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option} {path}: missing, and it cannot be fetched ({error}); put TruthfulQA.csv from "
            f"github.com/sylinrl/TruthfulQA there, or name other normal data such as --normal_data data/benign.jsonl"
        ) from error
