"""What every judge is: (prompts, answers, references) in, a label and a score for each answer out."""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a judge says of one answer. `label`: one of the judge's labels. `score`: the number it was read from, None
    if there is none."""

    label: str
    score: float | None = None


class Judge(Protocol):
    """A judge of answers. It is loaded, and tried once, before any model is asked.

    labels: all that it can say; `given`: those that mean "the answer was given", which is bad on the forget side and
    good on the keep side; `uncounted`: those that say nothing of an answer, so that no rate counts them.
    limits: one sentence for the reader of a report, on what this judge cannot tell.
    """

    name: str  # as in report.json and in --judge
    kind: str  # "outcome", "reference", "classifier" or "guard"
    labels: tuple[str, ...]
    given: frozenset[str]
    uncounted: frozenset[str]
    limits: str

    def reads(self, language: str | None) -> bool:
        """Return whether this judge reads a language (ISO 639-1; None: one that could not be told)."""
        ...

    def judge(self, prompts: list[str], answers: list[str], references: list[str | None]) -> list[Judgement]:
        """Return what the judge says of each answer, in order. All three lists have the same length."""
        ...
