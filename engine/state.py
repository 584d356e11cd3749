"""The state of a run beside its weights and optimizer, as a checkpoint stores it."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass
class BestState:
    """The best evaluated state so far.

    `selection_key`: smaller is better. `metrics`: its evaluation, as logged. `weights`: fp32 master weights, or None.
    """

    step: int
    selection_key: tuple[float, ...]
    metrics: dict
    weights: list[torch.Tensor] | None = None


@dataclasses.dataclass
class TrainingState:
    """The progress of a run.

    `step`: completed steps, skipped ones included. `skipped`: latest steps in a row with a loss or gradient that was
    not finite. `rollbacks`, `seconds`, `tokens`: so far. `first_evaluation`, `last_evaluation`: as logged.
    `multipliers`: of the weights of terms with a budget (method/terms.py). `first`, `runs`, `summed`: the fp32
    master weights that short runs begin with, the runs that have ended, and the sum of their weights (run/averaged.py).
    `adversary`, `adversary_turns`: its factors and moments, a tensor a trained parameter, and the steps of the run in
    which it has learned since it began anew (method/adversary.py).
    """

    step: int = 0
    best: BestState | None = None
    skipped: int = 0
    rollbacks: int = 0
    seconds: float = 0.0
    tokens: int = 0
    first_evaluation: dict | None = None
    last_evaluation: dict | None = None
    multipliers: dict[str, float] = dataclasses.field(default_factory=dict)
    first: list[torch.Tensor] | None = None
    runs: int = 0
    summed: list[torch.Tensor] | None = None
    adversary: list[torch.Tensor] | None = None
    adversary_turns: int = 0
