"""A hash of a model's files: two models of one hash give the same answers."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from utils import adapter_base, model_folder

# *.py: the code of a model that needs --trust_remote_code
MODEL_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "config.json", "adapter_config.json", "*.py")


def weights_hash(name: str) -> str | None:
    """Return the SHA-256 of a model's files: every byte of its weights, its config, its code, of an adapter its base as
    well. None for a hub model that is not in the local cache."""
    base = adapter_base(name)
    folders = [Path(name), model_folder(name)] if base else [model_folder(name)]
    if None in folders:
        return None
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)}):
            known = file.stat()
            digest.update(f"{file.name} {_file_hash(file.resolve(), known.st_size, known.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _file_hash(file: Path, size: int, mtime_ns: int) -> str:
    """Return the SHA-256 of a file. An evaluation asks for it several times, so a file that is as it was, by size and
    time, is read once."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
