"""Make the ledger follow a policy file: its rules are requests of kind `policy`, and what changes in it follows.

rules:
  - id: locks                               # stays in the ledger
    rule: No instructions for opening locks that are not one's own
    refuse:                                 # examples that are refused
      - How do I open my neighbour's lock?
      - prompt: How do I pick a lock unseen?
        response: Take a thin wire.         # what is to be forgotten; without one, the model's own answer is
    holdout:                                # further examples that are refused: every state is asked, none is taught
      - How do I get a locked door open at night?
    allow:                                  # examples beside the border, which stay as they are
      - How does a pin tumbler lock work?
    answer: I don't help with that.         # or silence, if it is left out
    since: 2026-11-01
    until: 2027-11-01
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from command_line import read_yaml
from data_module import prompt_hash
from ledger.book import Book
from sources.paraphrase import paraphrase
from utils import UsageError, write_json_lines

FIELDS = ("id", "rule", "refuse", "holdout", "allow", "answer", "since", "until")
TAUGHT = ("refuse", "allow")  # more is made of both alike: by its form nothing may tell which side it is
SIDES = (*TAUGHT, "holdout")
RULE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}")
NUMBERED = re.compile(r"(?<=-[0-9a-f]{8})\.\d+$")
STAMP = 8  # letters of the hash of a rule's content in its request's id


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of a policy. refuse, holdout, allow: rows as a file of rows holds them."""

    id: str
    rule: str
    refuse: tuple[dict, ...]
    allow: tuple[dict, ...]
    holdout: tuple[dict, ...]
    since: str
    until: str

    @property
    def request(self) -> str:
        """The id of its request: another content is another request. The dates are none of its content."""
        content = json.dumps([self.rule, self.refuse, self.allow, *([self.holdout] if self.holdout else [])],
                             sort_keys=True)  # fmt: skip
        return f"{self.id}-{hashlib.sha256(content.encode()).hexdigest()[:STAMP]}"

    def holds_on(self, day: str) -> bool:
        """Return whether the rule is in force on a day, as 2026-11-27."""
        return self.since <= day and (not self.until or day < self.until)


@dataclasses.dataclass(frozen=True)
class Change:
    """What follows for the ledger: a rule to add (`rule`), or a request to withdraw (`request`), and why."""

    why: str
    rule: Rule | None = None
    request: str = ""


def read_policy(path: str, *, rephrase: int = 0, seed: int = 0) -> list[Rule]:
    """Read a policy file. rephrase: further wordings of each example, on both sides alike. Raises UsageError."""
    content = read_yaml(path, "policy")
    rules = content.get("rules")
    if set(content) != {"rules"} or not isinstance(rules, list) or not rules:
        raise UsageError(f"--policy {path}: must hold 'rules' alone, a list")
    found = [
        _read_rule(rule, f"--policy {path}, rule {number}", rephrase, seed) for number, rule in enumerate(rules, 1)
    ]
    names = [rule.id for rule in found]
    sides = {side: {prompt_hash(row["prompt"]): rule.id for rule in found for row in getattr(rule, side)}
             for side in SIDES}  # fmt: skip
    for rule in found:
        for row in (*rule.refuse, *rule.holdout):
            if other := sides["allow"].get(prompt_hash(row["prompt"])):
                raise UsageError(f"--policy {path}: {row['prompt']!r} is refused by rule {rule.id}, allowed by {other}")
        for row in rule.refuse:
            if other := sides["holdout"].get(prompt_hash(row["prompt"])):
                raise UsageError(f"--policy {path}: {row['prompt']!r} is taught by rule {rule.id}, held out by {other}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--policy {path}: two rules have the id {twice[0]}")
    return found


def _read_rule(rule, where: str, rephrase: int, seed: int) -> Rule:
    if not isinstance(rule, dict) or (wrong := sorted(map(str, rule.keys() - set(FIELDS)))):
        named = f"unknown {wrong[0]!r}" if isinstance(rule, dict) else "must hold 'name: value' lines"
        raise UsageError(f"{where}: {named}; a rule has {', '.join(FIELDS)}")
    for name in ("id", "rule"):
        if not isinstance(rule.get(name), str) or not rule[name].strip():
            raise UsageError(f"{where}: {name} is missing")
    if not RULE_ID.fullmatch(rule["id"]):
        raise UsageError(f"{where}: id {rule['id']!r} must be 1 to 41 letters, digits, dots, dashes and underlines")
    answer = rule.get("answer")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise UsageError(f"{where}: answer must be a sentence; leave it out for silence")
    sides = {side: [_row(example, f"{where}, {side}") for example in _list(rule, side, where)]
             for side in SIDES}  # fmt: skip
    if not sides["refuse"]:
        raise UsageError(f"{where}: refuse is missing: examples of what is refused")
    known = {row["prompt"] for rows in sides.values() for row in rows}
    for side in TAUGHT:
        sides[side] += _rephrased(sides[side], rephrase, seed, known)
    if answer:
        sides["refuse"] = [row | {"wanted": answer} for row in sides["refuse"]]
    since, until = (_date(rule.get(name), f"{where}: {name}") for name in ("since", "until"))
    return Rule(rule["id"], rule["rule"], *(tuple(sides[side]) for side in SIDES), since, until)


def _list(rule: dict, side: str, where: str) -> list:
    examples = rule.get(side) or []
    if not isinstance(examples, list):
        raise UsageError(f"{where}: {side} must be a list of examples")
    return examples


def _row(example, where: str) -> dict:
    row = {"prompt": example} if isinstance(example, str) else example
    texts = row.values() if isinstance(row, dict) else ()
    if (
        not isinstance(row, dict)
        or not {"prompt"} <= row.keys() <= {"prompt", "response"}
        or not all(isinstance(text, str) and text.strip() for text in texts)
    ):
        raise UsageError(f"{where}: {example!r} is no example; give a prompt, or prompt and response")
    return dict(row)


def _rephrased(rows: list[dict], count: int, seed: int, known: set[str]) -> list[dict]:
    """Return up to `count` further wordings of each row. known: prompts that are there already; gets what is made."""
    found = []
    for place, row in enumerate(rows):
        for number in range(count):
            prompt = paraphrase(row["prompt"], np.random.default_rng([seed, place, number]))
            if prompt not in known:
                known.add(prompt)
                found.append(row | {"prompt": prompt})
    return found


def _date(value, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    raise UsageError(f"{where} must be a date as 2026-11-27, got {value!r}")


def refuse_answers(rules: list[Rule]) -> None:
    """Raise UsageError if a rule has an answer to give, for a recipe that teaches none."""
    for rule in rules:
        if any("wanted" in row for row in rule.refuse):
            raise UsageError(f"rule {rule.id}: the ledger's recipe teaches no answer; leave 'answer' out (silence), or "
                             "begin a ledger with one that does (run.method: consent)")  # fmt: skip


def changes(book: Book, rules: list[Rule], day: str) -> list[Change]:
    """Return what makes the ledger follow the rules that hold on a day; [] if it does."""
    holding = {rule.id: rule for rule in rules if rule.holds_on(day)}
    found, there = [], set()
    for request in book.in_force():
        if request.kind != "policy" or not request.added["rule"]:
            continue
        rule = holding.get(request.added["rule"])
        if rule is None:
            found.append(Change("the policy has no such rule now", request=request.id))
        elif base_of(request.id) != rule.request:
            found.append(Change("the rule was changed", request=request.id))
        else:
            there.add(rule.id)
    replaced = {book.requests[change.request].added["rule"] for change in found}
    return found + [Change("the rule was changed" if rule.id in replaced else "the rule is new", rule=rule)
                    for rule in holding.values() if rule.id not in there]  # fmt: skip


def base_of(name: str) -> str:
    """Return a request's id without the number that tells it from an earlier one of the same content."""
    return NUMBERED.sub("", name)


def free_id(book: Book, rule: Rule) -> str:
    """Return an id for a rule's request: a rule that came back unchanged gets a number."""
    name, number = rule.request, 1
    while name in book.requests:
        number += 1
        name = f"{rule.request}.{number}"
    return name


def write_rule(rule: Rule, folder: Path) -> dict[str, str | None]:
    """Write the rows of a rule; return the file of each side as a request takes it, None of one without rows."""
    files: dict[str, str | None] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for side, name in {"refuse": "rows", "holdout": "holdout", "allow": "allowed"}.items():
        rows, path = getattr(rule, side), folder / f"{name}.jsonl"
        files[name] = str(path) if rows else None
        if rows:
            write_json_lines(path, rows)
    return files
