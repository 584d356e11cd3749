"""What an objective is: settings, a token loss, and a rule that turns token values into what is minimised."""

from __future__ import annotations

import dataclasses

import torch

from engine.token_values import NLL, TokenLoss
from method.losses import sequence_sum

BY_TOKENS = "divided by the step's answer tokens (earlier versions: by its rows, as with mean_over=sequences)"


@dataclasses.dataclass(frozen=True)
class TermTokens:
    """The tokens of a term in one batch, as its objective gets them: M answer tokens; the batch has S sequences.

    `nll`, `original_nll` (M,): NLL of the targets, in nats, under the model and under the original. `values` (M,): the
    token loss. `states`, `original_states` (M, D): hidden states at the objective's layer, at the place that predicts
    each token. `sequence` (M,) in [0, S): each token's sequence. `count`: S. `examples` (S,): example_id of each
    sequence. `mine` (S,) bool: the term's own sequences. `num_examples`: more than any example_id. `preferred`: the
    tokens of the term that `prefers` names.
    """

    nll: torch.Tensor
    values: torch.Tensor
    sequence: torch.Tensor
    count: int
    examples: torch.Tensor
    mine: torch.Tensor
    num_examples: int
    original_nll: torch.Tensor | None = None
    states: torch.Tensor | None = None
    original_states: torch.Tensor | None = None
    preferred: TermTokens | None = None


def mean_by_example(tokens: TermTokens, values: torch.Tensor) -> torch.Tensor:
    """Return the mean of a row's own sequences' values, by example_id: (S,) -> (num_examples,); 0 for none.

    Means over indices: a selection by a mask would wait for the device.
    """
    count = sequence_sum(tokens.mine.float(), tokens.examples, tokens.num_examples)
    return sequence_sum(values * tokens.mine, tokens.examples, tokens.num_examples) / count.clamp(min=1)


class Objective:
    """The base of all objectives. A term sums `values` and divides the sum by its number of sequences or tokens."""

    token_loss: TokenLoss = NLL  # gives TermTokens.values
    measure = "nll"  # name of the value that the log shows for the term
    logs_nll = False  # True: the log shows the NLL of the term's tokens, not the minimised value
    note = ""  # what earlier versions did otherwise, for the log of a run (CHANGELOG.md)
    better = "falls"  # direction of the measure in a successful run: "falls" or "rises"
    length_normalised = False  # a sequence's value is a mean over its tokens, not a sum
    # The unit of the mean, unless the recipe sets it. A ForgetObjective uses "tokens": a sequence then counts once a
    # token, so that one weight has the same scale for each of them.
    over = "sequences"
    original_nll = original_states = False  # what it needs from the original beside its token loss
    layer: int | None = None  # the layer whose hidden states it needs
    stops_at_holdout = False  # it stops where the text of --holdout_text is (run/levels.py)
    prefers: str | None = None  # the draw whose answers it prefers to the term's own
    # Whether `values` is linear in the token values: their gradient is then known before they are, and head and losses
    # need one pass (engine/token_values.py). Hidden states may enter in any way.
    is_linear = False

    def values(self, tokens: TermTokens) -> torch.Tensor:
        """Return the values to minimise, (S,) or (M,): the token loss as it is, unless a subclass makes more of it."""
        return tokens.values

    @property
    def needs_original(self) -> bool:
        """Whether the term's tokens need the original's logits."""
        return self.original_nll or self.token_loss.needs_original

    @property
    def asks_original(self) -> bool:
        """Whether the term compares its tokens with the original's, in logits or in states."""
        return self.needs_original or self.original_states


class ForgetObjective(Objective):
    """The base of objectives that unlearn answers: --forget_loss takes them, and the log shows the answers' NLL."""

    over = "tokens"
    better = "rises"
    logs_nll = True
