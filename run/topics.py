"""The words that name what a list of prompts is about, and other words in their place. Words alone: no model."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from sources.words import words_of

# English words that say how something is asked, not what about. Other languages have none here: there, only the normal
# prompts tell which words are common.
FUNCTION_WORDS = frozenset(
    words_of("""
    a about above after again against all also although always am among an and another any anybody anyone
    anything are around as ask at away back be because been before begin begun behind being below best better
    between both but by call can cannot common could did different do does doing done down during each early
    easy either else enough even ever every everyone everything example explain far few find first for from get
    give go goes good got great had has have having he help her here him his how i if in instead into is it its
    just keep kind know last learn least less let like list little long lot made main make makes making many may
    me mean might mine more most much must my name need never new next no nobody none nor not nothing now of off
    often old on once one only or other others our out over own part people person please put quick quickly
    rather really right same say see set several shall she should show since small so some somebody someone
    something soon sort start still such suggest take tell than that the their them then there these they thing
    things think this those through time tip tips to too try two type under until up us use used useful uses
    using usually very want was way ways we well were what when where whether which while who whom whose why
    will with within without word work works would write yes yet you your describe detail detailed instructions
    step steps reason reasons important possible difference short long big ve re ll don doesn didn isn aren wasn
    won shouldn
    """)
)
COVER_SHARE = 1 / 8  # of the list: a word that names the topic of fewer prompts is one of many things in it
COVERED_SHARE = 1 / 2  # of the list: words that name the topic of fewer prompts together name no common one
COMMON_ELSEWHERE = 1 / 4  # a word at least this often in normal prompts as in the list belongs to no topic
PHRASE_SHARE = 3 / 4  # of a word's prompts: what stands beside it so often is part of its name
LONGEST_PHRASE = 3  # words


@dataclasses.dataclass(frozen=True)
class Term:
    """A word that names the topic of many prompts (`anchor`, a stem), and the `phrase` (stems) that it mostly stands
    in: of "chess opening", "chess" may be the anchor."""

    anchor: str
    phrase: tuple[str, ...]

    def find(self, prompt: str) -> str | None:
        """Return the words that name the topic in a prompt, as they stand there; None if it holds none."""
        match = self._pattern().search(prompt)
        return match and match["term"]

    def put(self, prompt: str, other: str) -> str:
        """Return a prompt with another thing in the topic's place, in the form that the place asks for: article,
        plural, and the capital at a beginning."""

        def placed(match: re.Match) -> str:
            said, article = match["term"], match["article"]
            shown = in_number_of(said, other)
            if article:
                vowel = "n" if shown[:1].lower() in "aeiou" else ""
                return f"{article[0]}{vowel}{match['gap']}{shown}"
            return shown[:1].upper() + shown[1:] if match.start() == 0 else shown

        return self._pattern().sub(placed, prompt)

    def _pattern(self) -> re.Pattern:
        phrase = r"[\s-]+".join(map(_forms, self.phrase))
        return re.compile(rf"(?<!\w)(?:(?P<article>an?)(?P<gap>\s+))?(?P<term>{phrase}|{_forms(self.anchor)})(?!\w)",
                          re.I)  # fmt: skip


def stem(word: str) -> str:
    """Return an English word in the singular, by its ending alone; a word of another language mostly as it is."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zzes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def in_number_of(said: str, other: str) -> str:
    """Return the name of another thing as plural or singular as `said` is, which stands in a prompt."""
    *before, last = other.split()
    single = stem(last.lower())
    was_plural, is_plural = stem(said.lower().split()[-1]) != said.lower().split()[-1], single != last.lower()
    if was_plural == is_plural:
        return other
    if was_plural:
        last = last[:-1] + "ies" if re.search(r"[^aeiou]y$", last) else last + plural_ending(last)
    else:
        last = last[:-3] + "y" if single.endswith("y") else last[: len(single)]
    return " ".join([*before, last])


def plural_ending(word: str) -> str:
    """Return what the plural of an English word adds to it."""
    return "es" if word.lower().endswith(("ch", "sh", "x", "s")) else "s"


def content_words(text: str) -> list[str]:
    """Return the stems of a text's words that say what it is about, in order."""
    return [stem(word) for word in words_of(text) if _tells(word)]


def topic_terms(prompts: list[str], others: list[str]) -> list[Term]:
    """Return the fewest words that together name the topic of most prompts, the most common first; none if there are no
    such words. others: prompts that stay, whose common words name no topic.

    A greedy cover: each word is the one that names the topic in most of the prompts that no earlier word names. So
    "bread" is no term of a list in which each prompt says "sourdough", and bread may stay.
    """
    words = [list(dict.fromkeys(content_words(prompt))) for prompt in prompts]
    counts = collections.Counter(word for of_prompt in words for word in of_prompt)
    elsewhere = collections.Counter(word for prompt in others for word in set(content_words(prompt)))
    telling = {word for word, count in counts.items() if not word.isdigit()
               and elsewhere[word] * len(prompts) < COMMON_ELSEWHERE * count * max(1, len(others))}  # fmt: skip
    fewest = min(len(prompts), max(2, math.ceil(COVER_SHARE * len(prompts))))
    left, terms = [set(of_prompt) & telling for of_prompt in words], []
    while left:
        new = collections.Counter(word for of_prompt in left for word in of_prompt)
        # of words as common: the rarest elsewhere, then the longest
        best = max(new, key=lambda word: (new[word], -elsewhere[word], len(word), word), default=None)
        if best is None or new[best] < fewest:
            break
        terms.append(Term(best, _phrase_of(best, prompts)))
        left = [of_prompt for of_prompt in left if best not in of_prompt]
    return terms if prompts and len(left) <= (1 - COVERED_SHARE) * len(prompts) else []


def _phrase_of(anchor: str, prompts: list[str]) -> tuple[str, ...]:
    """Return the words that a word mostly stands in, its own among them."""
    texts = [words_of(prompt) for prompt in prompts]
    texts = [text for text in texts if anchor in map(stem, text)]
    phrase = (anchor,)
    grown = True
    while grown and len(phrase) < LONGEST_PHRASE:
        grown = False
        for side in (-1, 1):
            beside = collections.Counter(word for text in texts for word in {_beside(text, phrase, side)} if word)
            word, count = beside.most_common(1)[0] if beside else ("", 0)
            if count >= PHRASE_SHARE * len(texts) and len(phrase) < LONGEST_PHRASE:
                phrase = (word, *phrase) if side < 0 else (*phrase, word)
                grown = True
    return phrase


def _beside(text: list[str], phrase: tuple[str, ...], side: int) -> str | None:
    """Return the stem before (-1) or after (1) a phrase's first place in a text; None if it tells nothing."""
    stems = list(map(stem, text))
    start = next((i for i in range(len(stems)) if tuple(stems[i : i + len(phrase)]) == phrase), None)
    place = -1 if start is None else start - 1 if side < 0 else start + len(phrase)
    return stems[place] if 0 <= place < len(text) and _tells(text[place]) else None


def _tells(word: str) -> bool:
    return word not in FUNCTION_WORDS and (len(word) > 1 or not word.isascii())


def _forms(word: str) -> str:
    """Return a pattern of a stem and its plurals."""
    return rf"{re.escape(word[:-1])}(?:y|ies)" if word.endswith("y") else rf"{re.escape(word)}(?:e?s)?"
