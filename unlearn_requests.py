"""Keep a ledger of requests to forget, and the model that meets them.

    python unlearn_requests.py init --ledger consent --config recipes/consent/ledger.yaml
    python unlearn_requests.py add --ledger consent --id R1 --kind person --rows rows.jsonl
    python unlearn_requests.py apply --ledger consent

`COMMAND --help` lists the options of a command. The newest model lies in FOLDER/states, `status` names it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from command_line import OneLineParser, read_yaml, underscored
from engine.processes import join_processes
from engine.weights_hash import weights_hash
from evaluation.parsing import parse_evaluation
from evaluation.terminal import print_table
from ledger import evidence, state_run
from ledger.book import Asked, Book, faults_of_notes, read_date
from ledger.chain import missing_since, read_head
from ledger.examples import hashes_of, more_examples
from ledger.find import find, normalised, read_records
from ledger.fitting import Fitting, next_fitting, refuse_loss
from ledger.options import (
    AddOptions,
    ApplyOptions,
    ExamplesOptions,
    ExportOptions,
    FindOptions,
    InitOptions,
    StatusOptions,
    SyncOptions,
    VerifyOptions,
    WithdrawOptions,
)
from ledger.page import export_of, write_export
from ledger.policy import SIDES, changes, free_id, read_policy, refuse_answers, write_rule
from ledger.settings import LedgerSettings, read_settings_file
from method.recipe import read_recipe
from prompts.tokenizer import load_tokenizer
from run.levels import refuse_levels
from run.parsing import parse_run
from run.writer import writer
from utils import RunError, UsageError, atomic_write_text, load_config, run_script, write_json_lines

BROKEN = 1  # exit code of `verify`: the ledger is not what it was
HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------- the commands
def init(options: InitOptions) -> None:
    settings = read_settings_file(options.config)
    run = parse_run(settings.run_words())  # refuses a wrong option or recipe
    parse_evaluation([*settings.evaluation_words(), f"--model_name={run.model_name}", "--split=all"])
    if (run.recipe.get("selection") or {}).get("kl_budget"):
        raise UsageError("run.method: its selection changes whole weights, and states are adapters: set "
                         "selection.kl_budget=0")  # fmt: skip
    refuse_levels(read_recipe(run).terms, run.holdout_text)
    if getattr(load_config(run.model_name), "quantization_config", None):
        raise UsageError(f"run.model_name {run.model_name}: is quantised; name the model that it was made of")
    original = weights_hash(run.model_name)
    if original is None:
        raise UsageError(f"run.model_name {run.model_name}: is not in a local folder; copy it to models/ first")
    book = Book(Path(options.ledger))
    if book.chain.path.exists():
        raise UsageError(f"{book.chain.path}: there is a ledger; name another folder with --ledger")
    book.folder.mkdir(parents=True, exist_ok=True)
    book.folder.chmod(0o700)  # requests, answers and logs name people
    with book.chain.writing():
        book.chain.append("init", settings=settings.content, model=run.model_name, original=original)
    print(f"{book.chain.path}: begun; the original is {run.model_name}, the recipe {run.method}")


def add(options: AddOptions) -> None:
    given = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name != "ledger"
    }
    book = Book(Path(options.ledger))
    with book.chain.writing():
        entry = book.read().add(Asked(**given | {"fields": tuple(options.fields)}))
    print(f"request {options.id}: {len(entry['rows'])} rows, noted as entry {entry.number}; 'apply' meets it")


def withdraw(options: WithdrawOptions) -> None:
    book = Book(Path(options.ledger))
    with book.chain.writing():
        book.read().withdraw(options.id, options.why)
        request = book.read().request(options.id)
    after = "the next 'apply' fits the model without it" if request.states else "no state was fitted to it"
    print(f"request {options.id}: withdrawn; {after}")


def sync(options: SyncOptions) -> None:
    rules = read_policy(options.policy, rephrase=options.rephrase, seed=options.seed)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    day = read_date(options.day or today, f"--day {options.day}")
    book = Book(Path(options.ledger))
    terms = parse_run(LedgerSettings.of(book.read().settings).run_words()).recipe["terms"]
    if not any(term["draw"] == "wanted" for term in terms):
        refuse_answers(rules)
    if options.dry_run:
        for change in changes(book.read(), rules, day):
            print(f"{'add ' + change.rule.id if change.rule else 'withdraw ' + change.request}: {change.why}")
            for side in SIDES if change.rule else ():
                print(*(f"  {side}: {row['prompt']}" for row in getattr(change.rule, side)), sep="\n")
        return
    with book.chain.writing(), tempfile.TemporaryDirectory() as folder:
        found = changes(book.read(), rules, day)
        asked = {change.rule.id: Asked(free_id(book, change.rule), "policy", note=change.rule.rule, rule=change.rule.id,
                                       **write_rule(change.rule, Path(folder) / change.rule.id))
                 for change in found if change.rule}  # fmt: skip
        falling = {change.request for change in found if not change.rule}
        for request in asked.values():  # all of them before the first is written: half a policy is none
            book.check(request, without=falling)
        for change in found:
            if change.rule is None:
                book.withdraw(change.request, change.why)
                print(f"request {change.request}: withdrawn, {change.why}")
            else:
                book.read().add(asked[change.rule.id])
                print(f"request {asked[change.rule.id].id}: added, {change.why}")
    print("the ledger follows the policy" + (": nothing changed" if not found else "; 'apply' makes the model follow"))


def examples(options: ExamplesOptions) -> None:
    read_policy(options.policy)  # refuses what no policy is
    target = Path(options.to)
    if target.exists():
        raise UsageError(f"--to {target}: is there already, and may hold what you wrote; name another file")
    book = Book(Path(options.ledger)).read()
    run = parse_run([*LedgerSettings.of(book.settings).run_words(), f"--seed={options.seed}", "--cache_dir=none"])
    tokenizer = load_tokenizer(run.model_name, trust_remote_code=run.trust_remote_code)
    content = read_yaml(options.policy, "policy")
    with writer(run, tokenizer, join_processes().device, "examples") as answer:
        for rule in content["rules"]:
            others = set().union(*(hashes_of(other) for other in content["rules"] if other is not rule))
            for side, texts in more_examples(rule, options.count, options.seed, answer, others).items():
                print(f"{rule['id']}, {side}: {len(texts)} more", *(f"  {text}" for text in texts), sep="\n")
                rule[side] = [*(rule.get(side) or []), *texts]
    atomic_write_text(target, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    print(f"{target}: read it, take out what is not of the rule, then 'sync --policy {target}'")


def apply(options: ApplyOptions) -> None:
    book = Book(Path(options.ledger))
    with book.chain.writing():
        book.read()
        settings = LedgerSettings.of(book.settings)
        fitting = next_fitting(book, settings.states, refit=options.refit)
        refuse_shredding(book, fitting, options.shred)
        if not options.dry_run:
            for name in state_run.finish_shredding(book):
                print(f"request {name}: its text, whose destruction was cut off, is deleted")
            state_run.finish_last(book)
        if fitting is not None:
            refuse_loss(fitting, confirmed=options.confirm_loss or options.dry_run)
        lines, plan = ["every request is met by the newest state"], None
        if fitting is not None:
            plan = state_run.plan_of(book, fitting, settings)
            lines = state_run.describe(fitting, plan)
        if options.shred:
            lines.append(f"then the texts of these requests are destroyed: {', '.join(options.shred)}")
        print("\n".join(lines), flush=True)
        if options.dry_run:
            return
        if fitting is None:
            state_run.remove_leftovers(book)
        else:
            if weights_hash(book.entries[0]["model"]) != book.entries[0]["original"]:
                raise UsageError(f"{book.entries[0]['model']}: is not the model that the ledger began with; restore it")
            state_run.make_state(book, fitting, plan, settings, functools.partial(run, book.chain.lock))
            book.read()
        shred(book, options.shred)
    show_status(book)


def run(lock: int, script: str, words: list[str]) -> None:
    """Run one of this project's scripts; it says on stderr what it does. Raises UsageError or RunError if it fails.

    lock: the number of the ledger's lock file, which the script holds as well: if this process is killed, nobody else
    may write before the script has ended.
    """
    child = subprocess.Popen([sys.executable, str(HERE / script), *words], stdout=subprocess.DEVNULL, pass_fds=(lock,))
    try:
        child.wait()
    except KeyboardInterrupt:  # the child gets Ctrl-C too; wait until it has finished its step and saved
        child.wait()
        raise
    if child.returncode == 2:
        raise UsageError(f"{script} refused what the ledger asks for (the line above); nothing was noted")
    if child.returncode:
        raise RunError(f"{script} ended with {child.returncode}; nothing was noted, and 'apply' goes on from there")


def refuse_shredding(book: Book, fitting: Fitting | None, names: list[str]) -> None:
    """Raise UsageError if a text that is to be destroyed is so already, or if no state will have met its request."""
    for name in names:
        if name == "all":
            continue
        request = book.request(name)
        if request.shredded:
            raise UsageError(f"--shred {name}: its text was destroyed on {request.shredded.at}")
        if names.count(name) > 1:
            raise UsageError(f"--shred {name}: is named twice")
        if fitting is None and not book.is_met(request):
            raise UsageError(f"--shred {name}: no state meets it")


def shred(book: Book, names: list[str]) -> None:
    """Destroy the texts of requests, and what else holds their rows."""
    if "all" in names:
        names = [name for name, request in book.requests.items() if book.is_met(request) and not request.shredded]
    for name in names:
        deleted = state_run.shred(book.read(), name)
        print(
            f"request {name}: its text and salt are destroyed, and {deleted} files of answers, caches and checkpoints"
        )
    book.read()


def status(options: StatusOptions) -> None:
    show_status(Book(Path(options.ledger)).read())


def show_status(book: Book) -> None:
    """Print a line a request, and what the newest state measured."""
    rows = [evidence.status_line(book, request) for request in book.requests.values()]
    if rows:
        print_table(rows)
    state = book.state
    if state is None:
        print("no state yet: 'apply' makes one")
        return
    drift = "not measured" if state["drift"] is None else f"{state['drift']:.4f} nats from the first original"
    kept = state["keep"].get("worst.answered.ratio")
    kept = "-" if kept is None else f"{kept:.3f} times as often as by the original"
    print(f"state {state['state']} of {state.at}: {state_run.model_of(book)}; drift {drift}; the worst group that is "
          f"to be kept is answered {kept}")  # fmt: skip
    if state["attacks"]:
        shares = (f"{name.removeprefix('attack.')} {100 * value:.0f} %" for name, value in state["attacks"].items())
        print(f"brought back of what is forgotten, all requests together: {', '.join(shares)}")


def verify(options: VerifyOptions) -> None:
    book = Book(Path(options.ledger))
    faults = book.chain.faults()
    if not faults and not book.chain.entries() and (book.chain.note.exists() or (book.folder / "states").exists()):
        faults = [f"{book.chain.path}: is empty, and what lies beside it knows entries"]
    if torn := book.chain.torn():
        print(f"a last line that was cut off ({len(torn)} characters) is no entry; the next writing removes it")
    if not faults:
        book.read()
        faults = faults_of_notes(book)
        if options.export:
            head = read_head(Path(options.export), f"--export {options.export}: is not the export.json of a ledger")
            faults += [fault] if (fault := missing_since(book.entries, head, options.export)) else []
        faults += book.faults() + state_run.faults(book)
    if faults:
        print("\n".join(faults))
        raise SystemExit(BROKEN)
    print(f"{book.chain.path}: {len(book.entries)} entries hold; the last one is {book.entries[-1].hash}")
    if not options.export:
        print("a chain that was written anew from the start would look so too: compare with an export (--export)")


def export(options: ExportOptions) -> None:
    book = Book(Path(options.ledger)).read()
    folder = Path(options.to)
    write_export(folder, export_of(book, state_run.copies(book), evidence.status_line))
    print(
        f"{folder / 'export.html'} and export.json: {len(book.entries)} entries, the last one {book.entries[-1].hash}"
    )


def find_rows(options: FindOptions, terms: list[str], files: list[str]) -> None:
    if wordless := [term for term in terms if not normalised(term)]:
        raise UsageError(f"find {wordless[0]!r}: holds no letter and no digit")
    if not terms or not files:
        raise UsageError("find: give what is looked for, and files, as: find 'Jane Doe' --in data/rows.jsonl")
    taken, left, nearly = [], [], 0
    for file in files:
        records, taken_there = read_records(file), set()
        hits = find(terms, records)
        for hit in hits:
            print(f"{file}, row {hit.number}: {hit.how} {hit.score:.2f}: {hit.shown[:80]!r} ({hit.term[:40]})")
            if hit.how != "near" or options.near:
                taken_there.add(hit.number)
        nearly += len({hit.number for hit in hits} - taken_there)
        for number, record in enumerate(records, 1):
            (taken if number in taken_there else left).append(record)
    more = f", {nearly} more nearly (--near takes them as well)" if nearly else ""
    print(f"{len(taken)} of {len(taken) + len(left)} rows found{more}")
    for path, some in ((options.found, taken), (options.rest, left)):
        if path:
            write_json_lines(path, some)
            print(f"{path}: {len(some)} rows")


COMMANDS = {
    "init": (InitOptions, init), "add": (AddOptions, add), "withdraw": (WithdrawOptions, withdraw),
    "sync": (SyncOptions, sync), "examples": (ExamplesOptions, examples), "apply": (ApplyOptions, apply),
    "status": (StatusOptions, status), "verify": (VerifyOptions, verify), "export": (ExportOptions, export),
    "find": (FindOptions, find_rows),
}  # fmt: skip


def main() -> None:
    """Run one command."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__ + "\ncommands:\n" + "\n".join(f"  {command:10}{kind.__doc__.splitlines()[0]}"
                                                    for command, (kind, _) in COMMANDS.items()))  # fmt: skip
        return
    if name not in COMMANDS:
        raise UsageError(f"{name}: no such command; there are {', '.join(COMMANDS)}")
    kind, command = COMMANDS[name]
    parser = OneLineParser(kind, prog=f"unlearn_requests.py {name}")
    if kind is FindOptions:
        parser.usage = "%(prog)s WHAT ... [--OPTION VALUE ...] --in FILE ..."
        parser.add_argument("terms", nargs="*", help="names, or quotations of eight words and more")
        parser.add_argument("--in", dest="files", nargs="+", default=[], help="files of rows")
    given = vars(parser.parse_args(underscored(argv)))
    further = [given.pop(extra) for extra in ("terms", "files") if extra in given]
    command(kind(**given), *further)


if __name__ == "__main__":
    run_script(main)
