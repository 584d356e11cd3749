"""Refusals taken out of the weights' reach: one direction of the hidden states is removed in every layer.

A model that only refuses still holds the answers. Its refusals hang on one direction, the difference between its mean
states at the end of harmful and of harmless prompts (Arditi et al. 2024, arXiv 2406.11717).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from data_module import make_sequence
from engine.adapters import decoder_layers
from engine.tree import AnswerLogitsModel
from evaluation.attacks.base import AttackResult, AttackTarget, one_answer_each
from evaluation.likelihood import score_answers
from sources.rows import Row
from utils import UsageError

DEEPEST = 0.8  # share of the layers among which the direction is sought; the last ones hold the next token
ROWS_TRIED = 8  # example answers whose NLL tells which direction to take


def ablate(target: AttackTarget) -> list[AttackResult]:
    """Remove the direction of refusal and ask again. It is found on example prompts, never on the attacked ones."""
    harmful, harmless = target.data.forget_train_rows, target.data.keep_rows
    if not harmful or not harmless:
        raise UsageError("there are no example prompts of both sides to tell harmful from harmless")
    _, direction = choose_direction(target, harmful, harmless)
    with without_direction(target.model, direction):
        return [one_answer_each("without the direction of refusal", target.answer(target.prompts()))]


def choose_direction(target: AttackTarget, harmful: list[Row], harmless: list[Row]) -> tuple[int, torch.Tensor]:
    """Return (layer, direction (D,) of unit length): of the layers tried, the one without whose direction the example
    answers of the harmful rows are likeliest."""
    means = [final_states(target.model, target.formatter, rows).mean(0) for rows in (harmful, harmless)]  # (L, D) each
    differences = means[0] - means[1]  # (L, D)
    norms = differences.norm(dim=-1)  # (L,)
    layers = [layer for layer in layers_to_try(len(norms), target.config.ablated_layers) if norms[layer] > 0]
    if not layers:
        raise UsageError("harmful and harmless prompts leave the same hidden states")
    directions = {layer: differences[layer] / norms[layer] for layer in layers}
    tried = [row for row in harmful if row.response][:ROWS_TRIED]
    if not tried:
        raise UsageError("no harmful example prompt has an answer, which shows what each direction does")
    nll = {layer: answer_nll(target, tried, direction) for layer, direction in directions.items()}
    best = min(layers, key=nll.__getitem__)
    return best, directions[best]


def layers_to_try(total: int, count: int) -> list[int]:
    """Return at most `count` layers, evenly spaced, without the first, at whose input all prompts end alike, and
    without the last fifth."""
    last = max(1, int(DEEPEST * total))
    layers = torch.linspace(1, last, min(count, last)).round().int().tolist()
    return [layer for layer in dict.fromkeys(layers) if layer < total]


@torch.no_grad()
def final_states(model, formatter, rows: list[Row]) -> torch.Tensor:
    """Return the hidden states at the last token of each prompt, at the input of every layer: (P, L, D), fp32."""
    _, layers = decoder_layers(model)
    device, states = next(model.parameters()).device, []
    kept: dict[int, torch.Tensor] = {}

    def keep(number: int):
        def hook(_, args, kwargs):
            kept[number] = _input(args, kwargs)[0, -1].float()  # (D,)

        return hook

    hooks = [layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for row in rows:
            ids = torch.tensor([formatter.prompt_of(row, ask=True)], device=device)  # (1, T)
            model(input_ids=ids, use_cache=False)
            states.append(torch.stack([kept[i] for i in range(len(layers))]))  # (L, D)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(states)


@contextlib.contextmanager
def without_direction(model, direction: torch.Tensor) -> Iterator[None]:
    """Inside the block, no layer sees or writes the direction (D,), of unit length: it is projected out of the input
    and output of every layer, and of what the parts of a layer add to it."""
    _, layers = decoder_layers(model)

    def project(state):
        if not isinstance(state, torch.Tensor) or state.shape[-1] != direction.shape[0]:
            return state  # such as the inside of an MLP, which is wider
        unit = direction.to(state.device)
        exact = state.float()  # (..., D)
        return (exact - (exact @ unit)[..., None] * unit).to(state.dtype)

    def before(_, args, kwargs):
        if args:
            return (project(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": project(kwargs["hidden_states"])}

    def after(_, __, output):
        return (project(output[0]), *output[1:]) if isinstance(output, tuple) else project(output)

    hooks = []
    try:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            parts = [part for part in layer.children() if "norm" not in type(part).__name__.lower()]
            hooks += [module.register_forward_hook(after) for module in (*parts, layer)]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def answer_nll(target: AttackTarget, rows: list[Row], direction: torch.Tensor) -> float:
    """Return the mean token NLL (nats) of the rows' responses without the direction, averaged over the rows."""
    sequences = [make_sequence("forget", i, row, target.formatter) for i, row in enumerate(rows)]
    answer_model = AnswerLogitsModel(target.model, packed=target.packed)
    with without_direction(target.model, direction):
        scores = score_answers(answer_model, sequences, target.formatter.tokenizer.pad_token_id)
    found = [score.nll for score in scores if score is not None]
    return sum(found) / len(found) if found else float("inf")


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    """Return the hidden states (B, T, D) that a layer was given."""
    return args[0] if args else kwargs["hidden_states"]
