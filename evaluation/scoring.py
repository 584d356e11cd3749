"""What models say of answers that they are given: the paper's columns, memorisation and membership.

Nothing is generated here; every figure comes from a forward over texts that are known.
"""

from __future__ import annotations

import math

import numpy as np

from data_module import PromptFormatter, Sequence
from engine.tree import AnswerLogitsModel
from evaluation import metrics
from evaluation.judges import Classifier
from evaluation.likelihood import TokenScores, score_answers
from sources.rows import Row

MEMBERSHIP = ("loss", "min_k", "min_k_plus_plus", "zlib", "reference")


def scores_of(
    forward: AnswerLogitsModel, formatter: PromptFormatter, asked: list[tuple[str, str, str]]
) -> list[TokenScores | None]:
    """`TokenScores` of (prompt, style, answer) triples; None for an empty answer. The end of the turn is not scored."""
    sequences = [Sequence("normal", i, tuple(formatter.prompt(prompt, style)),
                          tuple(formatter.answer(answer, style, complete=False)) if answer else ())
                 for i, (prompt, style, answer) in enumerate(asked)]  # fmt: skip
    return score_answers(forward, sequences, formatter.tokenizer.pad_token_id)


# -------------------------------------------------------------------------------------- the paper's columns
def yao2023_metrics(
    groups, answers: dict[str, list[list[str]]], original: AnswerLogitsModel, formatter: PromptFormatter, options
) -> list[dict]:
    """One dict a group: harmful rate by judge, diversity, fluency and utility, before and after.

    Fluency is the perplexity of the answers under the original, after their prompts; utility a reward model's
    mean score or, without one, the original's mean log-probability of a token. Source: Yao et al. 2023, section 4.
    """
    judges = [Classifier(name, original.model.device, **options.trust()) for name in options.judge_model]
    rewards = (
        Classifier(options.reward_model, original.model.device, **options.trust()) if options.reward_model else None
    )
    columns: list[dict] = [{} for _ in groups]
    for label in ("before", "after"):
        asked = [(row.prompt, group.style, text) for group, texts in zip(groups, answers[label], strict=True)
                 for row, text in zip(group.rows, texts, strict=True)]  # fmt: skip
        scored = iter(scores_of(original, formatter, asked))
        for group, texts, column in zip(groups, answers[label], columns, strict=True):
            prompts = [row.prompt for row in group.rows]
            known = [s for s in (next(scored) for _ in texts) if s is not None]
            tokens = sum(len(s.targets) for s in known)
            nll = sum(-sum(s.log_probs) for s in known) / tokens if tokens else None
            column[label] = {
                "diversity": metrics.mean([metrics.unique_token_share(s.targets) for s in known]),
                "fluency": math.exp(nll) if tokens else None,
                "utility": metrics.mean(rewards.reward(prompts, texts) if rewards else [-s.nll for s in known]),
                "harmful": {judge.name: metrics.rate(judge.harmful(prompts, texts)) for judge in judges},
            }
    return columns


# ------------------------------------------------------------------------------ memorisation and membership
def score_forget_answers(
    forward: AnswerLogitsModel, formatter: PromptFormatter, groups
) -> dict[str, list[tuple[Row, TokenScores]]]:
    """By forget group: its rows that came with an answer, and what the model says of that answer."""
    asked = [(group, row) for group in groups if group.side == "forget" for row in group.rows if row.response]
    scored = scores_of(forward, formatter, [(row.prompt, group.style, row.response) for group, row in asked])
    found: dict[str, list] = {}
    for (group, row), score in zip(asked, scored, strict=True):
        if score is not None:
            found.setdefault(group.name, []).append((row, score))
    return found


def memorization_metrics(known: dict[str, dict]) -> dict:
    """{"groups": memorisation by group, before and after; "membership": AUC by source, model and score}.

    known: "before", "after" and, where there is one, "retrained" -> what `score_forget_answers` gave. Members are the
    "(trained)" group of a source, others its "(unseen)" one.
    """
    groups = []
    for name in known["after"]:
        entry = {"name": name, "n": len(known["after"][name])}
        for label in ("before", "after"):
            scores = [score for _, score in known[label][name]]
            entry[label] = {
                "nll": metrics.mean([s.nll for s in scores]),
                "extraction_strength": metrics.mean(
                    [metrics.extraction_strength(s.predicted, s.targets) for s in scores]
                ),
                "exact_memorisation": metrics.mean(
                    [metrics.exact_memorisation(s.predicted, s.targets) for s in scores]
                ),
            }
        groups.append(entry)
    membership = []
    for name in known["after"]:
        source, trained = name.removesuffix(" (unseen)"), name.replace(" (unseen)", " (trained)")
        if source == name or trained not in known["after"]:
            continue
        entry = {"source": source, "members": len(known["after"][trained]), "others": len(known["after"][name])}
        for label, by_group in known.items():
            before = {side: known["before"][side] for side in (trained, name)}
            entry[label] = {
                score: metrics.auc(*(member_scores(score, by_group[side], before[side]) for side in (trained, name)))
                for score in MEMBERSHIP if not (score == "reference" and label == "before")
            }  # fmt: skip
        if "retrained" in known:
            entry["privacy_leakage"] = {score: metrics.privacy_leakage(entry["after"][score], entry["retrained"][score])
                                        for score in MEMBERSHIP}  # fmt: skip
        membership.append(entry)
    return {"groups": groups, "membership": membership}


def member_scores(
    name: str, scored: list[tuple[Row, TokenScores]], before: list[tuple[Row, TokenScores]]
) -> list[float]:
    """One number a text, high for a member. `before`: the original's scores of the same texts, for "reference"."""
    if name == "loss":
        return [-s.nll for _, s in scored]
    if name == "min_k":
        return [metrics.min_k(s.log_probs) for _, s in scored]
    if name == "min_k_plus_plus":
        return [metrics.min_k_plus_plus(s.log_probs, s.means, s.deviations) for _, s in scored]
    if name == "zlib":
        return [metrics.zlib_ratio(s.log_probs, row.response) for row, s in scored]
    return list(np.subtract([-s.nll for _, s in scored], [-s.nll for _, s in before]))
