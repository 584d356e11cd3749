"""The requests of a ledger as its entries tell them, and the folder in which each one's text lies.

FOLDER/ledger.jsonl           the chain: salted hashes, dates, states; no text of a request
FOLDER/requests/ID/           what a request asks: its rows or text, subject, note and salt; `--shred` deletes it
FOLDER/states/NNNN/           the model after an apply
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ledger.chain import NOT_WRITTEN, Chain, Entry, missing_since, read_head
from ledger.kept import contents, keep, prompts, read_given, read_kept
from ledger.salted import new_salt, salted
from sources.rows import Row
from utils import UsageError, atomic_dir, write_json

KINDS = ("person", "text", "fact", "harm", "policy")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAMES_OF_ALL = ("all", "worst")  # in commands and in reports
# endings of the files beside a request's rows: with rows that stay, and with rows that are asked and never trained on
BESIDE = {"allowed": "-allowed.jsonl", "holdout": "-holdout.jsonl"}
# what no prompt may be at once: (in a request, in another one or the same, what it is there)
CLASHES = (("rows", "allowed", "stay"), ("allowed", "rows", "are to be forgotten"), ("holdout", "allowed", "stay"),
           ("allowed", "holdout", "are to be forgotten"), ("rows", "holdout", "are held out"),
           ("holdout", "rows", "are trained on"))  # fmt: skip
ABOUT = "request.json"  # in a request's folder: subject, note, salt


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for, as `add` is told. rows: a file of rows; text: a file of text; one of the two.

    subject and note stay with the text; basis, approved_by and the dates stand in the ledger for ever.
    """

    id: str
    kind: str
    rows: str | None = None
    text: str | None = None
    fields: tuple[str, ...] = ()
    subject: str = ""
    note: str = ""
    received: str = ""
    due: str = ""
    basis: str = ""
    approved_by: str = ""
    allowed: str | None = None  # a file of rows beside the border, that stay as they are
    holdout: str | None = None  # a file of rows that are to be forgotten as well, asked and never trained on
    rule: str = ""  # of a policy: the rule's id


@dataclasses.dataclass
class Request:
    """A request, and what followed. states: the numbers of the states that were fitted to it."""

    added: Entry
    withdrawn: Entry | None = None
    shredded: Entry | None = None
    lost: Entry | None = None  # the state that was fitted anew without its text
    states: list[int] = dataclasses.field(default_factory=list)

    @property
    def id(self) -> str:
        return self.added["id"]

    @property
    def kind(self) -> str:
        return self.added["kind"]

    @property
    def is_in_force(self) -> bool:
        """Whether it stands: added and not withdrawn."""
        return self.withdrawn is None


class Book:
    """A ledger's folder: reads its entries into requests and states, and writes what a command asks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.chain = Chain(folder / "ledger.jsonl")

    # ---- reading
    def read(self) -> Book:
        """Read the entries; return self. Raises UsageError for a chain that is broken or does not begin with `init`."""
        entries = self.chain.entries()
        if not entries or entries[0].what != "init":
            raise UsageError(f"{self.chain.path}: does not begin with an entry 'init'")
        self.entries, self.settings = entries, entries[0]["settings"]
        self.requests: dict[str, Request] = {}
        self.states: list[Entry] = []
        for entry in entries[1:]:
            if entry.what == "add":
                self.requests[entry["id"]] = Request(entry)
            elif entry.what == "withdraw":
                self.requests[entry["id"]].withdrawn = entry
            elif entry.what == "shred":
                self.requests[entry["id"]].shredded = entry
            elif entry.what == "state":
                self.states.append(entry)
                for name in entry["requests"]:
                    self.requests[name].states.append(entry["state"])
                for name in entry["lost"]:
                    self.requests[name].lost = entry
        return self

    @property
    def state(self) -> Entry | None:
        """The newest state, or None."""
        return self.states[-1] if self.states else None

    def in_force(self) -> list[Request]:
        """Return the requests that stand, in their order."""
        return [request for request in self.requests.values() if request.is_in_force]

    def is_met(self, request: Request) -> bool:
        """Return whether the newest state is what a request asks for: fitted to it, or without it once withdrawn. A
        request whose text is destroyed, and that a state was fitted anew without, cannot be met any more."""
        if request.lost:
            return True
        fitted = self.state is not None and request.id in self.state["requests"]
        return fitted == request.is_in_force or (not request.states and not request.is_in_force)

    def open(self) -> list[Request]:
        """Return the requests that the newest state does not meet yet."""
        return [request for request in self.requests.values() if not self.is_met(request)]

    def request(self, name: str) -> Request:
        """Return a request by its id. Raises UsageError if there is none."""
        if name not in self.requests:
            known = ", ".join(list(self.requests)[-8:]) or "none yet"
            raise UsageError(f"request {name!r}: {self.chain.path} has no such id; it has {known}")
        return self.requests[name]

    # ---- the text of a request
    def folder_of(self, name: str) -> Path:
        return self.folder / "requests" / name

    def about(self, name: str) -> dict:
        """Return what lies beside a request's text: subject, note, salt. Raises UsageError."""
        path = self.folder_of(name) / ABOUT
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({error}); restore it, or withdraw the request") from error

    def file_of(self, name: str) -> Path:
        """Return the file with a request's rows or text."""
        return self.folder_of(name) / f"{name}.jsonl"

    def beside(self, name: str, what: str) -> Path | None:
        """Return the file of other rows that a request came with; None if it has none. what: `allowed`, rows beside its
        border that stay as they are, or `holdout`, rows that are asked and never trained on."""
        return self.folder_of(name) / f"{name}{BESIDE[what]}" if self.requests[name].added.content.get(what) else None

    def rows_of(self, name: str) -> list[Row]:
        """Return a request's rows, or its texts. Raises UsageError."""
        return read_kept(self.file_of(name), is_text=self.requests[name].added["is_text"])

    def rows_beside(self, name: str, what: str) -> list[Row]:
        """Return the rows that `beside` names the file of. Raises UsageError."""
        path = self.beside(name, what)
        return read_kept(path, is_text=False) if path else []

    # ---- writing: each within `chain.writing`
    def add(self, asked: Asked) -> Entry:
        """Keep a request's text and note it in the ledger. Raises UsageError, with nothing written."""
        given = self.check(asked)
        rows, salt = given["rows"], new_salt()
        self.remove_leftovers()
        with atomic_dir(self.folder_of(asked.id)) as partial:
            keep(rows, partial / f"{asked.id}.jsonl", asked.kind)  # reports name a group by its file
            for what, ending in BESIDE.items():
                if given[what]:
                    keep(given[what], partial / f"{asked.id}{ending}", asked.kind)
            write_json(partial / ABOUT, {"subject": asked.subject, "note": asked.note, "salt": salt})
        hashes = {"subject": salted(asked.subject, salt) if asked.subject else "",
                  "note": salted(asked.note, salt) if asked.note else "",
                  **{what: [salted(content, salt) for content in contents(some, asked.kind)]
                     for what, some in given.items()}}  # fmt: skip
        plain = {
            name: getattr(asked, name) for name in ("id", "kind", "received", "due", "basis", "approved_by", "rule")
        }
        return self.chain.append("add", is_text=asked.text is not None, **plain, **hashes)

    def check(self, asked: Asked, without: Collection[str] = ()) -> dict[str, list[Row]]:
        """Return a request's rows, and those of BESIDE. Raises UsageError if it cannot be added.

        A prompt that is to be forgotten and to stay, or is trained on and held out, in the request alone or with one
        that is in force, could not be fitted or not be measured. without: ids of requests that fall before it.
        """
        self._refuse(asked)
        fields = list(asked.fields)
        given = {"rows": read_given(asked.rows or asked.text, "--rows" if asked.rows else "--text", fields)}
        given |= {what: read_given(path, f"--{what}", fields) if (path := getattr(asked, what)) else []
                  for what in BESIDE}  # fmt: skip
        mine = {what: prompts(rows) for what, rows in given.items()}
        sides = [("the request itself", mine)]
        for request in self.in_force():
            if not request.shredded and request.id not in without:
                theirs = {what: prompts(self.rows_beside(request.id, what)) for what in BESIDE}
                sides.append((f"request {request.id}", {"rows": prompts(self.rows_of(request.id)), **theirs}))
        for name, theirs in sides:
            for one, other, why in CLASHES:
                if both := mine[one] & theirs[other]:
                    raise UsageError(f"--{one} {getattr(asked, one) or asked.text}: {len(both)} of its prompts are "
                                     f"among those that {why} in {name}; take them out of one of the two")  # fmt: skip
        return given

    def _refuse(self, asked: Asked) -> None:
        if not ID.fullmatch(asked.id):
            raise UsageError(f"--id {asked.id!r}: must be 1 to 64 letters, digits, dots, dashes and underlines")
        if asked.id in self.requests:
            since = self.requests[asked.id].added.at
            raise UsageError(f"--id {asked.id}: the ledger has such a request since {since}; give another id")
        if asked.kind not in KINDS:
            raise UsageError(f"--kind {asked.kind}: must be one of {', '.join(KINDS)}")
        if (asked.rows is None) == (asked.text is None):
            raise UsageError("--rows and --text: give one of the two, a file of rows or a file of text")
        if asked.id.endswith(tuple(ending.partition(".")[0] for ending in BESIDE.values())):
            raise UsageError(f"--id {asked.id}: ends as the files beside a request's rows do; give another id")
        if asked.id in NAMES_OF_ALL:
            raise UsageError(f"--id {asked.id}: stands for several requests; give another id")
        for name in ("received", "due"):
            if value := getattr(asked, name):
                read_date(value, f"--{name} {value}")
        if asked.received and asked.due and asked.due < asked.received:
            raise UsageError(f"--due {asked.due}: lies before --received {asked.received}")

    def withdraw(self, name: str, why: str) -> Entry:
        """Note that a request falls. Raises UsageError if it has fallen before."""
        request = self.request(name)
        if not request.is_in_force:
            raise UsageError(f"request {name}: was withdrawn on {request.withdrawn.at}")
        return self.chain.append("withdraw", id=name, why=why)

    def shred(self, name: str) -> Entry:
        """Delete a request's text and salt, and note it. Raises UsageError if it was not yet answered by a state."""
        request = self.request(name)
        if request.shredded:
            raise UsageError(f"request {name}: its text was destroyed on {request.shredded.at}")
        if not self.is_met(request):
            raise UsageError(f"request {name}: the newest state does not meet it yet, and without its text none will; "
                             "apply first")  # fmt: skip
        entry = self.chain.append("shred", id=name)  # the entry first: a text without it would seem to be lost
        shutil.rmtree(self.folder_of(name))
        return entry

    def finish_shredding(self) -> list[str]:
        """Delete the texts whose destruction is noted but was cut off; return their ids."""
        left = [name for name, request in self.requests.items() if request.shredded and self.folder_of(name).exists()]
        for name in left:
            shutil.rmtree(self.folder_of(name))
        return left

    def remove_leftovers(self) -> None:
        """Remove what an `add` that was cut off left of a text: folders of no request."""
        folder = self.folder / "requests"
        for path in list(folder.iterdir()) if folder.is_dir() else ():
            if path.name not in self.requests:
                shutil.rmtree(path)

    # ---- what is checked
    def faults(self) -> list[str]:
        """Return what is wrong beyond the chain: texts that are missing or were changed, and folders of no request."""
        found = []
        for name, request in self.requests.items():
            if request.shredded:
                if self.folder_of(name).exists():
                    found.append(f"request {name}: its text was to be destroyed on {request.shredded.at} and is there")
            else:
                found += self._faults_of(request)
        folder = self.folder / "requests"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name not in self.requests:
                found.append(f"{path}: no request has this id (an 'add' that was cut off); the next 'add' removes it")
        return found

    def _faults_of(self, request: Request) -> list[str]:
        """Return what is wrong with the text of a request."""
        try:
            about = self.about(request.id)
            salt, path = about["salt"], self.file_of(request.id)
            for what in BESIDE:
                if other := self.beside(request.id, what):
                    found = contents(read_kept(other, is_text=False))
                    if [salted(content, salt) for content in found] != request.added[what]:
                        return [f"request {request.id}: {other} was changed"]
            for name in ("subject", "note"):
                if (salted(about[name], salt) if about[name] else "") != request.added[name]:
                    return [f"request {request.id}: its {name} was changed"]
            hashes = [salted(content, salt) for content in contents(self.rows_of(request.id))]
        except (UsageError, KeyError, TypeError, ValueError) as error:
            return [f"request {request.id}: its text cannot be read ({error})"]
        wanted = request.added["rows"]
        if hashes == wanted:
            return []
        changed = [place for place, (a, b) in enumerate(zip(hashes, wanted, strict=False), 1) if a != b]
        if len(hashes) != len(wanted):
            return [f"request {request.id}: {path} has {len(hashes)} rows, the ledger {len(wanted)}"]
        return [f"request {request.id}: row {changed[0]} of {path} was changed"]


def read_date(text: str, where: str) -> str:
    """Return a date as it stands. Raises UsageError, with `where`, if it is none as 2026-11-27."""
    try:
        if datetime.date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise UsageError(f"{where}: must be a date as 2026-11-27")


def faults_of_notes(book: Book) -> list[str]:
    """Return what the counts and last hashes that lie beside the chain and in the states' folders say against it."""
    found: list[str] = []
    for path in (book.chain.note, *sorted((book.folder / "states").glob("*/state.json"))):
        if not path.exists():
            found.append(f"{path}: is missing: it notes the last entry")
            continue
        try:
            fault = missing_since(book.entries, read_head(path, NOT_WRITTEN.format(path)), str(path))
        except UsageError as error:
            fault = str(error)
        found += [fault] if fault else []
    return found
