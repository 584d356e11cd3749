"""Make a causal language model forget listed text and keep the rest (Yao, Xu and Liu 2023).

    python unlearn_harm.py --model_name=facebook/opt-1.3b --model_save_dir=models/opt1.3b_unlearned

Reads top to bottom: prepare (processes, rows, model, own answers, the original's states), train, finish. A step
minimises the weighted sum of a recipe's terms over the trainable parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data_module import TRAINED_ON, PromptFormatter, prompt_hash, refuse_overlap, sample, split_sources
from engine import checkpoint
from engine.adapters import add_lora, freeze
from engine.generation import generate_missing_responses
from engine.optimizer import MasterWeightAdamW, refuse_missing_8bit
from engine.processes import gather_to_main_cpu, refuse_idle_processes, shard, start_processes
from engine.reference import ReferenceCache
from engine.run_metadata import RunMetadata
from engine.saving import gather_weights, lock_output_dir, write_model
from engine.state import BestState, TrainingState
from engine.tree import AnswerLogitsModel, wrap_model
from evaluation.dev_evaluator import DevEvaluator
from evaluation.report import write_model_card
from method.plan import print_plan
from method.recipe import Recipe, parse_run, read_recipe
from method.sampler import UnlearnBatchSampler
from method.step import StepStats, compute_gradients
from method.terms import layers_of, sequences_needing_reference
from options import UnlearnOptions
from sources.rows import Row, read_sources
from utils import (
    RunError,
    RunLog,
    StopSignals,
    UsageError,
    atomic_dir,
    fingerprint,
    load_model,
    load_tokenizer,
    log,
    peak_memory_gib,
    pick_dtype,
    run_script,
    seed_everything,
    trim_cpu_heap,
    write_json,
)

MAX_SKIPPED_STEPS = 3  # in a row, for a loss or gradient that is not finite; then the learning rate is halved
MAX_ROLLBACKS = 5  # each halves the learning rate
TRIM_EVERY = 2  # steps; each one leaves a third of what it used in holes that the next one cannot use
COLLAPSE_FACTOR = 5  # times --kl_budget: from there on the retain side has collapsed, and the run rolls back


def main() -> None:
    options = parse_run()
    seed_everything(options.seed, options.threads)
    stop = StopSignals()
    with contextlib.ExitStack() as held:
        setup = prepare(options, held)
        if options.dry_run:
            print_plan(options, setup.recipe, setup.formatter, setup.sampler, setup.answer_model, setup.layout_line)
            return
        state = resume_or_start(setup)
        state, reason = train(setup, state, stop)
        finish(setup, state, reason)


# ------------------------------------------------------------------------------------------------ prepare
@dataclasses.dataclass
class Setup:
    """All that a run works with. `newest`: the checkpoint to go on from, where there is one; `wrapped`: the model as
    several processes call it; `started`: when this process began, in seconds since the epoch."""

    options: UnlearnOptions
    recipe: Recipe
    accelerator: Accelerator
    metadata: RunMetadata
    run_log: RunLog
    newest: Path | None
    started: float
    formatter: PromptFormatter
    sampler: UnlearnBatchSampler
    dev_rows: dict[str, list[Row]]
    row_counts: dict[str, list[dict[str, int]]]
    answer_model: AnswerLogitsModel | None = None
    layout_line: str = ""
    adapters: object = None
    optimizer: MasterWeightAdamW | None = None
    reference: ReferenceCache | None = None
    evaluator: DevEvaluator | None = None
    wrapped: torch.nn.Module | None = None

    @property
    def save_dir(self) -> Path:
        return Path(self.options.model_save_dir)

    @property
    def model(self):
        return self.answer_model.model

    def layout(self, sequences):
        batch = self.answer_model.layout(
            sequences, self.recipe.layout.pack_tokens, self.formatter.tokenizer.pad_token_id
        )
        return batch.to(self.accelerator.device)


def prepare(options: UnlearnOptions, held: contextlib.ExitStack) -> Setup:
    """Read rows and model, ask the original. Raises UsageError before anything is trained or written."""
    started = time.time()
    accelerator = start_processes(options)
    refuse_missing_8bit(options)
    held.callback(lock_output_dir(Path(options.model_save_dir), options, accelerator).close)
    recipe = read_recipe(options)
    sources = read_both_sides(options)
    tokenizer = load_tokenizer(options.model_name, trust_remote_code=options.trust_remote_code)
    metadata = RunMetadata(options, {side: [row for rows in some for row in rows] for side, some in sources.items()})
    newest = checkpoint.resumable(options, metadata) if options.resume else None
    # an earlier log is started anew only here, where no mistyped name can stop the run any more
    run_log = RunLog(options.log_file, write=accelerator.is_main_process and not options.dry_run, resume=bool(newest))
    splits = {side: split_sources(some, options) for side, some in sources.items()}
    sampler = UnlearnBatchSampler(
        *([parts["train"] for parts in some] for some in splits.values()),
        list({term.draw.name: term.draw for term in recipe.terms}.values()),
        seed=options.seed, steps=options.max_unlearn_steps, wording=recipe.wording,
    )  # fmt: skip
    counts = {side: [{name: len(rows) for name, rows in parts.items()} for parts in some]
              for side, some in splits.items()}  # fmt: skip
    run_log.event("data", f"rows, split by prompt: forget {counts['forget']}, normal {counts['normal']}", **counts)
    setup = Setup(
        options, recipe, accelerator, metadata, run_log, newest, started,
        PromptFormatter(tokenizer, options.template, options.max_prompt_tokens, options.max_answer_tokens),
        sampler, development_rows(splits, options, recipe.dev.prompts), counts,
    )  # fmt: skip
    refuse_idle_processes(accelerator, sampler.examples_per_step())
    load_weights(setup)
    ask_original(setup)
    return setup


def read_both_sides(options: UnlearnOptions) -> dict[str, list[list[Row]]]:
    """The rows of every source, by side. A prompt on both sides is refused."""
    forget = read_sources(options.forget_data, "--forget_data", options.harm_categories)
    sources = {"forget": [rows for rows in forget if rows],
               "normal": read_sources(options.normal_data, "--normal_data")}  # fmt: skip
    refuse_overlap(*([row for rows in some for row in rows] for some in sources.values()))
    return sources


def development_rows(splits: dict, options: UnlearnOptions, count: int) -> dict[str, list[Row]]:
    """The rows of both sides that the run evaluates on the way, never trained on."""
    forget = sample([row for parts in splits["forget"] for row in parts["dev"]], count, options.seed)
    by_spec = {spec: parts["dev"] for spec, parts in zip(options.normal_data, splits["normal"], strict=True)}
    share = -(-count // len(by_spec))  # of each file, however often it is named
    normal = [row for rows in by_spec.values() for row in sample(rows, share, options.seed)]
    if options.kl_budget and not normal:
        raise UsageError("--kl_budget: no normal row is held out to measure it on; raise --dev_share or give more rows")
    return {"forget": forget, "normal": normal}


def load_weights(setup: Setup) -> None:
    """The model with its adapters, and the optimizer of what is trained."""
    options, recipe, accelerator, formatter = setup.options, setup.recipe, setup.accelerator, setup.formatter
    model = load_model(options.model_name, **options.trust())
    if not options.shard:  # a model that is to be split need not fit on one device
        model.to(accelerator.device)
    setup.metadata.set_base_model(fingerprint(model))
    answer_tokens = max(options.max_answer_tokens, setup.sampler.answer_tokens("normal"), recipe.dev.tokens)
    formatter.fit(model.config, answer_tokens)
    prompts = [source[0].prompt for sources in setup.sampler.rows.values() for source in sources]
    answer_model, setup.layout_line = wrap_model(model, formatter, prompts, recipe.layout.pack_tokens)
    frozen = freeze(model, recipe.trainable.frozen_layers)
    setup.adapters = add_lora(model, recipe.lora, frozen) if options.use_lora else None
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # without it, nothing before the first trained weight gets a gradient
    dtype = pick_dtype(options.dtype, accelerator.device)
    if options.shard:
        if not answer_model.packed:
            raise UsageError(f"--shard needs the packed layout, and this model does not take it ({setup.layout_line})")
        shard(answer_model, dtype, accelerator.device.type)
    masters = torch.float32 if options.shard else dtype  # split: the parts are the masters
    setup.optimizer, setup.answer_model = MasterWeightAdamW(model, recipe.optimizer, masters), answer_model
    name, count = str(dtype).removeprefix("torch."), accelerator.num_processes
    setup.run_log.event(
        "model", f"{options.model_name} in {name} on {accelerator.device}, template {formatter.style}, "
        f"{setup.layout_line}; {count} process{'es, the model split over them' if options.shard else ''}",
        packed=answer_model.packed, dtype=name, processes=count, shard=options.shard,
    )  # fmt: skip


def ask_original(setup: Setup) -> None:
    """The original's own answers, then its states on the sequences that the run will visit."""
    options, recipe, sampler = setup.options, setup.recipe, setup.sampler

    def bar(items, label: str):
        return tqdm(items, desc=label, leave=False, disable=None)  # None: a terminal has one, a file has none

    def answer(rows: list[Row], tokens: int) -> list[Row]:
        if options.dry_run:  # a plan needs lengths, not answers
            return [row if row.response else dataclasses.replace(row, response=f"own answer {row.prompt[:30]} " * 8)
                    for row in rows]  # fmt: skip
        return generate_missing_responses(
            rows, setup.answer_model.generator, setup.formatter, fingerprint=setup.metadata.base_model, tokens=tokens,
            temperature=recipe.own_answers.temperature, seed=options.seed, batch_size=recipe.own_answers.batch_size,
            cache_dir=options.cache_dir, progress=lambda chunks: bar(chunks, "own answers"),
        )  # fmt: skip

    sampler.fill_responses(answer)
    normal_tokens = sampler.answer_tokens("normal") or options.max_answer_tokens
    setup.evaluator = DevEvaluator(
        answer(setup.dev_rows["forget"], options.max_answer_tokens), answer(setup.dev_rows["normal"], normal_tokens),
        setup.formatter, answer_tokens=recipe.dev.tokens, pack_tokens=recipe.layout.pack_tokens,
        batch_size=recipe.own_answers.batch_size,
    )  # fmt: skip
    if options.dry_run:
        return
    scheduled = [s for step in range(options.max_unlearn_steps) for s in sampler.sequences(step, setup.formatter)]
    setup.reference = ReferenceCache(
        setup.answer_model, sequences_needing_reference(scheduled, recipe.terms), recipe.layout.pack_tokens,
        setup.formatter.tokenizer.pad_token_id, layers=layers_of(recipe.terms),
        progress=lambda chunks: bar(chunks, "reference"),
    )  # fmt: skip
    normal = [s for s in setup.evaluator.sequences if s.draw == "normal"]
    setup.reference.precompute(setup.answer_model, normal)
    mib, seconds = setup.reference.bytes() / 2**20, time.time() - setup.started
    setup.run_log.event("reference", f"the original's states: {mib:.0f} MiB, ready after {seconds:.0f} s",
                        mib=mib, seconds=seconds)  # fmt: skip
    setup.run_log.event("objective", "minimised: " + ", ".join(f"{t.weight:g} x {t.name}" for t in recipe.terms),
                        terms=[t.describe() for t in recipe.terms])  # fmt: skip
    setup.wrapped = setup.answer_model if options.shard else setup.accelerator.prepare(setup.answer_model)


# -------------------------------------------------------------------------------------------------- train
def train(setup: Setup, state: TrainingState, stop: StopSignals) -> tuple[TrainingState, str]:
    """Go through the steps; returns the state at the end and why it ended there."""
    options, run_log = setup.options, setup.run_log
    first, loop_started, reason = state.step, time.time(), f"--max_unlearn_steps {options.max_unlearn_steps} reached"
    steps = tqdm(range(first, options.max_unlearn_steps), desc="unlearning", disable=None)
    with logging_redirect_tqdm([log]), stop:
        for step in steps:
            # ---- save and evaluate, with the weights as `step` updates have made them
            if setup.accelerator.num_processes == 1:
                stop.asked = stop.signalled
            if step > first and (stop.asked or (options.save_every and step % options.save_every == 0)):
                save_checkpoint(setup, state)
            if stop.asked:
                raise SystemExit(stop.farewell(f"{step} steps are saved; go on with --resume"))
            if step == 0 or (options.eval_every and step % options.eval_every == 0):
                evaluate(setup, state)
            # ---- one step: gradients, the stop rule, the update
            tick = time.perf_counter()
            stats = compute_gradients(
                setup.sampler.sequences(step, setup.formatter), setup.recipe.terms, setup.wrapped, setup.layout,
                setup.reference, setup.accelerator, num_parts=options.gradient_accumulation, sharded=options.shard,
                signalled=stop.signalled,
            )  # fmt: skip
            stop.asked = stats.signals > 0  # of several processes, all stop after the same step
            if found := reached_max_bad_loss(setup, stats):
                reason = found
                break
            lr, grad_norm = update(setup, state, stats)
            state.step = step + 1
            if step % TRIM_EVERY == 0:
                trim_cpu_heap()
            seconds = time.perf_counter() - tick
            left = (time.time() - loop_started) / (step + 1 - first) * (options.max_unlearn_steps - step - 1)
            log_step(run_log, setup.recipe, stats, step + 1, options.max_unlearn_steps, grad_norm=grad_norm, lr=lr,
                     seconds=seconds, tokens_per_second=stats.tokens / seconds, seconds_left=left)  # fmt: skip
        evaluate(setup, state)
    return state, reason


def reached_max_bad_loss(setup: Setup, stats: StepStats) -> str | None:
    """Why the run stops, before the weights are touched, where a watched term has reached --max_bad_loss."""
    ceiling = setup.options.max_bad_loss
    for term in setup.recipe.terms:
        if term.watch and term.weight > 0 and stats.means[term.name] >= ceiling:
            return f"--max_bad_loss {ceiling:g} reached: {term.field} {stats.means[term.name]:.3f}"
    return None


def update(setup: Setup, state: TrainingState, stats: StepStats) -> tuple[float, float]:
    """Move the weights; returns (learning rate, gradient norm). What is not finite never reaches them."""
    optimizer = setup.optimizer
    lr, grad_norm = optimizer.lr, math.nan
    if math.isfinite(stats.loss):
        grad_norm = optimizer.step()
    else:
        optimizer.drop_gradients()
    if math.isfinite(grad_norm):
        state.skipped = 0
        state.tokens += int(stats.tokens)
        return lr, grad_norm
    state.skipped += 1
    log.warning("step %d: loss %s, gradient norm %s: not finite, the step is not taken", state.step + 1, stats.loss,
                grad_norm)  # fmt: skip
    if state.skipped == MAX_SKIPPED_STEPS:
        roll_back(setup, state, f"{MAX_SKIPPED_STEPS} steps in a row were not finite")
    return lr, grad_norm


def log_step(run_log: RunLog, recipe: Recipe, stats: StepStats, step: int, steps: int, **figures) -> None:
    """One readable line and one JSON object: each term's mean under its own name, then the rest."""
    means = {term.field: stats.means[term.name] for term in recipe.terms}
    shown = [f"{field} {value:.{4 if 'kl' in field or 'normal' in field else 3}f}" for field, value in means.items()]
    run_log.event(
        "step",
        f"step {step}/{steps}  {'  '.join(shown)}  grad_norm {figures['grad_norm']:.2f}  lr {figures['lr']:.2e}  "
        f"{figures['tokens_per_second']:.0f} tokens/s  {figures['seconds_left']:.0f} s left",
        step=step, **means, weighted_losses=stats.weighted, **figures,
    )  # fmt: skip


def evaluate(setup: Setup, state: TrainingState) -> None:
    """Evaluate on the development split, log the result, and keep the best state within the KL budget.

    The untouched original is the one to go back to after a fault, and gives way to whatever is within the budget.
    """
    options, evaluator = setup.options, setup.evaluator
    trim_cpu_heap()
    metrics = evaluator.evaluate(setup.answer_model, setup.reference)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if value is not None)
    state.last_evaluation = {"step": state.step, **metrics}
    state.first_evaluation = state.first_evaluation or state.last_evaluation
    setup.run_log.event("eval", f"after step {state.step}: {shown}", **state.last_evaluation)
    if not options.kl_budget:
        return
    dev_kl, key, best = metrics["dev_kl"] or 0.0, evaluator.selection_key(metrics), state.best
    within = dev_kl <= options.kl_budget
    if best is None or (within and (best.step == 0 or key <= best.selection_key)):
        state.best = BestState(state.step, key, state.last_evaluation, setup.optimizer.snapshot())
    if dev_kl > COLLAPSE_FACTOR * options.kl_budget and state.step < options.max_unlearn_steps:
        roll_back(setup, state, f"development KL {dev_kl:.3f} is far past --kl_budget")


def roll_back(setup: Setup, state: TrainingState, why: str) -> None:
    """After a fault: the best state that is kept (else the last finite weights), half the learning rate."""
    state.rollbacks += 1
    if state.rollbacks > MAX_ROLLBACKS:
        raise RunError(f"{why}, after {MAX_ROLLBACKS} times half the learning rate: lower --lr (now "
                       f"{setup.options.lr:g})")  # fmt: skip
    place = "last finite weights"
    if state.best is not None:
        setup.optimizer.restore(state.best.weights)
        place = f"state after step {state.best.step}"
    setup.optimizer.halve_lr_and_reset()
    state.skipped = 0
    log.warning("%s: back to the %s, with half the learning rate (x %g)", why, place, setup.optimizer.lr_scale)


# ------------------------------------------------------------------------------------- checkpoints of a run
def save_checkpoint(setup: Setup, state: TrainingState) -> None:
    """Every process must call it: what is split is gathered."""
    options, optimizer = setup.options, setup.optimizer
    tensors, weights = optimizer.state(), gather_weights(setup.model, optimizer, setup.adapters)
    kept = dataclasses.replace(state, seconds=time.time() - setup.started)
    if state.best is not None:
        gathered = [gather_to_main_cpu(tensor) for tensor in state.best.weights]
        kept.best = dataclasses.replace(state.best, weights=gathered)
    if setup.accelerator.is_main_process:
        folder = checkpoint.folder_of(setup.save_dir)
        path = folder / f"step-{state.step:06d}"
        with atomic_dir(path) as beside:
            write_model(beside, setup.model, weights, setup.adapters, setup.formatter.tokenizer, options, merged=False)
            checkpoint.write_state(beside, kept, tensors, optimizer.progress(), setup.metadata.identity())
        checkpoint.prune_checkpoints(folder, setup.recipe.checkpoints.keep, path)
    setup.accelerator.wait_for_everyone()


def resume_or_start(setup: Setup) -> TrainingState:
    """The state of the newest checkpoint, or of a run that begins."""
    options, folder = setup.options, checkpoint.folder_of(setup.save_dir)
    if setup.newest:
        state = checkpoint.read_state(setup.newest, setup.optimizer, setup.metadata.identity())
        setup.started -= state.seconds
        setup.run_log.event("resume", f"going on after step {state.step}, from {setup.newest}", step=state.step)
        return state
    if options.resume:
        log.info("--resume: no whole checkpoint of this run in %s: it starts anew", folder)
    if options.overwrite and setup.accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    return TrainingState()


# ------------------------------------------------------------------------------------------------- finish
def finish(setup: Setup, state: TrainingState, reason: str) -> None:
    """Restore the best state within the budget, save the model whole, and tell what the run was."""
    options, optimizer, accelerator = setup.options, setup.optimizer, setup.accelerator
    saved = choose_state(setup, state)
    if not optimizer.num_updates:
        raise RunError(f"{reason} before the first update, so nothing is saved: the model is the original")
    seconds, cut = time.time() - setup.started, len(setup.formatter.cut)
    summary = {"steps": state.step, "kept_step": saved["step"], "stop_reason": reason, "seconds": round(seconds, 1),
               "cut_prompts": cut, "peak_gib": round(peak_memory_gib(accelerator.device), 2)}  # fmt: skip
    if cut:
        log.warning("%d prompts were longer than %d tokens and lost their beginning", cut,
                    setup.formatter.max_prompt_tokens)  # fmt: skip
    trim_cpu_heap()
    weights = gather_weights(setup.model, optimizer, setup.adapters)
    if accelerator.is_main_process:
        with atomic_dir(setup.save_dir) as beside:
            write_model(beside, setup.model, weights, setup.adapters, setup.formatter.tokenizer, options)
            write_json(beside / "unlearn_args.json", {"options": dataclasses.asdict(options), "run": summary})
            asked = setup.sampler.trained_prompts(saved["step"])
            write_json(beside / TRAINED_ON, {"forget": sorted(map(prompt_hash, asked))})
            manifest = setup.metadata.manifest(setup.row_counts, accelerator, seconds, state.tokens,
                                               state.first_evaluation, saved)  # fmt: skip
            write_json(beside / "run_manifest.json", manifest)
            write_model_card(beside)
    accelerator.wait_for_everyone()
    setup.run_log.event("done", f"{reason}; model saved to {setup.save_dir} after {seconds:.0f} s, "
                        f"peak memory {summary['peak_gib']:.2f} GiB", **summary)  # fmt: skip


def choose_state(setup: Setup, state: TrainingState) -> dict:
    """Restore the state that is saved; returns its evaluation. RunError where none is within the budget."""
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
