"""Make a causal language model forget listed text and keep its other behaviour (Yao, Xu and Liu 2023).

    python unlearn_harm.py --model_name=facebook/opt-1.3b --model_save_dir=models/opt1.3b_unlearned

The file reads top to bottom: prepare (processes, rows, model, own answers, reference), train, finish. A step minimises
the weighted sum of a recipe's terms over the trainable parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data_module import Sides
from engine import checkpoint
from engine.paths import ARGS
from engine.prefetch import Prefetcher
from engine.saving import gather_weights, write_model
from engine.state import BestState, TrainingState
from evaluation.report import write_model_card
from method.plan import print_plan
from method.step import StepStats
from method.terms import next_multipliers
from options import UnlearnOptions
from run.account import account_lines
from run.announcement import announcement
from run.averaged import average, begin_run
from run.noise import add_noise
from run.parsing import parse_run
from run.perturbed import step_gradients
from run.selection import select
from run.setup import Setup, prepare, resume_or_start, save_checkpoint
from utils import (
    RunError,
    StopSignals,
    atomic_dir,
    log,
    peak_memory_gib,
    run_script,
    seed_everything,
    trim_cpu_heap,
    write_json,
)

MAX_SKIPPED_STEPS = 3  # in a row, with a loss or gradient that is not finite; then the run rolls back
MAX_ROLLBACKS = 5  # each halves the learning rate
TRIM_EVERY = 2  # steps; a step leaves a third of its memory in fragments that the next step cannot use
COLLAPSE_FACTOR = 5  # times --kl_budget; with a larger dev KL the retain side has collapsed, and the run rolls back


def main() -> None:
    """Run the command line."""
    options = parse_run()
    if (lines := announcement(options)) and os.environ.get("RANK", "0") == "0":  # one of several processes
        print("\n".join(lines), flush=True)
    run(options)


def run(options: UnlearnOptions, sides: Sides | None = None, script: str = "unlearn") -> None:
    """Prepare, train, finish.

    sides: the rows, if they are read already. script: whose run it is, a key of ARGS.
    """
    seed_everything(options.seed, options.threads, deterministic=options.deterministic)
    stop = StopSignals()
    with contextlib.ExitStack() as held:
        setup = prepare(options, held, sides)
        if options.dry_run:
            if setup.neighbours and setup.accelerator.is_main_process:
                print("\n".join(setup.neighbours.plan_lines()))
            print_plan(options, setup.recipe, setup.formatter, setup.sampler, setup.answer_model, setup.layout_line,
                       account_lines(setup.account))  # fmt: skip
            return
        state = resume_or_start(setup)
        state, reason = train(setup, state, stop)
        finish(setup, state, reason, script)


# -------------------------------------------------------------------------------------------------- train
def train(setup: Setup, state: TrainingState, stop: StopSignals) -> tuple[TrainingState, str]:
    """Run the steps; return (the state at the end, the reason for the end)."""
    options = setup.options
    first, loop_started, ended = state.step, time.time(), None
    steps = tqdm(range(first, options.max_unlearn_steps), desc="training", disable=None)
    prefetcher = Prefetcher(setup.prepare_step, ahead=setup.accelerator.device.type != "cpu")
    with logging_redirect_tqdm([log]), stop, prefetcher.running():
        for step in steps:
            # ---- save and evaluate the weights after `step` steps
            if setup.accelerator.num_processes == 1:
                stop.asked = stop.signalled
            if step > first and (stop.asked or (options.save_every and step % options.save_every == 0)):
                save_checkpoint(setup, state)
            if stop.asked:
                raise SystemExit(stop.farewell(f"{step} steps are saved; go on with --resume"))
            if step == 0 or (options.eval_every and step % options.eval_every == 0):
                dev_kl = evaluate(setup, state)
                if options.kl_budget and not dev_kl <= COLLAPSE_FACTOR * options.kl_budget:  # NaN is a collapse, too
                    ended = roll_back(setup, state, f"development KL {dev_kl:.3f} is far past --kl_budget")
            if ended:
                break
            if step == 0 and setup.recipe.selection.kl_budget:
                select(setup)
                if state.best is not None:  # a roll-back goes back to the weights without the forget set's own part
                    state.best = dataclasses.replace(state.best, weights=setup.optimizer.snapshot())
            if step == 0 and setup.recipe.noise.share:
                add_noise(setup)
            begin_run(setup, state)
            # ---- one step: gradients, the stop rule, the update
            tick = time.perf_counter()
            sums = step_gradients(setup, prefetcher.get(step), state, signalled=stop.signalled)
            norm = setup.optimizer.grad_norm()
            if step + 1 < options.max_unlearn_steps:
                prefetcher.start(step + 1)  # while the device runs what was launched
            stats = sums.read(norm)
            stop.asked = stats.signals > 0  # all processes stop after the same step
            if ended := reached_max_bad_loss(setup, stats):
                break
            lr, grad_norm = update(setup, state, stats)
            state.step = step + 1
            if state.skipped == MAX_SKIPPED_STEPS:
                ended = roll_back(setup, state, f"{MAX_SKIPPED_STEPS} steps in a row were not finite")
            if step % TRIM_EVERY == 0:
                trim_cpu_heap()
            seconds = time.perf_counter() - tick
            left = (time.time() - loop_started) / (step + 1 - first) * (options.max_unlearn_steps - step - 1)
            log_step(setup, stats, step + 1, grad_norm=grad_norm, lr=lr, seconds=seconds,
                     tokens_per_second=stats.tokens / seconds, seconds_left=left,
                     **({"multipliers": state.multipliers} if state.multipliers else {}))  # fmt: skip
            if ended:
                break
        average(setup, state)
        evaluate(setup, state)
    return state, ended or f"all {options.max_unlearn_steps} steps taken"


def reached_max_bad_loss(setup: Setup, stats: StepStats) -> str | None:
    """Return the reason to stop if a watched term has reached --max_bad_loss, else None."""
    ceiling = setup.options.max_bad_loss
    for term in setup.recipe.terms:
        if term.watch and term.weight > 0 and stats.means[term.name] >= ceiling:
            return f"--max_bad_loss {ceiling:g} reached: {term.field} {stats.means[term.name]:.3f}"
    return None


def update(setup: Setup, state: TrainingState, stats: StepStats) -> tuple[float, float]:
    """Update the weights; return (learning rate, gradient norm). A step that is not finite leaves them unchanged."""
    optimizer = setup.optimizer
    lr, grad_norm = optimizer.lr, math.nan
    if math.isfinite(stats.loss):
        grad_norm = optimizer.step() if stats.grad_norm is None else optimizer.step(stats.grad_norm)
    else:
        optimizer.drop_gradients()
    if math.isfinite(grad_norm):
        state.skipped = 0
        state.tokens += int(stats.tokens)
        state.multipliers = next_multipliers(setup.recipe.terms, state.multipliers, stats.means)
        return lr, grad_norm
    state.skipped += 1
    log.warning("step %d: loss %s, gradient norm %s: not finite, the step is not taken", state.step + 1, stats.loss,
                grad_norm)  # fmt: skip
    return lr, grad_norm


def log_step(setup: Setup, stats: StepStats, step: int, **figures) -> None:
    """Log a step as a readable line and a JSON object: each term's mean under its own name, then `figures`."""
    means = {term.field: stats.means[term.name] for term in setup.recipe.terms}
    digits = {term.field: 3 if term.objective.measure == "nll" else 4 for term in setup.recipe.terms}
    shown = "  ".join(f"{field} {value:.{digits[field]}f}" for field, value in means.items())
    setup.run_log.event(
        "step",
        f"step {step}/{setup.options.max_unlearn_steps}  {shown}  grad_norm {figures['grad_norm']:.2f}  "
        f"lr {figures['lr']:.2e}  {figures['tokens_per_second']:.0f} tokens/s  {figures['seconds_left']:.0f} s left",
        step=step, **means, weighted_losses=stats.weighted, **figures,
    )  # fmt: skip


def evaluate(setup: Setup, state: TrainingState) -> float:
    """Evaluate on the dev split, log the result, and keep the best state within the KL budget; return the dev KL.

    The original (step 0) is kept for roll-backs until another state is within the budget.
    """
    budget, evaluator = setup.options.kl_budget, setup.evaluator
    trim_cpu_heap()
    metrics = evaluator.evaluate(setup.answer_model, setup.reference)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if value is not None)
    state.last_evaluation = {"step": state.step, **metrics}
    state.first_evaluation = state.first_evaluation or state.last_evaluation
    if shown:
        setup.run_log.event("eval", f"after step {state.step}: {shown}", **state.last_evaluation)
    dev_kl, key, best = metrics["dev_kl"] or 0.0, evaluator.selection_key(metrics), state.best
    within = dev_kl <= budget and (best is None or best.step == 0 or key <= best.selection_key)
    if budget and (best is None or within):
        state.best = BestState(state.step, key, state.last_evaluation, setup.optimizer.snapshot())
    return dev_kl


def roll_back(setup: Setup, state: TrainingState, why: str) -> str | None:
    """Restore the best state, if there is one, and halve the learning rate.

    Steps that are not finite never change the weights, so without --kl_budget there is nothing to restore. After
    MAX_ROLLBACKS, return the reason for the end if a state within the budget can be saved; otherwise raise RunError.
    """
    best, optimizer = state.best, setup.optimizer
    state.rollbacks += 1
    if state.rollbacks > MAX_ROLLBACKS:
        why = f"{why}, after {MAX_ROLLBACKS} times half the learning rate: lower --lr (now {setup.options.lr:g})"
        if best is not None and best.step > 0:
            return why
        raise RunError(why)
    if best is not None:
        optimizer.restore(best.weights)
    optimizer.halve_lr_and_reset()
    # what a budget's term weighed in a collapse, and an adversary learned there, is no measure
    state.skipped, state.multipliers, state.adversary = 0, {}, None
    place = f"rolls back to the state after step {best.step}" if best is not None else "the weights stay as they are"
    log.warning("%s: %s, with half the learning rate (x %g)", why, place, optimizer.lr_scale)
    return None


# ------------------------------------------------------------------------------------------------- finish
def finish(setup: Setup, state: TrainingState, reason: str, script: str) -> None:
    """Restore the best state within the budget, save the model, and describe the run of a script in files and log."""
    options, optimizer, accelerator = setup.options, setup.optimizer, setup.accelerator
    if not optimizer.num_updates:
        raise RunError(f"{reason} before the first update, so nothing is saved: the model is the original")
    saved = choose_state(setup, state)
    seconds, cut = time.time() - setup.started, len(setup.formatter.cut)
    summary = {"steps": state.step, "kept_step": saved["step"], "stop_reason": reason, "seconds": round(seconds, 1),
               "cut_prompts": cut, "peak_gib": round(peak_memory_gib(accelerator.device), 2)}  # fmt: skip
    if cut:
        log.warning("%d prompts were longer than %d tokens and were cut at the beginning of the user's text", cut,
                    setup.formatter.max_prompt_tokens)  # fmt: skip
    trim_cpu_heap()
    weights = gather_weights(setup.model, optimizer, setup.adapters, setup.save_form.dtype)
    if accelerator.is_main_process:
        with atomic_dir(setup.save_dir) as beside:
            write_model(beside, setup.model, weights, setup.adapters, setup.formatter.tokenizer, options,
                        setup.save_form)  # fmt: skip
            terms = [term.describe() for term in setup.recipe.terms]
            write_json(beside / ARGS[script],
                       {"options": dataclasses.asdict(options), "run": summary, "terms": terms,
                        "rows": [dataclasses.asdict(source) for source in setup.account]})  # fmt: skip
            setup.trained_on.with_run(setup.sampler.trained_keys(saved["step"])).write(beside)
        # the weights are in place; an error in a descriptive file must not lose them
        tell("run_manifest.json", lambda: write_json(setup.save_dir / "run_manifest.json", setup.metadata.manifest(
            setup.account, accelerator, seconds, state.tokens, state.first_evaluation, saved,
        )))  # fmt: skip
        if script == "unlearn":
            tell("the model card", lambda: write_model_card(setup.save_dir))
    accelerator.wait_for_everyone()
    setup.run_log.event("done", f"{reason}; model saved to {setup.save_dir} after {seconds:.0f} s, "
                        f"peak memory {summary['peak_gib']:.2f} GiB", **summary)  # fmt: skip
    if accelerator.is_main_process:
        tell("what is left of its checkpoints", lambda: log_leftovers(setup))


def log_leftovers(setup: Setup) -> None:
    """Say which checkpoints of the finished run still lie on the disk."""
    if line := checkpoint.describe_leftovers(setup.save_dir):
        log.info(line)


def tell(what: str, write) -> None:
    """Write a file that only describes the run; any error becomes a warning."""
    try:
        write()
    except Exception as error:  # such as a missing template: the model itself is saved
        log.warning("%s could not be written (%s: %s)", what, type(error).__name__, error)


def choose_state(setup: Setup, state: TrainingState) -> dict:
    """Restore the state to save; return its evaluation. Raises RunError if no state is within the budget."""
    budget, best = setup.options.kl_budget, state.best
    if not budget:
        return state.last_evaluation
    if best.step == 0:
        raise RunError(f"no evaluated state is within --kl_budget {budget:g}, so nothing is saved: raise it, or lower "
                       "--lr or --eval_every")  # fmt: skip
    if best.step != state.step:
        setup.optimizer.restore(best.weights)
    log.info("the state after step %d is kept: best within --kl_budget %g", best.step, budget)
    return best.metrics


if __name__ == "__main__":
    run_script(main)
