"""The terms of a step: named, weighted losses over the sequences of a draw. A step minimises their sum.

Neither this file nor its callers know the number or the names of the terms.
"""

from __future__ import annotations

import collections
import dataclasses

import torch

from data_module import Sequence
from engine.reference import ReferenceCache
from engine.token_values import NLL, TokenLoss, TokenRequest, token_values
from engine.tree import Batch
from method.losses import sequence_sum, token_nll, weighted_sum
from method.objective import Objective, TermTokens
from method.sampler import Draw


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted loss.

    `draw`: gives its sequences; terms may share a draw. `tokens`: "all", or "first" of each sequence. `over`: unit of
    its mean, "tokens" or "sequences". `field`: its name in the log. `watch`: drawn and logged even at
    weight 0; above 0, --max_bad_loss stops on it.
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
    """Number of answer tokens and sequences of a draw in a step."""

    tokens: int = 0
    sequences: int = 0


def active_terms(terms: list[Term]) -> list[Term]:
    """Return the terms whose draw is required, by themselves or by another term."""
    draws = {term.draw.name for term in terms if term.active}
    return [term for term in terms if term.draw.name in draws]


def count_draws(sequences: list[Sequence]) -> dict[str, DrawCount]:
    """Return {draw: its tokens and sequences} of a whole step, the denominators of all means."""
    tokens, num_sequences = collections.Counter(), collections.Counter(s.draw for s in sequences)
    for s in sequences:
        tokens[s.draw] += len(s.answer_ids)
    return collections.defaultdict(
        DrawCount, {name: DrawCount(tokens[name], num_sequences[name]) for name in num_sequences}
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
        if term.objective.needs_original or term.objective.original_states:
            draws |= {term.draw.name, term.preferred}
    return [s for s in sequences if s.draw in draws]


def compute_losses(
    terms: list[Term], batch: Batch, logits: torch.Tensor, states: dict[int, torch.Tensor], reference: ReferenceCache,
    counts: dict[str, DrawCount],
) -> list[LossTerm]:  # fmt: skip
    """Compute every term of one batch: logits (N, V), hidden states {layer: (N, D)}; `counts`: of the whole step."""
    view = _BatchView(terms, batch, logits, states, reference)
    return [_loss_term(term, view, counts[term.draw.name]) for term in terms]


def _loss_term(term: Term, view: _BatchView, count: DrawCount) -> LossTerm:
    """Compute one term of one batch; `count`: of its draw in the whole step."""
    objective = term.objective
    tokens = view.tokens(term.draw.name, objective, first_only=term.tokens == "first")
    if term.preferred:
        tokens = dataclasses.replace(tokens, preferred=view.tokens(term.preferred, objective))
    values = objective.values(tokens)
    if objective.length_normalised and term.over == "tokens":
        values = values * sequence_sum(torch.ones_like(tokens.nll), tokens.sequence, tokens.count)  # (S,)
    num_tokens = count.tokens if term.tokens == "all" else count.sequences  # one first token a sequence
    denominator = num_tokens if term.over == "tokens" else count.sequences
    if objective.logs_nll:
        mean = weighted_sum(tokens.nll.detach(), 1.0, num_tokens)
    else:
        mean = weighted_sum(values.detach(), 1.0, denominator)
    return LossTerm(term.name, weighted_sum(values, term.weight, denominator), mean)


class _BatchView:
    """The token losses of a batch, each computed once for all draws that need it, and the tokens of each draw."""

    def __init__(self, terms: list[Term], batch: Batch, logits, states: dict, reference: ReferenceCache):
        self.batch, self.states, self.reference = batch, states, reference
        draws: dict[TokenLoss, set[str]] = {NLL: set()}
        for term in terms:
            draws.setdefault(term.objective.token_loss, set()).add(term.draw.name)
        # the NLL of all tokens costs nothing extra; the other losses are computed for the draws that need them
        self.masks = {
            loss: self.tokens_of(*names) for loss, names in draws.items() if loss is not NLL
        }  # (M,) bool each
        requests = [TokenRequest(NLL, batch.target_to_logit, batch.targets)]
        for loss, mask in self.masks.items():
            sequences = [s for s in batch.sequences if s.draw in draws[loss]]
            original = reference.logits(sequences) if loss.needs_original else None
            requests.append(TokenRequest(loss, batch.target_to_logit[mask], batch.targets[mask], original))
        self.nll, *values = token_values(logits, requests)  # (M,), and (Q,) each
        self.values = dict(zip(self.masks, values, strict=True))

    def tokens_of(self, *draws: str) -> torch.Tensor:
        """Return a mask (M,) bool: the answer tokens of these draws."""
        batch = self.batch
        return torch.stack([batch.tokens_of(draw) for draw in draws]).any(0)

    def tokens(self, draw: str, objective: Objective, *, first_only: bool = False) -> TermTokens:
        """Return a draw's tokens as an objective gets them; with `first_only`, the first token of each sequence."""
        batch, loss, layer = self.batch, objective.token_loss, objective.layer
        mine = self.tokens_of(draw)  # (M,) bool
        sequences = [s for s in batch.sequences if s.draw == draw]
        nll = self.nll[mine]  # (Q,)
        tokens = TermTokens(
            nll=nll,
            values=nll if loss is NLL else self.values[loss][mine[self.masks[loss]]],
            original_nll=self._original_nll(sequences, batch.targets[mine]) if objective.original_nll else None,
            states=None if layer is None else self.states[layer][batch.target_to_logit[mine]],
            original_states=self.reference.states(sequences, layer) if objective.original_states else None,
            sequence=batch.sequence_ids[mine],
            count=len(batch.sequences),
            examples=batch.sequence_ids.new_tensor([s.example_id for s in batch.sequences]),
            mine=batch.sequence_ids.new_tensor([s.draw == draw for s in batch.sequences]).bool(),
        )
        return tokens.first_only(batch.is_first_token[mine]) if first_only else tokens

    def _original_nll(self, sequences: list[Sequence], targets: torch.Tensor) -> torch.Tensor:
        """Return the NLL (Q,) of the targets under the original."""
        logits = self.reference.logits(sequences)  # (Q, V)
        return token_nll(logits, torch.arange(len(logits), device=logits.device), targets)
