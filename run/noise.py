"""Noise before the first step (method/noise.py): the terms then teach the weights again what the original says."""

from __future__ import annotations

import torch

from method.noise import noised
from utils import UsageError, log


def refuse_noise(recipe, options, num_processes: int) -> None:
    """Raise UsageError if the recipe's noise cannot be added in such a run, or if no term takes it back."""
    if not recipe.noise.share:
        return
    for switch, on in (("--use_lora", options.use_lora), ("--shard", options.shard),
                       ("accelerate launch with several processes", num_processes > 1),
                       ("--kl_budget, which takes noise for a collapse", bool(options.kl_budget))):  # fmt: skip
        if on:
            raise UsageError(f"noise.share: noise goes into whole weights, in one process: leave {switch} out, or set "
                             "noise.share=0")  # fmt: skip
    if not any(term.draw.side == "normal" and term.objective.asks_original for term in recipe.terms):
        raise UsageError("noise.share: no term brings normal rows back to what the original says: give one a weight, "
                         "or set noise.share=0")  # fmt: skip


def add_noise(setup) -> None:
    """Put noise into the trained matrices of a run (run/setup.py) that has taken no step. Vectors stay as they are."""
    settings, optimizer = setup.recipe.noise, setup.optimizer
    generator = torch.Generator().manual_seed(setup.options.seed)
    masters = [noised(weight, settings.share, settings.scale, generator) if weight.ndim == 2 else weight
               for weight in optimizer.snapshot()]  # fmt: skip
    optimizer.restore(masters)
    log.info("noise took the place of %g of %d matrices: the terms teach them again what the original says",
             settings.share, sum(weight.ndim == 2 for weight in masters))  # fmt: skip
