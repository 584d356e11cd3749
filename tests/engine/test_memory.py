"""The memory of a run, part by part: what autograd saves, what the optimizer keeps, and which options make it fit."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from data_module import Sequence
from engine.adapters import LoraSettings, add_lora, enable_gradient_checkpointing
from engine.generation import answer_bytes
from engine.memory import SavedBytes, count_saved_bytes, estimate_parts, measure_saved_bytes, switch_that_fits
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from method.plan import reference_tokens

IDS = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(1))  # (R, T)


def options(**changes) -> SimpleNamespace:
    plain = {"optimizer": "adamw", "kl_budget": 0.0, "gradient_accumulation": 1, "gradient_checkpointing": False,
             "use_lora": False, "load_in_4bit": False}  # fmt: skip
    return SimpleNamespace(**plain | changes)


def test_saved_bytes_are_those_of_two_layers_worked_by_hand():
    """A product saves its input, x (4, 8); relu its result (4, 16), which the second product saves as well; the
    square its input (4, 2). Weights are not counted: 4 bytes x (32 + 64 + 8)."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 2, bias=False))
    with count_saved_bytes(model) as counted:
        model(torch.ones(4, 8)).square().sum()
    assert counted[0] == 4 * (4 * 8 + 4 * 16 + 4 * 2)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing(family):
    model = tiny_model(family)

    def saved(ids, checkpointing=False):
        return measure_saved_bytes(model, lambda: model.base_model(ids, use_cache=False)[0].sum(), ids.numel(),
                                   num_frozen=0, checkpointing=checkpointing)  # fmt: skip

    small, large = saved(IDS[:, :16]), saved(IDS)
    assert large.plain == pytest.approx(small.plain, rel=0.1)  # bytes a token
    assert large.checkpointing < 0.5 * large.plain
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    saved(IDS, checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()), "it was on before"


def test_peak_of_layers_worked_by_hand():
    """100 bytes a place in 4 layers and 20 with checkpointing: a layer saves (100 - 20) / 4 = 20. Plain, the backward
    of the last layer holds 20 more; with checkpointing, it computes 20 again and holds 20 more."""
    saved = SavedBytes(plain=100, checkpointing=20)
    assert saved.activations(10, 4, checkpointing=False) == 1200
    assert saved.activations(10, 4, checkpointing=True) == 600


def test_parts_are_what_the_optimizer_keeps():
    model = tiny_model("llama")
    stepper = MasterWeightAdamW(model, OptimizerSettings(lr=1e-3, total_steps=9), torch.bfloat16)
    model(IDS, labels=IDS).loss.backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())
    stepper.step()
    parts = estimate_parts(model, options(kl_budget=0.1), SavedBytes(100, 20), 10**4)
    moments = sum(t.numel() * t.element_size() for name, t in stepper.state().items() if "exp_avg" in name)
    assert parts.moments == moments
    assert parts.gradients == gradients
    assert parts.best_state == sum(t.numel() * t.element_size() for t in stepper.snapshot())
    count = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert parts.weights == 2 * count + buffers
    assert parts.residuals == 2 * count
    assert parts.frozen_head == 2 * model.get_output_embeddings().weight.numel()
    kept = parts.weights + parts.residuals + parts.moments + parts.best_state + parts.frozen_head
    assert parts.total == kept + 1.4e6  # 100 bytes x 10,000 places, and a layer of (100 - 20) / 2 bytes once more
    assert gradients < 1.4e6, "the larger of the two counts"


def test_switches_are_the_cheapest_that_fit():
    model = tiny_model("llama").bfloat16()
    saved, places = SavedBytes(plain=1e6, checkpointing=1e5), 100
    whole = estimate_parts(model, options(), saved, places).total
    switches = lambda available: switch_that_fits(model, options(), 4, saved, places, available)  # noqa: E731
    assert switches(whole - 1) == ["--gradient_checkpointing"]
    only = estimate_parts(model, options(gradient_checkpointing=True), saved, places).total
    assert switches(only - 1) == ["--gradient_checkpointing", "--optimizer adamw8bit"]
    in_8_bits = options(gradient_checkpointing=True, optimizer="adamw8bit")
    assert switches(estimate_parts(model, in_8_bits, saved, places).total - 1) == [
        "--use_lora", "--gradient_checkpointing"
    ]  # fmt: skip
    assert switches(1000) == []
    add_lora(model, LoraSettings(4, 8), None)
    lora = options(use_lora=True)
    found = switch_that_fits(model, lora, 4, saved, places, estimate_parts(model, lora, saved, places).total - 1)
    assert found == ["--gradient_checkpointing"]


def test_states_of_a_sequence_that_comes_again_are_counted_once():
    """Three steps saw 2 sequences of 5 tokens and one of 2. In 1,000 times as many steps the 8 rows come 1,000 times,
    and are cached once: 8 x (5 + 2) / 2; in twice as many, at most 4 sequences."""
    seen = [Sequence("retain", 0, (1,), (1, 2, 3, 4, 5)), Sequence("retain", 1, (1,), (1, 2)),
            Sequence("retain", 0, (1,), (1, 2, 3, 4, 5))]  # fmt: skip
    assert reference_tokens(seen, 1000, 8) == 8 * 3.5
    assert reference_tokens(seen, 2, 8) == 4 * 3.5
    assert reference_tokens([], 5, 8) == 0


def test_bytes_of_an_answer_hold_its_keys_and_values():
    """Two layers, 2 key heads of 8 numbers, fp32: 2 x 2 x 2 x 8 x 4 bytes = 256 a token."""
    model = tiny_model("llama")
    a_token = answer_bytes(model, 10, 31) - answer_bytes(model, 10, 30)
    assert a_token == pytest.approx(1.2 * 256, abs=1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_what_was_counted_is_freed(checkpointing, backward):
    """A plan that held its model would count its memory into the peak of the run that it plans."""
    model = tiny_model("llama")
    if checkpointing:
        enable_gradient_checkpointing(model)
    ids = torch.randint(3, 400, (2, 16))
    plain = model(input_ids=ids, use_cache=False).logits.square().mean()
    plain.backward()
    wanted = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    with count_saved_bytes(model) as counted:
        loss = model(input_ids=ids, use_cache=False).logits.square().mean()
    if backward:
        loss.backward()
        torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, wanted)
    assert counted[0] > 0
    held = weakref.ref(model.model.layers[0])
    del model, loss, plain
    gc.collect()
    assert held() is None
