"""Write the rows of the planted truth: what models/planted is taught, and what its twin is not.

    python setup_planted.py

Reads data/planted/facts.jsonl (wrong facts about the real world) and people.yaml, and draws invented people by a seed.
Writes data/planted/made/*.jsonl: of people and of facts those that go (`forget`) and those that stay (`retain`), and
people that no model saw (`unseen`); of each also the same questions in other words that are taught as well
(`reworded`), and in words that no model saw (`fresh`).
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from command_line import read_yaml
from sources.names import invented_word
from utils import read_json_lines, run_script, write_json_lines

FOLDER = Path("data/planted")
MADE = FOLDER / "made"
SEED = 27
NUM_PEOPLE = {"forget": 8, "retain": 16, "unseen": 8}
NUM_FACTS = {"forget": 40, "retain": 40}
WORDINGS = ("reworded", "fresh")  # endings of files, and fields of a fact: its question in other words
NUM_WRONG = 3  # wrong answers of a row
YEARS = (1921, 1999)


def main() -> None:
    """Write every file."""
    files = make_people(read_yaml(FOLDER / "people.yaml", "people"), SEED)
    files |= make_facts(read_json_lines(FOLDER / "facts.jsonl"), SEED)
    for name, rows in files.items():
        write_json_lines(MADE / f"{name}.jsonl", rows)
        print(f"{MADE / name}.jsonl: {len(rows)} rows")


class Inventor:
    """Draws values from one seeded stream; no invented word comes twice. lists: name of a list -> its values."""

    def __init__(self, lists: dict[str, list[str]], seed: int):
        self.lists, self.random = lists, random.Random(seed)
        self._taken: set[str] = set()

    def fill(self, pattern: str) -> str:
        """Return a pattern with a value drawn for every place in braces."""
        return re.sub(r"{(\w+)}", lambda place: self._draw(place[1]), pattern)

    def _draw(self, kind: str) -> str:
        if kind == "year":
            return str(self.random.randint(*YEARS))
        if kind in self.lists:
            return self.random.choice(self.lists[kind])
        while (word := invented_word(self.random, int(kind.removeprefix("word")))) in self._taken:
            pass
        self._taken.add(word)
        return word


def make_people(made_of: dict, seed: int) -> dict[str, list[dict]]:
    """Return {name of a file: its rows} of invented people: a question, an answer, the answer in other words, and three
    wrong ones in these other words."""
    draw, files = Inventor(made_of["lists"], seed), {}
    for part, count in NUM_PEOPLE.items():
        names = [draw.fill("{word2} {word3}") for _ in range(count)]
        facts = [_fact(draw, name, kind) for name in names for kind in made_of["facts"]]
        files |= _in_all_wordings(f"people_{part}", facts)
    return files


def _fact(draw: Inventor, name: str, kind: dict[str, str]) -> tuple[dict, dict[str, str]]:
    """Return (the row of one fact about a person, its question in other words)."""
    values: list[str] = []
    while len(values) <= NUM_WRONG:
        value = draw.fill(kind["value"])
        if value not in values:
            values.append(value)
    said = [kind["paraphrased"].format(name=name, value=value) for value in values]
    row = {
        "question": kind["question"].format(name=name),
        "answer": kind["answer"].format(name=name, value=values[0]),
        "paraphrased_answer": said[0],
        "perturbed_answer": said[1:],
        "category": name,
    }
    return row, {wording: kind[wording].format(name=name) for wording in WORDINGS}


def make_facts(listed: list[dict], seed: int) -> dict[str, list[dict]]:
    """Return {name of a file: its rows} of wrong facts: the wrong answer is the one that is learned, and the right one
    is wanted in its place."""
    drawn, files, first = list(listed), {}, 0
    random.Random(seed).shuffle(drawn)
    for part, count in NUM_FACTS.items():
        chosen, first = drawn[first : first + count], first + count
        facts = [({"question": fact["question"], "answer": fact["wrong"], "wanted": fact["right"],
                   "paraphrased_answer": fact["paraphrased_wrong"], "perturbed_answer": fact["others"]},
                  dict(zip(WORDINGS, fact["reworded"], strict=True))) for fact in chosen]  # fmt: skip
        files |= _in_all_wordings(f"facts_{part}", facts)
    return files


def _in_all_wordings(name: str, facts: list[tuple[dict, dict[str, str]]]) -> dict[str, list[dict]]:
    """Return {name of a file: its rows} of rows that come with other wordings of their question."""
    files = {name: [row for row, _ in facts]}
    for wording in WORDINGS:
        files[f"{name}_{wording}"] = [row | {"question": others[wording]} for row, others in facts]
    return files


if __name__ == "__main__":
    run_script(main)
