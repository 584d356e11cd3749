"""Folders that a run made, and paths of the wrong kind, refused before a script spends time on anything else."""

from __future__ import annotations

import json
from pathlib import Path

from utils import UsageError

ARGS = {"unlearn": "unlearn_args.json", "finetune": "finetune_args.json"}  # what a run of a script leaves in its folder


def made_by_run(folder: str | Path) -> bool:
    """Return whether a folder holds the model of a run of this project that is finished."""
    return any((Path(folder) / name).is_file() for name in ARGS.values())


def read_args(folder: str | Path) -> dict | None:
    """Return what an unlearning run wrote beside its model: its options and, as "run", what it measured of itself. None
    for a folder of another origin. Raises UsageError for a damaged file."""
    path = Path(folder) / ARGS["unlearn"]
    if not path.is_file():
        return None
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        made["options"]["model_name"], made["options"]["seed"]  # of every run
        return made
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not what a run writes ({error!r}); restore it or remove it") from error


def refuse_folder(option: str, path: str | Path) -> None:
    """Raise UsageError, naming `option`, if `path` is a folder; it is to be a file."""
    if Path(path).is_dir():
        raise UsageError(f"{option} {path}: is a folder; name a file")


def refuse_no_file(option: str, path: str | Path) -> None:
    """Raise UsageError, naming `option`, if the file `path` cannot be made: it is a folder or lies in a file."""
    refuse_folder(option, path)
    _refuse_file_above(option, Path(path))


def refuse_no_folder(option: str, path: str | Path) -> None:
    """Raise UsageError, naming `option`, if the folder `path` cannot be made: it is a file or lies in one."""
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"{option} {path}: is a file; name a folder")
    _refuse_file_above(option, Path(path))


def _refuse_file_above(option: str, path: Path) -> None:
    above = next((folder for folder in path.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise UsageError(f"{option} {path}: {above} is a file, so nothing can be written below it; name another path")
