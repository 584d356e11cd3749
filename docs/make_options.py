"""Write docs/options.md: every option and every setting of a recipe, from the dataclasses that hold them.

python docs/make_options.py
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import unlearn_requests
from evaluation.options import EvaluateOptions
from method.draws import DRAWS
from method.objectives import OBJECTIVES
from method.recipe import SECTIONS, TermEntry
from options import GROUPS, UnlearnOptions, in_groups
from run.finetuning import FinetuneOptions
from sweep import SweepOptions

PAGE = Path(__file__).resolve().parent / "options.md"
SCRIPTS = {"unlearn_harm.py": UnlearnOptions, "finetune.py": FinetuneOptions,
           "evaluate_unlearning.py": EvaluateOptions, "sweep.py": SweepOptions}  # fmt: skip
HEAD = ["| name | takes | default | |", "|---|---|---|---|"]
TEXT = """# Options and settings

This page is written by `python docs/make_options.py`; a test holds it to the code. Options stand on the command line
or in a `--config` file; what the command line says wins. `-` for `_` is read as well. A recipe may bring other defaults
(its `options`). Settings belong to a recipe's YAML, and `--set TERM.SETTING=VALUE` or `--set SECTION.SETTING=VALUE`
changes one.
"""


def page() -> str:
    """Return the text of docs/options.md."""
    parts, shown = [TEXT], {}
    for script, kind in SCRIPTS.items():
        parts.append(f"## {script}\n\n{kind.__doc__}\n")
        for group, fields in in_groups(kind).items():
            rows = {field.name: row for field, row in zip(fields, _rows(fields, kind, "--"), strict=True)}
            if group:
                parts.append(f"**{GROUPS[group]}**\n")
            if new := [row for row in rows.values() if row not in shown]:
                parts += [*HEAD, *new, ""]
            for other in dict.fromkeys(shown[row] for row in rows.values() if row in shown):
                same = ", ".join(f"`--{name}`" for name, row in rows.items() if shown.get(row) == other)
                parts.append(f"As of {other}: {same}.\n")
            shown |= {row: script for row in rows.values() if row not in shown}
    parts.append("## unlearn_requests.py\n")
    for command, (kind, _) in unlearn_requests.COMMANDS.items():
        parts += [f"**{command}**: {kind.__doc__.splitlines()[0]}\n", *_table(kind, "--"), ""]
    parts.append(
        "`find` also takes what is looked for, names or quotations, before its options, and files after `--in`.\n"
    )
    parts.append("## Settings of a recipe\n\nThe sections:\n")
    for name, kind in SECTIONS.items():
        parts += [f"**{name}**\n", *_table(kind, f"{name}."), ""]
    parts += ["Every term:\n", *_table(TermEntry, "TERM."), ""]
    for what, kinds in (("draws", DRAWS), ("objectives", OBJECTIVES)):
        parts.append(f"## Settings of {what}\n")
        for name, kind in kinds.items():
            parts += [f"**{name}**: {_first_sentence(kind)}\n", *_table(kind, "TERM."), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def _first_sentence(kind: type) -> str:
    """Return the first sentence of a class's own docstring."""
    text = " ".join((kind.__dict__.get("__doc__") or "").split())
    return re.split(r"(?<!al)(?<!eq)(?<=\.) ", text)[0]  # "et al." and "eq." end no sentence


def _table(kind: type, prefix: str) -> list[str]:
    """Return a table of a dataclass's options, in the order in which they are declared."""
    fields = [field for field in dataclasses.fields(kind) if "help" in field.metadata]
    return [*HEAD, *_rows(fields, kind, prefix)] if fields else []


def _rows(fields: list[dataclasses.Field], kind: type, prefix: str) -> list[str]:
    """Return the line of a table for each of a dataclass's options."""
    hints = get_type_hints(kind)
    said = [field.metadata["help"].replace("%%", "%").replace("|", "\\|") for field in fields]
    return [f"| `{prefix}{field.name}` | {_kind(hints[field.name])} | {_default(field)} | {text} |"
            for field, text in zip(fields, said, strict=True)]  # fmt: skip


def _kind(hint) -> str:
    """Return in words what an option takes."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    if inner and all(isinstance(part, str) for part in inner):
        return ", ".join(inner)
    if getattr(hint, "__origin__", None) in (list, tuple):
        return "a list"
    if inner:
        return _kind(inner[0])
    return {bool: "true or false", str: "text", int: "whole number", float: "number"}.get(hint) or hint.__name__


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    if value is None or value in ([], ()):
        return "-"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(page().splitlines())} lines")
