"""A hash of a model's files: two models of one hash give the same answers."""

from __future__ import annotations

import hashlib
from pathlib import Path

from utils import adapter_base, model_folder

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "config.json", "adapter_config.json")


def weights_hash(name: str) -> str | None:
    """Return the SHA-256 of a model's files: every byte of its weights, its config, of an adapter its base as well.
    None for a hub model that is not in the local cache."""
    base = adapter_base(name)
    folders = [Path(name), model_folder(name)] if base else [model_folder(name)]
    if None in folders:
        return None
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
