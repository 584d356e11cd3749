"""RepSelect, before the first step: take out of the weights what the forget rows alone need, and little else.

Adapters learn the forget rows first: with them active, the rows are known so well that what is left of their gradient
is what is special to them. Its shared directions are damped (method/selection.py), and it is subtracted from the MLP
weights in small steps, while the normal rows' KL to the original is within its budget. No step of the run's terms has
been taken; the terms then go on from there.
"""

from __future__ import annotations

import contextlib
import re
import time

import torch

from data_module import Sequence, make_sequence
from engine.adapters import LoraSettings, add_lora, decoder_layers
from engine.optimizer import global_norm
from engine.token_values import KL, NLL, TokenRequest
from method.losses import sequence_mean
from method.selection import damp_shared
from utils import RunError, UsageError, log

# in the names of weights of a layer's MLP; what chooses among experts is none
MLP = re.compile(r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts|fc1|fc2|fc_in|fc_out)\b")
ROUTER = re.compile(r"\.(gate|router)\b")
MOST_STEPS = 200
ROWS_PER_BATCH = 4
PROBES = 48  # normal sequences on which the KL is taken


def refuse_selection(recipe, options, num_processes: int) -> None:
    """Raise UsageError if the recipe's selection cannot be done in such a run."""
    if not recipe.selection.kl_budget:
        return
    for switch, on in (("--use_lora", options.use_lora), ("--shard", options.shard),
                       ("accelerate launch with several processes", num_processes > 1)):  # fmt: skip
        if on:
            raise UsageError("selection.kl_budget: the selection changes whole weights, in one process: leave "
                             f"{switch} out, or set selection.kl_budget=0")  # fmt: skip
    if not any(term.draw.side == "normal" and term.objective.asks_original for term in recipe.terms):
        raise UsageError("selection.kl_budget: no term compares normal rows with the original, so no KL bounds it: "
                         "give one a weight, or set selection.kl_budget=0")  # fmt: skip


def select(setup) -> None:
    """Change the weights of a run (run/setup.py) that has taken no step. Raises RunError if no weight is an MLP's, or
    no forget row has an answer."""
    settings, optimizer, started = setup.recipe.selection, setup.optimizer, time.time()
    chosen = _mlp_weights(setup, settings.skip_layers)
    forget = _forget_sequences(setup, settings.rows)
    with _learned(setup, forget, chosen):
        for start in range(0, len(forget), ROWS_PER_BATCH):
            (-_mean_nll(setup, forget[start : start + ROWS_PER_BATCH])).backward()
        chosen = [i for i in chosen if optimizer.parameters[i].grad is not None]
        gradients = [optimizer.parameters[i].grad.float().clone() for i in chosen]
    optimizer.drop_gradients()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.options.seed)  # of the randomised decomposition
        damped = [_damped(gradient, settings.directions) for gradient in gradients]
    masters = optimizer.snapshot()
    scale = (
        settings.step
        * global_norm([masters[i] for i in chosen])
        / max(global_norm(damped), torch.finfo(torch.float32).tiny)
    )
    kl, steps, probes = 0.0, 0, _probes(setup)
    while steps < MOST_STEPS:
        before = [masters[i].clone() for i in chosen]
        for i, direction in zip(chosen, damped, strict=True):
            masters[i].sub_(direction, alpha=scale)
        optimizer.restore(masters)
        after = _mean_kl(setup, probes)
        if not after <= settings.kl_budget:  # the step that went too far is taken back
            for i, master in zip(chosen, before, strict=True):
                masters[i] = master
            optimizer.restore(masters)
            break
        kl, steps = after, steps + 1
    seconds = time.time() - started
    setup.run_log.event("selection", f"selection: {steps} steps on {len(chosen)} weights, KL on normal rows {kl:.4f} "
                        f"of {settings.kl_budget:g}, {seconds:.0f} s",
                        steps=steps, weights=len(chosen), kl=kl, seconds=seconds)  # fmt: skip
    if not steps:
        log.warning("selection: the first step is beyond selection.kl_budget, so nothing was changed: lower "
                    "selection.step or raise the budget")  # fmt: skip


def _mlp_weights(setup, skip: int) -> list[int]:
    """Return the places of the trained MLP matrices, stacked experts included, among the optimizer's parameters."""
    name, _ = decoder_layers(setup.model)
    skipped = tuple(f"{name}.{i}." for i in range(skip))

    def is_mlp(weight: str) -> bool:
        of_layers = weight.startswith(f"{name}.") and not weight.startswith(skipped)
        return of_layers and bool(MLP.search(weight)) and not ROUTER.search(weight)

    trained = zip(setup.optimizer.parameters, setup.optimizer.names, strict=True)
    found = [i for i, (parameter, names) in enumerate(trained)
             if parameter.dim() in (2, 3) and any(map(is_mlp, names))]  # fmt: skip
    if not found:
        raise RunError("selection.kl_budget: no trained weight of this model is an MLP's by its name, so there is "
                       "nothing to take out: set selection.kl_budget=0")  # fmt: skip
    return found


def _forget_sequences(setup, count: int) -> list[Sequence]:
    """Return the forget rows with their answers, as many as asked, from all sources alike."""
    sources = setup.sampler.rows["forget"]
    rows = [source[i] for i in range(max(map(len, sources))) for source in sources if i < len(source)]
    rows = [row for row in rows if row.response or row.is_text]
    if not rows:
        raise RunError("selection.kl_budget: no forget row has an answer whose gradient could be taken: set "
                       "selection.kl_budget=0")  # fmt: skip
    stride = max(1, len(rows) // count)
    return [make_sequence("forget", i, row, setup.formatter) for i, row in enumerate(rows[::stride][:count])]


def _damped(gradient: torch.Tensor, directions: int) -> torch.Tensor:
    """Return a gradient (O, I), or experts' (E, O, I), with its shared directions damped (method/selection.py)."""
    if gradient.dim() == 2:
        return damp_shared(gradient, directions)
    return torch.stack([damp_shared(of_expert, directions) for of_expert in gradient])


@contextlib.contextmanager
def _learned(setup, forget: list[Sequence], chosen: list[int]):
    """Within the block, adapters that have learned the forget rows are active and the chosen weights get gradients."""
    settings, model = setup.recipe.selection, setup.model
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    adapters = None
    if settings.adapter_lr:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.options.seed)  # the adapters' first values
            adapters = add_lora(model, LoraSettings(rank=settings.adapter_rank, alpha=settings.adapter_rank), None)
        own = [parameter for parameter in model.parameters() if parameter not in trained]
        for start in range(0, len(forget), ROWS_PER_BATCH):
            loss = _mean_nll(setup, forget[start : start + ROWS_PER_BATCH])
            gradients = torch.autograd.grad(loss, own, allow_unused=True)  # a vision tower's adapters have none
            with torch.no_grad():
                for weight, gradient in zip(own, gradients, strict=True):
                    if gradient is not None:
                        weight -= settings.adapter_lr * gradient
    try:
        wanted = {setup.optimizer.parameters[i] for i in chosen}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in wanted)
        yield
    finally:
        if adapters is not None:
            adapters.unload()
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def _mean_nll(setup, sequences: list[Sequence]) -> torch.Tensor:
    """Return the mean over the sequences of their mean token NLL, a scalar with a graph."""
    batch = setup.layout(sequences).to(next(setup.model.parameters()).device)
    _, values = setup.answer_model(batch, [TokenRequest(NLL, batch.target_to_logit, batch.targets)])  # (M,)
    return sequence_mean(values[0], batch.sequence_ids, len(sequences)).mean()


def _probes(setup) -> list[Sequence]:
    """Return normal sequences of the first steps, each once."""
    found: dict[tuple, Sequence] = {}
    draws = {term.draw.name for term in setup.recipe.terms
             if term.draw.side == "normal" and term.objective.asks_original}  # fmt: skip
    for step in range(setup.options.max_unlearn_steps):
        for s in setup.sampler.sequences(step, setup.formatter):
            if s.draw in draws:
                found.setdefault((s.prompt_ids, s.answer_ids), s)
        if len(found) >= PROBES:
            break
    return list(found.values())[:PROBES]


@torch.no_grad()
def _mean_kl(setup, sequences: list[Sequence]) -> float:
    """Return the mean KL( original || model ) over the sequences' answer tokens, in nats."""
    total = count = 0
    for start in range(0, len(sequences), 4 * ROWS_PER_BATCH):
        part = sequences[start : start + 4 * ROWS_PER_BATCH]
        batch = setup.layout(part).to(next(setup.model.parameters()).device)
        request = TokenRequest(KL, batch.target_to_logit, batch.targets, setup.reference.logits(part))
        values = setup.answer_model(batch, [request])[1][0]  # (M,)
        total, count = total + values.sum().item(), count + len(values)
    return total / max(count, 1)
