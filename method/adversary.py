"""MUDMAN's adversary: low-rank factors over the weights that learn the forget rows again, by arithmetic alone.

The adversary of a weight W (.., O, I) is W + L R^T. Both factors lie in one tensor (.., O + I, K), K the rank: first
L (.., O, K), then R (.., I, K). It is three times as long: (3, .., O + I, K) holds the factors and Adam's two moments.
A weight without factors has (3, 0). Nothing is added to the model, so what saves or splits it has nothing to know.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.optim.adam import adam

from engine.optimizer import BETAS, EPSILON
from method.draw import RunSizes
from method.draws import Answer
from method.objectives.towards import Nll
from method.perturbed import PerturbedSettings
from method.terms import Term

NAME = "perturbed.adversary_steps"  # no term of a recipe can have a name with a dot


@dataclasses.dataclass(frozen=True)
class RelearnedAnswer(Answer):
    """The own answers of a step's forget rows, for the adversary alone."""

    apart = True


def adversary_term(settings: PerturbedSettings, sizes: RunSizes) -> Term | None:
    """Return what the adversary minimises: the mean token NLL of the step's forget rows; None if there is none."""
    if not settings.adversary_steps:
        return None
    return Term(NAME, RelearnedAnswer(NAME, sizes), "nll", Nll(), 1.0, over="tokens", field=NAME)


def fork(weights: list[torch.Tensor], chosen: list[bool], rank: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Return an adversary that equals the weights as they are: L is 0, R uniform in +- 1 / sqrt(I), no moments.

    chosen: which of the weights, matrices (.., O, I), get factors. R as in an adapter (Hu et al. 2021), at scale 1.
    """
    adversary = []
    for weight, has_factors in zip(weights, chosen, strict=True):
        if not has_factors:
            adversary.append(torch.zeros(3, 0, device=weight.device))
            continue
        *experts, rows, columns = weight.shape
        state = torch.zeros(3, *experts, rows + columns, rank)
        state[0, ..., rows:, :].uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        adversary.append(state.to(weight.device))
    return adversary


def laid_over(weights: list[torch.Tensor], adversary: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the adversary's weights, W + L R^T; a weight without factors as it is."""
    found = []
    for weight, state in zip(weights, adversary, strict=True):
        if state.numel():
            left, right = _factors(state[0], weight)
            weight = weight + (left @ right.mT).to(weight.dtype)  # (.., O, K) x (.., K, I) -> (.., O, I)
        found.append(weight)
    return found


def learn(adversary: list[torch.Tensor], gradients: list[torch.Tensor | None], lr: float, done: int) -> None:
    """Take one step of Adam with the factors, in place.

    gradients: of the NLL with respect to the adversary's weights, (.., O, I). A factor's gradient follows from it by
    the chain rule: G R for L, G^T L for R. done: the steps since the fork.
    """
    states, found = [], []
    for state, gradient in zip(adversary, gradients, strict=True):
        if state.numel() and gradient is not None:
            gradient = gradient.float()
            left, right = _factors(state[0], gradient)
            states.append(state)
            found.append(torch.cat([gradient @ right, gradient.mT @ left], dim=-2))  # (.., O + I, K)
    factors, first, second = ([state[i] for state in states] for i in range(3))  # views: they are changed in place
    counts = [torch.tensor(float(done)) for _ in states]
    adam(factors, found, first, second, [], counts, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=lr,
         weight_decay=0.0, eps=EPSILON, maximize=False)  # fmt: skip


def _factors(factors: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L (.., O, K) and R (.., I, K) of a weight's factors (.., O + I, K), as views."""
    return factors.split(list(weight.shape[-2:]), dim=-2)
