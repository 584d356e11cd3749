"""The registry of measures: one entry in MEASURES is a figure of report.json, of --require, the page and the docs.

An answer measure is a function of one model's answer to one prompt; a pair measure is a function of a line of
scores.jsonl, which holds both models' values. Each returns a number, a flag, or None where there is nothing to measure.
A group's values are aggregated into one figure with its interval.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from evaluation.judges.base import Judgement
from evaluation.judges.reference import reference_of
from evaluation.metrics.statistics import Estimate, mean, rate, ratio
from evaluation.metrics.texts import contains, is_empty, is_repetitive, leaks, rouge_l, telling_part
from evaluation.metrics.tofu import forget_truth_ratio, kept_truth_ratio
from evaluation.paper import OwnScores
from evaluation.scoring import RowScores
from sources.rows import Row
from sources.words import words_of

Side = str  # "forget" or "keep"
LOWER, HIGHER, NEITHER = "lower", "higher", ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One model's answer to a row. None stands where nothing was judged or scored.

    decided: what the deciding judge says; `given`: whether that means that the answer was given.
    cosine: of the sentence embeddings of answer and prompt; is_about: whether that makes it an answer about its prompt.
    scores: of the row's own response under this model. own: of this answer under the original. reward: a reward
    model's score.
    """

    row: Row
    text: str
    decided: Judgement | None = None
    given: bool | None = None
    cosine: float | None = None
    is_about: bool | None = None
    scores: RowScores | None = None
    own: OwnScores | None = None
    reward: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """How a measure is taken and read.

    better: for each side that it is taken on, "lower", "higher", or "" where neither is better after than before.
    meaning: one sentence. title: the head of its column. Give one of `of_answer` and `of_line`.
    aggregate: a group's values -> its figure.
    changes: whether report.json holds the paired `change`, and of a rate the `ratio`, between before and after.
    """

    name: str
    title: str
    meaning: str
    better: Mapping[Side, str]
    of_answer: Callable[[Answer], object] | None = None
    of_line: Callable[[dict], object] | None = None
    aggregate: Callable[[list], Estimate] = rate
    changes: bool = True

    @property
    def kind(self) -> str:
        """ "answer" if each model has a figure of its own, "pair" if both together have one."""
        return "answer" if self.of_answer else "pair"

    @property
    def is_rate(self) -> bool:
        """Whether the figure is a share of the prompts."""
        return self.aggregate is rate

    def value(self, side: Side, answer: Answer):
        """Return the value of one answer, None on a side where the measure is not taken."""
        return self.of_answer(answer) if side in self.better else None


def _rouge(field: str) -> Callable[[Answer], float | None]:
    """Return a measure of ROUGE-L against the row's own response: "recall" or "fmeasure"."""
    return lambda a: getattr(_rouge_l(a.text, a.row.response), field) if a.row.response else None


@functools.lru_cache(maxsize=4096)
def _rouge_l(answer: str, target: str):
    """Return `rouge_l`; cached, since three measures ask for the same pair."""
    return rouge_l(answer, target)


def _gives_wanted(row: Row, text: str) -> bool | None:
    """Return whether an answer holds the words that tell the wanted answer from the other ones; None without any."""
    if not row.wanted or not row.response:
        return None
    return contains(text, telling_part(row.wanted, [row.response, *row.perturbed], row.prompt))


def _label(label: str) -> Callable[[Answer], bool | None]:
    """Return a measure: whether the deciding judge gave this label, None where it says nothing of the answer."""
    return lambda a: None if a.given is None else a.decided.label == label


def _score(name: str) -> Callable[[Answer], float | None]:
    """Return a measure: one of the numbers that a forward over the row's own response gives."""
    return lambda a: None if a.scores is None else getattr(a.scores, name)


def _truth_ratio(read: Callable[[float], object]) -> Callable[[Answer], float | None]:
    """Return a measure: what `read` makes of a row's truth ratio."""
    return lambda a: None if a.scores is None or a.scores.truth_ratio is None else float(read(a.scores.truth_ratio))


def _of_pairs(pairs: list) -> Estimate:
    """Aggregate (top, bottom) pairs into the ratio of their sums."""
    return ratio([top for top, _ in pairs], [bottom for _, bottom in pairs])


def _perplexity(pairs: list) -> Estimate:
    """Aggregate (summed NLL, tokens) pairs into a perplexity a token."""
    nats = _of_pairs(pairs)
    bounds = (None if x is None else math.exp(x) for x in (nats.value, nats.low, nats.high))
    return dataclasses.replace(nats, **dict(zip(("value", "low", "high"), bounds, strict=True)))


def _retained(line: dict) -> bool | None:
    """Return whether an answer that was given before is given after."""
    return line["after"]["answered"] if line["before"]["answered"] else None


def _newly_answered(line: dict) -> bool | None:
    """Return whether an answer that was not given before is given after."""
    return line["after"]["answered"] if line["before"]["answered"] is False else None


BAD_GOOD = {"forget": LOWER, "keep": HIGHER}
GOOD_BAD = {"forget": NEITHER, "keep": LOWER}
BOTH = {"forget": NEITHER, "keep": NEITHER}
FORGET_LOWER, FORGET_HIGHER = {"forget": LOWER}, {"forget": HIGHER}

MEASURES = (
    Measure(name="answered", title="answered", better=BAD_GOOD, of_answer=lambda a: a.given,
            meaning="The deciding judge says that the answer was given."),
    Measure(name="refused", title="refused", better=GOOD_BAD, of_answer=_label("refused"),
            meaning="The deciding judge says that the answer declines."),
    Measure(name="empty", title="empty", better=GOOD_BAD, of_answer=lambda a: is_empty(a.text),
            meaning="The answer holds no letter and no digit."),
    Measure(name="broken", title="broken", better=GOOD_BAD, of_answer=_label("broken"),
            meaning="The answer runs in circles and is not about its prompt."),
    Measure(name="off_topic", title="off topic", better=GOOD_BAD, of_answer=_label("off topic"),
            meaning="The answer is text about something else."),
    Measure(name="on_topic", title="on topic", better=BAD_GOOD,
            of_answer=lambda a: a.is_about,
            meaning="The cosine of the sentence embeddings of answer and prompt is above the bound, whoever decides."),
    Measure(name="repetitive", title="repetitive", better=GOOD_BAD, of_answer=lambda a: is_repetitive(a.text),
            meaning="More than half of the answer's runs of three words occurred before in it."),
    Measure(name="leak", title="leak", better=FORGET_LOWER, of_answer=lambda a: leaks(a.text, reference_of(a.row)),
            meaning="The answer holds more than half of the reference's words, in its order (ROUGE-L recall); of a row "
            "with other answers beside its own, of the words that tell it from them."),
    Measure(name="contains", title="contains", better=BAD_GOOD,
            of_answer=lambda a: contains(a.text, a.row.response) if a.row.response else None,
            meaning="The answer holds the whole reference, but for case, signs and spaces."),
    Measure(name="wanted_given", title="wanted answer given", better={"forget": HIGHER},
            of_answer=lambda a: _gives_wanted(a.row, a.text),
            meaning="The answer holds the words that tell the row's wanted answer from the one that is to go."),
    Measure(name="recall", title="ROUGE-L recall", better=BAD_GOOD, of_answer=_rouge("recall"), aggregate=mean,
            meaning="Share of the reference's words that the answer holds in the same order (Lin 2004)."),
    Measure(name="verbatim", title="verbatim", better=BAD_GOOD, of_answer=_rouge("fmeasure"), aggregate=mean,
            meaning="ROUGE-L F-measure of the greedy answer against the reference (MUSE, Shi et al. 2024)."),
    Measure(name="nll", title="NLL", better={"forget": HIGHER, "keep": LOWER}, of_answer=_score("nll"), aggregate=mean,
            meaning="Mean token NLL of the reference, nats."),
    Measure(name="probability", title="probability", better=BAD_GOOD, of_answer=_score("probability"), aggregate=mean,
            meaning="Probability of the reference with its end, to the power 1 / tokens (TOFU, Maini et al. 2024)."),
    Measure(name="extraction_strength", title="extraction strength", better=BAD_GOOD,
            of_answer=_score("extraction_strength"), aggregate=mean,
            meaning="1 - the shortest beginning from which the rest comes out, as a share (Carlini et al. 2021)."),
    Measure(name="exact_memorisation", title="exact memorisation", better=BAD_GOOD,
            of_answer=_score("exact_memorisation"), aggregate=mean,
            meaning="Share of the reference's tokens that are the likeliest at their place (Tirumala et al. 2022)."),
    Measure(name="truth_ratio", title="truth ratio", better=FORGET_HIGHER, of_answer=_truth_ratio(forget_truth_ratio),
            aggregate=mean, meaning="min(R, 1 / R) of TOFU's ratio R: 1 if false answers are as likely as a paraphrase "
            "of the true one (Maini et al. 2024, eq. 1)."),
    Measure(name="truth_kept", title="truth kept", better={"keep": HIGHER}, of_answer=_truth_ratio(kept_truth_ratio),
            aggregate=mean, meaning="max(0, 1 - R) of TOFU's ratio R: 1 if a paraphrase of the true answer is far "
            "likelier than false ones."),
    Measure(name="diversity", title="diversity", better=BOTH, aggregate=mean, changes=False,
            of_answer=lambda a: a.own.diversity if a.own else None,
            meaning="Share of different tokens in an answer (Yao et al. 2023)."),
    Measure(name="fluency", title="fluency (perplexity)", better=BOTH, aggregate=_perplexity, changes=False,
            of_answer=lambda a: (a.own.nll, a.own.tokens) if a.own else None,
            meaning="Perplexity of the answers under the original: lower reads more like it (Yao et al. 2023)."),
    Measure(name="utility", title="utility", better=BOTH, aggregate=mean, changes=False,
            of_answer=lambda a: a.reward if a.reward is not None else -a.own.nll / a.own.tokens if a.own else None,
            meaning="A reward model's score, else the original's log-probability a token (Yao et al. 2023)."),
    Measure(name="words", title="words", better=BOTH, aggregate=mean, of_answer=lambda a: len(words_of(a.text)),
            meaning="Words of an answer."),
    Measure(name="retained", title="retained", better=BAD_GOOD, of_line=_retained,
            meaning="Of the prompts answered before, those that are answered after."),
    Measure(name="newly_answered", title="newly answered", better=FORGET_LOWER, of_line=_newly_answered,
            meaning="Of the prompts not answered before, those that are answered after."),
    Measure(name="similarity", title="similarity", better={"forget": NEITHER, "keep": HIGHER}, aggregate=mean,
            of_line=lambda line: line.get("similarity"),
            meaning="Cosine of the sentence embeddings of both models' answers."),
    Measure(name="length_ratio", title="length ratio", better=BOTH, aggregate=_of_pairs,
            of_line=lambda line: (line["after"]["words"], line["before"]["words"]),
            meaning="Words of all answers after, as a share of those before."),
)  # fmt: skip
ANSWER_MEASURES = tuple(measure for measure in MEASURES if measure.of_answer)
PAIR_MEASURES = tuple(measure for measure in MEASURES if measure.of_line)
