"""Which tokens of a batch each term looks at. The host works it out before the step; the device only takes by index.

Letters: N logit rows, M answer tokens of the batch, Q of a term or a request, S sequences, D hidden size.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from engine.host_copy import copied
from engine.layout import Batch
from engine.reference import ReferenceCache
from engine.token_values import NLL, TokenLoss, TokenRequest, original_nll
from method.objective import TermTokens


@dataclasses.dataclass
class TermPlaces:
    """The tokens of a term, as indices. `request`: which request gives its token loss; request 0 gives the NLL.

    `nll`, `values` (Q,): places among the values of request 0 and of its own. `logit_rows`, `targets`, `sequence` (Q,);
    `examples`, `mine` (S,) as in TermTokens. `original`, `original_states`: what the original says of these tokens.
    """

    request: int
    nll: torch.Tensor
    values: torch.Tensor
    logit_rows: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    examples: torch.Tensor
    mine: torch.Tensor
    num_examples: int
    layer: int | None = None
    original: object = None
    original_states: object = None
    preferred: TermPlaces | None = None

    def tokens(self, values: list[torch.Tensor], states: dict[int, torch.Tensor]) -> TermTokens:
        """Return the tokens as an objective gets them; values: of each request, states {layer: (N, D)}."""
        return TermTokens(
            nll=values[0][self.nll],
            values=values[self.request][self.values],
            original_nll=None if self.original is None else original_nll(self.original, self.targets),
            states=None if self.layer is None or not states else states[self.layer][self.logit_rows],
            original_states=None if self.original_states is None else self.original_states.taken(),
            sequence=self.sequence,
            count=len(self.mine),
            examples=self.examples,
            mine=self.mine,
            num_examples=self.num_examples,
            preferred=self.preferred and self.preferred.tokens(values, states),
        )


@dataclasses.dataclass
class BatchPlan:
    """A batch with all that a step asks of it: token losses, and the tokens of each term.

    `weights`: the gradient of the step's loss with respect to each request's values, where it does not depend on them;
    None if it does for some term.
    """

    batch: Batch
    requests: list[TokenRequest]
    terms: list[TermPlaces]
    weights: list[torch.Tensor | None] | None = None

    def to(self, device: torch.device) -> BatchPlan:
        """Return the plan on `device`, in one copy that runs while the host goes on."""
        return copied(self, device)


def plan_batch(terms: list, batch: Batch, reference: ReferenceCache) -> BatchPlan:
    """Return the plan of a batch that lies in main memory; without weights. No device is asked."""
    view = _Indices(batch)
    draws: dict[TokenLoss, set[str]] = {NLL: {s.draw for s in batch.sequences}}  # the NLL of all costs nothing extra
    for term in terms:
        if term.objective.token_loss is not NLL:
            draws.setdefault(term.objective.token_loss, set()).add(term.draw.name)
    chosen = {loss: view.by_logit_row(names) for loss, names in draws.items()}  # {loss: tokens (Q,)}
    requests = [view.request(loss, chosen[loss], names, reference) for loss, names in draws.items()]
    place_in = {loss: view.places_in(tokens) for loss, tokens in chosen.items()}  # {loss: (M,) places in its values}
    order = list(draws)
    places = []
    for term in terms:
        own = _places(term, term.draw.name, view, place_in, order, reference, only=term.tokens)
        if term.preferred:
            own.preferred = _places(term, term.preferred, view, place_in, order, reference)
        places.append(own)
    return BatchPlan(batch, requests, places)


def _places(term, draw: str, view: _Indices, place_in: dict, order: list, reference, *, only="all") -> TermPlaces:
    """Return the places of a draw's tokens for a term; `only`: which of them, as `Term.tokens`."""
    objective, batch, loss = term.objective, view.batch, term.objective.token_loss
    tokens = np.flatnonzero(view.of_draws({draw}))  # (Q,) in [0, M)
    sequences = [s for s in batch.sequences if s.draw == draw]
    kept = np.ones(len(tokens), dtype=bool)  # (Q,)
    if only == "first":
        kept &= batch.is_first_token.numpy()[tokens]
    if only == "telling":
        kept &= np.array([flag for s in sequences for flag in s.telling or (True,) * len(s.answer_ids)], dtype=bool)
    if objective.asks_original:
        kept &= np.array([place >= 0 for s in sequences for place in s.original_places], dtype=bool)
    index = torch.from_numpy(tokens[kept])

    def original(layer: int | None):
        return reference.original(sequences, layer).at(torch.from_numpy(np.arange(len(tokens))[kept]))

    examples = torch.tensor([s.example_id for s in batch.sequences])
    return TermPlaces(
        request=order.index(loss),
        nll=place_in[NLL][index],
        values=place_in[loss][index],
        logit_rows=batch.target_to_logit[index],
        targets=batch.targets[index],
        sequence=batch.sequence_ids[index],
        examples=examples,
        mine=torch.tensor([s.draw == draw for s in batch.sequences]),
        num_examples=int(examples.max()) + 1,
        layer=objective.layer,
        original=original(None) if objective.original_nll else None,
        original_states=original(objective.layer) if objective.original_states else None,
    )


class _Indices:
    """The answer tokens of a batch in main memory, by draw and by logit row."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self._rows, self._sequence = batch.target_to_logit.numpy(), batch.sequence_ids.numpy()

    def of_draws(self, names: set[str]) -> np.ndarray:
        """Return a mask (M,) bool: the answer tokens of these draws."""
        return np.array([s.draw in names for s in self.batch.sequences])[self._sequence]

    def by_logit_row(self, names: set[str]) -> np.ndarray:
        """Return the answer tokens of these draws, (Q,) in [0, M), in the order of their logit rows."""
        tokens = np.flatnonzero(self.of_draws(names))
        return tokens[np.argsort(self._rows[tokens], kind="stable")]

    def places_in(self, tokens: np.ndarray) -> torch.Tensor:
        """Return (M,): the place of each answer token among `tokens` (Q,); 0 for one that is not among them."""
        places = np.zeros(len(self._rows), dtype=np.int64)
        places[tokens] = np.arange(len(tokens))
        return torch.from_numpy(places)

    def request(self, loss: TokenLoss, tokens: np.ndarray, names: set[str], reference: ReferenceCache) -> TokenRequest:
        """Return the request of a loss at these tokens (Q,) of the draws `names`."""
        index, original = torch.from_numpy(tokens), None
        if loss.needs_original:
            asked = reference.original([s for s in self.batch.sequences if s.draw in names])
            among = np.cumsum(self.of_draws(names)) - 1  # (M,): place of a token among those of these draws
            original = asked.at(torch.from_numpy(among[tokens]))
        rows = self._rows[tokens]
        return TokenRequest(loss, torch.from_numpy(rows), self.batch.targets[index], original, rows)
