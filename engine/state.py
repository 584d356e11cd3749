"""What a run is after a number of steps, beside its weights: exactly what a checkpoint holds of it."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass
class BestState:
    """The best evaluated state so far. `selection_key`: smaller is better; `weights`: fp32 masters, where they are
    kept; `metrics`: its evaluation, as logged."""

    step: int
    selection_key: tuple[float, ...]
    metrics: dict
    weights: list[torch.Tensor] | None = None


@dataclasses.dataclass
class TrainingState:
    """`step`: steps gone through; `skipped`: steps in a row that were not finite; `rollbacks`: so far; `seconds`,
    `tokens`: spent so far; `first_evaluation`, `last_evaluation`: as logged."""

    step: int = 0
    best: BestState | None = None
    skipped: int = 0
    rollbacks: int = 0
    seconds: float = 0.0
    tokens: int = 0
    first_evaluation: dict | None = None
    last_evaluation: dict | None = None
