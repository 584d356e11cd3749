"""When MUDMAN's adversary begins anew and when it learns (method/adversary.py holds its arithmetic).

It lies over the weights as they are in each step, and is kept beside them in the state of a run: it is resumed, rolled
back and left out of what is saved without a word of its own.
"""

from __future__ import annotations

import math

import torch

from engine.optimizer import global_norm
from engine.state import TrainingState
from evaluation.attacks.weights import matrices
from method.adversary import fork, laid_over, learn
from method.step import PreparedStep, compute_gradients
from utils import UsageError, log


def refuse_no_matrix(setup) -> None:
    """Raise UsageError if a run (run/setup.py) has an adversary and trains no weight that it could lie over."""
    if setup.recipe.adversary and not any(_chosen(setup)):
        raise UsageError("perturbed.adversary_steps: the adversary lies over the trained matrices of the layers, and "
                         "this run trains none: change trainable.parameters, or set it to 0")  # fmt: skip


def taught(setup, state: TrainingState, weights: list[torch.Tensor], prepared: PreparedStep) -> list[torch.Tensor]:
    """Let the adversary learn the own answers of a step's forget rows; return its weights.

    weights: the fp32 masters, which it lies over; they stay as they are, while the model's are the adversary's
    afterwards. It begins anew, equal to them, after `adversary_turns` steps, and where there is none in the state.
    """
    settings, optimizer = setup.recipe.perturbed, setup.optimizer
    if state.adversary is None or state.adversary_turns >= settings.adversary_turns:
        generator = torch.Generator().manual_seed(setup.options.seed + state.step)
        state.adversary = fork(weights, _chosen(setup), settings.adversary_rank, generator)
        state.adversary_turns = 0
    for turn in range(settings.adversary_steps) if prepared.counts else ():
        optimizer.restore(laid_over(weights, state.adversary))
        compute_gradients(prepared, [setup.recipe.adversary], setup.wrapped, setup.accelerator, sharded=False,
                          signalled=False, graphs=setup.graphs)  # fmt: skip
        gradients = [parameter.grad for parameter in optimizer.parameters]
        finite = math.isfinite(global_norm([gradient for gradient in gradients if gradient is not None]))
        if finite:
            done = state.adversary_turns * settings.adversary_steps + turn
            learn(state.adversary, gradients, settings.adversary_lr, done)
        del gradients
        optimizer.drop_gradients()
        if not finite:
            log.warning("step %d: the adversary's gradient is not finite; it begins anew", state.step + 1)
            state.adversary, state.adversary_turns = None, 0
            optimizer.restore(weights)
            return weights
    state.adversary_turns += 1
    changed = laid_over(weights, state.adversary)
    optimizer.restore(changed)
    return changed


def _chosen(setup) -> list[bool]:
    """Return which of the trained weights are matrices of the layers, adapters included."""
    found = {id(weight) for weight, _ in matrices(setup.model)}
    return [id(parameter) in found for parameter in setup.optimizer.parameters]
