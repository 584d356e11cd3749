"""The gradients of one step: its terms over this process's sequences, in parts where memory asks for it."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from data_module import Sequence
from engine.processes import local_microbatches
from engine.reference import ReferenceCache
from method.terms import Term, compute_losses, count_draws, layers_of


@dataclasses.dataclass
class StepStats:
    """What all processes together found at a step: the loss, each term's mean and weighted loss, signals, tokens."""

    loss: float
    means: dict[str, float]
    weighted: dict[str, float]
    signals: float
    tokens: float


def compute_gradients(
    step_sequences: list[Sequence], terms: list[Term], wrapped, layout, reference: ReferenceCache, accelerator, *,
    num_parts: int, sharded: bool, signalled: bool,
) -> StepStats:  # fmt: skip
    """One forward and backward of this process's sequences, or one a part where gradients are accumulated.

    `wrapped`: the model as several processes call it; `layout(sequences)` gives their batch on the device; `signalled`:
    this process was asked to stop, which all learn of here.
    """
    counts, layers = count_draws(step_sequences), layers_of(terms)
    parts = local_microbatches(step_sequences, num_parts, accelerator)
    sums = torch.zeros(3 + 2 * len(terms), device=accelerator.device)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        batch = layout(part.sequences)
        # split, gradients are reduced after each part: under no_sync each GPU would hold all of them
        with contextlib.nullcontext() if last or sharded else accelerator.no_sync(wrapped):
            out = wrapped(batch, layers=layers)
            logits, states = out if layers else (out, {})  # (N, V), {layer: (N, D)}
            losses = compute_losses(terms, batch, logits, states, reference, counts)
            loss = sum(term.loss for term in losses)
            # processes average their gradients; a part that does not count is another process's
            accelerator.backward(loss * part.counts * accelerator.num_processes)
        facts = loss.new_tensor([float(last and signalled), batch.num_tokens * part.counts])
        scalars = [loss.detach(), *(t.mean for t in losses), *(t.loss.detach() for t in losses)]
        sums += torch.cat([torch.stack(scalars) * part.counts, facts])
        del batch, out, logits, states, losses, loss  # the next part's come before these would go
    loss, *figures, signals, tokens = accelerator.reduce(sums, "sum").tolist()
    names = [term.name for term in terms]
    return StepStats(loss, dict(zip(names, figures[: len(names)], strict=True)),
                     dict(zip(names, figures[len(names) :], strict=True)), signals, tokens)  # fmt: skip
