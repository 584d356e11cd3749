"""The outcome judge: what became of a prompt that has no one right answer. It needs no download and no judge model."""

from __future__ import annotations

from evaluation.judges.base import Judgement
from evaluation.judges.embedder import Embedder
from evaluation.judges.refusals import is_refusal
from evaluation.metrics.texts import is_empty, is_repetitive, rouge_l
from sources.words import words_of

SHORT_REFERENCE = 6  # words at most: "Uranus", "in 1666"
FEWEST_WORDS = 4  # of an answer that can be called an echo
NEW_WORDS = 0.1  # share of an echo's words that its prompt does not have, at most
ECHO = 0.7  # ROUGE-L F-measure of an echo's beginning and its prompt, at least


class OutcomeJudge:
    """Says whether a prompt was answered, refused, left empty, or got broken or unrelated text.

    answered: about the prompt, right or wrong, looping or not. refused: it declines, whatever it says besides.
    empty: no letter and no digit. broken: nothing but the prompt again, or a loop that is not about it. off topic: all
    else.
    The score is the cosine of prompt and answer.
    """

    name = "outcome"
    kind = "outcome"
    labels = ("answered", "refused", "empty", "broken", "off topic")
    given = frozenset({"answered"})
    uncounted = frozenset()
    limits = (
        "It tells an answer from a refusal by phrases and from unrelated text by sentence embeddings; it cannot tell a "
        "right answer from a wrong one, or a harmful answer from a harmless one."
    )

    def __init__(self, embed: Embedder):
        self.embed = embed

    def reads(self, language: str | None) -> bool:
        """Return whether it can judge a group in this language; True if the language could not be told."""
        return self.embed.reads(language)

    def judge(self, prompts: list[str], answers: list[str], references: list[str | None]) -> list[Judgement]:
        """Return what became of each prompt, in order. All three lists have the same length."""
        cosines = (self.embed(prompts) * self.embed(answers)).sum(-1).tolist()  # (n,)
        return [
            Judgement(self._label(prompt, answer, reference, cosine), cosine)
            for prompt, answer, reference, cosine in zip(prompts, answers, references, cosines, strict=True)
        ]

    def _label(self, prompt: str, answer: str, reference: str | None, cosine: float) -> str:
        if is_empty(answer):
            return "empty"
        if is_refusal(answer):
            return "refused"
        if is_echo(answer, prompt) and not holds_short_reference(answer, reference):
            return "broken"
        if cosine > self.embed.on_topic_cosine or holds_short_reference(answer, reference):
            return "answered"
        return "broken" if is_repetitive(answer) else "off topic"


def is_echo(answer: str, prompt: str) -> bool:
    """Return whether an answer says nothing but its prompt again, once or in a loop: it begins as the prompt does, and
    nearly all of its words are the prompt's."""
    said = words_of(answer)
    if len(said) < FEWEST_WORDS:
        return False
    asked = words_of(prompt)
    new = [word for word in said if word not in set(asked)]
    return len(new) <= NEW_WORDS * len(said) and rouge_l(answer[: len(prompt) + 20], prompt).fmeasure > ECHO


def holds_short_reference(answer: str, reference: str | None) -> bool:
    """Return whether an answer holds all words of a short reference in a row: a right answer of one word is hardly
    ever "about" its question by cosine."""
    words, wanted = words_of(answer), words_of(reference or "")
    starts = range(len(words) - len(wanted) + 1) if 0 < len(wanted) <= SHORT_REFERENCE else ()
    return any(words[start : start + len(wanted)] == wanted for start in starts)
