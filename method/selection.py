"""RepSelect's filter: what a forget gradient shares with many rows is damped, so that what is left is narrow."""

from __future__ import annotations

import dataclasses

import torch

from options import COUNT, POSITIVE, WEIGHT, number, option

SVD_ROUNDS = 2  # of the randomised decomposition


@dataclasses.dataclass(frozen=True)
class SelectionSettings:
    """Before the first step: the damped forget gradient is subtracted until the normal rows' KL reaches a budget."""

    kl_budget: WEIGHT = option(0.0, "nats; KL to the original on normal rows at which it ends (0: not at all)")
    directions: POSITIVE = option(300, "largest singular directions of a weight's gradient that are damped, a side")
    step: number(float, 0, above=True) = option(4e-4, "length of a step, as a fraction of the weights' norm")
    rows: POSITIVE = option(64, "forget rows whose gradient is taken, at most")
    adapter_rank: POSITIVE = option(8, "rank of the adapters that learn the forget rows first")
    adapter_lr: WEIGHT = option(0.05, "their learning rate (0: no adapters)")
    skip_layers: COUNT = option(0, "first layers that are left alone")


def damp_shared(gradient: torch.Tensor, directions: int) -> torch.Tensor:
    """Return a gradient (O, I) with its largest singular directions damped on both sides.

    The part along each of the `directions` largest is divided by its singular value over the smallest of these, so the
    smallest stays and what many rows share is taken down. What lies outside all of them stays as it is. Source:
    RepSelect (arXiv 2606.17168), the soft filter.
    """
    matrix = gradient.float()
    count = min(directions, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, q=count, niter=SVD_ROUNDS)  # (O, q), (q,), (I, q)
    kept = values[-1].clamp(min=torch.finfo(torch.float32).tiny) / values.clamp(min=torch.finfo(torch.float32).tiny)
    matrix = matrix - (matrix @ right * (1 - kept)) @ right.T
    return matrix - left @ ((1 - kept)[:, None] * (left.T @ matrix))
