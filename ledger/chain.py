"""An append-only file of entries, each chained to the one before by a hash.

A line is an entry as JSON with sorted keys and no spaces. Its `hash` is the SHA-256 of that line without it; `previous`
is the hash of the entry before it, so an entry that was changed, removed, added or moved breaks the chain at a place
that can be named. Missing last entries break nothing: they are found by the count and the last hash that were
noted elsewhere (`Head`). A chain that was written anew from the start is found only against such a note, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
from pathlib import Path

from utils import UsageError, atomic_write_text, log

NOT_WRITTEN = "{}: is not what was written there; restore it"
START = "0" * 64  # the hash before the first entry
OWN = ("number", "at", "what", "previous", "hash")  # fields that every entry has


@dataclasses.dataclass(frozen=True)
class Head:
    """How many entries a chain had, and the hash of the last one."""

    count: int
    hash: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry. number: from 1 on; at: UTC, ISO 8601; what: its kind; content: its other fields."""

    number: int
    at: str
    what: str
    previous: str
    hash: str
    content: dict

    def __getitem__(self, name: str):
        return self.content[name]


def written(fields: dict) -> bytes:
    """Return the fields of an entry as its line holds them. Raises ValueError for a number that JSON does not have."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def entry_hash(fields: dict) -> str:
    """Return the SHA-256 of an entry's fields without `hash`."""
    return hashlib.sha256(written({name: value for name, value in fields.items() if name != "hash"})).hexdigest()


def now() -> str:
    """Return the time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Chain:
    """The entries of a file. Only the holder of `writing` may append."""

    def __init__(self, path: Path):
        self.path = path
        self.lock: int | None = None  # its file's number, while this process may write

    # ---- reading
    def entries(self) -> list[Entry]:
        """Return the entries, without a torn last line. Raises UsageError for the first fault."""
        entries, faults, _ = self._read()
        if faults:
            raise UsageError(f"{self.path}: {faults[0]}; run 'unlearn_requests.py verify' and restore the file")
        return entries

    def head(self) -> Head:
        """Return count and hash of the last entry."""
        entries = self.entries()
        return Head(len(entries), entries[-1].hash if entries else START)

    def faults(self) -> list[str]:
        """Return what is wrong with the file, each with the number of its line; [] for a chain that holds."""
        return self._read()[1]

    def torn(self) -> str | None:
        """Return what a write that was cut off left of the last line, or None."""
        return self._read()[2]

    def _read(self) -> tuple[list[Entry], list[str], str | None]:
        """Return (entries, faults, the torn last line or None)."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"{self.path}: no such ledger; begin one with 'unlearn_requests.py init'") from error
        rest = lines.pop()  # an entry ends with a line end: without one, its write was cut off
        torn = None
        if rest:
            if _parsed(rest) is not None:  # whole but for its line end
                lines.append(rest)
            else:
                torn = rest.decode("utf-8", errors="replace")
        entries: list[Entry] = []
        faults, previous = [], START
        for place, line in enumerate(lines, 1):
            fields = _parsed(line)
            if fields is None:
                faults.append(f"entry {place}: is not an entry")
                previous = None
                continue
            faults += _faults_of(fields, line, place, previous)
            previous = fields["hash"]
            content = {name: value for name, value in fields.items() if name not in OWN}
            entries.append(Entry(*(fields[name] for name in OWN), content))
        return entries, faults, torn

    # ---- writing
    @contextlib.contextmanager
    def writing(self):
        """Hold the ledger for writing; a torn last line is cut off. Raises UsageError if another process holds it.

        A process that is started with `lock` among its files goes on holding it when this one is killed.
        """
        if not self.path.parent.is_dir():
            raise UsageError(f"{self.path}: no such ledger; begin one with 'unlearn_requests.py init'")
        with self.path.with_suffix(".lock").open("a") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(f"{self.path}: another process is writing to it; wait until it is done") from error
            if self.path.exists():
                self._cut_back()
            self._compare_note()
            self.lock = held.fileno()
            try:
                yield self
            finally:
                self.lock = None

    def append(self, what: str, **content) -> Entry:
        """Write an entry and wait until the disk has it. Raises UsageError if the chain is broken: nothing is added to
        a broken one."""
        assert self.lock is not None, "the ledger must be held for writing"
        assert not content.keys() & set(OWN), content.keys()
        head = self.head() if self.path.exists() else Head(0, START)
        fields = {"number": head.count + 1, "at": now(), "what": what, "previous": head.hash, **content}
        fields["hash"] = entry_hash(fields)
        line = written(fields) + b"\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        with self.path.open("ab") as stream:
            try:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:  # a full disk: no half of an entry stays
                stream.truncate(size)
                raise
        self._write_note(Head(fields["number"], fields["hash"]))
        return Entry(fields["number"], fields["at"], what, fields["previous"], fields["hash"], content)

    @property
    def note(self) -> Path:
        """The file beside the chain with count and hash of the last entry: it tells that last ones are missing."""
        return self.path.with_suffix(".head.json")

    def noted(self) -> Head | None:
        """Return what `note` holds; None if there is none. Raises UsageError for a file of another form."""
        return read_head(self.note, NOT_WRITTEN.format(self.note)) if self.note.exists() else None

    def _write_note(self, head: Head) -> None:
        atomic_write_text(self.note, json.dumps(dataclasses.asdict(head)) + "\n")

    def _compare_note(self) -> None:
        """Refuse a chain whose last entries are missing; note the last one if a cut-off kept it from being noted."""
        noted = self.noted()
        if not self.path.exists() and noted is None:
            return
        entries = self.entries()
        if noted and (fault := missing_since(entries, noted, self.note.name)):
            raise UsageError(f"{self.path}: {fault}; restore the file")
        if entries and (noted is None or noted.count < len(entries)):
            self._write_note(Head(len(entries), entries[-1].hash))

    def _cut_back(self) -> None:
        """Cut a torn last line off, or give a whole one its line end."""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole == len(raw):
            return
        with self.path.open("r+b") as stream:
            if _parsed(raw[whole:]) is not None:
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
            else:
                stream.truncate(whole)
                log.warning("%s: its last line was cut off by a write that did not end; the file goes back to entry %d",
                            self.path, raw.count(b"\n"))  # fmt: skip
            stream.flush()
            os.fsync(stream.fileno())


def _parsed(line: bytes) -> dict | None:
    """Return the fields of a line, or None if it is not an entry."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    kinds = {"number": int, "at": str, "what": str, "previous": str, "hash": str}
    if not isinstance(fields, dict) or any(type(fields.get(name)) is not kind for name, kind in kinds.items()):
        return None
    return fields


def _faults_of(fields: dict, line: bytes, place: int, previous: str | None) -> list[str]:
    """Return what is wrong with the entry at a place; previous: hash of the entry before, None if that is unknown."""
    faults = []
    try:
        true_hash, same = entry_hash(fields), written(fields) == line
    except ValueError:  # a number that JSON does not have
        true_hash, same = None, False
    if fields["hash"] != true_hash:
        faults.append(f"entry {place}: was changed (its hash is not that of its content)")
    elif not same:
        faults.append(f"entry {place}: was changed (it is not written as a ledger writes it)")
    if fields["number"] != place:
        faults.append(f"entry {place}: has number {fields['number']}: entries were removed, added or moved")
    elif previous is not None and fields["previous"] != previous:
        faults.append(f"entry {place}: does not follow the entry before it (its 'previous' is another hash)")
    return faults


def read_head(path: Path, complaint: str) -> Head:
    """Return the count and last hash that a file notes, by themselves or under `ledger`. Raises UsageError, with
    `complaint`, for another file."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        noted = noted.get("ledger", noted)
        return Head(int(noted["count"]), str(noted["hash"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{complaint} ({error!r})") from error


def missing_since(entries: list[Entry], head: Head, noted_in: str) -> str | None:
    """Return what a noted count and last hash say against the entries, or None; noted_in: where it was noted."""
    if head.count > len(entries):
        return f"{noted_in} knows {head.count} entries, the ledger has {len(entries)}: the last ones are missing"
    if head.count and entries[head.count - 1].hash != head.hash:
        return f"{noted_in} knows another entry {head.count}: the chain was written anew from there or before"
    return None
