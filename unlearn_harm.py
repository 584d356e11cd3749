"""Make a causal language model forget harmful answers and keep the rest (Yao, Xu and Liu 2023).

    python unlearn_harm.py --model_name=facebook/opt-1.3b --model_save_dir=models/opt1.3b_unlearned

Reads top to bottom: options -> processes -> data -> model -> own answers -> reference -> loop -> save.
A step minimises, over the trainable parameters,

    bad_weight * L_forget + random_weight * L_random + normal_weight * L_normal
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data_module import (
    TRAINED_ON,
    PromptFormatter,
    UnlearnBatchSampler,
    prompt_hash,
    refuse_overlap,
    sample,
    split_sources,
)
from engine import checkpoint
from engine.adapters import LoraSettings, add_lora, check_save_path, enable_gradient_checkpointing, freeze
from engine.generation import generate_missing_responses
from engine.optimizer import MasterWeightAdamW, OptimizerSettings, refuse_missing_8bit
from engine.processes import gather_to_main_cpu, local_microbatches, shard, start_processes
from engine.reference import ReferenceCache
from engine.run_metadata import RunMetadata
from engine.tree import wrap_model
from evaluation.dev_evaluator import DevEvaluator
from evaluation.report import write_model_card
from method.objective import compute_losses, sequences_needing_reference
from method.plan import print_plan
from options import UnlearnOptions, parse
from sources.rows import read_sources
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
    save_tokenizer,
    seed_everything,
    trim_cpu_heap,
    write_json,
)

MAX_SKIPPED_STEPS = 3  # in a row, for a loss or gradient that is not finite; then the run rolls back
MAX_ROLLBACKS = 5  # each halves the learning rate
TRIM_EVERY = 2  # steps; each one leaves a third of what it used in holes that the next one cannot use
COLLAPSE = 5  # times --kl_budget: from there on the retain side has collapsed, and the run rolls back


def main() -> None:
    # ------------------------------------------------------------------------------ options and processes
    options = parse(UnlearnOptions)
    save_dir = Path(options.model_save_dir)
    seed_everything(options.seed, options.threads)
    accelerator = start_processes(options)
    refuse_missing_8bit(options)
    held = lock_output_dir(save_dir, options, accelerator)
    newest = checkpoint.latest_valid_checkpoint(checkpoint.folder_of(save_dir)) if options.resume else None
    started = time.time()
    stop = StopSignals()

    # -------------------------------------------------------------------------- rows and their three splits
    sources = {
        "forget": [
            some for some in read_sources(options.forget_data, "--forget_data", options.harm_categories) if some
        ],
        "normal": read_sources(options.normal_data, "--normal_data"),
    }
    all_rows = {side: [row for some in by_source for row in some] for side, by_source in sources.items()}
    refuse_overlap(all_rows["forget"], all_rows["normal"])
    tokenizer = load_tokenizer(options.model_name, trust_remote_code=options.trust_remote_code)
    provenance = RunMetadata(options, all_rows)
    if newest:  # before minutes go into the original's answers; the model is compared where the state is read
        try:
            checkpoint.check_same_run(newest, {k: v for k, v in provenance.identity().items() if k != "model"})
        except UsageError as error:
            if not options.overwrite:
                raise
            log.warning("%s; with --overwrite, that is done", error)
            newest = None
    # what a mistyped name could not replace is started anew only here
    run_log = RunLog(options.log_file, write=accelerator.is_main_process and not options.dry_run, resume=bool(newest))
    forget, normal = (split_sources(by_source, options) for by_source in sources.values())
    rows = UnlearnBatchSampler([parts["train"] for parts in forget], [parts["train"] for parts in normal], options)
    dev_forget = sample([row for parts in forget for row in parts["dev"]], options.eval_prompts, options.seed)
    kinds = {spec: parts["dev"] for spec, parts in zip(options.normal_data, normal, strict=True)}  # each file once
    dev_normal = [
        row for some in kinds.values() for row in sample(some, -(-options.eval_prompts // len(kinds)), options.seed)
    ]
    if options.kl_budget and not dev_normal:
        raise UsageError("--kl_budget: no normal row is held out to measure it on; raise --dev_share or give more rows")
    counts = {"forget": [_counts(parts) for parts in forget], "normal": [_counts(parts) for parts in normal]}
    run_log.event("data", f"rows, split by prompt: forget {counts['forget']}, normal {counts['normal']}", **counts)

    # ------------------------------------------------------------------------- model, tokenizer, optimizer
    formatter = PromptFormatter(tokenizer, options.template, options.max_prompt_tokens, options.max_answer_tokens)
    model = load_model(options.model_name, **options.trust())
    if not options.shard:  # a model that is to be split need not fit on one device
        model.to(accelerator.device)
    dtype = pick_dtype(options.dtype, accelerator.device)
    provenance.set_base_model(fingerprint(model), dtype)
    formatter.fit(model.config, max(options.max_answer_tokens, rows.normal_tokens, options.eval_tokens))
    some = [source[0].prompt for source in rows.forget + rows.normal]
    forward, layout_line = wrap_model(model, formatter, some, options.pack_tokens)
    frozen = freeze(model, options.frozen_layers)
    lora = LoraSettings(options.lora_rank, options.lora_alpha, tuple(options.lora_targets))
    adapters = add_lora(model, lora, frozen) if options.use_lora else None
    probe = torch.tensor([formatter.prompt(some[0])[-8:]], device=next(model.parameters()).device)  # (1, T)
    check_save_path(model, adapters, probe, lora.targets)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model, options.frozen_layers)
    if options.shard:
        if not forward.packed:
            raise UsageError(f"--shard needs the packed layout, and this model does not take it ({layout_line})")
        shard(forward, dtype, accelerator.device.type)
    optimizer_settings = OptimizerSettings(
        options.lr, options.max_unlearn_steps, options.lr_schedule, options.warmup_steps, options.weight_decay,
        options.max_grad_norm, options.optimizer, options.use_lora,
    )  # fmt: skip
    stepper = MasterWeightAdamW(model, optimizer_settings, torch.float32 if options.shard else dtype)
    run_log.event(
        "model", f"{options.model_name} in {str(dtype)[6:]} on {accelerator.device}, template {formatter.style}, "
        f"{layout_line}; {accelerator.num_processes} process{'es, the model split over them' if options.shard else ''}",
        packed=forward.packed, dtype=str(dtype)[6:], processes=accelerator.num_processes, shard=options.shard,
    )  # fmt: skip

    # -------------------------------------------------- own answers, then the original's states (read-only)
    def bar(items, label):
        return tqdm(items, desc=label, leave=False, disable=None)  # None: a terminal has one, a file has none

    def answer(wanted, tokens):
        if options.dry_run:  # a plan needs lengths, not answers
            return [r if r.response else dataclasses.replace(r, response=f"own answer {r.prompt[:30]} " * 8)
                    for r in wanted]  # fmt: skip
        answered = generate_missing_responses(
            wanted, forward.generator, formatter, fingerprint=provenance.base_model, tokens=tokens,
            temperature=options.answer_temperature, seed=options.seed, batch_size=options.generation_batch,
            cache_dir=options.cache_dir, progress=lambda chunks: bar(chunks, "own answers"),
        )  # fmt: skip
        provenance.add_answers([row for row, asked in zip(answered, wanted, strict=True) if asked.response is None])
        return answered

    rows.fill_responses(answer)
    watch = DevEvaluator(
        answer(dev_forget, options.max_answer_tokens), answer(dev_normal, rows.normal_tokens), formatter, options
    )
    if options.dry_run:
        print_plan(options, formatter, rows, forward, layout_line)
        return
    scheduled_sequences = [s for step in range(options.max_unlearn_steps) for s in rows.sequences(step, formatter)]
    reference = ReferenceCache(
        forward,
        sequences_needing_reference(scheduled_sequences, options),
        options.pack_tokens,
        tokenizer.pad_token_id,
        progress=lambda chunks: bar(chunks, "reference"),
    )
    reference.precompute(forward, sequences_needing_reference(watch.sequences, options))
    run_log.event(
        "reference", f"the original's states on the normal rows: {reference.bytes() / 2**20:.0f} MiB, "
        f"ready after {time.time() - started:.0f} s", mib=reference.bytes() / 2**20, seconds=time.time() - started,
    )  # fmt: skip
    wrapped = forward if options.shard else accelerator.prepare(forward)

    # ------------------------------------------------------------------- where a run that was stopped goes on
    def save_checkpoint(step: int) -> None:
        # every process: what is split is gathered
        state, weights = stepper.state(masters=False), gather_weights(model, stepper, adapters)
        kept = {**best, "state": [gather_to_main_cpu(t) for t in best["state"] or ()] or None} if best else None
        if accelerator.is_main_process:
            with atomic_dir(checkpoint.folder_of(save_dir) / f"step-{step:06d}") as beside:
                write_model(beside, model, weights, adapters, tokenizer, options, merged=False)
                checkpoint.write_state(beside, state, stepper.progress(), step, kept, guard, provenance.identity(),
                                       {"seconds": time.time() - started, "tokens": provenance.tokens,
                                        "looks": run_log.looks[:1]},
                                       weights=weights, names=stepper.names)  # fmt: skip
            folder = checkpoint.folder_of(save_dir)
            checkpoint.prune_checkpoints(folder, options.keep_checkpoints, folder / f"step-{step:06d}")
        accelerator.wait_for_everyone()

    first_step, best, guard = 0, None, {"skipped": 0, "rollbacks": 0}
    if newest:
        first_step, best, guard, past = checkpoint.read_state(newest, stepper, provenance.identity())
        started, provenance.tokens, run_log.looks = started - past["seconds"], past["tokens"], past["looks"]
        run_log.event("resume", f"going on after step {first_step}, from {newest}", step=first_step)
    elif options.resume:
        log.info("--resume: no whole checkpoint of this run in %s: it starts anew", checkpoint.folder_of(save_dir))
    if not newest and options.overwrite and accelerator.is_main_process:
        shutil.rmtree(checkpoint.folder_of(save_dir), ignore_errors=True)

    # ---------------------------------------------------------------------------------------------- the loop
    stop_reason = f"--max_unlearn_steps {options.max_unlearn_steps} reached"
    loop_started = time.time()
    steps = tqdm(range(first_step, options.max_unlearn_steps), desc="unlearning", disable=None)
    with logging_redirect_tqdm([log]), stop:
        for step in steps:
            # ---- save, look, keep the best state: all with the weights as `step` updates have made them
            if accelerator.num_processes == 1:
                stop.asked = stop.signalled
            if step > first_step and (stop.asked or (options.save_every and step % options.save_every == 0)):
                save_checkpoint(step)
            if stop.asked:
                raise SystemExit(stop.farewell(f"{step} steps are saved; go on with --resume"))
            if step == 0 or (options.eval_every and step % options.eval_every == 0):
                best = look(step, watch, forward, reference, stepper, best, options, run_log)
                if options.kl_budget and (best["last_kl"] or 0) > COLLAPSE * options.kl_budget:
                    guard = roll_back(f"development KL {best['last_kl']:.3f} is far past --kl_budget", stepper, best,
                                      guard, options)  # fmt: skip

            # ---- this process's rows of the step: one forward, or one a part where gradients are accumulated
            tick = time.perf_counter()
            step_sequences = rows.sequences(step, formatter)
            parts = local_microbatches(step_sequences, options.gradient_accumulation, accelerator)
            if step == first_step and len(parts) < options.gradient_accumulation:
                log.info("--gradient_accumulation %d: a step's rows fill only %d micro-batches",
                         options.gradient_accumulation, len(parts))  # fmt: skip
            sums = torch.zeros(7, device=accelerator.device)
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                batch = forward.layout(part.sequences, options.pack_tokens, tokenizer.pad_token_id).to(
                    accelerator.device
                )
                # split, gradients are added up in their parts: put off, each GPU would hold all of them
                with contextlib.nullcontext() if last or options.shard else accelerator.no_sync(wrapped):
                    logits = wrapped(batch)  # (N, V)
                    bad, random, kl, first_kl = compute_losses(batch, logits, reference, options, step_sequences)
                    loss = bad["loss"] + random["loss"] + kl["loss"] + first_kl["loss"]
                    # processes average their gradients
                    accelerator.backward(loss * part.counts * accelerator.num_processes)
                means = [bad["mean"], random["mean"], kl["mean"], first_kl["mean"]]
                counts_of_part = loss.new_tensor([float(last and stop.signalled), batch.num_tokens * part.counts])
                sums += torch.cat([torch.stack([loss.detach(), *means]) * part.counts, counts_of_part])
                del batch, logits, loss  # the next part's come before these would go
            figures = accelerator.reduce(sums, "sum").tolist()
            _, bad_loss, random_loss, normal_loss, first_token_kl, signals, tokens = figures
            stop.asked = signals > 0  # of several processes, all stop after the same step

            # ---- the stop rules, looked at every step, before the weights are touched
            if options.bad_weight > 0 and bad_loss >= options.max_bad_loss:
                stop_reason = f"--max_bad_loss {options.max_bad_loss:g} reached: bad_loss {bad_loss:.3f}"
                break

            # ---- the update; one that is not finite never reaches the weights
            lr, grad_norm = stepper.lr, math.nan
            if math.isfinite(figures[0]):
                grad_norm = stepper.step()
            else:
                stepper.drop_gradients()
            if math.isfinite(grad_norm):
                guard["skipped"] = 0
                provenance.tokens += int(tokens)
            else:
                guard["skipped"] += 1
                log.warning("step %d: loss %s, gradient norm %s: not finite, the step is not taken", step + 1,
                            figures[0], grad_norm)  # fmt: skip
            if step % TRIM_EVERY == 0:
                trim_cpu_heap()
            if guard["skipped"] == MAX_SKIPPED_STEPS:
                guard = roll_back(f"{MAX_SKIPPED_STEPS} steps in a row were not finite", stepper, best, guard, options)

            # ---- one line a step
            seconds = time.perf_counter() - tick
            left = (time.time() - loop_started) / (step + 1 - first_step) * (options.max_unlearn_steps - step - 1)
            run_log.event(
                "step",
                f"step {step + 1}/{options.max_unlearn_steps}  bad_loss {bad_loss:.3f}  random_loss {random_loss:.3f}  "
                f"normal_loss {normal_loss:.4f}  first_kl {first_token_kl:.4f}  grad_norm {grad_norm:.2f}  "
                f"lr {lr:.2e}  {tokens / seconds:.0f} tokens/s  "
                f"{left:.0f} s left",
                step=step + 1, bad_loss=bad_loss, random_loss=random_loss, normal_loss=normal_loss,
                first_token_kl=first_token_kl, grad_norm=grad_norm, lr=lr, seconds=seconds,
                tokens_per_second=tokens / seconds, seconds_left=left,
            )  # fmt: skip
        else:
            step = options.max_unlearn_steps
        best = look(step, watch, forward, reference, stepper, best, options, run_log)

    # -------------------------------------------------------------------------- the best state, saved whole
    if options.kl_budget:
        if best["step"] == 0:
            raise RunError(
                f"no state that was looked at is within --kl_budget {options.kl_budget:g}, so nothing is saved: "
                "raise it, or lower --lr or --eval_every"
            )
        if best["state"] is not None and best["step"] != step:
            stepper.restore(best["state"])
        log.info("the state after step %d is kept: best within --kl_budget %g", best["step"], options.kl_budget)
    if not stepper.num_updates:
        raise RunError(f"{stop_reason} before the first update, so nothing is saved: the model is the original")
    seconds = time.time() - started
    summary = {"steps": step, "kept_step": best["step"] if options.kl_budget else step, "stop_reason": stop_reason,
               "seconds": round(seconds, 1), "cut_prompts": len(formatter.cut),
               "peak_gib": round(peak_memory_gib(accelerator.device), 2)}  # fmt: skip
    if formatter.cut:
        log.warning("%d prompts were longer than %d tokens and lost their beginning", len(formatter.cut),
                    formatter.max_prompt_tokens)  # fmt: skip
    trim_cpu_heap()
    weights = gather_weights(model, stepper, adapters)
    if accelerator.is_main_process:
        with atomic_dir(save_dir) as beside:
            write_model(beside, model, weights, adapters, tokenizer, options)
            write_json(beside / "unlearn_args.json", {"options": dataclasses.asdict(options), "run": summary})
            shown = best["found"] if options.kl_budget else run_log.looks[-1]
            write_json(beside / "run_manifest.json", provenance.manifest(counts, accelerator, seconds,
                                                                         run_log.looks[0], shown))  # fmt: skip
            asked = rows.trained_prompts(summary["kept_step"])
            write_json(beside / TRAINED_ON, {"forget": sorted(map(prompt_hash, asked))})
            write_model_card(beside)
    accelerator.wait_for_everyone()
    run_log.event("done", f"{stop_reason}; model saved to {save_dir} after {seconds:.0f} s, "
                  f"peak memory {summary['peak_gib']:.2f} GiB", **summary)  # fmt: skip
    if accelerator.is_main_process and (line := checkpoint.describe_leftovers(save_dir)):
        log.info(line)
    held.close()


# ------------------------------------------------------------------------------------------ parts of the run
def look(step, watch: DevEvaluator, forward, reference, stepper, best, options, run_log) -> dict:
    """Evaluate on the development split, log it, and return the best state so far; the untouched original is the
    one to go back to after a fault, and gives way to whatever is within the budget."""
    trim_cpu_heap()
    found = watch.look(forward, reference)
    shown = "  ".join(f"{k} {v:.3f}" for k, v in found.items() if v is not None)
    run_log.event("eval", f"after step {step}: {shown}", step=step, **found)
    within = (found["dev_kl"] or 0.0) <= options.kl_budget
    selection_key = watch.selection_key(found)
    if best is None or (within and (best["step"] == 0 or selection_key <= best["badness"])):
        best = {"step": step, "badness": selection_key, "state": stepper.snapshot() if options.kl_budget else None,
                "found": {"step": step, **found}}  # fmt: skip
    return {**best, "last_kl": found["dev_kl"]}


def gather_weights(model, stepper: MasterWeightAdamW, adapters) -> dict[str, torch.Tensor | None]:
    """The fp32 weights that are saved, by name, whole in the first process: with adapters these alone. Every process
    must call it."""
    named = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()
             if adapters is None or tensor.requires_grad}  # fmt: skip
    saved: dict[int, torch.Tensor | None] = {}  # a tied weight has two names and stays one tensor
    for tensor in named.values():
        if id(tensor) not in saved:
            saved[id(tensor)] = gather_to_main_cpu(stepper.master(tensor))
    return {name: saved[id(tensor)] for name, tensor in named.items()}


def write_model(beside: Path, model, weights: dict, adapters, tokenizer, options, *, merged: bool = True) -> None:
    """Fill a folder with the model as it is now and its tokenizer; adapters are merged into a fresh base."""
    if adapters is None:
        model.save_pretrained(beside, state_dict=dict(weights))  # it empties what it is given
        config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        # the weights are: a config that says bf16 would have them rounded where they are loaded
        write_json(beside / "config.json", config | {"dtype": "float32"})
    else:
        import peft

        named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        adapters.save_pretrained(beside / "adapter", state_dict=named)
        if merged:
            base = load_model(options.model_name, **options.trust())
            peft.PeftModel.from_pretrained(base, beside / "adapter").merge_and_unload().save_pretrained(beside)
    save_tokenizer(tokenizer, beside)


def roll_back(why: str, stepper: MasterWeightAdamW, best: dict | None, guard: dict, options) -> dict:
    """After a fault: the best state that is kept (else the last finite weights), half the learning rate."""
    rollbacks = guard["rollbacks"] + 1
    if rollbacks > MAX_ROLLBACKS:
        raise RunError(f"{why}, after {MAX_ROLLBACKS} times half the learning rate: lower --lr (now {options.lr:g})")
    place = "last finite weights"
    if best and best["state"] is not None:
        stepper.restore(best["state"])
        place = f"state after step {best['step']}"
    stepper.halve_lr_and_reset()
    log.warning("%s: back to the %s, with half the learning rate (x %g)", why, place, stepper.lr_scale)
    return {"skipped": 0, "rollbacks": rollbacks}


def lock_output_dir(save_dir: Path, options, accelerator):
    """Refuse a folder with something in it, or that another run writes to; the lock is held until it is closed."""
    if options.dry_run or not accelerator.is_main_process:
        return contextlib.ExitStack()
    if save_dir.resolve() in (here := Path.cwd(), *here.parents):
        raise UsageError(f"--model_save_dir {save_dir}: is where this runs, or above it; name a folder of its own")
    held = checkpoint.OutputDirLock(save_dir)
    if save_dir.exists() and any(save_dir.iterdir()) and not options.overwrite:
        raise UsageError(f"--model_save_dir {save_dir}: is not empty; pass --overwrite to replace it")
    checkpoints = checkpoint.folder_of(save_dir)
    if checkpoints.exists() and not (options.resume or options.overwrite):
        raise UsageError(f"{checkpoints}: holds checkpoints of a run that was stopped; pass --resume to go on with "
                         "it, or --overwrite to start anew")  # fmt: skip
    return held


def _counts(parts: dict) -> dict:
    return {split: len(part) for split, part in parts.items()}


if __name__ == "__main__":
    run_script(main)
