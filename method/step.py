"""The gradients of one step, over this process's sequences, in one or more parts.

What the host works out (`prepare_step`) needs no weights, so it can be done while the device runs the step before. The
device is then waited for once, when the sums are read.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from data_module import Sequence
from engine.compiled_layers import KnownGraphs
from engine.processes import copy_to, local_microbatches
from engine.reference import ReferenceCache
from method.term_tokens import BatchPlan
from method.terms import DrawCount, Term, compute_losses, count_draws, layers_of, plan_losses


@dataclasses.dataclass
class StepStats:
    """Sums of a step over all processes: loss, each term's mean and weighted loss, processes told to stop, tokens.

    grad_norm: the gradient's norm before clipping, if it was read with them.
    """

    loss: float
    means: dict[str, float]
    weighted: dict[str, float]
    signals: float
    tokens: float
    grad_norm: float | None = None


@dataclasses.dataclass
class PreparedPart:
    """One forward of a step, in main memory. If not `counts`, its sequences are another process's."""

    plan: BatchPlan
    counts: bool


@dataclasses.dataclass
class PreparedStep:
    """A step as the host prepares it: this process's parts, and the counts of the whole step.

    forget: the forget side's sequences, where their gradient is taken at other weights; the parts are then the others.
    relearned: what an adversary learns before that (method/adversary.py).
    """

    parts: list[PreparedPart]
    counts: dict[str, DrawCount]
    forget: PreparedStep | None = None
    relearned: PreparedStep | None = None


def prepare_step(
    step_sequences: list[Sequence], terms: list[Term], layout, reference: ReferenceCache, processes, *, num_parts: int
) -> PreparedStep:
    """Lay out this process's sequences of a step and plan their losses, all in main memory.

    step_sequences: those of all processes; `layout(sequences)` returns their Batch; processes: has num_processes and
    process_index.
    """
    counts = count_draws(step_sequences)
    parts = local_microbatches(step_sequences, num_parts, processes)
    planned = [
        PreparedPart(plan_losses(terms, layout(part.sequences), reference, counts), part.counts) for part in parts
    ]
    return PreparedStep(planned, counts)


class StepSums:
    """The sums of a step, on the device until they are read."""

    def __init__(self, sums: torch.Tensor, names: list[str]):
        self._sums, self._names = sums, names

    def __add__(self, other: StepSums) -> StepSums:
        """Return the sums of both, of the same terms."""
        assert self._names == other._names, (self._names, other._names)
        return StepSums(self._sums + other._sums, self._names)

    def read(self, norm: torch.Tensor | None = None) -> StepStats:
        """Wait for the device, once, and return the sums; norm: a scalar on the device that is read with them."""
        read = self._sums if norm is None else torch.cat([self._sums, norm.reshape(1)])
        *read, norm = read.tolist() + [None] * (norm is None)
        loss, *term_sums, signals, tokens = read
        names = self._names
        return StepStats(loss, dict(zip(names, term_sums[: len(names)], strict=True)),
                         dict(zip(names, term_sums[len(names) :], strict=True)), signals, tokens, norm)  # fmt: skip


def compute_gradients(
    prepared: PreparedStep, terms: list[Term], wrapped, accelerator, *, sharded: bool, signalled: bool,
    graphs: KnownGraphs | None = None, multipliers: dict[str, float] | None = None,
) -> StepSums:  # fmt: skip
    """Run forward and backward of this process's parts; return the step's sums over all processes.

    `wrapped`: the model as several processes call it. `signalled`: this process was asked to stop; the sums tell all
    processes. `graphs`: of the compiled layers, if they are. `multipliers`: of the weights of terms with a budget.
    """
    layers, parts = layers_of(terms), prepared.parts
    sums = torch.zeros(3 + 2 * len(terms), device=accelerator.device)
    if not parts:  # a step without a sequence; whoever was asked to stop says so all the same
        sums[-2] = float(signalled)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        plan = part.plan.to(accelerator.device)
        # a sharded model reduces gradients after each part: under no_sync() each GPU would hold the full gradient
        checks = graphs.of(plan.batch) if graphs else contextlib.nullcontext()
        with checks, contextlib.nullcontext() if last or sharded else accelerator.no_sync(wrapped):
            out = wrapped(plan.batch, plan.requests, plan.weights, layers=layers)
            (total, values), states = out if layers else (out, {})  # {layer: (N, D)}
            losses = compute_losses(terms, plan, values, states, prepared.counts, multipliers)
            loss = sum(term.loss for term in losses)
            # with known weights the losses' gradient through the values is that of `total`; states have their own
            minimised = [tensor for tensor in (total, loss) if tensor is not None and tensor.requires_grad]
            # processes average their gradients; part.counts is 0 for a part that another process counts
            accelerator.backward(sum(minimised) * (part.counts * accelerator.num_processes))
        counters = torch.tensor([float(last and signalled), plan.batch.num_tokens * float(part.counts)])
        scalars = [loss.detach(), *(t.mean for t in losses), *(t.loss.detach() for t in losses)]
        sums += torch.cat([torch.stack(scalars) * part.counts, copy_to(accelerator.device, counters)])
        del plan, out, total, values, states, losses, loss, minimised  # frees them before the next part's forward
    return StepSums(accelerator.reduce(sums, "sum"), [term.name for term in terms])
