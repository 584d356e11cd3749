"""Fine-tuning: the strongest attack of an adversary who has the weights."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch

from data_module import make_sequence
from engine.adapters import LoraSettings, add_lora
from engine.loading import is_quantised
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.token_values import fused_nll_and_kl
from engine.tree import AnswerLogitsModel
from evaluation.attacks.base import CONTROL_NAMES, AttackResult, AttackTarget, one_answer_each, step_label
from method.losses import sequence_mean
from sources.rows import Row
from utils import UsageError, log

ROWS_PER_STEP = 4
ORDER_STREAM = 31  # of the random order of the rows
WHOLE_LR = 0.1  # the rate of whole weights, as a fraction of that of adapters (docs/LOG.md)
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # of adapters, that are tried on a model that never knew the rows
CHOICE_STEPS = 30


def relearn(target: AttackTarget) -> list[AttackResult]:
    """Fine-tune on every set of rows and answer along the way. No row that is asked has been taught."""
    refuse_nothing_to_teach(target)
    prompts, results = target.prompts(), []
    for taught in target.data.relearn_sets:
        asked = range(len(prompts)) if taught.measured is None else taught.measured
        for whole in target.config.relearn_whole:
            name = f"{taught.name}, whole weights" if whole else taught.name
            for step, model in fine_tune(target, target.model, taught.rows, target.config.relearn_steps, whole=whole):
                texts = target.answer([prompts[i] for i in asked], model)
                results.append(one_answer_each(step_label(name, step), texts, taught.measured))
    return results


def refuse_nothing_to_teach(target: AttackTarget) -> None:
    """Raise UsageError if there are no rows to fine-tune on."""
    if not target.data.relearn_sets:
        raise UsageError("there are no rows to fine-tune on: name some with --relearn_data")


def choose_learning_rate(target: AttackTarget) -> float:
    """Return the rate of adapters at which a model that never knew the rows learns the first set of them best: the
    lowest loss on them after a few steps. A rate chosen on the unlearned model would favour it or its control.

    target: with that model. Where whole weights alone are taught, the rate is chosen on them.
    """
    refuse_nothing_to_teach(target)
    whole = all(target.config.relearn_whole)
    rows = target.data.relearn_sets[0].rows[: target.config.num_examples]
    losses = {}
    for rate in LEARNING_RATES:
        config = dataclasses.replace(target.config, relearn_lr=rate, relearn_answers=1)
        for _, model in fine_tune(dataclasses.replace(target, config=config), target.model, rows, CHOICE_STEPS,
                                  whole=whole):  # fmt: skip
            with torch.no_grad():
                answer_model = AnswerLogitsModel(model, packed=target.packed)
                losses[rate] = answer_loss(answer_model, target.formatter, rows).item()
    best = min(LEARNING_RATES, key=losses.get)
    tried = ", ".join(f"{loss:.2f} at {rate:g}" for rate, loss in losses.items())
    log.info("--relearn_lr auto: %g, at which %s learns the taught rows best (loss %s)", best,
             CONTROL_NAMES["retrained"], tried)  # fmt: skip
    return best


def fine_tune(target: AttackTarget, model, rows: list[Row], steps: int, *, whole: bool = False):
    """Yield (step, tuned model) `relearn_answers` times, at all steps, half of them, a quarter and so on; afterwards
    the model is what it was.

    AdamW on whole answers, four rows per step: in adapters on every layer, or in whole weights. An adversary can
    afford adapters: 7B weights with their moments fit on no single GPU. At ten times the learning rate they recover as
    much as full fine-tuning or more, in two thirds of the time (docs/LOG.md).
    """
    config, formatter = target.config, target.formatter
    rows = rows[: config.num_examples]
    if not rows:
        return
    rate = config.relearn_lr * (WHOLE_LR if whole else 1)
    settings = OptimizerSettings(lr=rate, total_steps=steps, schedule="constant", adapters=not whole)
    answer_steps = {max(1, steps // 2**i) for i in range(config.relearn_answers)}
    rng = np.random.default_rng([config.seed, ORDER_STREAM])
    order = [i for _ in range(ROWS_PER_STEP * steps // len(rows) + 1) for i in rng.permutation(len(rows))]
    with _whole_weights(model) if whole else _adapters(model, config.seed) as trained:
        optimizer = MasterWeightAdamW(trained, settings, model.dtype)
        answer_model = AnswerLogitsModel(model, packed=target.packed)
        for step in range(steps):
            chosen = [rows[i] for i in order[ROWS_PER_STEP * step : ROWS_PER_STEP * (step + 1)]]
            answer_loss(answer_model, formatter, chosen).backward()
            optimizer.step()
            if step + 1 in answer_steps:
                yield step + 1, model  # not merged: a bf16 weight would lose most of so small a change


@contextlib.contextmanager
def _adapters(model, seed: int):
    """Yield the weights of new adapters on every layer, which are gone after the block."""
    torch.manual_seed(seed)  # their first values
    adapters = add_lora(model, LoraSettings(), None)
    try:
        yield torch.nn.ParameterList(weight for weight in model.parameters() if weight.requires_grad)
    finally:
        adapters.unload()


@contextlib.contextmanager
def _whole_weights(model):
    """Yield the model with all its weights trained; after the block they are what they were."""
    if is_quantised(model):
        raise UsageError("--relearn_weights: the model's weights are stored in 4 or 8 bits, so they cannot be trained "
                         "whole: leave the option out")  # fmt: skip
    kept = [(weight, weight.detach().clone(), weight.requires_grad) for weight in model.parameters()]
    try:
        yield model.requires_grad_(True)
    finally:
        for weight, value, required in kept:
            weight.grad = None
            weight.data = value  # the optimizer made it a view of a buffer, maybe of another type
            weight.requires_grad_(required)


def answer_loss(answer_model: AnswerLogitsModel, formatter, rows: list[Row]) -> torch.Tensor:
    """Return the mean token NLL of every row's response, averaged over the rows: a scalar, in nats."""
    sequences = [make_sequence("forget", i, row, formatter) for i, row in enumerate(rows)]
    batch = answer_model.layout(sequences, 128, formatter.tokenizer.pad_token_id)
    batch = batch.to(next(answer_model.parameters()).device)
    logits = answer_model(batch)  # (N, V)
    no_reference = batch.target_to_logit[:0], logits[:0]
    nll, _ = fused_nll_and_kl(logits, batch.target_to_logit, batch.targets, *no_reference)  # (M,)
    return sequence_mean(nll, batch.sequence_ids, len(sequences)).mean()
