"""The plan of a run, printed by --dry_run: rows, tokens, memory, time, and the first batch."""

from __future__ import annotations

import dataclasses
import math

from accelerate import PartialState

from data_module import Sequence
from engine.layout import Batch
from engine.memory import MemoryParts, estimate_parts, measure_saved_bytes, run_measured, switch_that_fits
from engine.processes import local_microbatches
from engine.reference import ReferenceCache
from engine.tree import AnswerLogitsModel
from method.recipe import Recipe
from method.sampler import UnlearnBatchSampler
from method.terms import (
    compute_losses,
    count_draws,
    draws_of,
    layers_of,
    plan_losses,
    sequences_needing_reference,
)
from prompts.formatter import PromptFormatter
from utils import current_memory_gib, free_memory_gib, peak_memory_gib, trim_cpu_heap

NUM_SAMPLED_STEPS = 100  # their sizes are compared; they are spread evenly over the run
PROBE_TOKENS = 256  # at least; what autograd saves for them gives the activations of a whole step
NUM_TRIED_STEPS = 3  # the largest sampled steps are run; the first one warms up
# On a CPU, fragmentation grows by this fraction of a step's memory for each tenfold number of steps. Measured over
# 12, 60 and 300 steps (docs/LOG.md, "Memory that grows").
FRAGMENTATION_FRACTION = 1 / 3


@dataclasses.dataclass
class PlanEstimate:
    """Estimates of a run: its first and its largest batch, memory in GiB, seconds a step (None if it was not tried).

    switches: options that make it fit, where it does not.
    """

    first: Batch
    largest: Batch
    parts: MemoryParts
    peak_gib: float
    available_gib: float
    step_seconds: float | None
    switches: list[str]


def print_plan(
    options, recipe: Recipe, formatter: PromptFormatter, sampler: UnlearnBatchSampler, answer_model: AnswerLogitsModel,
    layout_line: str, account: list[str],
) -> None:  # fmt: skip
    """Print the plan to standard output; no weight is changed."""
    estimate = estimate_plan(options, recipe, formatter, sampler, answer_model)
    if PartialState().is_main_process:
        print("\n".join(_plan_lines(options, recipe, formatter, sampler, answer_model, layout_line, estimate, account)))


def estimate_plan(options, recipe: Recipe, formatter, sampler, answer_model: AnswerLogitsModel) -> PlanEstimate:
    """Run forward and backward of the largest sampled steps, the largest last; return the estimates.

    On a GPU that these steps would not fit, they are not run, and the estimate is all there is.
    """
    device, pad_id = next(answer_model.parameters()).device, formatter.tokenizer.pad_token_id
    pack_tokens, layers, model = recipe.layout.pack_tokens, layers_of(recipe.terms), answer_model.model

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

    def loss_of(sequences: list[Sequence], whole_step: list[Sequence]):
        counts, batch = count_draws(whole_step), answer_model.layout(sequences, pack_tokens, pad_id)
        plan = plan_losses(recipe.terms, batch, reference, counts).to(device)
        out = answer_model(plan.batch, plan.requests, plan.weights, layers=layers)
        (total, values), states = out if layers else (out, {})
        loss = sum(term.loss for term in compute_losses(recipe.terms, plan, values, states, counts))
        return sum(t for t in (total, loss) if t is not None and t.requires_grad)

    few, whole_step = _first_tokens(tried[-1][0]), tried[-1][1]
    places = answer_model.layout(few, pack_tokens, pad_id).input_ids.numel()
    saved = measure_saved_bytes(
        model, lambda: loss_of(few, whole_step).backward(), places, num_frozen=recipe.trainable.frozen_layers,
        checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    answer_model.zero_grad(set_to_none=True)
    largest = answer_model.layout(tried[-1][0], pack_tokens, pad_id)
    parts = estimate_parts(model, options, saved, largest.input_ids.numel())
    perturbed, trained = recipe.perturbed, [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    # of short runs, in fp32: the first weights, the sum of the last ones, and a new copy
    copies = 12 * count * (recipe.average.runs > 1)
    if perturbed.at(0):  # the weights in fp32, while others stand in their place; the forget side's gradient, changed
        copies += 4 * perturbed.changes_weights * count
        copies += 2 * perturbed.shapes_gradient * sum(p.numel() * p.element_size() for p in trained)
        if perturbed.adversary_steps:  # its factors and their moments, and its weights while SAM moves on from them
            copies += 4 * count * (perturbed.radius > 0)
            copies += 12 * perturbed.adversary_rank * sum(sum(p.shape[-2:]) * math.prod(p.shape[:-2]) for p in trained)
    parts = dataclasses.replace(parts, best_state=parts.best_state + copies)
    loaded = peak_memory_gib(device)
    available = free_memory_gib(device) + (current_memory_gib(device) if device.type == "cuda" else loaded)
    seconds, peak = None, parts.total / 2**30
    if device.type != "cuda" or peak <= available:
        trim_cpu_heap()
        before = current_memory_gib(device)
        for sequences, whole_step in tried:
            seconds, step_bytes = run_measured(
                device, lambda sequences=sequences, whole=whole_step: loss_of(sequences, whole).backward()
            )
            answer_model.zero_grad(set_to_none=True)
        seconds *= options.gradient_accumulation * first.num_tokens / largest.num_tokens
        if device.type == "cuda":  # what the step took in truth, in place of its estimate
            parts = dataclasses.replace(parts, activations=step_bytes)
            peak = max(loaded, parts.total / 2**30)
        else:
            step_peak = peak_memory_gib(device)
            peak = step_peak + _cpu_extras(options, recipe, sampler, answer_model, parts, needed, step_peak - before)
    fits_in = 0.9 * available * 2**30
    switches = switch_that_fits(model, options, recipe.lora.rank, saved, largest.input_ids.numel(), fits_in)
    return PlanEstimate(first, largest, parts, peak, available, seconds, switches if peak > 0.9 * available else [])


def _first_tokens(sequences: list[Sequence]) -> list[Sequence]:
    """Return the first sequences, as many as have PROBE_TOKENS tokens together."""
    few: list[Sequence] = []
    for sequence in sequences:
        if _num_tokens(few) < PROBE_TOKENS:
            few.append(sequence)
    return few


def _cpu_extras(options, recipe, sampler, answer_model, parts: MemoryParts, needed, step_gib: float) -> float:
    """Return the GiB that a run on a CPU holds beyond a step that was measured: the optimizer's state, the original's
    states, what a checkpoint copies, and memory lost between blocks."""
    model, steps = answer_model.model, options.max_unlearn_steps
    sides = {draw.side for draw in draws_of(recipe.terms) if draw.name in {s.draw for s in needed}}
    rows = sum(len(sampler.answered_rows(side)) for side in sides)
    width = model.config.get_text_config().hidden_size * next(model.parameters()).element_size()
    cached = reference_tokens(needed, steps / NUM_TRIED_STEPS, rows) * width * (1 + len(layers_of(recipe.terms)))
    fragmented = FRAGMENTATION_FRACTION * math.log10(steps) * step_gib
    saves = 0 < options.save_every < steps and not options.use_lora
    copies = 4 * sum(p.numel() for p in model.parameters()) if saves else 0  # the masters, in fp32
    return fragmented + (parts.moments + parts.best_state + cached + copies) / 2**30


def reference_tokens(needed: list[Sequence], times: float, rows: int) -> float:
    """Return the answer tokens whose states are cached in a run.

    needed: the sequences of some steps; times: how many times as many steps the run has; rows: the rows that they come
    from. A sequence that comes again is cached once, so there are no more than rows, or than came in these steps.
    """
    asked = [[(other.prompt_ids, other.answer_ids) for other in s.for_original()] for s in needed]
    unique = {tuple(of_one): sum(len(answer) for _, answer in of_one) for of_one in asked}
    number = min(len(unique) * times, max(rows, len(unique)))
    return number * sum(unique.values()) / max(len(unique), 1)


def _plan_lines(
    options, recipe, formatter, sampler, answer_model, layout_line, estimate: PlanEstimate, account: list[str]
) -> list[str]:
    """Return the lines of the plan."""
    parameters = list(answer_model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    answered = {side: len(sampler.answered_rows(side)) for side in sampler.rows}
    rows = {side: sum(map(len, sources)) for side, sources in sampler.rows.items()}
    terms = ", ".join(f"{term.weight:g} x {term.name}" for term in recipe.terms)
    selection = recipe.selection
    changes = [_adversary_line(recipe.perturbed)] * (recipe.perturbed.adversary_steps > 0)
    changes += [f"moved by {recipe.perturbed.radius:g}"] * (recipe.perturbed.radius > 0)
    changes += [f"rounded to {recipe.perturbed.bits} bits"] * (recipe.perturbed.bits > 0)
    first = [f"before that    selection: the forget gradient without its {selection.directions} largest directions is "
             f"taken out, up to a KL of {selection.kl_budget:g}"] if selection.kl_budget else []  # fmt: skip
    if changes:
        every = recipe.perturbed.every
        first.append(f"forget side    its gradient is taken at weights {' and '.join(changes)}, one step in {every}")
    shapes = ["kept where its sign is the others'"] * recipe.perturbed.agreeing
    shapes += [f"brought to a length of {recipe.perturbed.norm:g}"] * (recipe.perturbed.norm > 0)
    if shapes:
        first.append(f"forget side    its gradient is {' and '.join(shapes)}, one step in {recipe.perturbed.every}")
    if recipe.noise.share:
        first.append(f"before that    noise takes the place of {recipe.noise.share:g} of each matrix")
    if recipe.average.runs > 1:
        first.append(f"averaged       the weights of {recipe.average.runs} runs from the first ones, of "
                     f"{options.max_unlearn_steps // recipe.average.runs} steps each")  # fmt: skip
    part = "a step" if options.gradient_accumulation == 1 else "part of a step"
    lines = [
        f"model          {options.model_name}: {sum(p.numel() for p in parameters):,} parameters, {trained:,} trained",
        f"minimised      {terms}",
        *first,
        f"layout         {layout_line}",
        *(f"{'rows' if i == 0 else '':14s} {line}" for i, line in enumerate(account)),
        f"rows visited   {answered['forget']:,} forget of {rows['forget']:,}, {answered['normal']:,} normal of "
        f"{rows['normal']:,}; {len(sampler.replacement_pool):,} replacement answers to draw from",
        f"{part:14s} {_size(estimate.first)}; the largest: {_size(estimate.largest)}",
        f"memory         {estimate.peak_gib:.2f} GiB at most, of it {estimate.parts.line()}; {_advice(estimate)}",
        f"time           {_time(estimate.step_seconds, options.max_unlearn_steps)}",
        "",
        "first batch: each prompt, then in [..] the continuation that a term trains on:",
    ]
    decode = formatter.tokenizer.decode
    for s in estimate.first.sequences:
        prompt, answer = (decode(list(ids)).replace("\n", "\\n") for ids in (s.prompt_ids, s.answer_ids))
        follows = f" each token to be followed by [{decode(list(s.targets[:1]))}]" if s.targets else ""
        lines.append(f"  {s.draw:8s} row {s.example_id}: {prompt}[{answer}]{follows}")
    return lines


def _adversary_line(perturbed) -> str:
    """Say at which weights the forget side's gradient is taken, and what that costs."""
    more = "1 pass more" if perturbed.adversary_steps == 1 else f"{perturbed.adversary_steps} passes more"
    return (f"which an adversary of rank {perturbed.adversary_rank} has taught the forget rows again ({more} a step, "
            f"which the time leaves out; anew after {perturbed.adversary_turns})")  # fmt: skip


def _num_tokens(sequences: list[Sequence]) -> int:
    return sum(s.length for s in sequences)


def _size(batch: Batch) -> str:
    return (
        f"{len(batch.sequences)} sequences, {batch.num_tokens:,} tokens in {batch.input_ids.shape[0]} rows of "
        f"{batch.input_ids.shape[1]}, {len(batch.logit_positions):,} logit rows"
    )


def _time(seconds: float | None, steps: int) -> str:
    if seconds is None:
        return "not measured, since a step does not fit"
    return f"{seconds:.1f} s a step (one probe step), {steps} steps: {seconds * steps / 60:.0f} min"


def _advice(estimate: PlanEstimate) -> str:
    """Say whether the run fits into memory and, if not, which options to switch on."""
    if not estimate.peak_gib > 0.9 * estimate.available_gib:
        if estimate.available_gib > 0:
            return f"fits in {estimate.available_gib:.1f} GiB"
        return "the system does not report its memory"
    switches = " ".join(estimate.switches) or "a larger machine, or --shard over several GPUs"
    return f"does not fit in {estimate.available_gib:.1f} GiB: use {switches}"
