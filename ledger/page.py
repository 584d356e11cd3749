"""What an auditor may see of a ledger, as JSON and as one self-contained page: no text of a request is in it."""

from __future__ import annotations

from pathlib import Path

import jinja2

from ledger.book import Book
from utils import atomic_write_text, write_json

NOT_PROMISED = (
    "A figure is of the rows that were asked, by the measure beside it; other words may still find something.",
    "Copies of the model that were made elsewhere, quantised ones included, are not changed by this ledger.",
    "A chain of entries that was written anew from the start is found only by comparing it with an earlier export.",
    "That a text was destroyed means that its files were deleted here; backups and the disk itself are not wiped.",
)  # fmt: skip


def export_of(book: Book, copies: list[str], status_line) -> dict:
    """Return the content of export.json. copies: what else holds rows; status_line(book, request): its line."""
    head = book.entries[-1]
    return {
        "ledger": {"count": head.number, "hash": head.hash, "begun": book.entries[0].at, "last": head.at},
        "original": {"name": book.entries[0]["model"], "sha256": book.entries[0]["original"]},
        "settings": book.settings,
        "requests": [status_line(book, request) for request in book.requests.values()],
        "states": [{"number": state["state"], "at": state.at, "entry": state.number, "hash": state.hash,
                    **state.content} for state in book.states],
        "to_delete": copies,
        "not_promised": list(NOT_PROMISED),
    }  # fmt: skip


def write_export(folder: Path, content: dict) -> None:
    """Write export.json and export.html."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("export.html").render(**content)
    write_json(folder / "export.json", content)
    atomic_write_text(folder / "export.html", page)
