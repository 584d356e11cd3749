"""How a run's state lies on disk, and how it is taken up again.

A checkpoint is a folder with the model so far (which a pipeline can load; with adapters, these alone), the optimizer's
state and a manifest of sizes and hashes. It is filled beside its name, synced, then renamed, so that a
name is either whole or not there. No random generator is kept: every draw of a run depends on seed,
step and row alone, so the step number is the place in every stream.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.processes import shard_like
from engine.state import BestState, TrainingState
from utils import UsageError, log, write_json

MANIFEST, STATE, TENSORS = "manifest.json", "training_state.json", "training_state.safetensors"
FREE = {"resume", "overwrite", "dry_run", "config", "log_file", "save_every", "from_manifest", "set", "forget_loss",
        "bad_weight", "random_weight", "normal_weight", "recipe.checkpoints.keep"}  # fmt: skip


def folder_of(save_dir: Path) -> Path:
    return save_dir.with_name(f"{save_dir.name}-checkpoints")


class OutputDirLock:
    """Holds `save_dir` for this process; a process that ends, in whatever way, lets it go."""

    def __init__(self, save_dir: Path):
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        self.path = save_dir.with_name(f".{save_dir.name}.lock")
        while True:
            self._file = open(self.path, "a")  # noqa: SIM115 - open as long as the run is
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                    return
            except BlockingIOError as error:
                raise UsageError(
                    f"--model_save_dir {save_dir}: another run is writing to it; wait for it or name another folder"
                ) from error
            self._file.close()  # removed by its last holder between open and lock: once more

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()


def resumable(options, metadata) -> Path | None:
    """The newest whole checkpoint of this run. Compares all but the model, before minutes go into its answers."""
    newest = latest_valid_checkpoint(folder_of(Path(options.model_save_dir)))
    if newest is None:
        return None
    try:
        check_same_run(newest, {k: v for k, v in metadata.identity().items() if k != "model"})
    except UsageError as error:
        if not options.overwrite:
            raise
        log.warning("%s; with --overwrite, that is done", error)
        return None
    return newest


# ------------------------------------------------------------------------------------------------ writing
def write_state(
    beside: Path, state: TrainingState, tensors: dict[str, torch.Tensor], schedule: dict, identity: dict
) -> None:
    """Fill a folder, that holds the model already, with what the run needs to go on; the manifest comes last.

    tensors, schedule: the optimizer's, whole; state.best.weights: whole as well."""
    saved = {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
    for i, tensor in enumerate(state.best.weights if state.best else []):
        saved[f"best.{i:05d}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in saved.items()}, beside / TENSORS)
    best = dataclasses.replace(state.best, weights=None) if state.best else None
    content = dataclasses.asdict(dataclasses.replace(state, best=best))
    write_json(beside / STATE, {"state": content, "schedule": schedule, "identity": identity})
    files = sorted(file for file in beside.rglob("*") if file.is_file())
    write_json(beside / MANIFEST, {str(f.relative_to(beside)): {"bytes": f.stat().st_size, "sha256": sha256(f)}
                                   for f in files})  # fmt: skip


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prune_checkpoints(folder: Path, count: int, written: Path) -> None:
    """Remove all but the newest checkpoints, and what a killed run left half written. One of a later step than the one
    just written is damaged, or the run would have gone on from it: it has no place among the newest."""
    for stray in folder.glob(".*.part"):
        shutil.rmtree(stray, ignore_errors=True)
    found = sorted(folder.glob("step-*"))
    here = found.index(written) + 1
    for old in (*found[: max(here - count, 0)], *found[here:]):
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ reading
def latest_valid_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was written; damaged ones are named and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = _fault(path)
        if fault is None:
            return path
        log.warning("checkpoint %s is damaged (%s) and is passed over", path, fault)
    return None


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, written in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != written["bytes"] or sha256(file) != written["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error}"
    return None


def read_state(path: Path, optimizer, identity: dict) -> TrainingState:
    """Put a checkpoint's weights and moments into `optimizer`; returns the state. UsageError names what differs."""
    check_same_run(path, identity)
    content = json.loads((path / STATE).read_text(encoding="utf-8"))
    tensors = load_file(path / TENSORS)
    moments = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    optimizer.load_state(moments, content["schedule"])
    state = TrainingState(**content["state"])
    if state.best is not None:
        best = BestState(**state.best)
        kept = [tensors[name] for name in sorted(tensors) if name.startswith("best.")]
        best.weights = [shard_like(t, p) for t, p in zip(kept, optimizer.parameters, strict=True)]
        state.best = dataclasses.replace(best, selection_key=tuple(best.selection_key))
    return state


def check_same_run(path: Path, identity: dict) -> None:
    """UsageError where a checkpoint's run differs in one of the parts of `identity`."""
    then, now = json.loads((path / STATE).read_text(encoding="utf-8"))["identity"], json.loads(json.dumps(identity))
    differ = [f"{part}.{line}" for part in now for line in differences(then[part], now[part])]
    if differ:
        raise UsageError(f"--resume: {path} was made by another run ({'; '.join(differ)}); "
                         f"give the same options and data, or remove {path.parent} to start anew")  # fmt: skip


def differences(then: dict, now: dict) -> list[str]:
    """One line for each name whose value is another one, or that one of the two lacks."""
    return [f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
            for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]  # fmt: skip


def flat(options: dict) -> dict:
    """Options with the settings of their recipe side by side: {"lr": ..., "recipe.forget.weight": ...}."""
    recipe = options.get("recipe") or {}
    terms = {term["name"]: term for term in recipe.get("terms", [])}
    sections = {name: some for name, some in recipe.items() if name not in ("terms", "options", "whole_weights")}
    settings = {f"recipe.{name}.{key}": value for name, some in {**sections, **terms}.items()
                for key, value in (some or {}).items()}  # fmt: skip
    return {name: value for name, value in options.items() if name != "recipe"} | settings


def identity_of(options: dict, rows_hash: dict[str, str], base_model: str) -> dict:
    """What makes two runs the same one: options that change the result, rows, and the model they start from."""
    return {
        "options": {name: value for name, value in flat(options).items() if name not in FREE},
        "data": rows_hash,
        "model": {"fingerprint": base_model, "torch": torch.__version__},
    }
