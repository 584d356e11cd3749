"""Fine-tuning: the strongest attack of an adversary who has the weights."""

from __future__ import annotations

import numpy as np
import torch

from data_module import make_sequence
from engine.adapters import LoraSettings, add_lora
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.token_values import fused_nll_and_kl
from engine.tree import AnswerLogitsModel
from evaluation.attacks.base import AttackResult, AttackTarget, one_answer_each, step_label
from method.losses import sequence_mean
from sources.rows import Row
from utils import UsageError

ROWS_PER_STEP = 4
ORDER_STREAM = 31  # of the random order of the rows


def relearn(target: AttackTarget) -> list[AttackResult]:
    """Fine-tune on every set of rows and answer along the way. No row that is asked has been taught."""
    if not target.data.relearn_sets:
        raise UsageError("there are no rows to fine-tune on: name some with --relearn_data")
    prompts, results = target.prompts(), []
    for taught in target.data.relearn_sets:
        asked = range(len(prompts)) if taught.measured is None else taught.measured
        for step, model in fine_tune(target, target.model, taught.rows, target.config.relearn_steps):
            texts = target.answer([prompts[i] for i in asked], model)
            results.append(one_answer_each(step_label(taught.name, step), texts, taught.measured))
    return results


def fine_tune(target: AttackTarget, model, rows: list[Row], steps: int):
    """Yield (step, tuned model) `relearn_answers` times, at all steps, half of them, a quarter and so on; afterwards
    the model is what it was.

    AdamW on whole answers, four rows per step, in adapters on every layer. An adversary can afford adapters: 7B weights
    with their moments fit on no single GPU. At ten times the learning rate they recover as much as full fine-tuning or
    more, in two thirds of the time (docs/LOG.md).
    """
    config, formatter = target.config, target.formatter
    rows = rows[: config.num_examples]
    if not rows:
        return
    settings = OptimizerSettings(lr=config.relearn_lr, total_steps=steps, schedule="constant", adapters=True)
    torch.manual_seed(config.seed)  # the adapters' first values
    adapters = add_lora(model, LoraSettings(), None)
    trained = torch.nn.ParameterList(weight for weight in model.parameters() if weight.requires_grad)
    optimizer = MasterWeightAdamW(trained, settings, model.dtype)
    answer_model = AnswerLogitsModel(model, packed=target.packed)
    answer_steps = {max(1, steps // 2**i) for i in range(config.relearn_answers)}
    rng = np.random.default_rng([config.seed, ORDER_STREAM])
    order = [i for _ in range(ROWS_PER_STEP * steps // len(rows) + 1) for i in rng.permutation(len(rows))]
    try:
        for step in range(steps):
            chosen = [rows[i] for i in order[ROWS_PER_STEP * step : ROWS_PER_STEP * (step + 1)]]
            answer_loss(answer_model, formatter, chosen).backward()
            optimizer.step()
            if step + 1 in answer_steps:
                yield step + 1, model  # not merged: a bf16 weight would lose most of so small a change
    finally:
        adapters.unload()


def answer_loss(answer_model: AnswerLogitsModel, formatter, rows: list[Row]) -> torch.Tensor:
    """Return the mean token NLL of every row's response, averaged over the rows: a scalar, in nats."""
    sequences = [make_sequence("forget", i, row, formatter) for i, row in enumerate(rows)]
    batch = answer_model.layout(sequences, 128, formatter.tokenizer.pad_token_id)
    batch = batch.to(next(answer_model.parameters()).device)
    logits = answer_model(batch)  # (N, V)
    no_reference = batch.target_to_logit[:0], logits[:0]
    nll, _ = fused_nll_and_kl(logits, batch.target_to_logit, batch.targets, *no_reference)  # (M,)
    return sequence_mean(nll, batch.sequence_ids, len(sequences)).mean()
