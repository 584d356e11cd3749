"""Make a state of the model: its run, its measures and its entry, so that a cut-off leaves all of it or none.

The entry is written last. What lies in states/NNNN without an entry is of an `apply` that was cut off, and the next one
goes on from there, or begins again if it is asked for something else.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

from engine.checkpoint import sha256
from engine.paths import ARGS, read_args
from engine.weights_hash import weights_hash
from ledger.book import Book
from ledger.evidence import MANIFEST, RunScript, measure
from ledger.fitting import Fitting, sources_of, steps_of
from ledger.normal import normal_side, write_copies
from ledger.settings import NORMAL, LedgerSettings
from run.parsing import parse_run
from utils import UsageError, write_json

ADAPTER = "adapter/adapter_model.safetensors"
KEPT_FILES = ("state.json", "unlearn_args.json", MANIFEST, "adapter")  # of a state whose model is removed
SHREDDING = "shredding"  # a file that stands while a text and its copies are destroyed


def name_of(state: int) -> str:
    return f"{state:04d}"


def folder_of(book: Book, state: int) -> Path:
    return book.folder / "states" / name_of(state)


# ----------------------------------------------------------------------------------------------- what is planned
def plan_of(book: Book, fitting: Fitting, settings: LedgerSettings) -> dict:
    """Return what a state's run and its evaluation are asked, as its plan.json holds it."""
    run = parse_run(settings.run_words())
    steps = steps_of(book, fitting, settings.states, run.max_unlearn_steps, run.batch_size,
                     run.text_stride or run.text_window)  # fmt: skip
    asked = settings.normal_of_evaluation(run)
    specs = {name: [*getattr(run, name), *asked[name]] for name in NORMAL}
    side = normal_side(book, list(fitting.requests), specs, run.fields, _normal_folder(book, fitting.state))
    return {"requests": list(fitting.requests), "new": list(fitting.new), "lost": list(fitting.lost),
            "start": fitting.start, "steps": steps, **sources_of(book, fitting, settings.states),
            "normal": {name: side.of(name, getattr(run, name)) for name in NORMAL},
            "asked": {name: side.of(name, some) for name, some in asked.items()},
            "taken_out": side.taken_out, "unknown": side.unknown}  # fmt: skip


def _normal_folder(book: Book, state: int) -> Path:
    """Return where the normal rows of a state lie, if requests name some of what was given."""
    return book.folder / "cache" / "normal" / name_of(state)


def describe(fitting: Fitting, plan: dict) -> list[str]:
    """Return lines that say what the next `apply` does; plan: of its run."""
    start = "fitted anew from the original" if fitting.start is None else f"goes on from state {fitting.start}"
    lines = [f"state {fitting.state}: {start} ({fitting.why})",
             f"  {len(fitting.requests)} requests, new: {', '.join(fitting.new) or 'none'}"]  # fmt: skip
    if fitting.lost:
        lines.append(f"  lost, since their text is destroyed: {', '.join(fitting.lost)}")
    if fitting.is_original:
        return [*lines, "  nothing is in force: the state is the original"]
    for spec, noted in (pair for of_option in plan["taken_out"].values() for pair in of_option.items()):
        lines += [f"  taken out of {spec}: {', '.join(map(str, numbers))} (request {name})"
                  for name, numbers in noted["rows"].items()]  # fmt: skip
    if plan["unknown"]:
        lines.append(f"  normal rows were changed since these texts were destroyed: {', '.join(plan['unknown'])}; if "
                     "rows still name them, take them out yourself")  # fmt: skip
    files = len(set(plan["forget_data"] + plan["forget_text"]))
    return [*lines, f"  {plan['steps']} steps on the rows of {files} requests"]


# ------------------------------------------------------------------------------------------------- what is done
def make_state(book: Book, fitting: Fitting, plan: dict, settings: LedgerSettings, run_script: RunScript) -> None:
    """Train, measure and note a state. plan: of its run (`plan_of`); run_script: runs one of this project's scripts,
    and raises if it fails."""
    started, folder = time.time(), folder_of(book, fitting.state)
    if fitting.is_original:
        remove_leftovers(book)
        found = {"model": book.entries[0]["original"], "adapter": None, "drift": 0.0, "figures": {}, "keep": {},
                 "attacks": {}, "report": None, "steps": 0, "taken_out": {}}  # fmt: skip
    else:
        shutil.rmtree(_normal_folder(book, fitting.state), ignore_errors=True)
        write_copies(plan["taken_out"], parse_run(settings.run_words()).fields, _normal_folder(book, fitting.state))
        _train(book, fitting, plan, settings, run_script)
        found = measure(book, fitting, plan, settings, folder, run_script)
        found |= {"model": weights_hash(str(folder)), "adapter": sha256(folder / ADAPTER), "steps": plan["steps"],
                  "taken_out": plan["taken_out"]}  # fmt: skip
        write_json(folder / "state.json", {"state": fitting.state, "ledger": dataclasses.asdict(book.chain.head())})
    book.chain.append("state", state=fitting.state, requests=list(fitting.requests), new=list(fitting.new),
                      lost=list(fitting.lost), start=fitting.start, why=fitting.why,
                      seconds=round(time.time() - started, 1), **found)  # fmt: skip
    shutil.rmtree(_normal_folder(book, fitting.state), ignore_errors=True)
    finish_last(book.read())
    _prune(book, settings.states.keep)


def _train(book: Book, fitting: Fitting, plan: dict, settings: LedgerSettings, run_script: RunScript) -> None:
    """Run unlearn_harm.py for a state, unless that was done before a cut-off."""
    folder = folder_of(book, fitting.state)
    noted = folder.with_name(f"{folder.name}-plan.json")
    if not _is(noted, plan):  # of an apply that was asked for something else
        for leftover in (folder, folder.with_name(f"{folder.name}-checkpoints")):
            shutil.rmtree(leftover, ignore_errors=True)
        write_json(noted, plan)
    if read_args(folder) and (folder / MANIFEST).is_file():
        return
    if fitting.start is not None:
        refuse_changed_adapter(book, fitting.start)
    words = [*settings.run_words(NORMAL), f"--max_unlearn_steps={plan['steps']}", f"--model_save_dir={folder}",
             f"--log_file={book.folder / 'logs' / folder.name}.log", f"--cache_dir={book.folder / 'cache'}",
             "--test_share=0",  # of what stays, the rows of the looks alone are held out
             "--overwrite", "--resume"]  # fmt: skip
    given = {name: plan[name] for name in ("forget_data", "forget_text")}
    given |= {"normal_data": plan["normal"]["normal_data"] + plan["allowed"],
              "normal_text": plan["normal"]["normal_text"]}  # fmt: skip
    for name, files in given.items():
        words += [f"--{name}", *files] if files else []
    if fitting.start is not None:
        words.append(f"--start_adapter={folder_of(book, fitting.start) / 'adapter'}")
    run_script("unlearn_harm.py", words)


def refuse_changed_adapter(book: Book, state: int) -> None:
    """Raise UsageError if the adapter of a state is not the one that its entry notes."""
    (entry,) = (entry for entry in book.states if entry["state"] == state)
    file = folder_of(book, state) / ADAPTER
    if not file.is_file() or sha256(file) != entry["adapter"]:
        raise UsageError(f"{file}: is not the one that entry {entry.number} notes; restore it, or pass --refit")


def _is(file: Path, content: dict) -> bool:
    try:
        return json.loads(file.read_text(encoding="utf-8")) == content
    except (OSError, ValueError):
        return False


def finish_last(book: Book) -> None:
    """Note count and hash of the last state's entry beside its model, which a cut-off may have kept from being done,
    and remove its plan."""
    if (state := book.state) is None:
        return
    folder = folder_of(book, state["state"])
    if folder.is_dir():
        content = {"state": state["state"], "ledger": {"count": state.number, "hash": state.hash}}
        if not _is(folder / "state.json", content):
            write_json(folder / "state.json", content)
    folder.with_name(f"{folder.name}-plan.json").unlink(missing_ok=True)


def remove_leftovers(book: Book) -> None:
    """Remove what an `apply` that was cut off made, when nothing is asked for any more that it could serve."""
    last = book.state["state"] if book.state else 0
    for plan in (book.folder / "states").glob("*-plan.json"):
        name = plan.name.removesuffix("-plan.json")
        if int(name) > last:
            for path in (folder_of(book, int(name)), plan.with_name(f"{name}-checkpoints"),
                         book.folder / "evidence" / name, _normal_folder(book, int(name))):  # fmt: skip
                shutil.rmtree(path, ignore_errors=True)
            plan.unlink()


def _prune(book: Book, keep: int) -> None:
    """Remove the models of older states; their adapters and notes stay."""
    for state in book.states[:-keep]:
        folder = folder_of(book, state["state"])
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in KEPT_FILES:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------------- what is left
def copies(book: Book) -> list[str]:
    """Return the files and folders that hold rows of requests beside the requests themselves, or what was learned."""
    found = [book.folder / name for name in ("cache", "evidence", "logs")]
    found += sorted((book.folder / "states").glob("*-checkpoints")) if (book.folder / "states").is_dir() else []
    return [str(path) for path in found if path.exists()]


def delete_copies(book: Book) -> int:
    """Delete caches, answers, logs and checkpoints; return how many files that was. All of them, since no file of them
    says whose rows it holds. Hashes of rows without a salt of the request's, by which one who guesses a row could tell
    that it was there, are taken out of the states' files."""
    count = 0
    for path in map(Path, copies(book)):
        count += sum(file.is_file() for file in path.rglob("*"))
        shutil.rmtree(path)
    for path in (book.folder / "states").glob("*/trained_on.json"):
        path.unlink()
        count += 1
    for path in (book.folder / "states").glob(f"*/{MANIFEST}"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["data"] = {"rows": [_counts(account) for account in manifest["data"]["rows"]]}
        write_json(path, manifest)
    for path in (book.folder / "states").glob(f"*/{ARGS['unlearn']}"):
        written = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in written:
            write_json(path, written | {"rows": [_counts(account) for account in written["rows"]]})
    return count


def _counts(account: dict) -> dict:
    """Return the account of a source without what may name somebody: its categories, and notes about it."""
    return {name: value for name, value in account.items() if name not in ("categories", "notes", "unused_fields")}


def shred(book: Book, name: str) -> int:
    """Destroy the text of a request and what else holds its rows; return how many further files that was. A cut-off is
    made good by `finish_shredding`."""
    (book.folder / SHREDDING).touch()
    book.shred(name)
    count = delete_copies(book)
    (book.folder / SHREDDING).unlink()
    return count


def finish_shredding(book: Book) -> list[str]:
    """Do what is left of a destruction that was cut off; return the ids of the texts that were still there."""
    left = book.finish_shredding()
    if left or (book.folder / SHREDDING).exists():
        delete_copies(book)
        remove_leftovers(book)
        (book.folder / SHREDDING).unlink(missing_ok=True)
    return left


def faults(book: Book) -> list[str]:
    """Return what is wrong with the states' folders: one that the ledger does not know, a model that was changed."""
    states, found = book.folder / "states", []
    known = {name_of(state["state"]): state for state in book.states}
    for path in sorted(states.iterdir()) if states.is_dir() else ():
        if (path / "state.json").is_file() and path.name not in known:
            found.append(f"{path}: the ledger has no such state: its entry was removed, or an 'apply' was cut off just "
                         "before it ('apply' then goes on)")  # fmt: skip
    if (state := book.state) and state["requests"]:
        folder = folder_of(book, state["state"])
        if not folder.is_dir() or weights_hash(str(folder)) != state["model"]:
            found.append(f"{folder}: is not the model that entry {state.number} notes")
        elif sha256(folder / ADAPTER) != state["adapter"]:
            found.append(f"{folder / ADAPTER}: is not the one that entry {state.number} notes")
    return found


def model_of(book: Book) -> str:
    """Return where the newest state's model lies."""
    return str(folder_of(book, book.state["state"])) if book.state["requests"] else book.entries[0]["model"]
