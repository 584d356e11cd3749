"""Several short runs in one: each begins with the first weights, and those that they end with are averaged.

The rows go on where the run before left off, so no two runs take the same steps. Of adapters each factor is averaged,
which is the average of what they add only as long as the factors stay near each other, as in short runs they do.
"""

from __future__ import annotations

from engine.state import TrainingState
from utils import UsageError, log


def refuse_averaging(recipe, options) -> None:
    """Raise UsageError if a recipe's short runs cannot be averaged in such a run."""
    runs = recipe.average.runs
    if runs == 1:
        return
    if options.max_unlearn_steps % runs:
        raise UsageError(f"average.runs={runs}: does not divide --max_unlearn_steps {options.max_unlearn_steps}, so "
                         "the runs would not be alike; change one of the two")  # fmt: skip
    others = {"--kl_budget": options.kl_budget, "--shard": options.shard, "noise.share": recipe.noise.share,
              "selection.kl_budget": recipe.selection.kl_budget}  # fmt: skip
    for what, on in others.items():
        if on:
            raise UsageError(f"average.runs={runs}: does not go with {what}, which has other first or last weights; "
                             "leave one of the two out")  # fmt: skip


def begin_run(setup, state: TrainingState) -> None:
    """Where one of the short runs has ended, add up its weights and begin the next one; setup: of run/setup.py."""
    length = setup.options.max_unlearn_steps // setup.recipe.average.runs
    if setup.first_weights is None or state.step == 0 or state.step % length:
        return
    add_up(setup, state)
    setup.optimizer.restart(setup.first_weights)
    log.info("run %d of %d begins with the first weights", state.runs + 1, setup.recipe.average.runs)


def average(setup, state: TrainingState) -> None:
    """Put the average of all short runs in the place of the last one's weights."""
    if setup.first_weights is None:
        return
    if setup.optimizer.updates_of_run:  # a run that was stopped on the way counts as well
        add_up(setup, state)
    if state.runs > 1:
        setup.optimizer.restore([tensor / state.runs for tensor in state.summed])
        log.info("the weights of %d runs are averaged", state.runs)


def add_up(setup, state: TrainingState) -> None:
    """Add the weights of a run that has ended to those of the runs before it."""
    weights = setup.optimizer.snapshot()
    state.summed = weights if state.summed is None else [a + b for a, b in zip(state.summed, weights, strict=True)]
    state.runs += 1
