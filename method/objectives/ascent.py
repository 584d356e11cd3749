"""Gradient ascent, the published forget loss, with a level at which it ends."""

from __future__ import annotations

import dataclasses
from typing import Literal

from method import losses
from method.objective import ForgetObjective
from options import WEIGHT, option


@dataclasses.dataclass(frozen=True)
class Ascent(ForgetObjective):
    """Gradient ascent on the answer (Yao et al. 2023, eq. 2)."""

    ceiling: WEIGHT = option(0.0, "nats; an answer whose mean NLL is above it gives no gradient (0: no ceiling)")
    ceiling_of: Literal["number", "holdout"] = option(
        "number", "holdout: without a ceiling, it is the original's NLL of --holdout_text, text that it never saw"
    )
    back: bool = option(False, "pull an answer that is above the ceiling back to it")

    @property
    def stops_at_holdout(self) -> bool:
        return self.ceiling_of == "holdout" and not self.ceiling

    @property
    def is_linear(self) -> bool:
        return not self.ceiling and not self.stops_at_holdout

    def values(self, tokens):
        return losses.gradient_ascent(tokens.nll, tokens.sequence, tokens.count, self.ceiling, back=self.back)
