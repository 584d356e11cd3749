"""Make a state of the model: its run, its measures and its entry, so that a cut-off leaves all of it or none.

The entry is written last. What lies in states/NNNN without an entry is of an `apply` that was cut off, and the next one
goes on from there, or begins again if it is asked for something else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from engine.checkpoint import sha256
from engine.paths import read_args
from engine.weights_hash import weights_hash
from evaluation.figures import point_values
from ledger.book import Book, Request
from ledger.fitting import Fitting, sources_of, steps_of
from ledger.kept import prompts
from ledger.settings import LedgerSettings
from run.parsing import parse_run
from utils import UsageError, write_json

MEASURES = ("answered", "extraction_strength", "recall", "wanted_given", "rouge")  # of a request, noted in the entry
RunScript = Callable[[str, list[str]], None]  # (name of a script, its arguments)
MANIFEST, ADAPTER = "run_manifest.json", "adapter/adapter_model.safetensors"
KEPT_FILES = ("state.json", "unlearn_args.json", MANIFEST, "adapter")  # of a state whose model is removed
SHREDDING = "shredding"  # a file that stands while a text and its copies are destroyed
WITHOUT_ANSWERS = ", prompts alone"  # ending of a group's name in a report: rows without an answer of their own


def name_of(state: int) -> str:
    return f"{state:04d}"


def folder_of(book: Book, state: int) -> Path:
    return book.folder / "states" / name_of(state)


# ----------------------------------------------------------------------------------------------- what is planned
def plan_of(book: Book, fitting: Fitting, settings: LedgerSettings) -> dict:
    """Return what a state's run is asked, as its plan.json holds it."""
    run = parse_run(settings.run_words())
    steps = steps_of(book, fitting, settings.states, run.max_unlearn_steps, run.batch_size,
                     run.text_stride or run.text_window)  # fmt: skip
    sources = sources_of(book, fitting, settings.states)
    return {"requests": list(fitting.requests), "new": list(fitting.new), "lost": list(fitting.lost),
            "start": fitting.start, "steps": steps, **sources}  # fmt: skip


def describe(fitting: Fitting, plan: dict) -> list[str]:
    """Return lines that say what the next `apply` does; plan: of its run."""
    start = "fitted anew from the original" if fitting.start is None else f"goes on from state {fitting.start}"
    lines = [f"state {fitting.state}: {start} ({fitting.why})",
             f"  {len(fitting.requests)} requests, new: {', '.join(fitting.new) or 'none'}"]  # fmt: skip
    if fitting.lost:
        lines.append(f"  lost, since their text is destroyed: {', '.join(fitting.lost)}")
    if fitting.is_original:
        return [*lines, "  nothing is in force: the state is the original"]
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
                 "attacks": {}, "report": None, "steps": 0}  # fmt: skip
    else:
        _train(book, fitting, plan, settings, run_script)
        found = _measure(book, fitting, plan, settings, run_script)
        found |= {"model": weights_hash(str(folder)), "adapter": sha256(folder / ADAPTER), "steps": plan["steps"]}
        write_json(folder / "state.json", {"state": fitting.state, "ledger": dataclasses.asdict(book.chain.head())})
    book.chain.append("state", state=fitting.state, requests=list(fitting.requests), new=list(fitting.new),
                      lost=list(fitting.lost), start=fitting.start, why=fitting.why,
                      seconds=round(time.time() - started, 1), **found)  # fmt: skip
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
    words = [*settings.run_words(), f"--max_unlearn_steps={plan['steps']}", f"--model_save_dir={folder}",
             f"--log_file={book.folder / 'logs' / folder.name}.log", f"--cache_dir={book.folder / 'cache'}",
             "--overwrite", "--resume"]  # fmt: skip
    for name in ("forget_data", "forget_text"):
        words += [f"--{name}", *plan[name]] if plan[name] else []
    if plan["normal_data"]:
        words += ["--normal_data", *parse_run(settings.run_words()).normal_data, *plan["normal_data"]]
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


def _measure(
    book: Book, fitting: Fitting, plan: dict, settings: LedgerSettings, run_script: RunScript
) -> dict:  # fmt: skip
    """Evaluate a state; return what its entry says of it. Requests that fell are asked as something to be kept."""
    folder = folder_of(book, fitting.state)
    report_dir = book.folder / "evidence" / folder.name
    asked = _asked(book, fitting)
    sides: dict[str, list[str]] = {"forget_data": [], "forget_text": [], "normal_data": [], "normal_text": []}
    for request in asked:
        side = "forget" if request.id in fitting.requests else "normal"
        sides[f"{side}_{'text' if request.added['is_text'] else 'data'}"].append(str(book.file_of(request.id)))
    drift = _drift(folder)
    if not (sides["forget_data"] or sides["forget_text"]):  # all texts are destroyed: nothing of them can be asked
        return {"drift": drift, "figures": {}, "keep": {}, "attacks": {}, "report": None}
    sides["normal_data"] += plan["normal_data"]
    given = {**(settings.content.get("evaluation") or {})}
    run = parse_run(settings.run_words())
    own = {name: _listed(given, name) for name in ("normal_data", "normal_text")}
    for name, files in own.items():
        sides[name] += files if any(own.values()) else getattr(run, name)
        given.pop(name, None)
    words = LedgerSettings({"evaluation": given}, settings.states).evaluation_words()
    for name, files in sides.items():
        words += [f"--{name}", *files] if files else []
    run_script("evaluate_unlearning.py", [
        *words, f"--model_name={folder}", f"--original_name={book.entries[0]['model']}", f"--report_dir={report_dir}",
        f"--train_log={book.folder / 'logs' / folder.name}.jsonl", "--split=all", "--examples=0",
    ])  # fmt: skip
    raw = (report_dir / "report.json").read_bytes()
    values = point_values(json.loads(raw))
    figures = {request.id: _of_group(values, request.id) or _of_group(values, f"{request.id}{WITHOUT_ANSWERS}")
               for request in asked}  # fmt: skip
    keep = {name.removeprefix("keep."): value for name, value in values.items() if name.startswith("keep.worst.")}
    attacked = {name: value for name, value in values.items()
                if name.startswith("attack.") and name.count(".") == 1 and name != "attack.worst"}  # fmt: skip
    return {"drift": drift, "figures": figures, "keep": keep, "attacks": attacked,
            "report": hashlib.sha256(raw).hexdigest()}  # fmt: skip


def _listed(options: dict, name: str) -> list[str]:
    """Return an option's values, which a file of settings may give as one value or a list."""
    value = options.get(name) or []
    return list(map(str, value if isinstance(value, list) else [value]))


def _asked(book: Book, fitting: Fitting) -> list[Request]:
    """Return the requests whose rows a state is asked: all that it is fitted to, and those that fell, unless a prompt
    of theirs stands in one that is in force: no prompt can be on both sides."""
    there = [request for request in book.requests.values() if not request.shredded]
    kept = [request for request in there if request.id in fitting.requests]
    standing = set().union(*(prompts(book.rows_of(request.id)) for request in kept))
    fell = [request for request in there if request.states and request not in kept
            and not prompts(book.rows_of(request.id)) & standing]  # fmt: skip
    return kept + fell


def _of_group(values: dict[str, float], group: str) -> dict[str, float]:
    """Return what was measured of a request's rows, whichever side they were asked on."""
    found = {}
    for side in ("forget", "keep"):
        for measure in MEASURES:
            for ending in ("", ".before", ".ratio"):
                if (value := values.get(f"{side}.{group}.{measure}{ending}")) is not None:
                    found[f"{measure}{ending}"] = value
    return found


def _drift(folder: Path) -> float | None:
    """Return the KL from the first original on the rows of the looks, in nats, as the run measured it last."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest["after"].get("dev_kl")


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
                         book.folder / "evidence" / name):  # fmt: skip
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
        manifest["data"] = {"rows": manifest["data"]["rows"]}
        write_json(path, manifest)
    return count


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


def status_line(book: Book, request: Request) -> dict[str, str]:
    """Return the line of a request in the table of `status`; every cell is text."""
    state, measured, proved = book.state, {}, ""
    for one in book.states:
        if one["figures"].get(request.id):
            measured, proved = one["figures"][request.id], one.at[:10]
    first = next((one.at[:10] for one in book.states if request.states and one["state"] == request.states[0]), "-")
    if request.lost:
        stands = f"lost with state {request.lost['state']}: its text is destroyed"
    elif not request.is_in_force:
        stands = "withdrawn" if book.is_met(request) else "withdrawn, not applied yet"
    else:
        stands = "in force" if book.is_met(request) else "open"
    if request.shredded:
        stands += f"; text destroyed on {request.shredded.at[:10]}, last proved on {proved or 'never'}"
    # a text goes on about its subject even if none of it is known: what counts is whether it is said word for word
    order = [name for name in MEASURES if name != "answered"] if request.added["is_text"] else MEASURES
    measure = next((name for name in order if name in measured), None)
    before, after = (measured.get(f"{measure}{ending}") for ending in (".before", ""))
    return {"request": request.id, "kind": request.kind, "received": request.added["received"] or "-",
            "due": request.added["due"] or "-", "since": first, "stands": stands,
            "measure": measure or "-", "before": "-" if before is None else f"{before:.2f}",
            "now": "-" if after is None else f"{after:.2f}",
            "tested": proved or ("-" if state is None else "not yet")}  # fmt: skip
