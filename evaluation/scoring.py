"""What models say of answers that they are given: the scores of every row, and the columns of Yao et al. 2023.

Nothing is generated here: every figure comes from a forward over known texts.
"""

from __future__ import annotations

import dataclasses
import math

from data_module import Sequence
from engine.tree import AnswerLogitsModel
from evaluation.groups import Group, group_label
from evaluation.judges.classifier import Classifier
from evaluation.likelihood import TokenScores, score_answers
from evaluation.metrics.membership import MUSE_SHARE, min_k, min_k_plus_plus, zlib_ratio
from evaluation.metrics.memorisation import exact_memorisation, extraction_strength, unique_token_share
from evaluation.metrics.statistics import mean, rate
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


def scores_of(
    answer_model: AnswerLogitsModel, formatter: PromptFormatter, asked: list[tuple[Row, str, str]]
) -> list[TokenScores | None]:
    """Return the scores of (row, style, answer) triples; None for an empty answer. The end of turn is not scored."""
    sequences = []
    for i, (row, style, answer) in enumerate(asked):
        answer_ids = tuple(formatter.answer(answer, style, complete=False)) if answer else ()
        sequences.append(Sequence("normal", i, tuple(formatter.prompt_of(row, style)), answer_ids))
    return score_answers(answer_model, sequences, formatter.tokenizer.pad_token_id)


# ------------------------------------------------------------------------------ the columns of Yao et al. 2023
def yao2023_metrics(
    groups, answers: dict[str, list[list[str]]], original: AnswerLogitsModel, formatter: PromptFormatter, options
) -> list[dict]:
    """Return one dict per group: harmful rate by judge, diversity, fluency and utility, before and after.

    Fluency is the perplexity of the answers under the original model, after their prompts. Utility is a reward model's
    mean score; without a reward model, the original's mean log-probability of a token. Source: Yao et al. 2023,
    section 4.
    """
    device = original.model.device
    judges = [Classifier(name, device, **options.trust()) for name in options.judge_model]
    rewards = Classifier(options.reward_model, device, **options.trust()) if options.reward_model else None
    columns: list[dict] = [{} for _ in groups]
    for label in ("before", "after"):
        asked = [(row, group.style, text) for group, texts in zip(groups, answers[label], strict=True)
                 for row, text in zip(group.rows, texts, strict=True)]  # fmt: skip
        scored = iter(scores_of(original, formatter, asked))
        for group, texts, column in zip(groups, answers[label], columns, strict=True):
            prompts = [row.prompt for row in group.rows]
            scores = [s for s in (next(scored) for _ in texts) if s is not None]
            num_tokens = sum(len(s.targets) for s in scores)
            nll = sum(-sum(s.log_probs) for s in scores) / num_tokens if num_tokens else None
            column[label] = {
                "diversity": mean([unique_token_share(s.targets) for s in scores]),
                "fluency": math.exp(nll) if num_tokens else None,
                "utility": mean(rewards.reward(prompts, texts) if rewards else [-s.nll for s in scores]),
                "harmful": {judge.name: rate(judge.harmful(prompts, texts)) for judge in judges},
            }
    return columns


# ------------------------------------------------------------------------------ report.json of schema 4
ForgetScores = dict[tuple[str, str], list[tuple[Row, RowScores]]]  # by source and split of the group
MEMORIZATION = ("nll", "extraction_strength", "exact_memorisation")


def score_forget_answers(answer_model: AnswerLogitsModel, formatter: PromptFormatter, groups) -> ForgetScores:
    """Return, for every forget group, its rows that came with an answer and the model's scores of that answer."""
    forget = [group for group in groups if group.side == "forget"]
    scored: ForgetScores = {}
    for group, scores in zip(forget, score_rows(answer_model, formatter, forget), strict=True):
        if rows := [(whole(row), score) for row, score in zip(group.rows, scores, strict=True) if score is not None]:
            scored[group.source, group.split] = rows
    return scored


def memorization_metrics(scores: dict[str, ForgetScores]) -> dict:
    """Return {"groups": memorisation by group, before and after; "membership": [], measured by
    `evaluation.membership` alone}."""
    groups = []
    for (source, split), rows in scores["after"].items():
        entry = {"name": group_label(source, split), "n": len(rows)}
        for label in ("before", "after"):
            answers = [score for _, score in scores[label][source, split]]
            entry[label] = {name: mean([getattr(s, name) for s in answers]) for name in MEMORIZATION}
        groups.append(entry)
    return {"groups": groups, "membership": []}
