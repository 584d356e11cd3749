"""The levers of a recipe beside its terms, each in a room of its own, asked one after the other whether a run can have
them: what they refuse, they refuse before anything is loaded."""

from __future__ import annotations

from run.averaged import refuse_averaging
from run.levels import refuse_levels
from run.noise import refuse_noise
from run.perturbed import refuse_perturbed
from run.selection import refuse_selection


def refuse_levers(recipe, options, num_processes: int) -> None:
    """Raise UsageError if what a recipe asks for beside its terms cannot be had in such a run."""
    refuse_levels(recipe.terms, options.holdout_text)
    refuse_selection(recipe, options, num_processes)
    refuse_noise(recipe, options, num_processes)
    refuse_averaging(recipe, options)
    refuse_perturbed(recipe, options)
