"""What the original says of the answers that a model gave: ground for the columns of Yao et al. 2023, section 4."""

from __future__ import annotations

import dataclasses

from engine.tree import AnswerLogitsModel
from evaluation.groups import Group
from evaluation.metrics.memorisation import unique_token_share
from evaluation.scoring import scores_of
from prompts.formatter import PromptFormatter


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnScores:
    """What the original says of a model's answer: tokens, their summed NLL (nats), share of different ones."""

    tokens: int
    nll: float
    diversity: float


def score_own(
    original: AnswerLogitsModel, formatter: PromptFormatter, groups: list[Group], answers: list[list[str]]
) -> list[list[OwnScores | None]]:
    """Return the original's scores of one model's answers, an entry a row of every group; None for an empty answer."""
    asked = [(row, group.style, text) for group, texts in zip(groups, answers, strict=True)
             for row, text in zip(group.rows, texts, strict=True)]  # fmt: skip
    scored = iter(scores_of(original, formatter, asked))
    return [[None if (s := next(scored)) is None else
             OwnScores(tokens=len(s.targets), nll=-sum(s.log_probs), diversity=unique_token_share(s.targets))
             for _ in texts] for texts in answers]  # fmt: skip
