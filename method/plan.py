"""What a run would do, printed before it does it: rows, tokens, steps, the first batch token by token."""

from __future__ import annotations

import math
import time

from accelerate import PartialState

from data_module import Sequence
from engine.processes import local_microbatches, local_shard
from engine.reference import ReferenceCache
from engine.tree import AnswerLogitsModel, Batch
from method.objective import compute_losses, sequences_needing_reference
from utils import current_memory_gib, free_memory_gib, peak_memory_gib, trim_cpu_heap

SAMPLED_STEPS = 100  # evenly over the run, of which
# Of what a step takes on a processor, so much stays in blocks that the next steps have no use for, with each tenfold of
# the steps: measured over 12, 60 and 300 of them (docs/LOG.md, "Memory that grows").
HOLES = 1 / 3
TRIED_STEPS = 3  # the largest are tried; the first one warms up


def print_plan(options, formatter, rows, forward: AnswerLogitsModel, layout_line: str) -> None:
    """Print the plan to standard output; no weight is changed.

    What is tried is a forward and a backward of some of the steps, the largest last, since these decide the peak.
    """
    device, pad_id = next(forward.parameters()).device, formatter.tokenizer.pad_token_id

    def first_part(step: int) -> tuple[list[Sequence], list[Sequence]]:
        step_sequences = rows.sequences(step, formatter)
        parts = local_microbatches(step_sequences, options.gradient_accumulation, PartialState())
        return max((part.sequences for part in parts), key=_tokens), step_sequences

    sampled = range(0, options.max_unlearn_steps, -(-options.max_unlearn_steps // SAMPLED_STEPS))
    by_size = sorted(sampled, key=lambda step: _tokens(first_part(step)[0]))
    first = forward.layout(first_part(0)[0], options.pack_tokens, pad_id)
    tried = [first_part(step) for step in by_size[-TRIED_STEPS:]]
    scheduled_sequences = [s for sequences, _ in tried for s in sequences]
    reference = ReferenceCache(
        forward, sequences_needing_reference(scheduled_sequences, options), options.pack_tokens, pad_id
    )
    trim_cpu_heap()
    before = current_memory_gib(device)
    for sequences, step_sequences in tried:
        start = time.perf_counter()
        largest = forward.layout(sequences, options.pack_tokens, pad_id).to(device)
        sum(t["loss"] for t in compute_losses(largest, forward(largest), reference, options, step_sequences)).backward()
        forward.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start

    visited_forget, visited_normal = rows.rows_to_visit()
    weights = list(forward.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    held = sum(local_shard(p).numel() for p in weights if p.requires_grad)  # by this process, where the model is split
    seconds *= options.gradient_accumulation * first.num_tokens / largest.num_tokens
    # the probe has held weights, activations, logits and gradients; what only the first update and the cache add:
    cached = sum(len(s.answer_ids) for s in largest.sequences if s.kind == "normal") * options.max_unlearn_steps
    width = forward.model.config.get_text_config().hidden_size * weights[0].element_size()
    kept = {"adamw": 8, "adamw8bit": 2}[options.optimizer] + 4 * bool(options.kl_budget)  # moments; best state
    tenfolds = math.log10(options.max_unlearn_steps) if device.type == "cpu" else 0.0
    holes = HOLES * tenfolds * (peak_memory_gib(device) - before)
    saves = 0 < options.save_every < options.max_unlearn_steps and not options.use_lora
    copies = 8 * sum(p.numel() for p in weights) if saves and device.type == "cpu" else 0  # masters and model, in fp32
    peak = peak_memory_gib(device) + holes + (kept * held + cached * width + copies) / 2**30
    room = peak_memory_gib(device) + free_memory_gib(device)
    lines = [
        f"model          {options.model_name}: {sum(p.numel() for p in weights):,} parameters, {trained:,} trained",
        f"layout         {layout_line}",
        f"rows visited   {len(visited_forget):,} harmful of {sum(map(len, rows.forget)):,}, "
        f"{len(visited_normal):,} normal of {sum(map(len, rows.normal)):,}; {len(rows.pool):,} random answers to draw",
        f"{'a step' if options.gradient_accumulation == 1 else 'part of a step':14s} {_size(first)}; the largest: "
        f"{_size(largest)}",
        f"memory         {peak:.2f} GiB at most ({kept * held / 2**30:.2f} of it the optimizer's state); "
        + _advice(peak, room, options),
        f"time           {seconds:.1f} s a step (one probe step), {options.max_unlearn_steps} steps: "
        f"{seconds * options.max_unlearn_steps / 60:.0f} min",
        "",
        "first batch; [..] is an answer, trained on; the words before it are not:",
    ]
    decode = formatter.tokenizer.decode
    for sequence in first.sequences:
        prompt = decode(list(sequence.prompt_ids)).replace("\n", "\\n")
        answer = decode(list(sequence.answer_ids)).replace("\n", "\\n")
        follows = f" each token to be followed by [{decode(list(sequence.targets[:1]))}]" if sequence.targets else ""
        lines.append(f"  {sequence.kind:7s} row {sequence.group}: {prompt}[{answer}]{follows}")
    if PartialState().is_main_process:
        print("\n".join(lines))


def _tokens(sequences: list[Sequence]) -> int:
    return sum(s.length for s in sequences)


def _size(batch: Batch) -> str:
    return (
        f"{len(batch.sequences)} sequences, {batch.num_tokens:,} tokens in {batch.input_ids.shape[0]} rows of "
        f"{batch.input_ids.shape[1]}, {len(batch.logit_positions):,} logit rows"
    )


def _advice(peak: float, room: float, options) -> str:
    """Whether it fits, and what to switch on where it does not."""
    if not peak > 0.9 * room:
        return f"fits in {room:.1f} GiB" if room > 0 else "the system does not tell how much there is"
    switches = [text for text, on in (("--use_lora", options.use_lora),
                                      ("--gradient_checkpointing", options.gradient_checkpointing))
                if not on]  # fmt: skip
    return f"does not fit in {room:.1f} GiB: use {' and '.join(switches) or 'a larger machine'}"
