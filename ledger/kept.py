"""The file in which a request keeps its rows or text, in one form whatever they came in, and what is hashed of them.

A row's category is the kind of its request, by which a recipe tells people from rules (`kinds` of a draw). Its own
category and id are left out: they may name who it is about, and reports and logs print them.
"""

from __future__ import annotations

import json
from pathlib import Path

from data_module import prompt_hash
from sources.rows import Row, read_rows, read_texts
from utils import UsageError, write_json_lines


def read_given(spec: str, option: str, fields: list[str]) -> list[Row]:
    """Read what an option of `add` is given, in all forms of --forget_data or --forget_text. Raises UsageError."""
    if option != "--text":
        return read_rows(spec, option, fields)
    (source,) = read_texts([spec], option, fields)
    return source.rows


def plain_row(row: Row, kind: str) -> dict:
    """Return a row as a file of rows holds it; kind: its category."""
    if row.is_text:
        return {"text": row.response}
    if row.earlier:
        turns = [*row.earlier, ("user", row.prompt), *([("assistant", row.response)] if row.response else [])]
        fields = {"messages": [{"role": role, "content": text} for role, text in turns]}
    elif row.complete:
        fields = {"prompt": row.prompt, "response": row.response}
    else:  # the beginning of an answer, as AdvBench and HarmBench name it
        fields = {"goal": row.prompt, "target": row.response}
    fields |= {"category": kind, "wanted": row.wanted, "paraphrased_answer": row.paraphrased,
               "perturbed_answer": list(row.perturbed)}  # fmt: skip
    return {name: value for name, value in fields.items() if value}


def keep(rows: list[Row], path: Path, kind: str) -> None:
    """Write the rows or texts of a request of some kind to a file. Raises UsageError if they could not be read back."""
    write_json_lines(path, [plain_row(row, kind) for row in rows])
    if contents(read_kept(path, is_text=rows[0].is_text)) != contents(rows, kind):
        raise UsageError(f"{rows[0].source}: holds rows that no file of requests can keep; give prompts and responses")


def read_kept(path: Path, *, is_text: bool) -> list[Row]:
    """Return the rows of a file that `keep` wrote. Raises UsageError."""
    return read_given(str(path), "--text" if is_text else "--rows", [])


def contents(rows: list[Row], kind: str | None = None) -> list[str]:
    """Return what is hashed of each row: prompt, earlier turns, answers, whether its answer is whole, and its kind, as
    JSON. kind: of their request, for rows that are not kept yet."""
    return [json.dumps([row.prompt, row.earlier, row.response, row.wanted, row.complete,
                        "" if row.is_text else row.category if kind is None else kind]) for row in rows]  # fmt: skip


def prompts(rows: list[Row]) -> set[str]:
    """Return a hash of each row's prompt, of a text of its words: rows of one hash cannot be on both sides of a run."""
    return {prompt_hash(row.key) for row in rows}
