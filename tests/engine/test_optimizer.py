"""The step on the weights: masters in two halves, parts, and moments in 8 bits, against plain AdamW."""

import pytest
import torch

from engine import optimizer
from engine.optimizer import MasterWeightAdamW, OptimizerSettings, merge_fp32, split_fp32


def test_a_master_in_two_halves_loses_nothing():
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    halfway = (torch.arange(-500, 500, dtype=torch.int32) << 16) + 0x8000  # as far from one bf16 as from the next
    master = torch.cat([bits, halfway, torch.tensor([0, -(2**31), 1, 0x7F7FFFFF])]).to(torch.int32).view(torch.float32)
    master = master[master.isfinite()]
    rounded, rest = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_fp32(master, rounded, rest)
    assert torch.equal(merge_fp32(rounded, rest).view(torch.int32), master.view(torch.int32))
    finite = rounded.isfinite()
    nearest = master.bfloat16()  # torch takes the even one at halfway
    apart = rounded[finite] != nearest[finite]
    assert torch.equal((master[finite][apart].view(torch.int32) & 0xFFFF), torch.full((apart.sum(),), 0x8000).int())


def small_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.Linear(90, 70, bias=False))


def train(stepper: MasterWeightAdamW, model, steps: int) -> None:
    draw = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in model.parameters():
            # as bf16 has them, so that the fp32 run sees the same ones
            parameter.grad = torch.randn(parameter.shape, generator=draw).bfloat16().to(parameter.dtype)
        stepper.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_adamws_whatever_the_parts(monkeypatch, dtype):
    """An update of 1e-5 is below half of bf16's grid at these weights: without masters nothing would move."""
    monkeypatch.setitem(optimizer.PART, "cpu", 256)  # several parts a tensor, the last one short
    model, plain = small_model(), small_model()
    stepper = MasterWeightAdamW(
        model, OptimizerSettings(lr=1e-5, total_steps=1000, schedule="constant", weight_decay=0.01), dtype
    )
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.01)
    draw = torch.Generator().manual_seed(5)
    for _ in range(7):
        for parameter in plain.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw).bfloat16().float()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
    train(stepper, model, 7)
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(stepper.master(got), wanted.detach(), rtol=0, atol=1e-8)


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = small_model()
    stepper = MasterWeightAdamW(model, OptimizerSettings(lr=1e-3, total_steps=1000), torch.bfloat16)
    train(stepper, model, 1)
    before, state = stepper.snapshot(), stepper.state()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert stepper.step() != stepper.step()  # NaN the first time; nothing is left for the second
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.snapshot(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in stepper.state().items())


def test_8_bit_moments_take_the_same_way_in_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")
    results = {}
    for kind in ("adamw", "adamw8bit"):
        model = small_model()
        start = [p.detach().clone() for p in model.parameters()]
        stepper = MasterWeightAdamW(
            model, OptimizerSettings(lr=1e-4, total_steps=1000, schedule="constant", kind=kind), torch.bfloat16
        )
        train(stepper, model, 4)
        mid = {name: tensor.clone() for name, tensor in stepper.state().items()}, stepper.progress()
        train(stepper, model, 4)
        way = torch.cat([(stepper.master(p) - s).flatten() for p, s in zip(model.parameters(), start, strict=True)])
        again = small_model()  # a run that is resumed
        resumed = MasterWeightAdamW(
            again, OptimizerSettings(lr=1e-4, total_steps=1000, schedule="constant", kind=kind), torch.bfloat16
        )
        resumed.load_state(*mid)
        train(resumed, again, 4)
        assert all(torch.equal(a, b) for a, b in zip(stepper.snapshot(), resumed.snapshot(), strict=True))
        moments = [t for name, t in stepper.state().items() if "master" not in name and t.numel() > 4096]
        results[kind] = way, sum(t.numel() * t.element_size() for t in moments)
    (way, size), (way_8, size_8) = results["adamw"], results["adamw8bit"]
    assert (way - way_8).norm() <= 0.15 * way.norm()
    assert size_8 <= 0.3 * size


def test_codes_of_quantised_weights_are_left_alone():
    """A base whose weights are 4- or 8-bit codes would speak garbage once they are cast, and look as if it resisted."""
    model = torch.nn.Linear(4, 4)
    model.codes = torch.nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    MasterWeightAdamW(model, OptimizerSettings(lr=1e-4, total_steps=1000), torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert model.codes.dtype == torch.uint8
