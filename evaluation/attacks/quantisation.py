"""Quantised weights: what a user does to save memory, and what has undone unlearning before (Zhang et al. 2024)."""

from __future__ import annotations

import copy

import torch
from transformers.pytorch_utils import Conv1D

from evaluation.attacks.base import AttackResult, AttackTarget, one_answer_each


def quantise(target: AttackTarget) -> list[AttackResult]:
    """Answer with int8 and with 4-bit weights, quantised and dequantised in plain torch."""
    return [one_answer_each(f"{bits}-bit weights", target.answer(target.prompts(), fake_quantize(target.model, bits)))
            for bits in (8, 4)]  # fmt: skip


@torch.no_grad()
def fake_quantize(model, bits: int, group: int = 128):
    """Return a copy whose weights went through `bits`-bit integers: symmetric, one scale per `group` inputs.

    All matrices are quantised, stacked expert weights included. Embeddings and head keep their precision, as in common
    tools.
    """
    model = copy.deepcopy(model)
    top = 2 ** (bits - 1) - 1
    unquantised = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    unquantised.add(id(model.get_output_embeddings().weight))
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if weight.dim() not in (2, 3) or id(weight) in unquantised:
                continue
            is_transposed = isinstance(module, Conv1D)  # GPT-2's: (in, out)
            rows = weight.float().mT if is_transposed else weight.float()  # (..., out, in)
            size = group if rows.shape[-1] % group == 0 else rows.shape[-1]
            parts = rows.reshape(*rows.shape[:-1], -1, size)  # (..., out, groups, size)
            scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
            rounded = (torch.round(parts / scale).clamp(-top, top) * scale).reshape(rows.shape)
            weight.copy_(rounded.mT if is_transposed else rounded)
    return model
