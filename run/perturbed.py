"""The gradients of a step: all at once, or the forget side's apart (method/perturbed.py)."""

from __future__ import annotations

import contextlib

from engine.state import TrainingState
from evaluation.attacks.quantisation import rounded_to_bits
from evaluation.attacks.weights import matrices
from method.perturbed import PerturbedSettings, shaped, towards_worse
from method.step import PreparedStep, StepSums, compute_gradients
from run.adversary import taught
from utils import UsageError


def refuse_perturbed(recipe, options) -> None:
    """Raise UsageError if the recipe's changed weights cannot be had in such a run."""
    settings = recipe.perturbed
    if settings.at(0) and options.shard:
        raise UsageError("perturbed: weights and gradients are changed whole: leave --shard out, or every setting of "
                         "'perturbed'")  # fmt: skip
    if settings.bits and options.use_lora:
        raise UsageError("perturbed.bits: whole weights are rounded, and --use_lora trains none: leave one of them out")
    if settings.bits == 1 or settings.bits > 8:
        raise UsageError(f"perturbed.bits {settings.bits}: must be 0, or from 2 to 8")


def step_gradients(setup, prepared: PreparedStep, state: TrainingState, *, signalled: bool) -> StepSums:
    """Leave the gradients of a step's loss with the weights; return the step's sums over all processes.

    state: of the run; its adversary learns, if there is one.
    """

    def gradients(of: PreparedStep) -> StepSums:
        return compute_gradients(of, setup.recipe.terms, setup.wrapped, setup.accelerator, sharded=setup.options.shard,
                                 signalled=signalled, graphs=setup.graphs, multipliers=state.multipliers)  # fmt: skip

    if prepared.forget is None:
        return gradients(prepared)
    settings, before_move = setup.recipe.perturbed, None
    if settings.changes_weights:
        with _changed_weights(setup, state, prepared, lambda: gradients(prepared.forget)) as before_move:
            sums = gradients(prepared.forget)
    else:
        sums = gradients(prepared.forget)
    if not settings.shapes_gradient:
        return gradients(prepared) + (before_move or sums)
    parameters = setup.optimizer.parameters
    forget = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    setup.optimizer.drop_gradients()
    of_others = gradients(prepared)
    add_shaped(parameters, forget, settings)
    return of_others + (before_move or sums)


def add_shaped(parameters: list, forget: list, settings: PerturbedSettings) -> None:
    """Add the forget side's gradient, shaped, to the others' that lies with the parameters."""
    others = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(
        parameters, shaped(forget, others, agreeing=settings.agreeing, norm=settings.norm), strict=True
    ):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@contextlib.contextmanager
def _changed_weights(setup, state: TrainingState, prepared: PreparedStep, forget_gradients):
    """Within the block the trained weights are changed as the recipe says; gradients that it leaves stay.

    Yields the forget side's sums before the move, where they had to be taken (radius), else None.
    """
    settings, optimizer = setup.recipe.perturbed, setup.optimizer
    kept = optimizer.snapshot()
    changed, sums = kept, None
    try:
        if settings.adversary_steps:
            changed = taught(setup, state, kept, prepared.relearned)
        if settings.radius:
            sums = forget_gradients()
            changed = towards_worse(changed, [parameter.grad for parameter in optimizer.parameters], settings.radius)
            optimizer.drop_gradients()
        if settings.bits:
            changed = _rounded(setup.model, optimizer, changed, settings.bits)
        optimizer.restore(changed)
        del changed  # as much memory as the weights in fp32
        yield sums
    finally:
        optimizer.restore(kept)


def _rounded(model, optimizer, weights: list, bits: int) -> list:
    """Return the weights with the layers' matrices rounded; turned ones (GPT-2's) along their own inputs."""
    turned = {weight: view is not weight for weight, view in matrices(model)}
    found = []
    for parameter, weight in zip(optimizer.parameters, weights, strict=True):
        if parameter in turned:
            view = weight.mT if turned[parameter] else weight
            weight = rounded_to_bits(view, bits).to(weight.dtype)
            weight = weight.mT if turned[parameter] else weight
        found.append(weight)
    return found
