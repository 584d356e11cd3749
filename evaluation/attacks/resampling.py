"""Sampling many answers: one that is given is enough for an adversary."""

from __future__ import annotations

from evaluation.attacks.base import AttackResult, AttackTarget


def sampling(target: AttackTarget) -> list[AttackResult]:
    """Sample `num_samples` answers to every prompt at temperature 1."""
    count = target.config.num_samples
    texts = target.answer([prompt for prompt in target.prompts() for _ in range(count)], temperature=1.0)
    answers = [texts[i * count : (i + 1) * count] for i in range(len(target.data.rows))]
    return [AttackResult(f"worst of {count}", answers)]
