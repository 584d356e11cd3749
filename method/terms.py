"""The terms of a step: named, weighted losses over the sequences of a draw. A step minimises their sum.

Neither this file nor its callers know the number or the names of the terms.
"""

from __future__ import annotations

import collections
import dataclasses

import torch

from data_module import Sequence
from engine.layout import Batch
from engine.reference import ReferenceCache
from method.losses import sequence_sum, weighted_sum
from method.objective import Objective, TermTokens
from method.sampler import Draw
from method.term_tokens import BatchPlan, plan_batch


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted loss.

    `draw`: gives its sequences; terms may share a draw. `tokens`: "all", "first" of each sequence, or "telling": those
    that tell an answer from others. `over`: unit of its mean, "tokens" or "sequences". `field`: its name in the log.
    `watch`: drawn and logged even at weight 0; above 0, --max_bad_loss stops on it. `budget`: a bound on its mean, that
    its weight follows (`next_multipliers`); `budget_rate`: how fast.
    """

    name: str
    draw: Draw
    loss: str  # the objective's name in a recipe
    objective: Objective
    weight: float
    tokens: str = "all"
    over: str = "tokens"
    field: str = ""
    watch: bool = False
    preferred: str | None = None  # the draw whose sequences its objective prefers to its own
    budget: float | None = None
    budget_rate: float = 1.0

    @property
    def active(self) -> bool:
        """Whether it requires its draw. A term of weight 0 is measured only if another term requires the same draw."""
        return (self.weight > 0 or self.watch) and not self.draw.is_off

    def describe(self) -> dict:
        """Return its description for the log, which plots of its curve need."""
        return {"name": self.name, "field": self.field, "measure": self.objective.measure, "draw": self.draw.name,
                "side": self.draw.side, "loss": self.loss, "weight": self.weight, "over": self.over,
                "tokens": self.tokens, "better": self.objective.better}  # fmt: skip


@dataclasses.dataclass
class LossTerm:
    """One term of one batch, as scalars: `loss`, weighted, to be minimised; `mean`, as logged, without a gradient."""

    name: str
    loss: torch.Tensor
    mean: torch.Tensor


@dataclasses.dataclass(frozen=True)
class DrawCount:
    """Number of answer tokens and sequences of a draw in a step; `compared`: tokens the original is asked about;
    `telling`: tokens that tell an answer from others."""

    tokens: int = 0
    sequences: int = 0
    compared: int = 0
    telling: int = 0


def active_terms(terms: list[Term]) -> list[Term]:
    """Return the terms whose draw is required, by themselves or by another term."""
    draws = {term.draw.name for term in terms if term.active}
    return [term for term in terms if term.draw.name in draws]


def count_draws(sequences: list[Sequence]) -> dict[str, DrawCount]:
    """Return {draw: its tokens and sequences} of a whole step, the denominators of all means."""
    tokens, compared, telling = collections.Counter(), collections.Counter(), collections.Counter()
    num_sequences = collections.Counter(s.draw for s in sequences)
    for s in sequences:
        tokens[s.draw] += len(s.answer_ids)
        compared[s.draw] += sum(place >= 0 for place in s.original_places)
        telling[s.draw] += len(s.answer_ids) if s.telling is None else sum(s.telling)
    return collections.defaultdict(
        DrawCount,
        {name: DrawCount(tokens[name], num_sequences[name], compared[name], telling[name]) for name in num_sequences},
    )


def draws_of(terms: list[Term]) -> list[Draw]:
    """Return the draws of the terms, each once: terms may share one."""
    return list({term.draw.name: term.draw for term in terms}.values())


def layers_of(terms: list[Term]) -> tuple[int, ...]:
    """Return the layers whose hidden states the terms need."""
    return tuple(sorted({term.objective.layer for term in terms if term.objective.layer is not None}))


def sequences_needing_reference(sequences: list[Sequence], terms: list[Term]) -> list[Sequence]:
    """Return the sequences on which a term needs the original."""
    draws = set()
    for term in terms:
        if term.objective.asks_original:
            draws |= {term.draw.name, term.preferred}
    return [s for s in sequences if s.draw in draws]


def plan_losses(terms: list[Term], batch: Batch, reference: ReferenceCache, counts: dict[str, DrawCount]) -> BatchPlan:
    """Work out, in main memory, what a step asks of a batch that lies there; `counts`: of the whole step."""
    plan = plan_batch(terms, batch, reference)
    if all(term.objective.is_linear and term.budget is None for term in terms):  # a budget moves the weight
        plan.weights = _known_weights(terms, plan, counts)
    return plan


def _known_weights(terms: list[Term], plan: BatchPlan, counts: dict[str, DrawCount]) -> list[torch.Tensor | None]:
    """Return the gradient of the step's loss with respect to each request's values, which are not known yet.

    Every objective is linear in them, so its gradient is the same everywhere, and is taken at 0.
    """
    zeros = [torch.zeros(len(request.rows), requires_grad=True) for request in plan.requests]
    with torch.enable_grad():
        losses = [
            _loss_term(term, places.tokens(zeros, {}), counts[term.draw.name]).loss
            for term, places in zip(terms, plan.terms, strict=True)
            if term.objective.layer is None and term.weight
        ]
        graphs = [loss for loss in losses if loss.requires_grad]
        if not graphs:
            return [None] * len(zeros)
        return list(torch.autograd.grad(sum(graphs), zeros, allow_unused=True))


def compute_losses(
    terms: list[Term], plan: BatchPlan, values: list[torch.Tensor], states: dict[int, torch.Tensor],
    counts: dict[str, DrawCount], multipliers: dict[str, float] | None = None,
) -> list[LossTerm]:  # fmt: skip
    """Compute every term of one batch: values (Q,) of each request, hidden states {layer: (N, D)}.

    `counts`: of the whole step. `multipliers`: of the weights of terms with a budget, by name.
    """
    multipliers = multipliers or {}
    return [
        _loss_term(term, places.tokens(values, states), counts[term.draw.name], multipliers.get(term.name, 1.0))
        for term, places in zip(terms, plan.terms, strict=True)
    ]


def next_multipliers(terms: list[Term], multipliers: dict[str, float], means: dict[str, float]) -> dict[str, float]:
    """Return the multipliers of the weights of terms with a budget after a step with these means, by name.

    The dual variable of the constraint mean <= budget (PDU, Entesari et al. 2025, arXiv 2506.05314): it rises while the
    mean is above the budget and falls while it is below, and is never negative. It is 1 at the start.
    """
    return {
        term.name: max(0.0, multipliers.get(term.name, 1.0) + term.budget_rate * (means[term.name] - term.budget))
        for term in terms if term.budget is not None
    }  # fmt: skip


def _loss_term(term: Term, tokens: TermTokens, count: DrawCount, multiplier: float = 1.0) -> LossTerm:
    """Compute one term of one batch; `count`: of its draw in the whole step; `multiplier`: of its weight."""
    objective = term.objective
    values = objective.values(tokens)
    if objective.length_normalised and term.over == "tokens":
        values = values * sequence_sum(torch.ones_like(tokens.nll), tokens.sequence, tokens.count)  # (S,)
    if term.tokens == "all":
        num_tokens = count.compared if objective.asks_original else count.tokens
    else:
        num_tokens = count.telling if term.tokens == "telling" else count.sequences  # one first token a sequence
    denominator = num_tokens if term.over == "tokens" else count.sequences
    if objective.logs_nll:
        mean = weighted_sum(tokens.nll.detach(), 1.0, num_tokens)
    else:
        mean = weighted_sum(values.detach(), 1.0, denominator)
    return LossTerm(term.name, weighted_sum(values, term.weight * multiplier, denominator), mean)
