"""The objectives of the field against numbers worked by hand (nats), and in the pass that a step takes."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.token_values import TokenRequest, token_values
from method import losses
from method.losses import (
    FLAT_DIVERGENCES,
    flat,
    token_adjusted_kl,
    token_ce_u,
    token_margin,
    token_scale_slope,
    token_unlikelihood,
    weighted_ascent,
)
from method.objective import TermTokens
from method.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def slope(function, values: torch.Tensor) -> torch.Tensor:
    """The gradient of the sum of what the function returns."""
    values = values.clone().requires_grad_()
    function(values).sum().backward()
    return values.grad


def close(found: torch.Tensor, expected) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_weighted_ascent_by_hand():
    nll = torch.tensor([0.0, LN2, LN4, 60.0])  # p = 1, 1/2, 1/4 and next to nothing
    close(weighted_ascent(nll, beta=1), [0, -LN2 / 2, -LN4 / 4, 0])
    # the weight is a number: a token is pushed by p^beta, and one that is forgotten is left alone
    close(slope(lambda x: weighted_ascent(x, beta=2), nll), [-1, -1 / 4, -1 / 16, 0])
    assert slope(lambda x: weighted_ascent(x, beta=0), nll).tolist() == [-1] * 4  # gradient ascent
    # SatImp with both powers 1: p (1 - p); what is known by heart is left alone as well
    close(slope(lambda x: weighted_ascent(x, 1, 1), nll), [0, -1 / 4, -3 / 16, 0])


def test_undial_aims_at_the_original_with_the_token_lowered():
    # the original says 3/4 and 1/4; with ln 3 off the first logit, 1/2 and 1/2; the model says 1/4 and 3/4
    original, model, first = torch.tensor([[LN3, 0.0]]), torch.tensor([[0.0, LN3]]), torch.tensor([0])
    close(token_adjusted_kl(model, first, original, LN3), [LN2 - LN3 / 2])
    close(slope(lambda x: token_adjusted_kl(x, first, original, LN3), model), [[-1 / 4, 1 / 4]])  # p less 1/2
    assert token_adjusted_kl(torch.zeros(1, 2), first, original, LN3).item() == pytest.approx(0, abs=1e-6)
    published = F.cross_entropy(model, torch.tensor([[0.5, 0.5]]), reduction="none")  # larger by the entropy of the aim
    close(published - token_adjusted_kl(model, first, original, LN3), [LN2])


def test_ce_u_by_hand_and_its_gradient_is_that_of_unlikelihood():
    # p = 1/5, 3/5, 1/5; without the second token the aim is 1/2, 0, 1/2: -ln(1/5)
    logits, second = torch.tensor([[0.0, LN3, 0.0]]), torch.tensor([1])
    close(token_ce_u(logits, second), [math.log(5)])
    close(slope(lambda x: token_ce_u(x, second), logits), [[-0.3, 0.6, -0.3]])  # p less the aim
    many, targets = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 5, torch.arange(50) % 7
    torch.testing.assert_close(slope(lambda x: token_ce_u(x, targets), many),
                               slope(lambda x: token_unlikelihood(x, targets), many), rtol=0, atol=1e-5)  # fmt: skip


def test_margin_by_hand():
    logits = torch.tensor([[3.0, 0.0, 0.0], [7.0, 7.0, 7.0]])  # margins 3 - 1 and 0
    assert token_margin(logits).tolist() == [4, 0]
    close(slope(token_margin, logits)[0], [8 / 3, -4 / 3, -4 / 3])  # 2 * 2 * (1 - 1/3), and 2 * 2 * -1/3


def test_the_slope_in_a_scale_of_the_logits_by_hand():
    """p = 3/4, 1/4: the mean logit is 3/4 ln 3, the target's ln 3 or 0. A scale of the logits moves the NLL by that."""
    logits, targets = torch.tensor([[LN3, 0.0], [LN3, 0.0]]), torch.tensor([0, 1])
    close(token_scale_slope(logits, targets), [-LN3 / 4, 3 * LN3 / 4])
    scale = torch.ones(1, requires_grad=True)
    torch.nn.functional.cross_entropy(scale * logits, targets, reduction="sum").backward()
    close(scale.grad, [LN3 / 2])  # of both
    tokens = TermTokens(nll=torch.zeros(3), values=torch.tensor([1.0, 3.0, -2.0]), sequence=torch.tensor([0, 0, 1]),
                        count=2, examples=torch.tensor([0, 1]), mine=torch.ones(2, dtype=bool),
                        num_examples=2)  # fmt: skip
    close(OBJECTIVES["invariance"]().values(tokens), [4, 4])  # (1 + 3) / 2 and -2, squared


def test_flat_by_hand():
    half, quarter = torch.tensor([0.5]), torch.tensor([0.25])
    close(flat(half, quarter, "pearson"), [1 / 64 + 1 / 4 - 1 / 2])
    close(flat(half, quarter, "total_variation"), [(math.tanh(0.25) - math.tanh(0.5)) / 2])
    close(flat(torch.tensor([1.0]), torch.tensor([1.0]), "kl"), [0])  # -1 + e^0
    # -(ln 2 - ln(1 + e^-v)) + v + ln(1 + e^-v) - ln 2, at v = 1/2 for both
    close(flat(half, half, "jensen_shannon"), [0.5 + 2 * math.log(1 + math.exp(-0.5)) - 2 * LN2])
    nothing = torch.zeros(1)
    for name in FLAT_DIVERGENCES:  # a conjugate belongs to its divergence: f*(f'(1)) = f'(1) where f(1) = 0
        assert slope(lambda x, name=name: flat(x, half, name), half).item() < 0, name  # the answer to give is learned
        assert slope(lambda x, name=name: flat(half, x, name), half).item() > 0, name  # the forget answer is forgotten
        assert torch.isfinite(flat(nothing, nothing, name)).all()


@pytest.mark.parametrize("name", ["undial", "ce_u", "margin", "invariance"])
def test_a_step_gives_each_token_the_same_gradient_as_the_formula(name):
    """In chunks of logit rows, with other losses at the same rows, as a step computes them."""
    objective, generator = OBJECTIVES[name](), torch.Generator().manual_seed(1)
    logits, original = (torch.randn(40, 11, generator=generator) * 3 for _ in range(2))
    rows, targets = torch.arange(40), torch.randint(11, (40,), generator=generator)
    loss = objective.token_loss
    request = TokenRequest(loss, rows, targets, original if loss.needs_original else None)
    found = slope(lambda x: token_values(x, [request])[0], logits)
    torch.testing.assert_close(found, slope(lambda x: loss.values(x, targets, original), logits), rtol=1e-4, atol=1e-5)


def test_the_table_of_papers_names_every_objective_its_function_and_its_test():
    lines = (ROOT / "docs/papers.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")][1:]
    rows, levers = ([row for row in rows if len(row) == length] for length in (5, 4))
    assert [row[0].strip("`") for row in rows] == list(OBJECTIVES)
    assert len(levers) > 1
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("[mr]*/test_*.py"))
    for _, _, paper, function, _ in rows:
        assert re.search(r"\d{4}, \d{4}\.\d{5}", paper), paper
        assert callable(getattr(losses, function.strip("`"))), function
    for row in rows + levers:
        assert f"def {row[-1].strip('`')}(" in tests, row
