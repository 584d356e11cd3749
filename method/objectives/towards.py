"""Towards an answer, or towards what the original says."""

from __future__ import annotations

import dataclasses

from engine.token_values import KL
from method import losses
from method.objective import Objective


@dataclasses.dataclass(frozen=True)
class Nll(Objective):
    """Mean token NLL of each sequence (Yao et al. 2023, eq. 3). It falls as the continuation is learned."""

    length_normalised = True
    is_linear = True

    def values(self, tokens):
        return losses.sequence_mean(tokens.values, tokens.sequence, tokens.count)


@dataclasses.dataclass(frozen=True)
class Kl(Objective):
    """KL( original || model ) of each token (Yao et al. 2023, eq. 4). It is 0 for an unchanged model."""

    token_loss = KL
    measure = "kl"
    over = "tokens"
    is_linear = True
