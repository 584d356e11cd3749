"""The objectives against numbers worked by hand (nats)."""

import math

import pytest
import torch

from engine.token_values import TokenRequest, fused_nll_and_kl, token_values
from method.losses import (
    dpo,
    gradient_ascent,
    npo,
    rmu,
    rmu_direction,
    sequence_mean,
    simnpo,
    token_kl,
    token_nll,
    token_unlikelihood,
    weighted_sum,
)
from method.objectives import Unlikelihood

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def test_token_nll_by_hand():
    # row 0: logits 0 and ln 3, so p = 1/4 and 3/4; row 1: equal logits, p = 1/2 each
    logits = torch.tensor([[0.0, LN3], [7.0, 7.0]])
    found = token_nll(logits, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    assert found.tolist() == pytest.approx([LN4, LN4 - LN3, LN2], abs=1e-6)


def test_kl_by_hand_and_zero_where_nothing_changed():
    # original (1/2, 1/2), model (1/4, 3/4): 1/2 ln(2) + 1/2 ln(2/3) = ln 2 - 1/2 ln 3
    original, model = torch.zeros(1, 2), torch.tensor([[0.0, LN3]])
    assert token_kl(model, original).item() == pytest.approx(LN2 - LN3 / 2, abs=1e-6)
    # an unchanged model costs nothing (a cross-entropy, as published, would give the entropy, ln 2)
    assert token_kl(original, original).item() == 0
    # it is forward KL: the other way round is another number, 1/4 ln(1/2) + 3/4 ln(3/2)
    assert token_kl(original, model).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)


def test_kl_is_exact_where_softmax_underflows():
    # original puts e^-60 on token 1: softmax then log(p + 1e-12), as published, would cut it at ln 1e-12 = -27.6
    original, model = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -60.0]])
    assert token_kl(model, original).item() == pytest.approx(0.5 * 60 - LN2, abs=1e-4)
    zero = torch.zeros(1, dtype=torch.long)
    _, in_a_step = fused_nll_and_kl(model, zero, zero, zero, original)
    assert in_a_step.item() == pytest.approx(0.5 * 60 - LN2, abs=1e-4)
    assert torch.isfinite(token_kl(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]))).all()


def test_gradient_ascent_sign_and_ceiling():
    nll = torch.tensor([1.0, 2.0, 5.0, 9.0], requires_grad=True)  # sequence 0: 1 + 2; sequence 2: 5 + 9
    owner = torch.tensor([0, 0, 2, 2])
    assert gradient_ascent(nll, owner, 3).tolist() == [-3.0, 0.0, -14.0]  # sequence 1 has no token: 0
    bounded = gradient_ascent(nll, owner, 3, ceiling=6.0)  # means 1.5 and 7: the second is above
    assert bounded.tolist() == [-3.0, 0.0, -12.0]
    bounded.sum().backward()
    assert nll.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]  # pushed up below the ceiling, left alone above it
    nll.grad = None
    level = gradient_ascent(nll, owner, 3, ceiling=6.0, back=True)  # sequence 2: 2 beyond 12
    assert level.tolist() == [-3.0, 0.0, -10.0]
    level.sum().backward()
    assert nll.grad.tolist() == [-1.0, -1.0, 1.0, 1.0]  # pulled back above it


def slope(function, *values):
    """The gradient with respect to the first of `values`."""
    first = values[0].clone().requires_grad_()
    function(first, *values[1:]).sum().backward()
    return first.grad.tolist()


def test_npo_by_hand_and_its_limits():
    owner, original = torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 3.0])
    unchanged = npo(original, original, owner, 2, beta=0.5)
    assert unchanged.tolist() == pytest.approx([4 * LN2] * 2)  # -2/0.5 * ln sigmoid(0)
    # sequence 0 has lost ln 3 / 0.5 nats in all (a sum, not a mean): sigmoid(ln 3) = 3/4
    nll = original + torch.tensor([LN3, LN3, 0.0])
    assert npo(nll, original, owner, 2, beta=0.5)[0].item() == pytest.approx(4 * (LN4 - LN3))
    # at the start, and for beta -> 0 everywhere, its gradient is gradient ascent's: -1 a token
    assert slope(npo, original, original, owner, 2, 0.5) == pytest.approx([-1.0] * 3)
    assert slope(npo, nll, original, owner, 2, 1e-6) == pytest.approx([-1.0] * 3, abs=1e-5)
    assert npo(original + 1000, original, owner, 2, beta=0.1).tolist() == pytest.approx(
        [0.0, 0.0]
    )  # forgotten: nothing is left to gain


def test_simnpo_by_hand():
    nll, owner = torch.tensor([LN3, 3 * LN3, 40.0]), torch.tensor([0, 0, 1])
    # mean 2 ln 3, beta 1/2: sigmoid(ln 3) = 3/4; with gamma = ln 3: sigmoid(0) = 1/2
    assert simnpo(nll, owner, 2, beta=0.5, gamma=0.0)[0].item() == pytest.approx(4 * (LN4 - LN3))
    assert simnpo(nll, owner, 2, beta=0.5, gamma=LN3)[0].item() == pytest.approx(4 * LN2)
    assert simnpo(nll, owner, 2, beta=2.5, gamma=0.0)[1].item() == pytest.approx(0, abs=1e-6)


def test_dpo_by_hand():
    nothing = torch.zeros(1)
    assert dpo(nothing, nothing, beta=0.5).item() == pytest.approx(2 * LN2)
    # the rejected answer lost ln 3 nats, the preferred one gained ln 3: sigmoid(0.5 * 2 ln 3) = 3/4
    assert dpo(torch.tensor([-LN3]), torch.tensor([LN3]), beta=0.5).item() == pytest.approx(2 * (LN4 - LN3))
    assert slope(dpo, nothing, nothing, 0.5) == [0.5]  # the preferred answer's NLL is pushed down
    assert dpo(torch.tensor([0.0]), torch.tensor([1e4]), beta=0.1).item() == 0


def test_unlikelihood_by_hand():
    # p = 1/2 and 1/4: ln 2 and ln(4/3); an unlikely token costs nothing
    logits = torch.tensor([[0.0, 0.0], [0.0, LN3], [-50.0, 0.0]])
    zeros = torch.zeros(3, dtype=torch.long)
    assert token_unlikelihood(logits, zeros).tolist() == pytest.approx([LN2, LN4 - LN3, 0.0], abs=1e-6)
    # its slope is p on the token's own logit and -p on the others together: forgetting lowers it
    found = slope(token_unlikelihood, logits, zeros)
    assert found[0] == pytest.approx([0.5, -0.5])
    assert found[1] == pytest.approx([0.25, -0.25])


@pytest.mark.parametrize("gap", [14.0, 30.0, 200.0])
def test_unlikelihood_of_text_known_by_heart_has_a_slope(gap):
    """From a gap of 14 nats on, 1 - p is 0 in fp32: a clamp there has no gradient, and nothing would be forgotten."""
    logits, zero = torch.tensor([[gap, 0.0]]), torch.zeros(1, dtype=torch.long)
    assert token_unlikelihood(logits, zero).item() == pytest.approx(gap, rel=1e-5)  # -ln(e^-gap / (1 + e^-gap))
    assert slope(token_unlikelihood, logits, zero)[0] == pytest.approx([1.0, -1.0], abs=1e-5)
    # and in the pass that a step takes, over chunks of logit rows
    many = logits.repeat(40, 1).requires_grad_()
    rows = torch.arange(40)
    (values,) = token_values(many, [TokenRequest(Unlikelihood.token_loss, rows, torch.zeros_like(rows))])
    values.sum().backward()
    torch.testing.assert_close(many.grad, torch.tensor([[1.0, -1.0]]).repeat(40, 1), rtol=0, atol=1e-5)


def test_rmu_by_hand():
    states, control = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([3.0, 0.0])
    assert rmu(states, control).tolist() == [(4 + 4) / 2, 9 / 2]
    assert rmu(states, states).tolist() == [0, 0]
    direction = rmu_direction(64, 6.5, 0)
    assert direction.norm().item() == pytest.approx(6.5)
    assert (direction >= 0).all()
    assert torch.equal(direction, rmu_direction(64, 6.5, 0))


def test_mismatch_is_a_mean_per_answer():
    # answers of 1 and of 3 tokens: means 4 and 2, whose mean is 3; the mean over all tokens would be 2.5
    nll, owner = torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([0, 1, 1, 1])
    assert sequence_mean(nll, owner, 2).tolist() == [4.0, 2.0]
    assert sequence_mean(torch.empty(0), torch.empty(0, dtype=torch.long), 2).tolist() == [0.0, 0.0]


def test_parts_add_up_to_the_mean_of_the_whole():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    parts = weighted_sum(values[:1], 0.5, 4) + weighted_sum(values[1:], 0.5, 4)
    assert parts.item() == pytest.approx(0.5 * values.mean().item())
    assert weighted_sum(values[:0], 0.5, 0).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_equals_the_two_losses(dtype):
    """More rows than a chunk, shared logit rows, and normal tokens that share one: values and gradients agree."""
    torch.manual_seed(0)
    logits = torch.randn(37, 101).to(dtype).requires_grad_()
    target_to_logit, targets = torch.randint(0, 37, (60,)), torch.randint(0, 101, (60,))
    kl_row, original = torch.randint(0, 37, (25,)), torch.randn(25, 101).to(dtype)
    weights = torch.randn(85)

    def gradient(nll, kl):
        return torch.autograd.grad((torch.cat([nll, kl]) * weights).sum(), logits)[0]

    plain = token_nll(logits, target_to_logit, targets), token_kl(logits[kl_row], original)
    fused = fused_nll_and_kl(logits, target_to_logit, targets, kl_row, original)
    for expected, found in zip(plain, fused, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # one rounding to bf16 here, several in the plain way
    torch.testing.assert_close(gradient(*fused), gradient(*plain), rtol=tolerance, atol=tolerance)
