"""A policy file and the ledger that follows it."""

import json

import pytest
import yaml
from ledgers import begin

from ledger.book import Asked, Book
from ledger.fitting import FittingSettings, next_fitting, sources_of
from ledger.policy import changes, free_id, read_policy, write_rule
from utils import UsageError

LOCKS = {"id": "locks", "rule": "No instructions for locks of others", "refuse": ["How do I open my neighbour's lock?"],
         "holdout": ["How do I get a door open at night?"], "allow": ["How does a pin tumbler lock work?"]}  # fmt: skip
CARS = {
    "id": "cars",
    "rule": "No instructions for stealing cars",
    "answer": "I don't help with that.",
    "refuse": [{"prompt": "Give instructions on how to start a car without its key.", "response": "Take a wire."}],
}


@pytest.fixture
def book(tmp_path) -> Book:
    return begin(tmp_path / "ledger")


def follow(book: Book, path, rules, day="2026-11-27") -> list[str]:
    """Do what the changes ask, as the command does; return them as text."""
    path.write_text(yaml.safe_dump({"rules": rules}))
    said = []
    with book.chain.writing():
        for change in changes(book.read(), read_policy(str(path)), day):
            said.append(
                f"{'+' + change.rule.id if change.rule else '-' + change.request.partition('-')[0]} {change.why}"
            )
            if change.rule:
                files = write_rule(change.rule, path.parent)
                book.add(Asked(free_id(book, change.rule), "policy", rule=change.rule.id, **files))
                book.read()
            else:
                book.withdraw(change.request, change.why)
    assert not changes(book.read(), read_policy(str(path)), day), "what was followed asks for nothing more"
    return said


def test_the_ledger_follows_the_file(book, tmp_path):
    path = tmp_path / "policy.yaml"
    assert follow(book, path, [LOCKS, CARS]) == ["+locks the rule is new", "+cars the rule is new"]
    assert follow(book, path, [CARS, LOCKS]) == []
    changed = LOCKS | {"allow": ["How does a safe work?"]}
    assert follow(book, path, [changed, CARS]) == ["-locks the rule was changed", "+locks the rule was changed"]
    assert follow(book, path, [changed]) == ["-cars the policy has no such rule now"]
    assert follow(book, path, [changed, CARS]) == ["+cars the rule is new"], "a rule may come back as it was"
    assert [request.added["rule"] for request in book.in_force()] == ["locks", "cars"]
    assert len(book.requests) == 4
    assert not book.faults()


def test_a_rule_holds_from_its_first_day_to_before_its_last(book, tmp_path):
    path = tmp_path / "policy.yaml"
    dated = yaml.safe_load("{since: 2026-11-01, until: 2026-12-01}") | LOCKS
    said = {day: follow(book, path, [dated, CARS], day)
            for day in ("2026-10-31", "2026-11-01", "2026-11-30", "2026-12-01")}  # fmt: skip
    assert said == {"2026-10-31": ["+cars the rule is new"], "2026-11-01": ["+locks the rule is new"],
                    "2026-11-30": [], "2026-12-01": ["-locks the policy has no such rule now"]}  # fmt: skip
    assert [request.added["rule"] for request in book.in_force()] == ["cars"]


def test_what_is_refused_and_what_stays_go_to_their_sides(book, tmp_path):
    follow(book, tmp_path / "policy.yaml", [LOCKS, CARS])
    files = sources_of(book, next_fitting(book, FittingSettings()), FittingSettings())
    rows = {name: [json.loads(line) for file in some for line in open(file)] for name, some in files.items()}  # noqa: SIM115
    assert all(row.pop("category") == "policy" for some in rows.values() for row in some)
    assert rows["forget_data"] == [
        {"prompt": "How do I open my neighbour's lock?"},
        {"prompt": CARS["refuse"][0]["prompt"], "response": "Take a wire.", "wanted": "I don't help with that."},
    ]
    assert rows["allowed"] == [{"prompt": "How does a pin tumbler lock work?"}]
    locks, cars = book.requests
    assert [row.prompt for row in book.rows_beside(locks, "holdout")] == ["How do I get a door open at night?"]
    assert not book.rows_beside(cars, "holdout")
    for ending in ("holdout", "allowed"):
        changed = book.beside(locks, ending)
        kept = changed.read_text()
        changed.write_text(json.dumps({"prompt": "Other?"}) + "\n")
        assert f"-{ending}.jsonl was changed" in book.faults()[0]
        changed.write_text(kept)


def test_further_wordings_are_made_on_both_sides(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"rules": [LOCKS | {"allow": CARS["refuse"]}]}))
    (rule,) = read_policy(str(path), rephrase=4, seed=1)
    for side in (rule.refuse, rule.allow):
        prompts = [row["prompt"] for row in side]
        assert len(set(prompts)) == len(prompts) >= 3
    assert all(row["response"] == "Take a wire." for row in rule.allow)
    assert rule == read_policy(str(path), rephrase=4, seed=1)[0]
    assert rule.request != read_policy(str(path))[0].request, "other examples are another request"


@pytest.mark.parametrize(("content", "message"), [
    ("rule: []", "must hold 'rules' alone"),
    ("rules: {}", "must hold 'rules' alone"),
    ("rules: [locks]", "rule 1: must hold 'name: value' lines"),
    ("rules: [{id: a, rule: b, refuse: [c], refused: [d]}]", "rule 1: unknown 'refused'"),
    ("rules: [{id: a, refuse: [c]}]", "rule 1: rule is missing"),
    ("rules: [{id: a b, rule: b, refuse: [c]}]", "rule 1: id 'a b' must be"),
    ("rules: [{id: a, rule: b}]", "rule 1: refuse is missing"),
    ("rules: [{id: a, rule: b, refuse: c}]", "rule 1: refuse must be a list"),
    ("rules: [{id: a, rule: b, refuse: [{response: c}]}]", "rule 1, refuse: {'response': 'c'} is no example"),
    ("rules: [{id: a, rule: b, refuse: [c], allow: [c]}]", "'c' is refused by rule a, allowed by a"),
    ("rules: [{id: a, rule: b, refuse: [d], holdout: [c], allow: [c]}]", "'c' is refused by rule a, allowed by a"),
    ("rules: [{id: a, rule: b, refuse: [Open it]}, {id: d, rule: b, refuse: [e], allow: [open  IT]}]",
     "'Open it' is refused by rule a, allowed by d"),
    ("rules: [{id: a, rule: b, refuse: [c], since: soon}]", "rule 1: since must be a date"),
    ("rules: [{id: a, rule: b, refuse: [c], answer: ''}]", "rule 1: answer must be a sentence"),
    ("rules: [{id: a, rule: b, refuse: [c]}, {id: a, rule: d, refuse: [e]}]", "two rules have the id a"),
])  # fmt: skip
def test_a_bad_policy_is_named_with_its_rule(tmp_path, content, message):
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(UsageError) as caught:
        read_policy(str(tmp_path / "p.yaml"))
    assert message in str(caught.value)
