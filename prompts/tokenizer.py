"""Load and save tokenizers."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

from transformers import AutoTokenizer

from utils import UsageError, from_pretrained, model_folder

LIBRARY_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> the module it brings


def load_tokenizer(name: str, *, generates: bool = True, trust_remote_code: bool = False):
    """Load a tokenizer; for a model that generates, it has an end-of-text token and a pad token.

    A pad token that is missing becomes the end-of-text token, in memory only: `save_tokenizer` leaves it out again.
    Raises UsageError if the folder or hub name cannot be loaded.
    """
    try:
        tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    except (UsageError, ImportError) as error:
        _name_missing_packages(model_folder(name))
        raise UsageError(" ".join(str(error).split())) from error
    if not generates:
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{name}: its tokenizer has no end-of-text token; add eos_token to tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        pad_with_end(tokenizer)
    return tokenizer


def _name_missing_packages(folder: Path | None) -> None:
    """Raise UsageError if a folder holds its tokenizer in a file of another library alone, and a package is missing.

    transformers names tiktoken whatever the file is.
    """
    files = [folder / name for name in LIBRARY_FILES if (folder / name).is_file()] if folder else []
    if not files or (folder / "tokenizer.json").is_file():
        return
    with open(files[0], "rb") as content:
        is_sentencepiece = content.read(1) == b"\n"  # of tiktoken's files, each line is a token and its rank
    packages = SENTENCEPIECE if is_sentencepiece else {"tiktoken": "tiktoken"}
    missing = [package for package, module in packages.items() if not _is_installed(module)]
    if missing:
        raise UsageError(f"{files[0]}: cannot be read without {' and '.join(missing)}: pip install {' '.join(missing)}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def content_of(tokenizer) -> str:
    """Return all that says into which tokens it cuts a text, and how it writes a chat."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return json.dumps([cuts, tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())], default=str)


def pad_with_end(tokenizer) -> None:
    """Give a tokenizer its end-of-text token as the pad token, in memory only. Nothing attends to pad tokens."""
    tokenizer.as_loaded = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Save the tokenizer as `load_tokenizer` found it, without a pad token that it did not have."""
    getattr(tokenizer, "as_loaded", tokenizer).save_pretrained(folder)
