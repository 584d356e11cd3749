"""A ledger to work on."""

from pathlib import Path

from ledger.book import Book


def begin(folder: Path) -> Book:
    """Begin a ledger in a new folder, without settings."""
    folder.mkdir()
    book = Book(folder)
    with book.chain.writing():
        book.chain.append("init", settings={}, model="m", original="0")
    return book.read()
