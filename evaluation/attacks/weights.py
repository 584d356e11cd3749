"""The weights that attacks on weights change: every matrix of the layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.pytorch_utils import Conv1D


def matrices(model) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield (weight, view) of every matrix: the view is (..., out, in), whatever way round the weight is kept.

    The experts of a mixture, stacked in one tensor, are yielded together. Embeddings and head are left out, as common
    tools leave them.
    """
    left_out = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    left_out.add(id(model.get_output_embeddings().weight))
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if weight.dim() in (2, 3) and id(weight) not in left_out:
                yield weight, weight.mT if isinstance(module, Conv1D) else weight  # Conv1D: GPT-2's, (in, out)
