"""The step on the weights: masters in two halves, flat buffers, and moments in 8 bits, against plain AdamW."""

import copy
import importlib.util

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run_python

from engine import flat_weights
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
    monkeypatch.setitem(flat_weights.PART, "cpu", 256)  # several parts a tensor, the last one short
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


AGAINST_TORCH = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/engine"]
import torch
from engine import optimizer

optimizer.why_not_fused = lambda flat: None  # the interpreter runs the kernel on a CPU
from test_optimizer import largest_distance_from_torch
for dtype in (torch.bfloat16, torch.float32):
    assert largest_distance_from_torch(dtype) <= 2e-8, dtype
"""


def largest_distance_from_torch(dtype: torch.dtype) -> float:
    """Train a model by `dtype` and its twin by torch's AdamW; return the largest difference of their fp32 weights.

    Warm-up, decay of weights and rate, clipping, a frozen layer, a tied weight, and a weight that has no gradient in
    one step, so that its moments count fewer updates than its neighbours'.
    """
    torch.manual_seed(3)
    model = torch.nn.ModuleList([torch.nn.Linear(70, 90), torch.nn.Linear(90, 33), torch.nn.Linear(3, 3),
                                 torch.nn.Linear(70, 90, bias=False)])  # fmt: skip
    model[2].requires_grad_(False)
    model[3].weight = model[0].weight
    plain = copy.deepcopy(model)
    frozen = model[2].weight.detach().clone()
    settings = OptimizerSettings(lr=1e-3, total_steps=10, warmup_steps=3, weight_decay=0.01, max_grad_norm=40.0)
    stepper = MasterWeightAdamW(model, settings, dtype)
    assert model[3].weight is model[0].weight and len(stepper.parameters) == 4
    reference = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(5)
    for step in range(8):
        # up to 1/4, 2/4, 3/4 of the rate, then down: 7/7, 6/7, ... of it
        rate = 1e-3 * ((step + 1) / 4 if step < 3 else (10 - step) / 7)
        assert stepper.lr == pytest.approx(rate, rel=1e-12)
        reference.param_groups[0]["lr"] = rate
        for i, (mine, torchs) in enumerate(zip(stepper.parameters, reference.param_groups[0]["params"], strict=True)):
            gradient = torch.randn(mine.shape, generator=draw).bfloat16() * (0.1 if step % 2 else 1.0)  # or clipped
            mine.grad, torchs.grad = (None, None) if (step, i) == (2, 1) else (gradient.to(dtype), gradient.float())
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 40.0)
        reference.step()
        assert stepper.step(stepper.grad_norm().item()) == pytest.approx(norm.item(), rel=1e-5)
        assert (norm > 40) == (step % 2 == 0)
    assert torch.equal(model[2].weight.float(), frozen.to(dtype).float())
    masters = map(stepper.master, stepper.parameters)
    return max((a - b).abs().max().item() for a, b in zip(masters, reference.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_steps_equal_torchs_adamw(dtype):
    assert largest_distance_from_torch(dtype) <= 2e-8


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton comes with torch for CUDA only")
def test_the_gpus_kernel_equals_torchs_adamw():
    run = run_python("-c", AGAINST_TORCH.format(root=str(ROOT)), cwd=ROOT, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr


def test_parameters_are_views_of_one_buffer_and_stay_what_they_were():
    """A model is tied, copied and saved as before; weights stored in bf16 get residuals of zero."""
    model = small_model().bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    stepper = MasterWeightAdamW(model, OptimizerSettings(lr=1e-5, total_steps=9), torch.bfloat16)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(stepper.master(p), b.float()) for p, b in zip(model.parameters(), before, strict=True))
    copied = copy.deepcopy(model)  # as the frozen original is made
    train(stepper, model, 1)
    assert all(torch.equal(p, b) for p, b in zip(copied.parameters(), before, strict=True))
    assert not torch.equal(stepper.master(model[0].weight), before[0].float())


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
