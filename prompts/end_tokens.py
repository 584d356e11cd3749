"""Which tokens end an answer, as the model's folder says: its tokenizer, config.json and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import cached_file

from utils import UsageError


def read_end_tokens(name: str) -> list[int]:
    """Return the end tokens that config.json and generation_config.json of a folder or hub model name.

    Their `eos_token_id` is a token id or a list of ids. The files are read as they stand: a config class fills in ids
    that its file does not name. Raises UsageError for a file that is no JSON object.
    """
    ends: list[int] = []
    for file in ("config.json", "generation_config.json"):
        content = _read(name, file)
        for part in (content, content.get("text_config")):
            named = part.get("eos_token_id") if isinstance(part, dict) else None
            ends += [i for i in (named if isinstance(named, list) else [named]) if type(i) is int and i >= 0]
    return list(dict.fromkeys(ends))


def _read(name: str, file: str) -> dict:
    """Return the content of a model's JSON file; an empty dict if the model has no such file or it is out of reach."""
    path = Path(name) / file
    if not Path(name).is_dir():
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False,
                            _raise_exceptions_for_gated_repo=False)  # fmt: skip
        if found is None:
            return {}
        path = Path(found)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold a JSON object")
    return content
