"""What is measured of a state, request by request, and how a request stands.

Each request is asked by its own rows, and by those of its holdout, which no state was trained on; what fell, and what
lies beside a request's border, is asked as something to be kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from evaluation.figures import figures
from evaluation.metrics.statistics import Estimate
from evaluation.stages import take_answers
from ledger.book import Book, Request
from ledger.fitting import Fitting
from ledger.kept import prompts
from ledger.settings import NORMAL, LedgerSettings

MEASURES = ("answered", "extraction_strength", "recall", "wanted_given", "rouge")  # of a request, noted in the entry
# endings of the groups of one source in a report: rows with an answer of their own, and those without
HALVES = ("", ", prompts alone")
HELD_OUT, ATTACKED = "holdout.", "attack."  # what the figures of a request's holdout, and under attack, begin with
MANIFEST = "run_manifest.json"  # of a state, as its run leaves it
RunScript = Callable[[str, list[str]], None]  # (name of a script, its arguments)
NOTHING = {"figures": {}, "keep": {}, "attacks": {}, "report": None}  # measured, where nothing can be asked


def measure(
    book: Book, fitting: Fitting, plan: dict, settings: LedgerSettings, folder: Path, run_script: RunScript
) -> dict:  # fmt: skip
    """Evaluate a state; return what its entry says of it. plan: of its run; folder: of its model."""
    report_dir, asked = book.folder / "evidence" / folder.name, asked_of(book, fitting)
    sides: dict[str, list[str]] = {"forget_data": [], "forget_text": [], "normal_data": [], "normal_text": []}
    for request in asked:
        side = "forget" if request.id in fitting.requests else "normal"
        sides[f"{side}_{'text' if request.added['is_text'] else 'data'}"].append(str(book.file_of(request.id)))
        if holdout := book.beside(request.id, "holdout"):
            sides[f"{side}_data"].append(str(holdout))
    drift = drift_of(folder)
    if not (sides["forget_data"] or sides["forget_text"]):  # all texts are destroyed: nothing of them can be asked
        return {"drift": drift, **NOTHING}
    for name in NORMAL:
        sides[name] += plan["asked"][name]
    sides["normal_data"] += plan["allowed"]
    if earlier := _asked_before(report_dir):
        take_answers(earlier, report_dir, ("before",))  # the original is asked what it was not asked for that state
    words = settings.evaluation_words(NORMAL)
    for name, files in sides.items():
        words += [f"--{name}", *files] if files else []
    run_script("evaluate_unlearning.py", [
        *words, f"--model_name={folder}", f"--original_name={book.entries[0]['model']}", f"--report_dir={report_dir}",
        f"--train_log={book.folder / 'logs' / folder.name}.jsonl", "--split=all", "--examples=0",
    ])  # fmt: skip
    raw = (report_dir / "report.json").read_bytes()
    report = json.loads(raw)
    found = figures(report)
    values = {name: figure.value for name, figure in found.items() if figure.value is not None}
    keep = {name.removeprefix("keep."): value for name, value in values.items() if name.startswith("keep.worst.")}
    attacked = {name: value for name, value in values.items()
                if name.startswith(ATTACKED) and name.count(".") == 1 and name != "attack.worst"}  # fmt: skip
    return {"drift": drift, "figures": {request.id: figures_of(request.id, found, report) for request in asked},
            "keep": keep, "attacks": attacked, "report": hashlib.sha256(raw).hexdigest()}  # fmt: skip


def _asked_before(report_dir: Path) -> Path | None:
    """Return the newest earlier state's report that holds the original's answers; none is left after `--shred`."""
    folders = [path.parent.parent for path in report_dir.parent.glob("*/answers/before.jsonl")]
    earlier = [of for of in folders if of.name.isdecimal() and int(of.name) < int(report_dir.name)]
    return max(earlier, key=lambda of: int(of.name), default=None)


def asked_of(book: Book, fitting: Fitting) -> list[Request]:
    """Return the requests whose rows a state is asked: all that it is fitted to, and those that fell, unless a prompt
    of theirs stands in one that is in force: no prompt can be on both sides."""
    there = [request for request in book.requests.values() if not request.shredded]
    kept = [request for request in there if request.id in fitting.requests]
    standing = set().union(*(_prompts(book, request) for request in kept))
    fell = [request for request in there if request.states and request not in kept
            and not _prompts(book, request) & standing]  # fmt: skip
    return kept + fell


def _prompts(book: Book, request: Request) -> set[str]:
    """Return what `prompts` says of all rows of a request that are to be forgotten."""
    return prompts(book.rows_of(request.id) + book.rows_beside(request.id, "holdout"))


def figures_of(name: str, found: dict[str, Estimate], report: dict) -> dict[str, float]:
    """Return what was measured of a request's rows, whichever side they were asked on: each measure by its name and
    `n`, the rows asked; of its holdout with `holdout.` before it; and `attack.NAME`, the share of its attacked prompts
    that an attack's worst variant brings back, of `attack.NAME.n` prompts. found: figures of the report by name."""
    holdout, measured = f"{name}-holdout", {}
    for prefix, group in (("", name), (HELD_OUT, holdout)):
        of_group = _of_group(found, group)
        measured |= {f"{prefix}{measure}": value for measure, value in of_group.items()}
    groups = {f"{group}{ending}" for group in (name, holdout) for ending in HALVES}
    for attack in report.get("attacks") or []:
        rates = [rate for group, rate in attack["groups"].items() if group in groups and rate["n"]]
        asked = sum(rate["n"] for rate in rates)
        if asked and attack["judged"] and not attack["is_control"]:
            key, back = f"{ATTACKED}{attack['name']}", sum(rate["value"] * rate["n"] for rate in rates) / asked
            if back >= measured.get(key, 0.0):
                measured |= {key: back, f"{key}.n": asked}
    return measured


def _of_group(found: dict[str, Estimate], group: str) -> dict[str, float]:
    """Return the measures of a request's rows, those with an answer of their own and those without together."""
    measured = {}
    for name in MEASURES:
        for ending in ("", ".before", ".ratio"):
            halves = [figure for side in ("forget", "keep") for half in HALVES
                      if (figure := found.get(f"{side}.{group}{half}.{name}{ending}")) is not None
                      and figure.value is not None]  # fmt: skip
            if count := sum(figure.n for figure in halves):
                measured[f"{name}{ending}"] = sum(figure.value * figure.n for figure in halves) / count
                measured["n"] = max(count, measured.get("n", 0))
    return measured


def drift_of(folder: Path) -> float | None:
    """Return the KL from the first original on the rows of the looks, in nats, as the run measured it last."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest["after"].get("dev_kl")


# ------------------------------------------------------------------------------------------------ how it stands
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
    measure = own_measure(measured, is_text=request.added["is_text"])
    before, after = (measured.get(f"{measure}{ending}") for ending in (".before", ""))
    return {"request": request.id, "kind": request.kind, "received": request.added["received"] or "-",
            "due": request.added["due"] or "-", "since": first, "stands": stands,
            "measure": measure or "-", "before": _shown(before), "now": _shown(after),
            "held out": _shown(measured.get(f"{HELD_OUT}{measure}")), "attacked": worst_attack(measured),
            "tested": proved or ("-" if state is None else "not yet")}  # fmt: skip


def own_measure(figures: dict[str, float], *, is_text: bool) -> str | None:
    """Return the measure that says whether a request is forgotten. A text goes on about its subject even if none of it
    is known: what counts is whether it is said word for word."""
    order = [name for name in MEASURES if name != "answered"] if is_text else MEASURES
    return next((name for name in order if name in figures), None)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def worst_attack(measured: dict[str, float]) -> str:
    """Return how many of the attacked prompts of a request the worst attack brings back, as '1 of 4 (prefill)'."""
    backs = {name: value for name, value in measured.items() if name.startswith(ATTACKED) and not name.endswith(".n")}
    if not backs:
        return "-"
    worst = max(backs, key=backs.get)
    asked = round(measured[f"{worst}.n"])
    return f"{round(backs[worst] * asked)} of {asked} ({worst.removeprefix(ATTACKED)})"
