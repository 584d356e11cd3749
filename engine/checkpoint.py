"""Reserve the output folder, write and read checkpoints, and tell whether two runs are the same one.

A checkpoint is a folder with the model so far (a pipeline can load it; with adapters, only these), AdamW's moments and
a manifest of sizes and hashes. It is written under a temporary name, synced and renamed, so it is complete or absent.
No random state is stored: every draw of a run depends on seed, step and row only, so the step number is enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.processes import shard_like
from engine.state import BestState, TrainingState
from utils import UsageError, log, write_json

MANIFEST, STATE, TENSORS = "manifest.json", "training_state.json", "training_state.safetensors"
LISTS = ("first", "summed", "adversary")  # of a state: a tensor a trained parameter
# Options that may change between a run and its resume: none changes a result by more than rounding.
FREE = {
    "resume", "overwrite", "dry_run",  # how this start treats what lies there
    "config", "from_manifest",  # where options came from; their values are compared
    "log_file", "model_save_dir", "report_to",  # where results are written
    "compile",  # rounding alone
    "set", "method", "forget_loss", "bad_weight", "random_weight", "normal_weight",  # they set the recipe's, compared
    "save_every", "recipe.checkpoints.keep",  # when the state is stored, not what it is
    "cache_dir",  # where answers are kept; the answers themselves are compared
    "recipe.own_answers.batch_size",  # how many prompts share a forward: an answer depends on its own prompt
    "gradient_checkpointing",  # the same activations, computed twice
    "save_dtype", "adapter_only", "merge_into_base",  # the form of what is saved at the end
    "deterministic",  # rounding alone
    "threads",  # rounding alone, and 0 leaves the number to the machine anyway
    "allow_pickle",  # how weights may be read; the weights themselves are compared
    "make_neighbours",  # their file is one of normal_data, and its rows are compared
}  # fmt: skip
PATHS = ("model_name", "forget_data", "normal_data", "start_adapter")  # options whose values may name files or folders


def folder_of(save_dir: Path) -> Path:
    """Return the folder of the checkpoints of a run that saves to `save_dir`."""
    return save_dir.with_name(f"{save_dir.name}-checkpoints")


class OutputDirLock:
    """Reserve `save_dir` for this process until the `with` block ends, `close()` is called or the process exits.

    The lock is a file beside the folder. Letting go removes it, and the parent folders that were made for it and are
    empty. After a crash the file stays, but the system has let go of it, so the next run takes it over. Raises
    UsageError if another run holds it.
    """

    def __init__(self, save_dir: Path):
        self.path = save_dir.absolute().with_name(f".{save_dir.name}.lock")
        missing = [folder for folder in self.path.parents if not folder.exists()]  # the innermost first
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(self.path, "a")  # noqa: SIM115 - open as long as the run is
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    break
            except BlockingIOError as error:
                file.close()
                raise UsageError(
                    f"--model_save_dir {save_dir}: another run is writing to it; wait for it or name another folder"
                ) from error
            file.close()  # its last holder removed it between open and lock: try again
        # runs once: at close(), when the lock is collected, or when the interpreter exits after an error
        self._release = weakref.finalize(self, _release_lock, file, self.path, missing, os.getpid())

    def __enter__(self) -> OutputDirLock:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._release()


def _release_lock(file, path: Path, made: list[Path], owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not take its parent's lock away
        path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # something else lies in it by now
                folder.rmdir()
    file.close()


def describe_leftovers(save_dir: Path) -> str | None:
    """Say in one line which checkpoints of a finished run still lie on the disk; None if there are none."""
    folder = folder_of(save_dir)
    steps = sorted(folder.glob("step-*"))
    if not steps:
        return None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    count = f"{len(steps)} checkpoint{'s' if len(steps) > 1 else ''}"
    return f"{folder} still holds {count} ({size / 2**30:.2f} GiB); the model is saved, so it can be deleted"


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
    beside: Path, state: TrainingState, tensors: dict[str, torch.Tensor], schedule: dict, identity: dict, *,
    weights: dict[str, torch.Tensor], names: list[list[str]],
) -> None:  # fmt: skip
    """Add to a folder that holds the saved model what the run needs to go on; the manifest of its files comes last.

    tensors, schedule: the optimizer's moments, whole, and its progress; weights: the fp32 weights that the folder's
    model was written from, by name (save_pretrained empties the dict that it is given: pass it a copy); names: each
    trained parameter's names. A master is read from the model's own file on resume; it is stored here only if no file
    holds it bit for bit under one of its names (a family may save its weights in another layout).
    """
    saved_tensors = {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
    places: dict[str, list[str]] = {}
    in_files = _saved_tensors(beside)
    for i, some in enumerate(names):
        master = weights[next(name for name in some if name in weights)]
        if place := _find_master(beside, in_files, some, master):
            places[f"{i:05d}"] = place
        else:
            saved_tensors[f"optimizer.{i:05d}.master"] = master
    for i, tensor in enumerate(state.best.weights if state.best else []):
        saved_tensors[f"best.{i:05d}"] = tensor
    for name in LISTS:
        for i, tensor in enumerate(getattr(state, name) or []):
            saved_tensors[f"{name}.{i:05d}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in saved_tensors.items()}, beside / TENSORS)
    best = dataclasses.replace(state.best, weights=None) if state.best else None
    content = dataclasses.asdict(dataclasses.replace(state, best=best, **dict.fromkeys(LISTS)))
    write_json(beside / STATE, {"state": content, "schedule": schedule, "identity": identity, "masters": places})
    files = sorted(file for file in beside.rglob("*") if file.is_file())
    write_json(beside / MANIFEST, {str(f.relative_to(beside)): {"bytes": f.stat().st_size, "sha256": sha256(f)}
                                   for f in files})  # fmt: skip


def _saved_tensors(folder: Path) -> dict[str, str]:
    """Map each tensor's name in the folder's safetensors files to its file, relative to the folder."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as content:
            found |= dict.fromkeys(content.keys(), str(file.relative_to(folder)))
    return found


def _find_master(folder: Path, saved: dict[str, str], names: list[str], master: torch.Tensor) -> list[str] | None:
    """Return [file, name] of the saved tensor that equals `master` bit for bit; None if there is none."""
    # peft leaves the adapter's own name ("default") out of a saved tensor's name
    for name in (*names, *(f"base_model.model.{name.replace('.default', '')}" for name in names)):
        if name in saved:
            tensor = _read_tensor(folder / saved[name], name)
            if tensor.dtype == master.dtype and torch.equal(tensor, master):
                return [saved[name], name]
    return None


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as content:
        return content.get_tensor(name)


def sha256(path: Path) -> str:
    """Return the hash of a file's content in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prune_checkpoints(folder: Path, count: int, written: Path) -> None:
    """Keep the newest `count` checkpoints up to `written`; delete the others and those that a killed run left half
    written. A checkpoint of a later step must be damaged, because resume would have used it."""
    for stray in folder.glob(".*.part"):
        shutil.rmtree(stray, ignore_errors=True)
    found = sorted(folder.glob("step-*"))
    here = found.index(written) + 1
    for old in (*found[: max(here - count, 0)], *found[here:]):
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ reading
def latest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written; warn of each damaged one before it."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = _fault(path)
        if fault is None:
            return path
        log.warning("checkpoint %s is damaged (%s) and is passed over", path, fault)
    return None


def _fault(path: Path) -> str | None:
    """Say which file of a checkpoint is not as it was written; None if all are."""
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
    """Put a checkpoint's weights and moments into `optimizer`; return the state.

    Raises UsageError, which names what differs, if another run wrote it.
    """
    check_same_run(path, identity)
    content = json.loads((path / STATE).read_text(encoding="utf-8"))
    tensors = load_file(path / TENSORS)
    for number, (file, name) in content["masters"].items():
        tensors[f"optimizer.{number}.master"] = _read_tensor(path / file, name)
    moments = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    optimizer.load_state(moments, content["schedule"])
    state = TrainingState(**content["state"])

    def kept_as(kind: str) -> list[torch.Tensor]:
        kept = [tensors[name] for name in sorted(tensors) if name.startswith(f"{kind}.")]
        return [shard_like(t, p) for t, p in zip(kept, optimizer.parameters, strict=True)]

    for name in LISTS:
        if any(key.startswith(f"{name}.") for key in tensors):
            setattr(state, name, kept_as(name))
    if state.best is not None:
        best = BestState(**state.best)
        best.weights = kept_as("best")
        state.best = dataclasses.replace(best, selection_key=tuple(best.selection_key))
    return state


def check_same_run(path: Path, identity: dict) -> None:
    """Raise UsageError if the run that wrote a checkpoint differs in one of the parts of `identity`.

    A path under the working folder may also have moved along with that folder.
    """
    then, now = json.loads((path / STATE).read_text(encoding="utf-8"))["identity"], json.loads(json.dumps(identity))
    if "options" in then and "folder" not in then:
        raise UsageError(f"--resume: {path} was made by an earlier version, which kept other things; remove "
                         f"{path.parent} to start anew")  # fmt: skip
    differ = []
    for part in now.keys() - {"folder"}:
        before = then.get(part, {})
        if part == "options":
            before = {name: value for name, value in before.items() if name not in FREE}
            for name in PATHS:
                moved = _under(before.get(name), then.get("folder"), now.get("folder"))
                before |= {name: moved} if moved == now[part].get(name) else {}
        if part == "answers" and before and before != now[part]:
            differ.append(
                "the model's own answers are others now: their cache was lost, and this machine rounds otherwise"
            )
        else:
            differ += [f"{part}.{line}" for line in differences(before, now[part])]
    if differ:
        raise UsageError(f"--resume: {path} was made by another run ({'; '.join(sorted(differ))}); "
                         f"give the same options and data, or remove {path.parent} to start anew")  # fmt: skip


def differences(then: dict, now: dict) -> list[str]:
    """Return one line for each name whose values differ, or that one of the two lacks."""
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


def identity_of(
    options: dict, rows_hash: dict[str, str], base_model: str, *, dtype: str | None = None,
    answers_hash: str | None = None,
) -> dict:  # fmt: skip
    """Return what makes two runs the same one: options that change the result, rows, and the model they start from.

    base_model: the fingerprint of its weights; dtype: the one that is used, which `--dtype auto` leaves open;
    answers_hash: a hash of the model's own answers to rows without a response, if there are any.
    """
    compared = {name: value for name, value in flat(options).items() if name not in FREE and name != "dtype"}
    compared |= {name: _resolved(compared[name]) for name in PATHS if name in compared}
    answers = {"answers": {"sha256": answers_hash}} if answers_hash else {}
    return {
        "options": compared,
        "folder": str(Path.cwd()),
        "data": rows_hash,
        "model": {"fingerprint": base_model, "dtype": dtype, "torch": torch.__version__},
        **answers,
    }


def _resolved(value):
    """Return a path in full, so that `./a` is `a`; the name of a hub repository, or what is no path, as it is."""
    if isinstance(value, list):
        return [_resolved(item) for item in value]
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def _under(value, old: str | None, new: str | None):
    """Return paths under the folder `old` as the same places under `new`."""
    if isinstance(value, list):
        return [_under(item, old, new) for item in value]
    if old and new and isinstance(value, str) and value.startswith(old + os.sep):
        return new + value.removeprefix(old)
    return value
