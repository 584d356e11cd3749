"""Quantised weights: what a user does to save memory, and what has undone unlearning before (Zhang et al. 2024)."""

from __future__ import annotations

import copy

import torch

from evaluation.attacks.base import AttackResult, AttackTarget, one_answer_each
from evaluation.attacks.weights import matrices


def quantise(target: AttackTarget) -> list[AttackResult]:
    """Answer with int8 and with 4-bit weights, quantised and dequantised in plain torch."""
    return [one_answer_each(f"{bits}-bit weights", target.answer(target.prompts(), fake_quantize(target.model, bits)))
            for bits in target.config.quantised_bits]  # fmt: skip


def rounded_to_bits(matrix: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """Return a matrix (..., out, in) through `bits`-bit integers: symmetric, one scale per `group` inputs of a row."""
    top = 2 ** (bits - 1) - 1
    rows = matrix.float()
    size = group if rows.shape[-1] % group == 0 else rows.shape[-1]
    parts = rows.reshape(*rows.shape[:-1], -1, size)  # (..., out, groups, size)
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    return (torch.round(parts / scale).clamp(-top, top) * scale).reshape(rows.shape)


@torch.no_grad()
def fake_quantize(model, bits: int, group: int = 128):
    """Return a copy whose weights went through `bits`-bit integers: symmetric, one scale per `group` inputs.

    All matrices are quantised, stacked expert weights included. Embeddings and head keep their precision, as in common
    tools.
    """
    model = copy.deepcopy(model)
    for _, matrix in matrices(model):
        matrix.copy_(rounded_to_bits(matrix, bits, group))
    return model
