"""Several short runs in one: each begins with the first weights, and those that they end with are averaged.

The rows go on where the run before left off, so no two runs take the same steps. Of adapters each factor is averaged,
which is the average of what they add only as long as the factors stay near each other, as in short runs they do.
"""

from __future__ import annotations

import logging

from engine.state import TrainingState
from utils import UsageError, log


def refuse_averaging(recipe, options) -> None:
    """Raise UsageError if a recipe's short runs cannot be averaged in such a run."""
    runs = recipe.average.runs
    if runs == 1:
        return
    if options.max_unlearn_steps % runs:
        raise UsageError(f"average.runs={runs}: does not divide the run's {options.max_unlearn_steps} steps, so the "
                         "short runs would not be alike; change one of the two")  # fmt: skip
    others = {"--kl_budget": options.kl_budget, "--shard": options.shard, "noise.share": recipe.noise.share,
              "selection.kl_budget": recipe.selection.kl_budget}  # fmt: skip
    for what, on in others.items():
        if on:
            raise UsageError(f"average.runs={runs}: does not go with {what}, which has other first or last weights; "
                             "leave one of the two out")  # fmt: skip


def begin_run(setup, state: TrainingState) -> None:
    """Where one of the short runs has ended, add up its weights and begin the next one; setup: of run/setup.py."""
    runs = setup.recipe.average.runs
    if runs == 1:
        return
    if state.first is None:
        state.first = setup.optimizer.snapshot()
    elif state.step % (setup.options.max_unlearn_steps // runs) == 0:
        add_up(setup, state)
        setup.optimizer.restart(state.first)
        state.skipped, state.multipliers, state.adversary = 0, {}, None
        log.info("a run of %d begins with the first weights", runs)


def average(setup, state: TrainingState) -> None:
    """Put the average of all short runs in the place of the last one's weights; one that was stopped counts as well."""
    if state.first is None:
        return
    add_up(setup, state)
    if state.runs:
        setup.optimizer.restore([tensor / state.runs for tensor in state.summed])
    level = logging.INFO if state.runs == setup.recipe.average.runs else logging.WARNING
    log.log(level, "the weights of %d of %d runs are averaged", state.runs, setup.recipe.average.runs)


def add_up(setup, state: TrainingState) -> None:
    """Add the weights of a run that has ended to those of the runs before it, unless it took no step."""
    if not setup.optimizer.updates_of_run:
        return
    weights = setup.optimizer.snapshot()
    state.summed = [a.add_(b) for a, b in zip(state.summed, weights, strict=True)] if state.runs else weights
    state.runs += 1
