"""Write docs/options.md: every option and every setting of a recipe, from the dataclasses that hold them.

python docs/make_options.py
"""

from __future__ import annotations

import dataclasses
import inspect
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
from options import UnlearnOptions
from run.finetuning import FinetuneOptions
from sweep import SweepOptions

PAGE = Path(__file__).resolve().parent / "options.md"
SCRIPTS = {"unlearn_harm.py": UnlearnOptions, "finetune.py": FinetuneOptions,
           "evaluate_unlearning.py": EvaluateOptions, "sweep.py": SweepOptions}  # fmt: skip
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
        parts.append(f"## {script}\n")
        for base in [cls for cls in reversed(kind.__mro__) if dataclasses.is_dataclass(cls)]:
            if base in shown:
                parts.append(f"{_title(base)}: as of {shown[base]}.\n")
            elif lines := _table(base, kind, "--"):
                shown[base] = script
                parts += [f"{_title(base)}:\n" if base is not kind else "Its own:\n", *lines, ""]
    parts.append("## unlearn_requests.py\n")
    for command, (kind, _) in unlearn_requests.COMMANDS.items():
        parts += [f"**{command}**: {kind.__doc__.splitlines()[0]}\n", *_table(kind, kind, "--", inherited=True), ""]
    parts.append(
        "`find` also takes what is looked for, names or quotations, before its options, and files after `--in`.\n"
    )
    parts.append("## Settings of a recipe\n\nThe sections:\n")
    for name, kind in SECTIONS.items():
        parts += [f"**{name}**\n", *_table(kind, kind, f"{name}."), ""]
    parts += ["Every term:\n", *_table(TermEntry, TermEntry, "TERM."), ""]
    for what, kinds in (("draws", DRAWS), ("objectives", OBJECTIVES)):
        parts.append(f"## Settings of {what}\n")
        for name, kind in kinds.items():
            parts += [f"**{name}**: {_first_sentence(kind)}\n", *_table(kind, kind, "TERM.", inherited=True), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def _title(kind: type) -> str:
    return _first_sentence(kind).removesuffix(".")


def _first_sentence(kind: type) -> str:
    """Return the first sentence of a class's own docstring."""
    text = " ".join((kind.__dict__.get("__doc__") or "").split())
    return re.split(r"(?<!al)(?<!eq)(?<=\.) ", text)[0]  # "et al." and "eq." end no sentence


def _table(kind: type, whole: type, prefix: str, *, inherited: bool = False) -> list[str]:
    """Return a table of the options that a dataclass defines itself, with their defaults in `whole`; inherited: of all
    that it has."""
    own = inspect.get_annotations(kind)
    hints = get_type_hints(whole)
    fields = [field for field in dataclasses.fields(whole)
              if "help" in field.metadata and (inherited or field.name in own)]  # fmt: skip
    if not fields:
        return []
    said = [field.metadata["help"].replace("%%", "%").replace("|", "\\|") for field in fields]
    rows = [f"| `{prefix}{field.name}` | {_kind(hints[field.name])} | {_default(field)} | {text} |"
            for field, text in zip(fields, said, strict=True)]  # fmt: skip
    return ["| name | takes | default | |", "|---|---|---|---|", *rows]


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
