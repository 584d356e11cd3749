"""What a step minimises: the terms that the options ask for, of one batch's logits.

bad_weight * L_forget + random_weight * L_random + normal_weight * L_normal
"""

from __future__ import annotations

import torch

from data_module import Sequence
from engine.reference import ReferenceCache
from engine.token_values import fused_nll_and_kl
from engine.tree import Batch
from method.losses import (
    dpo,
    gradient_ascent,
    npo,
    random_mismatch,
    sequence_mean,
    sequence_sum,
    simnpo,
    token_nll,
    unlikelihood,
    weighted_sum,
)

# of which sequences a --forget_loss needs the original's states; the others: of the normal ones alone
ORIGINAL_OF = {"npo": ("normal", "forget"), "dpo": ("normal", "forget", "random")}


def sequences_needing_reference(sequences: list[Sequence], options) -> list[Sequence]:
    """Those of which the options' terms need the original's states."""
    kinds = ORIGINAL_OF.get(options.forget_loss, ("normal",))
    return [s for s in sequences if s.kind in kinds]


def compute_losses(
    batch: Batch, logits: torch.Tensor, reference: ReferenceCache, options, step_sequences: list[Sequence]
):
    """The three terms (the normal one in two parts) from one forward's logits (N, V).

    Each is {"loss": weighted, to be minimised; "mean": as logged, without a gradient}, divided by the
    counts of the whole step, so that micro-batches and processes add up to exactly its mean.
    """
    count = len(batch.sequences)  # S
    tokens = {kind: sum(len(s.answer_ids) for s in step_sequences if s.kind == kind) for kind in ("forget", "normal")}
    sequences = {kind: sum(s.kind == kind for s in step_sequences) for kind in ("forget", "random", "normal")}
    forget, random, normal = (batch.tokens_of(kind) for kind in ("forget", "random", "normal"))  # (M,) bool each
    original = reference.logits([s for s in batch.sequences if s.kind == "normal"])  # (Q, V), Q normal tokens
    nll, kl = fused_nll_and_kl(
        logits, batch.target_to_logit, batch.targets, batch.target_to_logit[normal], original
    )  # (M,), (Q,)
    first_kl = kl[batch.is_first_token[normal]]  # one a normal row

    forgetting = forget_term(batch, nll, reference, options)  # (S,)
    mismatch = random_mismatch(nll[random], batch.sequence_ids[random], count)  # (S,)

    def term(values, weight, denominator, logged):
        return {"loss": weighted_sum(values, weight, denominator),
                "mean": weighted_sum(logged.detach(), 1.0, denominator)}  # fmt: skip

    return (
        {
            "loss": weighted_sum(
                forgetting,
                options.bad_weight,
                tokens["forget"] if options.forget_loss == "ascent" else sequences["forget"],
            ),
            "mean": weighted_sum(nll[forget].detach(), 1.0, tokens["forget"]),
        },
        term(mismatch, options.random_weight, sequences["random"], mismatch),
        term(kl, options.normal_weight, tokens["normal"], kl),
        term(first_kl, options.normal_weight * options.first_token_weight, sequences["normal"], first_kl),
    )


def forget_term(batch: Batch, nll: torch.Tensor, reference: ReferenceCache, options) -> torch.Tensor:
    """`--forget_loss` of every sequence, (S,); 0 for one that is not to be forgotten. nll (M,)."""
    count, chosen = len(batch.sequences), batch.tokens_of("forget")
    owner = batch.sequence_ids[chosen]
    if options.forget_loss == "ascent":
        return gradient_ascent(nll[chosen], owner, count, options.forget_ceiling)
    if options.forget_loss == "unlikelihood":
        values = unlikelihood(nll[chosen], owner, count)
    elif options.forget_loss == "simnpo":
        values = simnpo(nll[chosen], owner, count, *options.beta())
    elif options.forget_loss == "npo":
        values = npo(nll[chosen], original_nll(batch, "forget", reference), owner, count, *options.beta())
    else:  # dpo: the random answers of the same row are the preferred ones, on average
        random = batch.tokens_of("random")
        rejected = sequence_sum(nll[chosen] - original_nll(batch, "forget", reference), owner, count)
        gained = sequence_sum(nll[random] - original_nll(batch, "random", reference), batch.sequence_ids[random], count)
        group = batch.sequence_ids.new_tensor([s.group for s in batch.sequences])
        isin = batch.sequence_ids.new_tensor([s.kind == "random" for s in batch.sequences]).bool()
        by_group = sequence_mean(gained[isin], group[isin], int(group.max()) + 1)
        values = dpo(by_group[group], rejected, *options.beta())
    is_forget = values.new_tensor([s.kind == "forget" for s in batch.sequences])
    return values * is_forget


def original_nll(batch: Batch, kind: str, reference: ReferenceCache) -> torch.Tensor:
    """The original's NLL of the answer tokens of one kind, in the batch's order."""
    logits = reference.logits([s for s in batch.sequences if s.kind == kind])
    return token_nll(logits, torch.arange(len(logits), device=logits.device), batch.targets[batch.tokens_of(kind)])
