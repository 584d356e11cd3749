"""How prompts beside the forget set are made from the model itself: what it is asked, and what of its words is kept.

A user lists what must go, and rarely what lies beside it. Two kinds of prompts lie there: the listed ones with another
thing of the same kind in the topic's place ("rye bread" for "sourdough"), and questions that the model itself asks
about such things. Each request is a row, so the model's words are sampled and cached as its own answers are.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re

import numpy as np

from data_module import prompt_hash
from run.topics import Term, content_words, topic_terms
from run.writer import Answer
from sources.paraphrase import other_form
from sources.rows import Row

MOST_REQUESTS = 24  # of each kind: more name few things that these do not
MOST_NAMES = 16  # things in a topic's place
PER_REQUEST = 5  # names or questions that a request asks for
LONGEST_NAME, LONGEST_QUESTION, SHORTEST_QUESTION = 3, 40, 3  # words
SAME_WORDS = 1 / 2  # of a prompt's telling words, in one listed prompt that no term names: more is the same matter

# Examples before each request, as earlier turns: a small model follows a pattern better than an instruction. Those of
# the list's own topic are left out.
NAME_SHOTS = (
    ("How long do the strings of a violin last?", "violin", "cello, guitar, harp, banjo, mandolin"),
    ("Why do goalkeepers in football wear gloves?", "football", "handball, water polo, lacrosse, hockey, futsal"),
    ("Where do penguins sleep?", "penguins", "seals, puffins, gulls, walruses, pelicans"),
)
QUESTION_SHOTS = (
    ("the cello", "How do I", "1. How do I tune a cello?\n2. How do I hold the bow of a cello?\n3. How do I choose my "
     "first cello?\n4. How do I clean a cello?\n5. How do I carry a cello on a train?"),
    ("penguins", "Why do", "1. Why do penguins stand in groups?\n2. Why do penguins lose their feathers?\n3. Why do "
     "penguins not freeze?\n4. Why do penguins slide on the ice?\n5. Why do penguins return to one place?"),
)  # fmt: skip
# What a list without a common topic is beside: questions of every day, in the forms of the listed prompts.
EVERYDAY = ("cooking", "gardens", "cats and dogs", "trains", "the weather", "school", "music", "football", "birds",
            "painting", "holidays", "clothes", "furniture", "books", "the sea", "computers")  # fmt: skip
OPENINGS = ("How do I", "What is")  # where no listed prompt gives one


@dataclasses.dataclass
class Made:
    """The prompts that were made, in their order, and what was not taken of `written` ones.

    `too_close`: to the forget set; `repeats`: of a forget row, a normal row or each other; `has_topic`: whether the
    list has a common topic, for which other things stand in.
    """

    prompts: list[str]
    written: int
    too_close: int
    repeats: int
    has_topic: bool

    def note(self, asked: int) -> str:
        """Return what became of them in words, without any of theirs."""
        way = (
            "the listed prompts with other things in their topic's place, and questions about these"
            if self.has_topic
            else "questions of every day that begin as the listed prompts do, since no word names a common topic"
        )
        return (f"made by the model: {way}; {len(self.prompts)} of {asked} asked for, from {self.written} written, "
                f"of which {self.too_close} were too close to the forget rows and {self.repeats} repeats")  # fmt: skip


def make_neighbours(prompts: list[str], others: list[str], count: int, seed: int, answer: Answer) -> Made:
    """Return up to `count` prompts beside the listed `prompts`; a pure function of its arguments.

    others: normal prompts, of which none is made again, and whose common words are no topic. answer: gives rows
    without a response the model's own.
    """
    terms = topic_terms(prompts, others)
    openings = openings_of(prompts) or list(OPENINGS)
    subjects, placed = list(EVERYDAY), []
    if terms:
        names = ask_names(prompts, terms, answer)
        subjects = list(itertools.chain(*itertools.zip_longest(*names.values())))
        subjects = [name for name in dict.fromkeys(subjects) if name]
        placed = put_names(spread([text for text in prompts if any(term.find(text) for term in terms)], count), names)
    questions = ask_questions(subjects, openings, count, answer)
    candidates = [text for pair in itertools.zip_longest(placed, questions) for text in pair if text]
    rng = np.random.default_rng([seed, 13])
    candidates += [other_form(text, rng) for text in candidates]  # where there are too few
    return take(candidates, prompts, others, terms, count)


# ------------------------------------------------------------------------------------------- names of other things
def ask_names(prompts: list[str], terms: list[Term], answer: Answer) -> dict[Term, list[str]]:
    """Return for each term the names of other things of its kind, those that the model names most often first."""
    requests = []
    for term in terms:
        of_term = [prompt for prompt in prompts if term.find(prompt)]
        requests += [
            (term, name_request(prompt, term.find(prompt), terms)) for prompt in spread(of_term, MOST_REQUESTS)
        ]
    counts: dict[Term, collections.Counter] = {term: collections.Counter() for term in terms}
    known = {word for prompt in prompts for word in content_words(prompt)}
    for (term, _), said in zip(requests, answer([row for _, row in requests]), strict=True):
        counts[term].update(read_names(said, known))
    return {term: [name for name, _ in counts[term].most_common(MOST_NAMES)] for term in terms}


def name_request(prompt: str, said: str, terms: list[Term]) -> Row:
    """Return the row that asks for other things that could stand where a prompt says `said`."""

    def ask(prompt: str, said: str) -> str:
        return f'"{prompt}"\nName five other things of the same kind as "{said}".'

    shots = [shot for shot in NAME_SHOTS if not any(holds(" ".join(shot), term) for term in terms)]
    earlier = tuple(turn for text, word, names in shots for turn in (("user", ask(text, word)), ("assistant", names)))
    return Row(ask(prompt, said), earlier=earlier)


def read_names(said: Row, known: set[str]) -> list[str]:
    """Return the names in a reply. Left out: what is no short name, what an example had, and a name that says nothing
    that the listed prompts do not say (`known`: stems of their words)."""
    shown = {name for _, _, names in NAME_SHOTS for name in names.split(", ")}
    names = []
    for part in parts_of(said, r"[,;\n]|\band\b|\d+[.)]"):
        name = re.sub(r"^(?:an?|the|other|some)\s+", "", part.strip(" .:*-\"'“”"), flags=re.I).strip()
        words = content_words(name)
        if (re.fullmatch(r"[^\W\d_]+(?:[ '’-][^\W\d_]+)*", name) and len(name.split()) <= LONGEST_NAME
                and set(words) - known and name.lower() not in shown):  # fmt: skip
            # a capital within the name is part of it, one at its beginning is that of a list
            names.append(name if any(map(str.isupper, name[1:])) else name.lower())
    return list(dict.fromkeys(names))


def put_names(prompts: list[str], names: dict[Term, list[str]]) -> list[str]:
    """Return the prompts that hold a term, with names in its place: first each prompt once, with another name each,
    then all with the next name, until every name has stood in every prompt."""
    placed = []
    for turn in range(max(map(len, names.values()), default=0)):
        for i, prompt in enumerate(prompts):
            text = prompt
            for term, others in names.items():
                if others and turn < len(others):
                    text = term.put(text, others[(i + turn) % len(others)])
            placed += [text] if text != prompt else []
    return placed


# ------------------------------------------------------------------------------------------- questions about them
def openings_of(prompts: list[str]) -> list[str]:
    """Return how the prompts begin: their words up to the first that tells what one is about, three at most, the most
    common beginning first. A prompt that begins with such a word gives none."""
    counts: collections.Counter[str] = collections.Counter()
    for prompt in prompts:
        opening = " ".join(itertools.takewhile(lambda word: not content_words(word), prompt.split()[:3]))
        counts.update([opening.rstrip(",:;")] if opening else [])
    return [opening for opening, _ in counts.most_common()]


def ask_questions(subjects: list[str], openings: list[str], count: int, answer: Answer) -> list[str]:
    """Return questions about the subjects that begin with the openings: the first of every reply, then the second."""
    if not subjects or not openings:
        return []
    number = min(MOST_REQUESTS, max(len(subjects), -(-count // PER_REQUEST)))
    requests = [question_request(subjects[i % len(subjects)], openings[(i + i // len(subjects)) % len(openings)])
                for i in range(number)]  # fmt: skip
    replies = [read_questions(said, openings) for said in answer(list(dict.fromkeys(requests)))]
    return [text for texts in itertools.zip_longest(*replies) for text in texts if text]


def question_request(subject: str, opening: str) -> Row:
    """Return the row that asks for questions about a subject."""

    def ask(subject: str, opening: str) -> str:
        return f'Write five short questions about {subject}. Begin each with "{opening}".'

    earlier = tuple(turn for about, first, questions in QUESTION_SHOTS
                    for turn in (("user", ask(about, first)), ("assistant", questions)))  # fmt: skip
    return Row(ask(subject, opening), earlier=earlier)


def read_questions(said: Row, openings: list[str]) -> list[str]:
    """Return the prompts in a reply: its lines that end as a question or begin as a listed prompt does."""
    shown = {re.sub(r"^\d+\. ", "", line) for _, _, text in QUESTION_SHOTS for line in text.split("\n")}
    starts = tuple(opening.lower() + " " for opening in openings)
    questions = []
    for part in parts_of(said, r"\n"):
        text = re.sub(r"^\s*(?:\d+[.):]|[-*•])?\s*", "", part).strip(' *"“”')
        is_prompt = text.endswith("?") or (text.lower().startswith(starts) and text[-1:] != ":")
        if is_prompt and SHORTEST_QUESTION <= len(text.split()) <= LONGEST_QUESTION and text not in shown:
            questions.append(text)
    return questions


# ---------------------------------------------------------------------------------------------------- what is kept
def take(candidates: list[str], prompts: list[str], others: list[str], terms: list[Term], count: int) -> Made:
    """Return the first `count` candidates that lie beside the listed prompts and repeat nothing."""
    seen = {prompt_hash(text) for text in (*prompts, *others)}
    listed = {prompt: set(content_words(prompt)) for prompt in prompts}
    known = set().union(*listed.values())
    unnamed = [words for prompt, words in listed.items() if not any(holds(prompt, term) for term in terms)]
    made = Made([], 0, 0, 0, bool(terms))
    for text in candidates:
        if len(made.prompts) == count:
            break
        made.written += 1
        words = set(content_words(text))
        # What says nothing that the list does not say is its topic in other words. Where a term names the topic, one
        # other word is enough: another thing stands there, and all else may be the same. Where none does, any word may
        # be the topic.
        if (any(holds(text, term) for term in terms) or words <= known
                or any(len(words & of_listed) > SAME_WORDS * len(words) for of_listed in unnamed)):  # fmt: skip
            made.too_close += 1
        elif (key := prompt_hash(text)) in seen:
            made.repeats += 1
        else:
            seen.add(key)
            made.prompts.append(text)
    return made


def holds(text: str, term: Term) -> bool:
    """Return whether a text names a topic."""
    return term.anchor in content_words(text)


def parts_of(said: Row, between: str) -> list[str]:
    """Return the parts of a reply, without the last one if the reply was cut off in it."""
    parts = re.split(between, said.response or "")
    return parts if said.complete else parts[:-1]


def spread(items: list, count: int) -> list:
    """Return at most `count` items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items
