"""What models say of answers that they are given: the columns of Yao et al. 2023, memorisation and membership.

Nothing is generated here: every figure comes from a forward over known texts.
"""

from __future__ import annotations

import math

from data_module import Sequence
from engine.tree import AnswerLogitsModel
from evaluation.groups import TRAINED, UNSEEN, group_label
from evaluation.judges.classifier import Classifier
from evaluation.likelihood import TokenScores, score_answers
from evaluation.metrics.memorisation import (
    auc,
    exact_memorisation,
    extraction_strength,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
    unique_token_share,
    zlib_ratio,
)
from evaluation.metrics.statistics import mean, rate
from prompts.formatter import PromptFormatter
from prompts.windows import whole
from sources.rows import Row

ForgetScores = dict[tuple[str, str], list[tuple[Row, TokenScores]]]  # by source and split of the group


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


# ------------------------------------------------------------------------------ memorisation and membership
def score_forget_answers(answer_model: AnswerLogitsModel, formatter: PromptFormatter, groups) -> ForgetScores:
    """Return, for every forget group, its rows that came with an answer and the model's scores of that answer.

    Of a passage the whole text is scored, as it was trained on: after the start of a text or its own first token.
    """
    asked = [(group, whole(row)) for group in groups if group.side == "forget" for row in group.rows
             if row.response or row.is_text]  # fmt: skip
    sequences = []
    for i, (group, row) in enumerate(asked):
        answer_ids = formatter.answer_of(row) if row.is_text else formatter.answer(row.response, group.style,
                                                                                   complete=False)  # fmt: skip
        sequences.append(Sequence("normal", i, tuple(formatter.prompt_of(row, group.style)), tuple(answer_ids)))
    scored = score_answers(answer_model, sequences, formatter.tokenizer.pad_token_id)
    by_group: ForgetScores = {}
    for (group, row), score in zip(asked, scored, strict=True):
        if score is not None:
            by_group.setdefault((group.source, group.split), []).append((row, score))
    return by_group


MEMORIZATION = {  # report.json's name -> a number per answer
    "nll": lambda s: s.nll,
    "extraction_strength": lambda s: extraction_strength(s.predicted, s.targets),
    "exact_memorisation": lambda s: exact_memorisation(s.predicted, s.targets),
}
MEMBERSHIP = {  # report.json's name -> a number per answer, high for a member: (row, its score, the original's score)
    "loss": lambda row, s, original: -s.nll,
    "min_k": lambda row, s, original: min_k(s.log_probs),
    "min_k_plus_plus": lambda row, s, original: min_k_plus_plus(s.log_probs, s.means, s.deviations),
    "zlib": lambda row, s, original: zlib_ratio(s.log_probs, row.response),
    "reference": lambda row, s, original: original.nll - s.nll,
}


def memorization_metrics(scores: dict[str, ForgetScores]) -> dict:
    """Return {"groups": memorisation by group, before and after; "membership": AUC by source, model and score}.

    scores: "before", "after" and, if there is one, "retrained" -> what `score_forget_answers` gave. Members are the
    trained rows of a source, non-members its unseen rows.
    """
    groups = []
    for (source, split), rows in scores["after"].items():
        entry = {"name": group_label(source, split), "n": len(rows)}
        for label in ("before", "after"):
            answers = [score for _, score in scores[label][source, split]]
            entry[label] = {name: mean([measure(s) for s in answers]) for name, measure in MEMORIZATION.items()}
        groups.append(entry)
    both = [source for source, split in scores["after"] if split == UNSEEN and (source, TRAINED) in scores["after"]]
    return {"groups": groups, "membership": [membership_metrics(source, scores) for source in both]}


def membership_metrics(source: str, scores: dict[str, ForgetScores]) -> dict:
    """Return report.json's entry of one source: counts, AUC by model and score, privacy leakage if a model was
    retrained without the forget rows."""
    members, others = (source, TRAINED), (source, UNSEEN)
    entry = {"source": source, "members": len(scores["after"][members]), "others": len(scores["after"][others])}
    for label, by_group in scores.items():
        entry[label] = {
            name: auc(*(member_scores(name, by_group[key], scores["before"][key]) for key in (members, others)))
            for name in MEMBERSHIP if not (name == "reference" and label == "before")
        }  # fmt: skip
    if "retrained" in scores:
        entry["privacy_leakage"] = {name: privacy_leakage(entry["after"][name], entry["retrained"][name])
                                    for name in MEMBERSHIP}  # fmt: skip
    return entry


def member_scores(
    name: str, scored: list[tuple[Row, TokenScores]], original: list[tuple[Row, TokenScores]]
) -> list[float]:
    """Return one number per answer, high for a member. `original`: the original model's scores of the same answers."""
    return [MEMBERSHIP[name](row, s, before) for (row, s), (_, before) in zip(scored, original, strict=True)]
