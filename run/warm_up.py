"""Compile the layers before the first step, and try whether what a compiled graph is not checked for holds."""

from __future__ import annotations

import time

import torch

from engine.compiled_layers import KnownGraphs, compile_layers, decompile_layers, why_not_compiled
from engine.optimizer import global_norm
from method.step import PreparedStep, compute_gradients
from method.terms import layers_of
from utils import RunError, log

MOST_STEPS = 6  # until two widths were met; their gradients are dropped
LOOKED_AT = 20  # steps among which one of a third width is looked for
SAME_NORM = 1e-3  # largest difference of two gradient norms, as a fraction: sums in another order


def warm_up(setup) -> None:
    """Compile the layers, if --compile and the model ask for it, by a few forwards and backwards; log the time.

    setup: of a run (run/setup.py). With `auto`, a model that cannot be compiled runs as it is. Raises RunError with
    `on`.
    """
    options, started = setup.options, time.time()
    if why := why_not_compiled(setup.model, options.compile, options.max_unlearn_steps):
        if options.compile == "on":
            log.warning("--compile on: the layers are not compiled: %s", why)
        return
    log.info("compiling the layers: up to a minute, once a run (--compile off leaves it out)")
    compile_layers(setup.model, leave=layers_of(setup.recipe.terms))
    setup.graphs = KnownGraphs()
    alone = setup.accelerator.num_processes == 1
    try:
        for step in range(min(MOST_STEPS, options.max_unlearn_steps)):
            # the second width makes it a variable; several processes, whose widths differ, take the same steps
            if len(setup.graphs.widths) < 2 or not alone:
                gradient_norm(setup, setup.prepare_step(step))
        setup.graphs.trusted = alone and len(setup.graphs.widths) >= 2 and unchecked_equals_checked(setup)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if options.compile == "on":
            raise RunError(f"--compile on: the layers of {type(setup.model).__name__} cannot be compiled ({line}); "
                           "use --compile off") from error  # fmt: skip
        decompile_layers(setup.model)
        setup.optimizer.drop_gradients()
        setup.graphs = None
        log.warning("the layers are not compiled, the run goes on without: %s", line)
        return
    seconds = time.time() - started
    checks = "checked no more" if setup.graphs.trusted else "checked in every step"
    setup.run_log.event("compile", f"compiled layers: warm-up took {seconds:.0f} s; their graphs are {checks}",
                        seconds=seconds, unchecked=setup.graphs.trusted)  # fmt: skip


def gradient_norm(setup, prepared: PreparedStep) -> float:
    """Run a step's forward and backward, drop its gradients, and return their norm."""
    compute_gradients(prepared, setup.recipe.terms, setup.wrapped, setup.accelerator, sharded=setup.options.shard,
                      signalled=False, graphs=setup.graphs).read()  # fmt: skip
    gradients = [parameter.grad for parameter in setup.model.parameters() if parameter.grad is not None]
    norm = global_norm(gradients)
    setup.optimizer.drop_gradients()
    return norm


def unchecked_equals_checked(setup) -> bool:
    """Return whether a step of a width that was not met yet, if there is one, has the same gradient without checks."""
    graphs, steps = setup.graphs, range(min(LOOKED_AT, setup.options.max_unlearn_steps))
    prepared = [step for step in map(setup.prepare_step, steps) if step.parts]
    widths = [step.parts[0].plan.batch.input_ids.shape[1] for step in prepared]
    chosen = next((i for i, width in enumerate(widths) if width not in graphs.widths), 0)
    norms = []
    for graphs.trusted in (True, False):  # without checks first: with them, a graph that does not fit is made anew
        norms.append(gradient_norm(setup, prepared[chosen]))
    same = abs(norms[0] - norms[1]) <= SAME_NORM * norms[1]
    if not same:
        log.warning("compiled layers: the gradient norm is %g without checks of the graphs, %g with them; they stay",
                    *norms)  # fmt: skip
    return same
