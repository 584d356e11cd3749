"""What a step minimises, worked by hand: which tokens, which weights, divided by the counts of the whole step."""

import re
from math import exp, log

import pytest
import torch
import yaml

from data_module import Sequence
from engine.tree import padded_batch
from method.draws import RunSizes
from method.recipe import build_terms
from method.terms import compute_losses, count_draws

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

    def logits(self, sequences):
        return torch.zeros(sum(len(s.answer_ids) for s in sequences), 2)


def terms(*settings: str):
    """(weighted losses, logged means) of the terms forget, random, normal, first with these settings."""
    specs = yaml.safe_load(RECIPE)
    for setting in settings:
        name, key, value = re.fullmatch(r"(\w+)\.(\w+)=(.*)", setting).groups()
        next(spec for spec in specs if spec["name"] == name)[key] = yaml.safe_load(value)
    made = build_terms(specs, RunSizes())
    here, elsewhere = ([Sequence(draw, row, (7, 8), (0,) * len(nll)) for draw, row, nll in rows]
                       for rows in (HERE, ELSEWHERE))  # fmt: skip
    batch = padded_batch(here, 0)
    chance = torch.tensor([exp(-value) for _, _, nll in HERE for value in nll])  # (M,): one logit row each
    logits = torch.stack([chance.log(), (1 - chance).log()], dim=-1)  # (M, 2)
    found = compute_losses(made, batch, logits, {}, Uniform(), count_draws(here + elsewhere))
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
    assert losses[0] == pytest.approx((first + second) / 3, rel=1e-5)  # of 3 harmful rows in the whole step
