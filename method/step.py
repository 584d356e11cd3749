"""The gradients of one step, over this process's sequences, in one or more parts."""

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
    """Sums of a step over all processes: loss, each term's mean and weighted loss, processes told to stop, tokens."""

    loss: float
    means: dict[str, float]
    weighted: dict[str, float]
    signals: float
    tokens: float


def compute_gradients(
    step_sequences: list[Sequence], terms: list[Term], wrapped, layout, reference: ReferenceCache, accelerator, *,
    num_parts: int, sharded: bool, signalled: bool,
) -> StepStats:  # fmt: skip
    """Run forward and backward of this process's sequences, once a part; return the step's sums over all processes.

    `wrapped`: the model as several processes call it. `layout(sequences)` returns their batch on the device.
    `signalled`: this process was asked to stop; the sums tell all processes.
    """
    counts, layers = count_draws(step_sequences), layers_of(terms)
    parts = local_microbatches(step_sequences, num_parts, accelerator)
    sums = torch.zeros(3 + 2 * len(terms), device=accelerator.device)
    if not parts:  # a step without a sequence; whoever was asked to stop says so all the same
        sums[-2] = float(signalled)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        batch = layout(part.sequences)
        # a sharded model reduces gradients after each part: under no_sync() each GPU would hold the full gradient
        with contextlib.nullcontext() if last or sharded else accelerator.no_sync(wrapped):
            out = wrapped(batch, layers=layers)
            logits, states = out if layers else (out, {})  # (N, V), {layer: (N, D)}
            losses = compute_losses(terms, batch, logits, states, reference, counts)
            loss = sum(term.loss for term in losses)
            # processes average their gradients; part.counts is 0 for a part that another process counts
            accelerator.backward(loss * part.counts * accelerator.num_processes)
        counters = loss.new_tensor([float(last and signalled), batch.num_tokens * part.counts])
        scalars = [loss.detach(), *(t.mean for t in losses), *(t.loss.detach() for t in losses)]
        sums += torch.cat([torch.stack(scalars) * part.counts, counters])
        del batch, out, logits, states, losses, loss  # frees them before the next part's forward
    loss, *term_sums, signals, tokens = accelerator.reduce(sums, "sum").tolist()
    names = [term.name for term in terms]
    return StepStats(loss, dict(zip(names, term_sums[: len(names)], strict=True)),
                     dict(zip(names, term_sums[len(names) :], strict=True)), signals, tokens)  # fmt: skip
