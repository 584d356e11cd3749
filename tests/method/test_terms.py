"""What a step minimises, worked by hand: which tokens, which weights, divided by the counts of the whole step."""

import dataclasses
import re
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
import yaml

from data_module import Sequence
from engine.layout import padded_batch
from engine.token_values import token_values, weighted_values
from method.draw import RunSizes
from method.losses import rmu_direction
from method.objectives import OBJECTIVES
from method.recipe import build_terms
from method.terms import (
    compute_losses,
    count_draws,
    layers_of,
    next_multipliers,
    plan_losses,
    sequences_needing_reference,
)
from options import read_settings
from utils import UsageError

# (kind, group, NLL of each answer token); two words in the vocabulary, the answers' word is 0
HERE = [("forget", 0, (1.0, 3.0)), ("mismatch", 0, (1.0,)), ("mismatch", 0, (1.0, 2.0, 6.0)), ("forget", 1, (2.0,)),
        ("mismatch", 1, (2.0,)), ("normal", 2, (0.5, 1.0)), ("normal", 3, (2.0,))]  # fmt: skip
ELSEWHERE = [("forget", 4, (9.0, 9.0, 9.0)), ("mismatch", 4, (9.0,)), ("normal", 5, (9.0,))]  # another process's rows
RECIPE = """
- {name: forget, draw: answer, loss: ascent, weight: 0.5}
- {name: mismatch, draw: mismatch, loss: nll, weight: 1.0}
- {name: normal, draw: retain, loss: kl, weight: 1.0}
- {name: first, sequences_of: normal, tokens: first, loss: kl, mean_over: sequences, times: normal, weight: 0.0}
"""


class Uniform:
    """An original that finds both words equally likely everywhere."""

    def original(self, sequences, layer=None):
        return Said(torch.zeros(sum(len(s.answer_ids) for s in sequences), 2))


@dataclasses.dataclass
class Said:
    """What an original says of some tokens: (M, V) logits, or (M, D) states."""

    tensor: torch.Tensor

    def at(self, tokens):
        return Said(self.tensor[tokens])

    def logits(self, part):
        return self.tensor[part]

    def taken(self):
        return self.tensor

    @property
    def vocabulary(self):
        return self.tensor.shape[-1]


def step_terms(made, rows, logits, original, counts, states=None, multipliers=None):
    """The terms as a step computes them from given logits, and their gradient with respect to the logits."""
    plan, logits = plan_losses(made, padded_batch(rows, 0), original, counts), logits.requires_grad_()
    if plan.weights is None:
        total, values = None, token_values(logits, plan.requests)
    else:
        total, values = weighted_values(logits, plan.requests, plan.weights)
    found = compute_losses(made, plan, values, states or {}, counts, multipliers)
    total = sum(term.loss for term in found) if total is None else total
    slope = torch.autograd.grad(total, logits, allow_unused=True)[0] if total.requires_grad else None
    return found, slope


def terms(*settings: str):
    """(weighted losses, logged means) of the terms forget, random, normal, first with these settings."""
    specs = yaml.safe_load(RECIPE)
    for setting in settings:
        name, key, value = re.fullmatch(r"(\w+)\.(\w+)=(.*)", setting).groups()
        next(spec for spec in specs if spec["name"] == name)[key] = yaml.safe_load(value)
    made = build_terms(specs, RunSizes())
    here, elsewhere = ([Sequence(draw, row, (7, 8), (0,) * len(nll)) for draw, row, nll in rows]
                       for rows in (HERE, ELSEWHERE))  # fmt: skip
    chance = torch.tensor([exp(-value) for _, _, nll in HERE for value in nll])  # (M,): one logit row each
    logits = torch.stack([chance.log(), (1 - chance).log()], dim=-1)  # (M, 2)
    found, _ = step_terms(made, here, logits, Uniform(), count_draws(here + elsewhere))
    return [term.loss.item() for term in found], [term.mean.item() for term in found]


def kl(nll):
    """KL of one half each against e^-nll and the rest."""
    return -log(2) - 0.5 * log(exp(-nll) * (1 - exp(-nll)))


def test_every_term_by_hand():
    losses, means = terms("forget.weight=0.5", "mismatch.weight=3", "normal.weight=2", "first.weight=0.25")
    first, every = kl(0.5) + kl(2.0), kl(0.5) + kl(1.0) + kl(2.0)
    expected = [
        -(1 + 3 + 2) / 6,  # 6 harmful answer tokens in the whole step, of which these are 3
        (1 + 3 + 2) / 4,  # of 4 random answers; the second one's mean is 3
        every / 4,  # of 4 normal tokens
        first / 3,  # of 3 normal rows
    ]
    weighted = [0.5, 3.0, 2.0, 2.0 * 0.25]
    assert losses == pytest.approx([w * value for w, value in zip(weighted, expected, strict=True)], abs=1e-6)
    assert means == pytest.approx([-expected[0], *expected[1:]], abs=1e-6)  # the NLL, not minus it


def test_what_is_forgotten_enough_counts_as_the_ceiling():
    losses, means = terms("forget.weight=1", "forget.ceiling=1.5")  # means a row: 2 and 2
    assert losses[0] == pytest.approx(-(1.5 * 2 + 1.5) / 6)
    assert means[0] == pytest.approx((1 + 3 + 2) / 6)


def test_dpo_prefers_the_random_answers_of_its_own_row():
    losses, _ = terms("forget.weight=1", "forget.loss=dpo", "forget.beta=0.5")
    rejected = 1 + 3 - 2 * log(2)  # of the first row: NLL less the original's
    preferred = ((1 - log(2)) + (1 + 2 + 6 - 3 * log(2))) / 2  # mean of its two random answers
    first = log(1 + exp(-0.5 * (rejected - preferred))) / 0.5
    second = log(2) / 0.5  # the second row's both answers have lost the same
    assert losses[0] == pytest.approx((first + second) / 6, rel=1e-5)  # of 6 harmful answer tokens in the whole step


def test_flat_compares_mean_probabilities_of_a_rows_own_answers():
    losses, _ = terms("forget.weight=1", "forget.loss=flat", "forget.prefers=mismatch", "forget.divergence=pearson")
    first = (exp(-1) + exp(-3)) / 2, (exp(-1) + (exp(-1) + exp(-2) + exp(-6)) / 3) / 2  # forget, mean of its two others
    second = exp(-2), exp(-2)
    values = [f * f / 4 + f - other for f, other in (first, second)]
    assert losses[0] == pytest.approx((2 * values[0] + values[1]) / 6, rel=1e-5)  # a row counts once a token


def forget_slopes(*settings):
    """How the loss of the term "forget" moves with each answer token's NLL, in an original that says the same."""
    made = build_terms(yaml.safe_load(RECIPE), RunSizes())[0]
    made = dataclasses.replace(made, objective=read_settings(OBJECTIVES[settings[0]], dict(settings[1:]), "forget"))
    rows = [Sequence("forget", 0, (7, 8), (0,) * 3), Sequence("forget", 1, (7, 8), (0,))]
    logits = torch.tensor([[0.0, 1.0], [0.5, 0.0], [0.0, 0.0], [2.0, 0.0]])  # (M, 2)
    original = SimpleNamespace(original=lambda sequences, layer=None: Said(logits.detach()))
    return step_terms([made], rows, logits, original, count_draws(rows))[1]


@pytest.mark.parametrize("loss", [("npo", ("beta", 1e-4)), ("simnpo", ("beta", 1e-4)), ("wga", ("beta", 1e-4))])
def test_a_weight_gives_every_forget_loss_the_gradient_of_ascent(loss):
    """For a small beta all are gradient ascent. Divided by rows, npo's was as many times larger as an answer has
    tokens."""
    torch.testing.assert_close(forget_slopes(*loss), forget_slopes("ascent"), rtol=1e-3, atol=1e-6)


def test_a_mean_over_tokens_or_over_sequences():
    """Of the replacement answers: sums 1, 9, 2 of 1, 3, 1 tokens, and in another process one more token of 9. Of each
    sequence's first token there are as many as sequences, whatever the mean is over."""
    by_tokens, _ = terms("mismatch.mean_over=tokens", "first.mean_over=tokens", "first.weight=1")
    assert by_tokens[1] == pytest.approx((1 + 9 + 2) / 6)
    by_sequences, _ = terms("first.weight=1")
    assert by_tokens[3] == by_sequences[3]


def test_hidden_states_by_hand():
    """RMU on two layers: squared distance to the direction, mean over the width, then over the step's tokens."""
    specs = yaml.safe_load("""
    - {name: forget, draw: answer, loss: rmu, layer: 3, coefficient: 5, weight: 2}
    - {name: retain, draw: retain, loss: state_distance, layer: 1, weight: 10}
    """)
    rows = [Sequence("forget", 0, (7,), (1, 2)), Sequence("retain", 0, (8,), (3,))]
    states = {
        3: torch.tensor([[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]]),
        1: torch.tensor([[9.0, 9.0], [9.0, 9.0], [1.0, 4.0]]),
    }
    original = SimpleNamespace(original=lambda sequences, layer=None: Said(torch.tensor([[1.0, 1.0]])))
    made = build_terms(specs, RunSizes())
    assert layers_of(made) == (1, 3)
    found, _ = step_terms(made, rows, torch.zeros(3, 10), original, count_draws(rows), states)
    u = rmu_direction(2, 5.0, 0).tolist()
    first = ((1 - u[0]) ** 2 + (2 - u[1]) ** 2) / 2
    second = (u[0] ** 2 + u[1] ** 2) / 2  # 25 / 2
    assert second == pytest.approx(12.5)
    assert found[0].loss.item() == pytest.approx(2 * (first + second) / 2, rel=1e-6)  # of two tokens
    assert found[0].mean.item() == pytest.approx(log(10))  # what the log shows is the answers' NLL
    assert found[1].loss.item() == pytest.approx(10 * ((1 - 1) ** 2 + (4 - 1) ** 2) / 2)
    assert sequences_needing_reference(rows, made) == rows[1:]


def test_a_terms_weight_follows_its_budget():
    made = build_terms(yaml.safe_load(RECIPE.replace("loss: kl, weight: 1.0}", "loss: kl, weight: 1.0, budget: 0.1, "
                                                     "budget_rate: 0.5}")), RunSizes())  # fmt: skip
    over = next_multipliers(made, {}, {"forget": 9.0, "mismatch": 9.0, "normal": 0.5})
    assert over == {"normal": pytest.approx(1 + 0.5 * 0.4)}  # the one that has a budget
    assert next_multipliers(made, over, {"normal": 0.0}) == {"normal": pytest.approx(1.2 - 0.5 * 0.1)}
    assert next_multipliers(made, {"normal": 0.01}, {"normal": 0.0}) == {"normal": 0}  # never negative
    with pytest.raises(UsageError, match=r"forget\.budget: ascent makes answers unlikely"):
        build_terms([{"name": "forget", "draw": "answer", "loss": "ascent", "budget": 1.0}], RunSizes())
    # and a step's loss and gradient are those of the weight times the multiplier
    rows = [Sequence("forget", 0, (7, 8), (0, 0)), Sequence("normal", 1, (7, 8), (0,))]
    logits = torch.tensor([[0.0, 1.0], [0.5, 0.0], [2.0, 0.0]])  # (M, 2)
    made = [term for term in made if term.name in ("forget", "normal")]
    twice = [dataclasses.replace(term, weight=2 * term.weight) if term.name == "normal" else term for term in made]
    found, slope = step_terms(made, rows, logits.clone(), Uniform(), count_draws(rows), multipliers={"normal": 2.0})
    expected, expected_slope = step_terms(twice, rows, logits.clone(), Uniform(), count_draws(rows))
    assert [term.loss.item() for term in found] == pytest.approx([term.loss.item() for term in expected])
    torch.testing.assert_close(slope, expected_slope)
