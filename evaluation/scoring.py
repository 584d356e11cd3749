"""What models say of answers that they are given: the scores of every row, and of any answer.

Nothing is generated here: every figure comes from a forward over known texts.
"""

from __future__ import annotations

import dataclasses
import math

from data_module import Sequence
from engine.tree import AnswerLogitsModel
from evaluation.groups import Group
from evaluation.likelihood import TokenScores, score_answers
from evaluation.metrics.membership import MUSE_SHARE, min_k, min_k_plus_plus, zlib_ratio
from evaluation.metrics.memorisation import exact_memorisation, extraction_strength
from evaluation.metrics.tofu import truth_ratio
from prompts.formatter import PromptFormatter
from prompts.windows import whole
from sources.rows import Row


# ------------------------------------------------------------------------------------ the scores of every row
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowScores:
    """What a model says of the answer that a row came with: plain numbers, as they stand in scores.jsonl.

    Without the token that ends the answer: `num_tokens`, `nll` (mean token NLL, nats), extraction_strength,
    exact_memorisation, and the membership scores, which are high for a member: min_k (of 20 % of the tokens), min_40
    (MUSE's 40 %), min_k_plus_plus, zlib; the membership score "loss" is minus `nll`.
    With that token, as TOFU computes them: `nll_with_end`, `probability` (its exp), `paraphrased_nll`, `perturbed_nll`
    (one a false answer) and `truth_ratio` (below 1 if the true answer is likelier; of a row without a paraphrase, its
    own answer stands for it); None or () where the row has no such answers. A passage of text has no end.
    """

    num_tokens: int
    nll: float
    nll_with_end: float
    probability: float
    extraction_strength: float
    exact_memorisation: float
    min_k: float
    min_40: float
    min_k_plus_plus: float
    zlib: float
    truth_ratio: float | None = None
    paraphrased_nll: float | None = None
    perturbed_nll: tuple[float, ...] = ()

    @classmethod
    def of(cls, given: list[TokenScores | None], num_tokens: int, text: str, has_paraphrase: bool) -> RowScores:
        """Return a row's scores. given: of its answer, with the end; of the paraphrase, if it has one; of the perturbed
        answers. num_tokens: of the answer, without the end. text: the answer's."""
        answer, others = given[0].first(num_tokens), [score.nll for score in given[1:] if score is not None]
        paraphrased, perturbed = (others[0], others[1:]) if has_paraphrase else (None, others)
        nll_with_end, true = given[0].nll, paraphrased if has_paraphrase else given[0].nll
        ratio = None
        if perturbed:
            ratio = float(truth_ratio(true, perturbed))
        return cls(
            num_tokens=num_tokens, nll=answer.nll, nll_with_end=nll_with_end, probability=math.exp(-nll_with_end),
            extraction_strength=extraction_strength(answer.predicted, answer.targets),
            exact_memorisation=exact_memorisation(answer.predicted, answer.targets),
            min_k=min_k(answer.log_probs), min_40=min_k(answer.log_probs, MUSE_SHARE),
            min_k_plus_plus=min_k_plus_plus(answer.log_probs, answer.means, answer.deviations),
            zlib=zlib_ratio(answer.log_probs, text), truth_ratio=ratio, paraphrased_nll=paraphrased,
            perturbed_nll=tuple(perturbed),
        )  # fmt: skip

    @classmethod
    def read(cls, fields: dict) -> RowScores | None:
        """Return the scores that stand in a dict, which may hold more than these; None if it has none."""
        if fields.get("nll") is None:
            return None
        own = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        return cls(**own | {"perturbed_nll": tuple(own.get("perturbed_nll", ()))})


def score_rows(
    answer_model: AnswerLogitsModel, formatter: PromptFormatter, groups: list[Group]
) -> list[list[RowScores | None]]:
    """Return a model's scores of every row of every group, in one pass; None for a row that came without an answer.

    The whole answer is scored, as far as the context holds it; of a passage the whole text, as it was trained on: after
    the start of a text or its own first token.
    """
    sequences: list[Sequence] = []
    rows = [[_add_row(whole(row), group.style, formatter, sequences) for row in group.rows] for group in groups]
    scored = score_answers(answer_model, sequences, formatter.tokenizer.pad_token_id)
    return [
        [None if row is None or scored[row.first] is None
         else RowScores.of(scored[row.first : row.last], row.num_tokens, row.text, row.has_paraphrase)
         for row in of_group]
        for of_group in rows
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _AddedRow:
    """Where the sequences of a row stand among all: [first, last)."""

    first: int
    last: int
    num_tokens: int
    text: str
    has_paraphrase: bool


def _add_row(row: Row, style: str, formatter: PromptFormatter, sequences: list[Sequence]) -> _AddedRow | None:
    """Append the sequences of a row: its answer, its paraphrase, its perturbed answers. None if it has no answer."""
    if not row.response:
        return None
    prompt, first = tuple(formatter.prompt_of(row, style)), len(sequences)
    room = formatter.max_prompt_tokens + formatter.longest_answer - len(prompt)
    if row.is_text:
        answers, num_tokens = [formatter.answer_of(row)], len(formatter.answer_of(row))
    else:
        texts = [text for text in (row.paraphrased, *row.perturbed) if text]
        answers = [formatter.answer(row.response, style, complete=row.complete, limit=room),
                   *(formatter.answer(text, style, limit=room) for text in texts)]  # fmt: skip
        num_tokens = len(formatter.answer(row.response, style, complete=False, limit=room))
    for ids in answers:
        sequences.append(Sequence("normal", len(sequences), prompt, tuple(ids)))
    return _AddedRow(first, len(sequences), num_tokens, row.response, bool(row.paraphrased))


def score_holdout(
    answer_model: AnswerLogitsModel, formatter: PromptFormatter, holdout: dict[str, list[Row]]
) -> list[RowScores | None]:
    """Return a model's scores of rows that no model ever saw, {source: rows}, one after another (`score_rows`)."""
    rows = [row for of_source in holdout.values() for row in of_source]
    return score_rows(answer_model, formatter, [Group("", "", "holdout", formatter.style, rows)])[0]
