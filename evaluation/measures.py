"""The measures of answers: one line in MEASURES registers a measure for answers.jsonl, report.json and --require.

A measure is a function of one answer or of the two models' answers to one prompt. It returns a number, a flag, or None
if there is nothing to measure. The numbers of a group are aggregated into one figure with its interval.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from evaluation.metrics.statistics import Estimate, mean, rate
from evaluation.metrics.texts import is_empty, is_repetitive, leaks, length_ratio, on_topic, rouge_l
from sources.rows import Row


@dataclasses.dataclass(frozen=True)
class Answer:
    """One model's answer. `cosine`: of the sentence embeddings of answer and prompt."""

    row: Row
    text: str
    cosine: float

    @functools.cached_property
    def on_topic(self) -> bool:
        """Whether the answer is about its prompt."""
        return on_topic(self.cosine, self.text)


@dataclasses.dataclass(frozen=True)
class AnswerPair:
    """Both models' answers to one prompt. `similarity`: cosine of the answers' sentence embeddings."""

    before: Answer
    after: Answer
    similarity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """How a measure is taken, aggregated and where it is written.

    Give one of `of_answer` (figures stand under "before" and "after") and `of_pair`.
    aggregate: a group's values -> its figure, such as rate; None keeps the measure out of report.json.
    sides: on the other side every value is None.
    section: key of report.json that holds the figures of several answer measures; "": they stand in the group itself.
    in_lines: whether answers.jsonl holds the value, rounded to `decimals` if given.
    is_figure: whether `forget.NAME` and `keep.NAME` are figures of --require: the rate after, over all prompts.
    """

    name: str
    of_answer: Callable[[Answer], object] | None = None
    of_pair: Callable[[AnswerPair], object] | None = None
    aggregate: Callable[[list], Estimate] | None = rate
    sides: tuple[str, ...] = ("forget", "keep")
    section: str = ""
    in_lines: bool = False
    decimals: int | None = None
    is_figure: bool = False

    def values(self, side: str, pairs: list[AnswerPair]) -> dict[str, list]:
        """Return one value per prompt, by "before" and "after"; by "" if the measure is one of pairs."""
        if side not in self.sides:
            return {label: [None] * len(pairs) for label in (("before", "after") if self.of_answer else ("",))}
        if self.of_pair:
            return {"": [self.of_pair(pair) for pair in pairs]}
        return {"before": [self.of_answer(pair.before) for pair in pairs],
                "after": [self.of_answer(pair.after) for pair in pairs]}  # fmt: skip

    def figure(self, values: list) -> Estimate:
        """Return the figure of a group from its prompts' values."""
        return self.aggregate([value for value in values if value is not None])

    def line_value(self, value):
        """Return the value as it stands in answers.jsonl."""
        return value if self.decimals is None or value is None else round(value, self.decimals)


def _length_ratio(texts: list[tuple[str, str]]) -> Estimate:
    """Aggregate (answer after, answer before) pairs into the ratio of their words."""
    return length_ratio([after for after, _ in texts], [before for _, before in texts])


@functools.lru_cache(maxsize=1024)
def _rouge_l(answer: str, target: str):
    """Return `rouge_l`; cached, since two measures ask for the same pair."""
    return rouge_l(answer, target)


def _recall(answer: Answer) -> float | None:
    """Return the ROUGE-L recall of the row's own response."""
    return _rouge_l(answer.text, answer.row.response).recall if answer.row.response else None


def _verbatim(answer: Answer) -> float | None:
    """Return the ROUGE-L F-measure against the row's own response."""
    return _rouge_l(answer.text, answer.row.response).fmeasure if answer.row.response else None


MEASURES = (
    Measure(name="cosine", of_answer=lambda a: a.cosine, aggregate=None, in_lines=True, decimals=4),
    Measure(name="on_topic", of_answer=lambda a: a.on_topic, in_lines=True, is_figure=True),
    Measure(name="empty", of_answer=lambda a: is_empty(a.text), in_lines=True, is_figure=True),
    Measure(name="repetitive", of_answer=lambda a: is_repetitive(a.text), in_lines=True, is_figure=True),
    Measure(name="leak", of_answer=lambda a: leaks(a.text, a.row.response), sides=("forget",), in_lines=True),
    Measure(name="retained", of_pair=lambda p: p.after.on_topic if p.before.on_topic else None),
    Measure(name="on_topic_change", of_pair=lambda p: p.after.on_topic - p.before.on_topic, aggregate=mean),
    Measure(name="recall", of_answer=_recall, aggregate=mean, section="rouge_l"),
    Measure(name="verbatim", of_answer=_verbatim, aggregate=mean, section="rouge_l"),
    Measure(name="similarity", of_pair=lambda p: p.similarity, aggregate=mean, in_lines=True, decimals=4),
    Measure(name="length_ratio", of_pair=lambda p: (p.after.text, p.before.text), aggregate=_length_ratio),
)
FIGURE_NAMES = tuple(measure.name for measure in MEASURES if measure.is_figure)
