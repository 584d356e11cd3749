"""Pruned weights: small ones set to zero, which may take away the little that unlearning added to each."""

from __future__ import annotations

import copy

import torch

from evaluation.attacks.base import AttackResult, AttackTarget, one_answer_each
from evaluation.attacks.weights import matrices


def prune(target: AttackTarget) -> list[AttackResult]:
    """Answer with a tenth, three tenths and half of every matrix set to zero."""
    return [one_answer_each(f"{share:.0%} of the weights pruned",
                            target.answer(target.prompts(), without_small_weights(target.model, share)))
            for share in target.config.pruned_shares]  # fmt: skip


@torch.no_grad()
def without_small_weights(model, share: float):
    """Return a copy in which `share` of every matrix is 0: its smallest weights (Han et al. 2015). Of weights that are
    equally small, which 16 bits make many, the first are taken. Embeddings and head stay."""
    model = copy.deepcopy(model)
    for _, matrix in matrices(model):
        count = int(share * matrix.shape[-2] * matrix.shape[-1])
        if not count:
            continue
        for part in matrix.reshape(-1, *matrix.shape[-2:]) if matrix.dim() == 3 else [matrix]:  # (out, in)
            part[smallest(part.abs(), count)] = 0
    return model


def smallest(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask, of the shape of `sizes`, of exactly `count` of the smallest numbers."""
    flat = sizes.flatten()
    bound = flat.float().kthvalue(count).values.to(flat.dtype)
    chosen = flat < bound
    equal = (flat == bound).nonzero()[: count - int(chosen.sum()), 0]
    chosen[equal] = True
    return chosen.view_as(sizes)
