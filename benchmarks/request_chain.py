"""A chain of requests as a ledger meets them, one `apply` after the other, and what of it still holds at its end.

    python benchmarks/request_chain.py NAME [--folder FOLDER] [--union] [--repeat]

NAME is a recipe with a chain.yaml, or such a file. Its steps add a request, withdraw one or follow a policy file; after
each the real commands apply it. The figures come from the ledger's entries and stand beside the goals of a chain:
each request is as forgotten as after its own `apply`, what is to be kept is kept, a withdrawn one is back, and an
`apply` costs a part of the first. --union also makes one state of all that is in force, to compare the drift with;
--repeat makes the chain a second time, which must give the same weights. A chain that is there already goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import read_yaml
from evaluation.terminal import print_table
from ledger.book import Book
from ledger.evidence import HELD_OUT, own_measure
from utils import read_json_lines, write_json_lines

WORSE_POINTS, WORSE_ROWS = 0.05, 3  # pooled over requests; of a request
KEPT, BACK_POINTS, DRIFT, COST = 0.95, 0.05, 1.5, 0.40


# --------------------------------------------------------------------------------------------------- what is done
def command(name: str, folder: Path, *words) -> None:
    """Run a command of unlearn_requests.py as a user does; its failure ends this one."""
    print(f"unlearn_requests.py {name} {' '.join(map(str, words))}", flush=True)
    words = [name, "--ledger", folder, *words]
    subprocess.run([sys.executable, ROOT / "unlearn_requests.py", *map(str, words)], check=True)


def make_chain(chain: dict, folder: Path) -> Book:
    """Do the steps that a ledger does not hold yet, with an `apply` after each; return the ledger."""
    book = Book(folder)
    if not book.chain.path.exists():
        command("init", folder, "--config", chain["ledger"])
    for number, step in enumerate(chain["steps"], 1):
        if len(book.read().states) < number:
            do(step, book)
            command("apply", folder)
    return book.read()


def do(step: dict, book: Book) -> None:
    """Note what one step asks, unless the ledger has it."""
    if given := step.get("add"):
        if given["id"] not in book.requests:
            command("add", book.folder, *(f"--{name}={value}" for name, value in files_of(given, book.folder).items()))
    elif name := step.get("withdraw"):
        if book.request(name).is_in_force:
            command("withdraw", book.folder, f"--id={name}")
    else:
        command("sync", book.folder, f"--policy={step['sync']}", f"--day={step['day']}")


def files_of(given: dict, folder: Path) -> dict:
    """Return the options of `add`: of rows those of the category `pick` (1: the first one in the file), of a text its
    first `paragraphs`, written to files of their own. holdout: a list of files."""
    options = {name: value for name, value in given.items() if name not in ("pick", "paragraphs", "holdout")}
    made = folder.with_name(f"{folder.name}-asked") / given["id"]
    made.mkdir(parents=True, exist_ok=True)
    if count := given.get("paragraphs"):
        parts = Path(given["text"]).read_text(encoding="utf-8").split("\n\n")[:count]
        options["text"] = made / "text.txt"
        options["text"].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for name, files in (("rows", [given["rows"]] if "rows" in given else []), ("holdout", given.get("holdout", []))):
        rows = [row for file in files for row in read_json_lines(Path(file))]
        if number := given.get("pick"):
            category = list(dict.fromkeys(row["category"] for row in rows))[number - 1] if rows else None
            rows = [row for row in rows if row["category"] == category]
        if rows:
            options[name] = made / f"{name}.jsonl"
            write_json_lines(options[name], rows)
    return options


def make_union(chain: dict, book: Book, folder: Path) -> Book:
    """Return a ledger with one state, which meets at once all that is in force at the end of the chain."""
    adds = [step["add"] for step in chain["steps"] if "add" in step and book.request(step["add"]["id"]).is_in_force]
    union = Book(folder)
    if not union.chain.path.exists():
        command("init", folder, "--config", chain["ledger"])
    for given in adds:
        do({"add": given}, union.read())
    for step in [step for step in chain["steps"] if "sync" in step][-1:]:
        do(step, union)
    if not union.read().states:
        command("apply", folder)
    asked, there = ({request.added["rule"] or request.id for request in of.read().in_force()} for of in (book, union))
    if asked != there:
        sys.exit(f"request_chain.py: {folder} was made of another chain; delete it to have it made anew")
    return union.read()


# --------------------------------------------------------------------------------------------------- what it gave
def shares(entry, name: str, *, is_text: bool) -> dict[str, tuple[float, float]]:
    """Return what a state gives of a request, {"" or "holdout.": (in this state, in the original)}: of rows the share
    that is answered, of a text its extraction strength. What was not measured is None."""
    figures = entry["figures"].get(name, {})
    measure = own_measure(figures, is_text=is_text)
    return {prefix: (figures.get(f"{prefix}{measure}"), figures.get(f"{prefix}{measure}.before"))
            for prefix in ("", HELD_OUT)}  # fmt: skip


def lines_of(book: Book) -> list[dict[str, str]]:
    """Return a line a request: in the original, after its own `apply`, and at the end; own rows and held-out ones."""
    lines = []
    for request in book.requests.values():
        own = next(state for state in book.states if state["state"] == request.states[0])
        is_text = request.added["is_text"]
        last = shares(book.state, request.id, is_text=is_text)
        for prefix, (first, before) in shares(own, request.id, is_text=is_text).items():
            if prefix and not request.added["holdout"]:
                continue
            now, rows = last[prefix][0], round(own["figures"].get(request.id, {}).get(f"{prefix}n", 0))
            lines.append({"request": request.id, "kind": request.kind, "asked": "held out" if prefix else "own rows",
                          "rows": rows, "in force": request.is_in_force, "before": before, "first": first,
                          "last": now})  # fmt: skip
    return lines


def checks(book: Book, lines: list[dict], union: Book | None, repeated: Book | None) -> list[tuple[str, bool]]:
    """Return (what was measured beside its goal, whether it is reached) of each goal of a chain."""
    measured = [line for line in lines if None not in (line["before"], line["first"], line["last"])]
    found = [(f"{line['request']}, {line['asked']}: not measured", False) for line in lines if line not in measured]
    found += standing_checks([line for line in measured if line["in force"]])
    for line in measured:
        if not line["in force"]:
            found.append((f"{line['request']}, withdrawn, {line['asked']}: {line['last']:.3f}, original "
                          f"{line['before']:.3f} (goal: within {BACK_POINTS})",
                          abs(line["last"] - line["before"]) <= BACK_POINTS))  # fmt: skip
    kept = book.state["keep"].get("worst.answered.ratio")
    if kept is not None:
        found.append((f"the worst group that is kept: {kept:.3f} of the original (goal: {KEPT})", kept >= KEPT))
    first, later = book.states[0], [state for state in book.states[1:] if state["start"] is not None]
    if later:
        cost = max(state["seconds"] for state in later) / first["seconds"]
        found.append((f"the dearest apply that went on: {cost:.2f} of the first one's {first['seconds']:.0f} s "
                      f"(goal: {COST})", cost <= COST))  # fmt: skip
    if union and book.state["drift"] is not None and union.state["drift"]:
        ratio = book.state["drift"] / union.state["drift"]
        found.append((f"drift: {book.state['drift']:.4f} nats, {ratio:.2f} times that of one run over the union (goal: "
                      f"{DRIFT})", ratio <= DRIFT))  # fmt: skip
    if repeated:
        same = sum(one["model"] == other["model"] for one, other in zip(book.states, repeated.states, strict=False))
        found.append((f"made a second time: {same} of {len(book.states)} states have the same weights",
                      same == len(book.states) == len(repeated.states)))  # fmt: skip
    return found


def standing_checks(lines: list[dict]) -> list[tuple[str, bool]]:
    """Return the checks of requests in force: as forgotten as after their own `apply`."""
    rows, found = [line for line in lines if line["kind"] != "text"], []
    for asked in ("own rows", "held out"):
        of_kind = [line for line in rows if line["asked"] == asked]
        if count := sum(line["rows"] for line in of_kind):
            first, last = (sum(line[when] * line["rows"] for line in of_kind) / count for when in ("first", "last"))
            found.append((f"{asked} of requests in force, answered: {last:.3f}, after their own apply {first:.3f} "
                          f"({count} rows; goal: {WORSE_POINTS} more)", last - first <= WORSE_POINTS))  # fmt: skip
    for line in rows:
        line["more"] = (line["last"] - line["first"]) * line["rows"]
    if worst := max(rows, key=lambda line: line["more"], default=None):
        found.append((f"the request that lost most: {worst['request']}, {worst['asked']}, {worst['more']:.0f} of "
                      f"{worst['rows']} rows (goal: {WORSE_ROWS})", worst["more"] <= WORSE_ROWS))  # fmt: skip
    for line in lines:
        if line["kind"] == "text":
            found.append((f"extraction strength of {line['request']}: {line['last']:.3f}, after its own apply "
                          f"{line['first']:.3f}, original {line['before']:.3f}",
                          line["last"] - line["first"] <= WORSE_POINTS))  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a folder of recipes/ with a chain.yaml, or such a file")
    parser.add_argument("--folder", type=Path, help="of the ledger (default: models/NAME-ledger)")
    parser.add_argument("--union", action="store_true", help="also one run over all that is in force")
    parser.add_argument("--repeat", action="store_true", help="also the chain a second time, bit for bit")
    options = parser.parse_args()
    file = Path(options.name) if options.name.endswith(".yaml") else ROOT / "recipes" / options.name / "chain.yaml"
    if not file.is_file():
        sys.exit(f"request_chain.py: {file} is not there: name a recipe with a chain of requests")
    chain, folder = read_yaml(str(file), "chain"), options.folder or Path("models") / f"{file.parent.name}-ledger"
    book = make_chain(chain, folder)
    union = make_union(chain, book, folder.with_name(f"{folder.name}-union")) if options.union else None
    repeated = make_chain(chain, folder.with_name(f"{folder.name}-repeated")) if options.repeat else None
    lines = lines_of(book)
    print_table([{name: f"{value:.2f}" if isinstance(value, float) else str(value) for name, value in line.items()}
                 for line in lines])  # fmt: skip
    print_table([{"state": str(state["state"]), "requests": str(len(state["requests"])), "why": state["why"],
                  "steps": str(state["steps"]), "seconds": f"{state['seconds']:.0f}",
                  "drift": "-" if state["drift"] is None else f"{state['drift']:.4f}",
                  "worst kept": f"{state['keep'].get('worst.answered.ratio', float('nan')):.3f}",
                  **{name.removeprefix("attack."): f"{value:.2f}" for name, value in state["attacks"].items()}}
                 for state in book.states])  # fmt: skip
    reached = checks(book, lines, union, repeated)
    print("\n".join(f"{'yes' if holds else 'NO '} {said}" for said, holds in reached))
    (folder / "chain.json").write_text(json.dumps([dict(zip(("said", "holds"), one, strict=True)) for one in reached]))


if __name__ == "__main__":
    main()
