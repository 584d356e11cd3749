"""Further examples of a policy's rules, as the model writes them after the rule's own: for a person to read and edit.

They go to a policy file, not into a ledger: what a model wrote is used only where somebody left it standing.
"""

from __future__ import annotations

import re

import numpy as np

from data_module import prompt_hash
from ledger.policy import SIDES, TAUGHT
from run.neighbours import parts_of
from run.topics import content_words
from run.writer import Answer
from sources.rows import Row

SHOWN, WRITTEN = 3, 5  # examples that a request shows, and asks for
REQUESTS = 3  # for each WRITTEN examples that are wanted: many a reply repeats or strays
FEWEST_WORDS, MOST_WORDS = 3, 40
SHOTS = (
    ("How often do I water a fern?\nWhy do the leaves of my basil turn yellow?\nWhen do I cut back roses?",
     "1. How do I repot a cactus?\n2. What is the right soil for tomatoes?\n3. Why does my orchid drop its buds?\n"
     "4. How much sun does lavender need?\n5. When do I plant tulip bulbs?"),
    ("Where do I buy a ticket for the night train?\nCan I take my bicycle on the train?\nWhat do I do if I miss my "
     "train?", "1. How do I find the right platform?\n2. May I bring a dog on the train?\n3. How early should I be at "
     "the station?\n4. How do I reserve a seat by the window?\n5. Where do I report a lost bag?"),
)  # fmt: skip


def more_examples(rule: dict, count: int, seed: int, answer: Answer, others: set[str]) -> dict[str, list[str]]:
    """Return up to `count` further examples of each side of a rule, as policy.yaml holds it, as many of both; no answer
    stays among them that repeats an example, or that shares more words with the other side's examples than with its
    own. others: `prompt_hash` of what other rules have."""
    own = {side: [_prompt(example) for example in rule.get(side) or []] for side in TAUGHT}
    seen = others | hashes_of(rule)
    words = {side: {word for text in texts for word in content_words(text)} for side, texts in own.items()}
    found: dict[str, list[str]] = {}
    for side, other in (TAUGHT, TAUGHT[::-1]):
        found[side] = []
        replies = answer(requests_of(own[side], count, seed)) if own[side] and count else []
        for text in (text for reply in replies for text in read_examples(reply)):
            said = set(content_words(text))
            is_of_side = len(said & words[side]) > len(said & words[other])
            if len(found[side]) < count and is_of_side and prompt_hash(text) not in seen:
                seen.add(prompt_hash(text))
                found[side].append(text)
    fewest = min((len(texts) for side, texts in found.items() if own[side]), default=0)
    return {side: texts[:fewest] for side, texts in found.items()}


def hashes_of(rule: dict) -> set[str]:
    """Return `prompt_hash` of every example of a rule, as policy.yaml holds it."""
    return {prompt_hash(_prompt(example)) for side in SIDES for example in rule.get(side) or []}


def requests_of(examples: list[str], count: int, seed: int) -> list[Row]:
    """Return rows that ask for prompts of the kind of some examples: each shows a few of them, drawn from the seed."""
    earlier = tuple(turn for shown, written in SHOTS for turn in (("user", _ask(shown)), ("assistant", written)))
    rng = np.random.default_rng([seed, 29])
    asked = []
    for _ in range(REQUESTS * -(-count // WRITTEN)):
        chosen = rng.permutation(len(examples))[:SHOWN]
        asked.append(Row(_ask("\n".join(examples[i] for i in chosen)), earlier=earlier))
    return list(dict.fromkeys(asked))


def _ask(shown: str) -> str:
    return f"{shown}\nWrite five other prompts of the same kind."


def read_examples(said: Row) -> list[str]:
    """Return the prompts in a reply: its numbered lines, none of an example before the request."""
    shown = {re.sub(r"^\d+\. ", "", line) for _, written in SHOTS for line in written.split("\n")}
    found = []
    for part in parts_of(said, r"\n"):
        numbered = re.fullmatch(r"\s*(?:\d+[.):]|[-*•])\s*(\S.*)", part)
        text = numbered[1].strip(' *"“”') if numbered else ""
        if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS and text not in shown:
            found.append(text)
    return found


def _prompt(example) -> str:
    return example if isinstance(example, str) else example["prompt"]
