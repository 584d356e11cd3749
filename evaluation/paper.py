"""What the original says of the answers that a model gave: ground for the columns of Yao et al. 2023, section 4."""

from __future__ import annotations

import dataclasses

from data_module import Sequence
from engine.tree import AnswerLogitsModel
from evaluation.groups import Group
from evaluation.likelihood import nll_of_answers
from evaluation.metrics.memorisation import unique_token_share
from prompts.formatter import PromptFormatter


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnScores:
    """What the original says of a model's answer: tokens, their summed NLL (nats), share of different ones."""

    tokens: int
    nll: float
    diversity: float


def score_own(
    original: AnswerLogitsModel, formatter: PromptFormatter, groups: list[Group], answers: dict[str, list[list[str]]]
) -> dict[str, list[list[OwnScores | None]]]:
    """Return the original's scores of every model's answers, by label, an entry a row of every group; None for an empty
    answer. The end of turn is not scored. All answers to a prompt are read at once, so that they share its tokens."""
    sequences = []
    for of_model in answers.values():
        for group, texts in zip(groups, of_model, strict=True):
            for row, text in zip(group.rows, texts, strict=True):
                answer_ids = tuple(formatter.answer(text, group.style, complete=False)) if text else ()
                prompt_ids = tuple(formatter.prompt_of(row, group.style))
                sequences.append(Sequence("normal", len(sequences), prompt_ids, answer_ids))
    sums = nll_of_answers(original, sequences, formatter.tokenizer.pad_token_id)
    scored = iter([None if nll is None else OwnScores(
        tokens=len(sequence.answer_ids), nll=nll, diversity=unique_token_share(list(sequence.answer_ids)),
    ) for sequence, nll in zip(sequences, sums, strict=True)])  # fmt: skip
    return {label: [[next(scored) for _ in texts] for texts in of_model] for label, of_model in answers.items()}
