"""How unlikely text is that the model never saw: the level at which forgetting a text of its kind stops.

Text that is pushed further than that is as easily told from unseen text as text that is known.
"""

from __future__ import annotations

import dataclasses

import torch

from data_module import Sequence
from engine.token_values import NLL, TokenRequest
from engine.tree import AnswerLogitsModel
from method.terms import Term
from utils import UsageError, log

BATCH = 16  # passages


def refuse_levels(terms: list[Term], holdout_text: list[str]) -> None:
    """Raise UsageError if a term stops at the holdout's level and there is none, or there is one and no term does."""
    asking = _at_holdout(terms)
    if holdout_text and not asking:
        raise UsageError("--holdout_text: no term of this --method stops at its level (ceiling_of: holdout, without a "
                         "ceiling of its own); leave it out")  # fmt: skip
    if asking and not holdout_text:
        name = asking[0].name
        raise UsageError(f"{name}: stops where text is as unlikely as text of its kind that the model never saw: name "
                         f"some with --holdout_text, or set the level in nats: --set {name}.ceiling=4")  # fmt: skip


def _at_holdout(terms: list[Term]) -> list[Term]:
    """Return the terms whose ceiling is the holdout's level."""
    return [term for term in terms if term.objective.stops_at_holdout]


def with_levels(terms: list[Term], holdout: list[Sequence], answer_model: AnswerLogitsModel, layout) -> list[Term]:
    """Return the terms; those that stop at the holdout's level get its mean NLL, in nats a token, as their ceiling.

    holdout: passages that the model never saw; layout: sequences -> Batch.
    """
    asking = _at_holdout(terms)
    if not asking:
        return terms
    level = mean_nll(holdout, answer_model, layout)
    log.info("%s: stops at %.2f nats a token, the NLL of %d passages of --holdout_text", asking[0].name, level,
             len(holdout))  # fmt: skip
    return [
        dataclasses.replace(term, objective=dataclasses.replace(term.objective, ceiling=level)) if term in asking
        else term
        for term in terms
    ]  # fmt: skip


@torch.no_grad()
def mean_nll(sequences: list[Sequence], answer_model: AnswerLogitsModel, layout) -> float:
    """Return the mean over the sequences of the mean NLL of their tokens, in nats."""
    device, means = next(answer_model.parameters()).device, []
    for start in range(0, len(sequences), BATCH):
        batch = layout(sequences[start : start + BATCH]).to(device)
        (nll,) = answer_model(batch, [TokenRequest(NLL, batch.target_to_logit, batch.targets)])[1]  # (M,)
        lengths = torch.bincount(batch.sequence_ids, minlength=len(batch.sequences))  # (S,)
        sums = nll.new_zeros(len(lengths)).index_add(0, batch.sequence_ids, nll)
        means += (sums / lengths).tolist()
    return sum(means) / len(means)
