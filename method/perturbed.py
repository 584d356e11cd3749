"""Changed weights at which a step takes the forget side's gradient, so that what is forgotten there stays forgotten."""

from __future__ import annotations

import dataclasses

import torch

from engine.optimizer import global_norm
from options import COUNT, POSITIVE, WEIGHT, option


@dataclasses.dataclass(frozen=True)
class PerturbedSettings:
    """What is done to the weights before the gradient of the forget side's terms; that of the others is taken as usual.

    radius: sharpness-aware minimisation of the forget loss (Fan et al. 2025, arXiv 2502.05374): a move towards
    knowing the forget set again. bits: a straight-through forward at rounded weights (arXiv 2605.02196).
    """

    radius: WEIGHT = option(0.0, "length of a move of all weights towards a higher forget loss (0: none)")
    bits: COUNT = option(0, "bits that the layers' matrices are rounded to (0: not)")
    every: POSITIVE = option(1, "one step in so many, from the first on")

    def at(self, step: int) -> bool:
        """Return whether a step takes the forget side's gradient at changed weights."""
        return (self.radius > 0 or self.bits > 0) and step % self.every == 0


def towards_worse(
    weights: list[torch.Tensor], gradients: list[torch.Tensor | None], radius: float
) -> list[torch.Tensor]:
    """Return the weights moved by `radius` along the gradient of a loss, all together: w + radius * g / |g|.

    A weight without a gradient stays; so do all where the gradient is 0 or not finite.
    """
    norm = global_norm([gradient for gradient in gradients if gradient is not None])
    if not 0 < norm < float("inf"):
        return weights
    return [
        w if g is None else w.add(g.to(w.dtype), alpha=radius / norm) for w, g in zip(weights, gradients, strict=True)
    ]
