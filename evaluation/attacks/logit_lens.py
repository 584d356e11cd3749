"""Logit lens: how likely the forgotten answers still are after every layer."""

from __future__ import annotations

import numpy as np
import torch

from data_module import make_sequence
from engine.tree import finish_logits
from method.losses import token_nll
from prompts.formatter import PromptFormatter
from sources.rows import Row

FINAL_PARTS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f", "project_out")


@torch.no_grad()
def logit_lens_nll(model, formatter: PromptFormatter, rows: list[Row]) -> list[float]:
    """Return the mean token NLL (nats) of the rows' responses after the embeddings and after every layer.

    Each layer's states are read with the model's final norm and head. If a forgotten answer is as likely in the middle
    layers as before, it is still inside. Returns an empty list if the final norm of this kind of model is not known.
    """
    head, device = final_layers(model), next(model.parameters()).device
    if head is None:
        return []
    totals, num_tokens = None, 0
    for row in rows:
        sequence = make_sequence("forget", 0, row, formatter)
        prompt, answer = sequence.prompt_ids, sequence.answer_ids
        ids = torch.tensor([[*prompt, *answer]], device=device)  # (1, T)
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        targets, positions = ids[0, len(prompt) :], torch.arange(len(answer), device=device)  # (A,) each
        answer_span = slice(len(prompt) - 1, -1)  # where the answer's tokens are predicted
        nll = []
        for state in out.hidden_states[:-1]:  # Mamba adds its layers up in fp32
            logits = finish_logits(model.config, head(state[:, answer_span].to(model.dtype)))  # (1, A, V)
            nll.append(token_nll(logits[0], positions, targets).sum().item())
        # the last state is already normed: the model's own logits stand for it
        nll.append(token_nll(out.logits[0, answer_span], positions, targets).sum().item())
        totals = np.array(nll) if totals is None else totals + np.array(nll)
        num_tokens += len(answer)
    return (totals / max(num_tokens, 1)).tolist() if totals is not None else []


def final_layers(model) -> torch.nn.Module | None:
    """Return what turns a layer's states into logits: the final norm, the projection if there is one (OPT), the head.
    None if no norm is found."""
    for module in model.base_model.modules():
        parts = [part for name in FINAL_PARTS if (part := getattr(module, name, None)) is not None]
        if parts and (hasattr(module, "layers") or hasattr(module, "h")):
            return torch.nn.Sequential(*parts, model.get_output_embeddings())
    return None
