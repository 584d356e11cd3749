"""What a run would do, printed before it does it: rows, tokens, steps, the first batch token by token."""

from __future__ import annotations

import time

import torch

from packing import AnswerLogits, Batch


def print_plan(options, encoder, rows, forward: AnswerLogits, batch: Batch, layout_line: str, one_step) -> None:
    """Print the plan to standard output. `one_step()` runs a forward and a backward, and changes no weight."""
    visited_forget, visited_normal = rows.rows_to_visit()
    weights = list(forward.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    held = sum(p.numel() * p.element_size() for p in weights)
    one_step()  # the first call allocates and compiles; the second is timed
    start = time.perf_counter()
    one_step()
    seconds = time.perf_counter() - start
    lines = [
        f"model          {options.model_name}: {sum(p.numel() for p in weights):,} parameters, {trained:,} trained",
        f"layout         {layout_line}",
        f"rows visited   {len(visited_forget):,} harmful of {len(rows.forget):,}, "
        f"{len(visited_normal):,} normal of {sum(map(len, rows.normal)):,}; {len(rows.pool):,} random answers to draw",
        f"a step         {len(batch.sequences)} sequences, {batch.real_tokens:,} tokens in {batch.input_ids.shape[0]} "
        f"rows of {batch.input_ids.shape[1]}, {len(batch.targets):,} answer tokens, {len(batch.index):,} logit rows",
        f"memory         weights {held / 2**20:,.0f} MiB, gradients, moments and fp32 copies "
        f"{trained * (8 + 4 + (4 if weights[0].dtype != torch.float32 else 0)) / 2**20:,.0f} MiB",
        f"time           {seconds:.1f} s a step (one probe step), {options.max_unlearn_steps} steps: "
        f"{seconds * options.max_unlearn_steps / 60:.0f} min",
        "",
        "first batch; [..] is an answer, trained on; the words before it are not:",
    ]
    decode = encoder.tokenizer.decode
    for sequence in batch.sequences:
        prompt = decode(list(sequence.prompt_ids)).replace("\n", "\\n")
        answer = decode(list(sequence.answer_ids)).replace("\n", "\\n")
        lines.append(f"  {sequence.kind:7s} row {sequence.group}: {prompt}[{answer}]")
    print("\n".join(lines))
