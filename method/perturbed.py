"""The forget side's gradient: taken at changed weights, or shaped, so that what is forgotten stays so."""

from __future__ import annotations

import dataclasses

import torch

from engine.optimizer import global_norm
from options import COUNT, POSITIVE, WEIGHT, option


@dataclasses.dataclass(frozen=True)
class PerturbedSettings:
    """What is done for the gradient of the forget side's terms; that of the others is taken as usual.

    To the weights before it, in this order: adversary_steps: an adversary that has learned the forget rows again is
    laid over them (MUDMAN, Sondej et al. 2025, arXiv 2506.12484): meta-learning to the first order, the gradient is
    taken at the adversary and applied to the weights themselves; radius: sharpness-aware minimisation of the forget
    loss (Fan et al. 2025, arXiv 2502.05374), a move towards knowing the forget set again; bits: a straight-through
    forward at rounded weights (arXiv 2605.02196). To the gradient itself: agreeing and norm: MUDMAN's disruption
    masking and normalisation. The paper's adversary is a copy of the weights that takes plain steps; here it is
    low-rank factors under Adam, as the adversary who fine-tunes adapters is (evaluation/attacks/relearning.py).
    """

    radius: WEIGHT = option(0.0, "length of a move of all weights towards a higher forget loss (0: none)")
    bits: COUNT = option(0, "bits that the layers' matrices are rounded to (0: not)")
    agreeing: bool = option(False, "keep it where its sign is that of the other terms' gradient, elsewhere drop it")
    norm: WEIGHT = option(0.0, "length that what is left of it is brought to, over all weights (0: as it is)")
    every: POSITIVE = option(1, "one step in so many, from the first on")
    adversary_steps: COUNT = option(
        0, "steps in which an adversary learns the step's forget rows again before it is taken, each a forward and a "
        "backward of their answers (0: no adversary)"
    )  # fmt: skip
    adversary_lr: WEIGHT = option(1e-3, "the adversary's learning rate (Adam)")
    adversary_rank: POSITIVE = option(8, "rank of its factors, which lie over the layers' trained matrices")
    adversary_turns: POSITIVE = option(
        32, "steps of the run for which it learns, before it begins anew from the weights as they are"
    )

    def at(self, step: int) -> bool:
        """Return whether a step takes the forget side's gradient apart."""
        return (self.changes_weights or self.shapes_gradient) and step % self.every == 0

    @property
    def changes_weights(self) -> bool:
        """Whether it is taken at changed weights."""
        return self.radius > 0 or self.bits > 0 or self.adversary_steps > 0

    @property
    def shapes_gradient(self) -> bool:
        """Whether it is changed once it is there."""
        return self.agreeing or self.norm > 0


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


def shaped(
    forget: list[torch.Tensor | None], others: list[torch.Tensor | None], *, agreeing: bool, norm: float
) -> list[torch.Tensor | None]:
    """Return the forget side's gradient, a tensor a weight, as it is added to that of the other terms.

    agreeing: 0 where its sign is not that of the others' gradient, so that a step takes nothing away that they hold to.
    norm: length that all of it is then brought to (0: as it is).
    """
    if agreeing:
        forget = [
            None if f is None or o is None else f * (f.sign() == o.sign()) for f, o in zip(forget, others, strict=True)
        ]
    length = global_norm([gradient for gradient in forget if gradient is not None]) if norm else 0.0
    if not 0 < length < float("inf"):
        return forget
    return [None if gradient is None else gradient * (norm / length) for gradient in forget]
