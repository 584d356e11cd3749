"""UNDO's noise: what the weights held is covered before the first step; what is left is what the steps teach again."""

from __future__ import annotations

import dataclasses
import math

import torch

from options import FRACTION, WEIGHT, option


@dataclasses.dataclass(frozen=True)
class NoiseSettings:
    """Before the first step, and after the original was asked, noise takes the place of a part of each matrix."""

    share: FRACTION = option(0.0, "part of each trained matrix that noise takes the place of (0: none)")
    scale: WEIGHT = option(0.1, "of the noise, in units of a new matrix's weights (Xavier's initialisation)")


def noised(weight: torch.Tensor, share: float, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Return (1 - share) w + share * scale * N of a matrix (O, I), fp32; N: normal, of deviation sqrt(2 / (O + I)).

    Source: UNDO, Lee et al. 2025 (arXiv 2506.06278), its step "noise".
    """
    deviation = math.sqrt(2 / sum(weight.shape))
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return weight * (1 - share) + noise * (share * scale * deviation)
