"""The plan of a run, printed by --dry_run: rows, tokens, memory, time, and the first batch."""

from __future__ import annotations

import dataclasses
import math
import time

from accelerate import PartialState

from data_module import PromptFormatter, Sequence
from engine.layout import Batch
from engine.processes import local_microbatches, local_shard
from engine.reference import ReferenceCache
from engine.tree import AnswerLogitsModel
from method.recipe import Recipe
from method.sampler import UnlearnBatchSampler
from method.terms import compute_losses, count_draws, layers_of, plan_losses, sequences_needing_reference
from utils import current_memory_gib, free_memory_gib, peak_memory_gib, trim_cpu_heap

NUM_SAMPLED_STEPS = 100  # their sizes are compared; they are spread evenly over the run
NUM_TRIED_STEPS = 3  # the largest sampled steps are run; the first one warms up
# On a CPU, fragmentation grows by this fraction of a step's memory for each tenfold number of steps. Measured over
# 12, 60 and 300 steps (docs/LOG.md, "Memory that grows").
FRAGMENTATION_FRACTION = 1 / 3


@dataclasses.dataclass
class PlanEstimate:
    """Estimates of a run: its first and its largest batch, memory in GiB, seconds a step."""

    first: Batch
    largest: Batch
    peak_gib: float
    optimizer_gib: float
    available_gib: float
    step_seconds: float


def print_plan(
    options, recipe: Recipe, formatter: PromptFormatter, sampler: UnlearnBatchSampler, answer_model: AnswerLogitsModel,
    layout_line: str,
) -> None:  # fmt: skip
    """Print the plan to standard output; no weight is changed."""
    estimate = estimate_plan(options, recipe, formatter, sampler, answer_model)
    if PartialState().is_main_process:
        print("\n".join(_plan_lines(options, recipe, formatter, sampler, answer_model, layout_line, estimate)))


def estimate_plan(options, recipe: Recipe, formatter, sampler, answer_model: AnswerLogitsModel) -> PlanEstimate:
    """Run forward and backward of the largest sampled steps, the largest last; return the estimates."""
    device, pad_id = next(answer_model.parameters()).device, formatter.tokenizer.pad_token_id
    pack_tokens, layers = recipe.layout.pack_tokens, layers_of(recipe.terms)

    def largest_part(step: int) -> tuple[list[Sequence], list[Sequence]]:
        sequences = sampler.sequences(step, formatter)
        parts = local_microbatches(sequences, options.gradient_accumulation, PartialState())
        return max((part.sequences for part in parts), key=_num_tokens, default=[]), sequences

    sampled = range(0, options.max_unlearn_steps, -(-options.max_unlearn_steps // NUM_SAMPLED_STEPS))
    sampled = [step for step in sampled if largest_part(step)[0]]  # a recipe may leave a step without a sequence
    by_size = sorted(sampled, key=lambda step: _num_tokens(largest_part(step)[0]))
    first = answer_model.layout(largest_part(sampled[0])[0], pack_tokens, pad_id)
    tried = [largest_part(step) for step in by_size[-NUM_TRIED_STEPS:]]
    scheduled = [s for sequences, _ in tried for s in sequences]
    needed = sequences_needing_reference(scheduled, recipe.terms)
    reference = ReferenceCache(answer_model, needed, pack_tokens, pad_id, layers=layers)
    trim_cpu_heap()
    before = current_memory_gib(device)
    for sequences, whole_step in tried:
        start = time.perf_counter()
        largest, counts = answer_model.layout(sequences, pack_tokens, pad_id), count_draws(whole_step)
        plan = plan_losses(recipe.terms, largest, reference, counts).to(device)
        out = answer_model(plan.batch, plan.requests, plan.weights, layers=layers)
        (total, values), states = out if layers else (out, {})
        loss = sum(term.loss for term in compute_losses(recipe.terms, plan, values, states, counts))
        sum(t for t in (total, loss) if t is not None and t.requires_grad).backward()
        answer_model.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start

    weights = list(answer_model.parameters())
    trained = sum(
        local_shard(p).numel() for p in weights if p.requires_grad
    )  # of this process, if the model is sharded
    # the measured peak has weights, activations, logits and gradients; the optimizer and the cache come on top
    cached = sum(len(s.answer_ids) for s in sequences_needing_reference(largest.sequences, recipe.terms))
    cached *= options.max_unlearn_steps * (1 + len(layers))
    width = answer_model.model.config.get_text_config().hidden_size * weights[0].element_size()
    kept = {"adamw": 8, "adamw8bit": 2}[options.optimizer] + 4 * bool(options.kl_budget)  # moments; best state
    tenfolds = math.log10(options.max_unlearn_steps) if device.type == "cpu" else 0.0
    fragmented = FRAGMENTATION_FRACTION * tenfolds * (peak_memory_gib(device) - before)
    saves = 0 < options.save_every < options.max_unlearn_steps and not options.use_lora
    copies = 4 * sum(p.numel() for p in weights) if saves and device.type == "cpu" else 0  # the masters, in fp32
    return PlanEstimate(
        first, largest,
        peak_gib=peak_memory_gib(device) + fragmented + (kept * trained + cached * width + copies) / 2**30,
        optimizer_gib=kept * trained / 2**30,
        available_gib=peak_memory_gib(device) + free_memory_gib(device),
        step_seconds=seconds * options.gradient_accumulation * first.num_tokens / largest.num_tokens,
    )  # fmt: skip


def _plan_lines(options, recipe, formatter, sampler, answer_model, layout_line, estimate: PlanEstimate) -> list[str]:
    """Return the lines of the plan."""
    parameters = list(answer_model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    answered = {side: len(sampler.answered_rows(side)) for side in sampler.rows}
    rows = {side: sum(map(len, sources)) for side, sources in sampler.rows.items()}
    terms = ", ".join(f"{term.weight:g} x {term.name}" for term in recipe.terms)
    part = "a step" if options.gradient_accumulation == 1 else "part of a step"
    lines = [
        f"model          {options.model_name}: {sum(p.numel() for p in parameters):,} parameters, {trained:,} trained",
        f"minimised      {terms}",
        f"layout         {layout_line}",
        f"rows visited   {answered['forget']:,} forget of {rows['forget']:,}, {answered['normal']:,} normal of "
        f"{rows['normal']:,}; {len(sampler.replacement_pool):,} replacement answers to draw from",
        f"{part:14s} {_size(estimate.first)}; the largest: {_size(estimate.largest)}",
        f"memory         {estimate.peak_gib:.2f} GiB at most ({estimate.optimizer_gib:.2f} of it the optimizer's "
        f"state); {_advice(estimate, options)}",
        f"time           {estimate.step_seconds:.1f} s a step (one probe step), {options.max_unlearn_steps} steps: "
        f"{estimate.step_seconds * options.max_unlearn_steps / 60:.0f} min",
        "",
        "first batch: each prompt, then in [..] the continuation that a term trains on:",
    ]
    decode = formatter.tokenizer.decode
    for s in estimate.first.sequences:
        prompt, answer = (decode(list(ids)).replace("\n", "\\n") for ids in (s.prompt_ids, s.answer_ids))
        follows = f" each token to be followed by [{decode(list(s.targets[:1]))}]" if s.targets else ""
        lines.append(f"  {s.draw:8s} row {s.example_id}: {prompt}[{answer}]{follows}")
    return lines


def _num_tokens(sequences: list[Sequence]) -> int:
    return sum(s.length for s in sequences)


def _size(batch: Batch) -> str:
    return (
        f"{len(batch.sequences)} sequences, {batch.num_tokens:,} tokens in {batch.input_ids.shape[0]} rows of "
        f"{batch.input_ids.shape[1]}, {len(batch.logit_positions):,} logit rows"
    )


def _advice(estimate: PlanEstimate, options) -> str:
    """Say whether the run fits into memory and, if not, which options to switch on."""
    if not estimate.peak_gib > 0.9 * estimate.available_gib:
        if estimate.available_gib > 0:
            return f"fits in {estimate.available_gib:.1f} GiB"
        return "the system does not report its memory"
    switches = [text for text, on in (("--use_lora", options.use_lora),
                                      ("--gradient_checkpointing", options.gradient_checkpointing))
                if not on]  # fmt: skip
    return f"does not fit in {estimate.available_gib:.1f} GiB: use {' and '.join(switches) or 'a larger machine'}"
