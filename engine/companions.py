"""Companion files of a base model: what else its folder holds that users of a saved model need."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

from utils import log, model_folder

COMPANIONS = (
    "*processor*.json", "chat_template.*", "additional_chat_templates/*.jinja", "generation_config.json",
    "*.model", "*.tiktoken", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")  # may name code


def copy_companions(name: str, folder: Path) -> list[str]:
    """Copy the companion files of the base `name` (a folder or hub name) to a saved model; return their names.

    These are processors, chat templates, vocabularies, licences and, where a config names code of its own (auto_map),
    the folder's Python files. Weights, README and reports stay behind. A file that the save has written is not
    replaced. Of a hub model, the files in the local cache are copied. A file that cannot be copied is named in the log.
    """
    source = model_folder(name)
    if source is None or source.resolve() == folder.resolve():
        return []
    patterns = COMPANIONS + (("*.py",) if any(_names_code(source / file) for file in CODE) else ())
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*")
                   if path.is_file() and len(path.relative_to(source).parts) <= 2)  # fmt: skip
    copied = []
    for file in names:
        if any(fnmatch.fnmatchcase(file, p) and p.count("/") == file.count("/") for p in patterns):
            if (folder / file).exists():
                continue
            try:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, folder / file)
                copied.append(file)
            except OSError as error:  # the weights are saved by now
                log.warning("%s of the base could not be copied (%s)", file, error)
    return copied


def _names_code(file: Path) -> bool:
    """Return whether a config file names code of its own."""
    try:
        return "auto_map" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or not for us to judge
        return False
