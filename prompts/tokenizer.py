"""Load and save tokenizers."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

from transformers import AutoTokenizer

from utils import UsageError, from_pretrained

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> the module it brings


def load_tokenizer(name: str, *, generates: bool = True, trust_remote_code: bool = False):
    """Load a tokenizer; for a model that generates, it has an end-of-text token and a pad token.

    A pad token that is missing becomes the end-of-text token, in memory only: `save_tokenizer` leaves it out again.
    Raises UsageError if the folder or hub name cannot be loaded.
    """
    _refuse_missing_packages(Path(name))
    tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    if not generates:
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{name}: its tokenizer has no end-of-text token; add eos_token to tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        pad_with_end(tokenizer)
    return tokenizer


def _refuse_missing_packages(folder: Path) -> None:
    """Raise UsageError if a folder holds its tokenizer as a SentencePiece model alone and a package is missing."""
    file = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if file is None or (folder / "tokenizer.json").is_file():
        return
    with open(file, "rb") as content:
        if content.read(1) != b"\n":  # its first byte; a tiktoken file holds a line of text for each token
            return
    missing = [package for package, module in PACKAGES.items() if not _is_installed(module)]
    if missing:
        raise UsageError(f"{file}: cannot be read without {' and '.join(missing)}: pip install {' '.join(missing)}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def pad_with_end(tokenizer) -> None:
    """Give a tokenizer its end-of-text token as the pad token, in memory only. Nothing attends to pad tokens."""
    tokenizer.as_loaded = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Save the tokenizer as `load_tokenizer` found it, without a pad token that it did not have."""
    getattr(tokenizer, "as_loaded", tokenizer).save_pretrained(folder)
