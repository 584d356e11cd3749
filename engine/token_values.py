"""Token losses from states and the output head, or from logits: a chunk of logit rows at a time.

The vocabulary is the largest axis of a step. Head and losses are fused: the logits of a chunk are made, turned into
values and, where the gradient of the values is known beforehand, into the gradient of states and head at once. Where
it is not known (an objective that is not linear in them), the backward makes the logits again, unless all of them fit
one chunk and were kept.

Letters: N logit rows, M answer tokens of a request, n tokens or rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from engine.head import WHOLE_LOGITS
from engine.kernels import kl_of_rows, log_partition, scaled_softmax

# Bytes of a chunk's logits, in the model's type: large enough that the head's products run at full speed.
CHUNK_BYTES = {"cpu": 128 << 20, "gpu": 256 << 20}
# Bytes of the logit rows that are in fp32 at a time: on a CPU they and their gradient stay in its cache.
FP32_BYTES = {"cpu": 3 << 20, "gpu": 128 << 20}


class TokenLoss:
    """One value a token, from its logit row. A subclass defines `values`; autograd computes the gradient."""

    needs_original = False

    def values(self, logits: torch.Tensor, targets: torch.Tensor, original: torch.Tensor | None) -> torch.Tensor:
        """Return (n,) in nats, from logits (n, V) fp32, targets (n,), and original (n, V) fp32 or None."""
        raise NotImplementedError


class NegativeLogLikelihood(TokenLoss):
    """-ln p(target). Its gradient is p minus the one-hot target; `_Pass` uses this closed form."""

    def values(self, logits, targets, original):
        return F.cross_entropy(logits, targets, reduction="none")


class ForwardKL(TokenLoss):
    """KL( original || model ) over the full vocabulary. Its gradient is p minus the original's probabilities."""

    needs_original = True

    def values(self, logits, targets, original):
        log_model, log_original = F.log_softmax(logits, dim=-1), F.log_softmax(original, dim=-1)
        return (log_original.exp() * (log_original - log_model)).sum(-1)


NLL, KL = NegativeLogLikelihood(), ForwardKL()


@dataclasses.dataclass
class TokenRequest:
    """A loss and its M tokens: `rows` (M,) in [0, N) predict them; `targets` (M,).

    original: the original's logits (M, V), or an object whose `logits(part)` makes those of a slice of the tokens; None
    for a loss that does not use them. host_rows: `rows` in main memory; given only if they ascend, so that the tokens
    of a chunk are a slice and no device is asked for them.
    """

    loss: TokenLoss
    rows: torch.Tensor
    targets: torch.Tensor
    original: object = None
    host_rows: np.ndarray | None = None


def token_values(states: torch.Tensor, requests: list[TokenRequest], head=WHOLE_LOGITS) -> list[torch.Tensor]:
    """Return the values (M,) fp32 of each request. Gradient flows to `states` and to the head's trained weights.

    states (N, D), of which `head` makes logits (N, V); without a head, they are logits (N, V).
    """
    ordered, places = zip(*(_in_order(request) for request in requests), strict=True)
    values = _TokenValues.apply(head, list(ordered), torch.is_grad_enabled(), states, *head.weights())
    return [value if place is None else value[place] for value, place in zip(values, places, strict=True)]


def weighted_values(
    states: torch.Tensor, requests: list[TokenRequest], weights: list[torch.Tensor | None], head=WHOLE_LOGITS
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return (the sum of all values, each times its weight, a scalar; the values (M,) of each request without graph).

    weights: (M,) fp32 of each request, None for one without a gradient; each request with host_rows. Since the weights
    are known, the gradients of states and head are made in the same pass: the logits are made once.
    """
    weights = weights if torch.is_grad_enabled() else [None] * len(requests)
    total, *values = _WeightedValues.apply(head, requests, weights, states, *head.weights())
    return (total if any(weight is not None for weight in weights) else total.detach()), values


def fused_nll_and_kl(
    logits: torch.Tensor, target_to_logit: torch.Tensor, targets: torch.Tensor, kl_row: torch.Tensor,
    original_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (NLL (M,) of all targets, KL (Q,) at the logit rows `kl_row`), in one pass.

    logits (N, V); target_to_logit, targets (M,); kl_row (Q,) in [0, N); original_logits (Q, V).
    """
    nll, kl = token_values(
        logits, [TokenRequest(NLL, target_to_logit, targets), TokenRequest(KL, kl_row, kl_row, original_logits)]
    )
    return nll, kl


@torch.no_grad()
def original_nll(original, targets: torch.Tensor) -> torch.Tensor:
    """Return the NLL (M,) fp32 of targets (M,) under the original, whose logits are made a chunk at a time."""
    vocabulary = original.shape[-1] if isinstance(original, torch.Tensor) else original.vocabulary
    size = _rows_of(CHUNK_BYTES, 4 * vocabulary, targets.device)
    parts = [slice(start, start + size) for start in range(0, len(targets), size)]
    chunks = (_original_logits(original, part) for part in parts)
    values = [
        log_partition(chunk) - chunk.gather(-1, targets[part, None])[:, 0].float()
        for chunk, part in zip(chunks, parts, strict=True)
    ]
    return torch.cat(values) if values else torch.zeros(0, device=targets.device)


def _in_order(request: TokenRequest) -> tuple[TokenRequest, torch.Tensor | None]:
    """Return a request whose rows ascend, and the places of the asked tokens in it (None: they ascend already)."""
    assert request.rows.shape == request.targets.shape, (request.rows.shape, request.targets.shape)
    assert request.original is not None or not request.loss.needs_original, "this loss needs the original's logits"
    if isinstance(request.original, torch.Tensor):
        assert len(request.original) == len(request.rows), (request.original.shape, request.rows.shape)
    if request.host_rows is not None:
        return request, None
    order = request.rows.argsort(stable=True)
    rows, original = request.rows[order], request.original
    original = original[order] if isinstance(original, torch.Tensor) else original
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return TokenRequest(request.loss, rows, request.targets[order], original, rows.cpu().numpy()), places


def _original_logits(original, part: slice) -> torch.Tensor:
    return original[part] if isinstance(original, torch.Tensor) else original.logits(part)


def _rows_of(limits: dict[str, int], row_bytes: int, device: torch.device) -> int:
    """Return how many logit rows fit the limit of a device's kind."""
    return max(1, limits["cpu" if device.type == "cpu" else "gpu"] // row_bytes)


# ----------------------------------------------------------------------------------------------- one pass
class _Pass:
    """One pass over the logit rows: the values of all requests and, with weights, the gradients.

    `log_partition` (N,) is kept from an earlier pass, if there was one.
    """

    def __init__(self, head, requests: list[TokenRequest], states: torch.Tensor, weights: list[torch.Tensor]):
        self.head, self.requests, self.states, self.weights = head, requests, states, weights
        device, vocabulary = states.device, head.vocabulary(states)
        self.size = _rows_of(CHUNK_BYTES, states.element_size() * vocabulary, device)
        self.inner = _rows_of(FP32_BYTES, 4 * vocabulary, device)
        self.log_partition: torch.Tensor | None = None
        self.kept = None  # (logits, pull) of the only chunk

    def run(self, factors: list[torch.Tensor | None] | None, *, keep: bool = False):
        """Return (values, gradient of the states, gradients of the weights); factors: of each value, in the gradient.

        Without factors, there are no gradients. keep: keep the logits for a second run, if they are one chunk.
        """
        states, requests = self.states, self.requests
        count, first_run = len(states), self.log_partition is None  # N
        values = [torch.empty(len(r.rows), dtype=torch.float32, device=states.device) for r in requests]
        if first_run:
            self.log_partition = torch.empty(count, dtype=torch.float32, device=states.device)
        mass = state_grad = weight_grads = None
        if factors is not None:
            mass = torch.zeros(count, dtype=torch.float32, device=states.device)  # of the row's softmax in its gradient
            for request, factor in zip(requests, factors, strict=True):
                if request.loss in (NLL, KL) and factor is not None:
                    mass.index_add_(0, request.rows, factor)
            state_grad, weight_grads = torch.empty_like(states), [None] * len(self.weights)
        for start in range(0, count, self.size):
            part = slice(start, min(start + self.size, count))
            logits, pull = self.kept or self.head.forward(states[part], self.weights, factors is not None or keep)
            self.kept = (logits, pull) if keep and count <= self.size else None
            row_grad = None  # (n, V)
            if factors is not None:
                row_grad = logits if self.head.may_overwrite else torch.empty_like(logits)
            self._chunk(start, logits, row_grad, values, factors, mass, first_run)
            if factors is not None:
                state_grad[part] = pull(row_grad, weight_grads)
            del logits, pull, row_grad
        if not count and weight_grads:
            weight_grads = [torch.zeros_like(w) for w in self.weights]
        return values, state_grad, weight_grads

    def _chunk(self, start: int, logits, row_grad, values, factors, mass, first_run: bool) -> None:
        """Fill in values, log partition and row_grad (n, V) of a chunk, which begins at logit row `start`."""
        edges = np.arange(start, start + len(logits) + self.inner, self.inner)
        edges[-1] = start + len(logits)
        bounds = [np.searchsorted(request.host_rows, edges).tolist() for request in self.requests]
        originals = [
            _original_logits(request.original, slice(bound[0], bound[-1]))
            if request.loss.needs_original and bound[-1] > bound[0] else None
            for request, bound in zip(self.requests, bounds, strict=True)
        ]  # fmt: skip
        for i, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            rows = logits[low - start : high - start]  # (n, V)
            if first_run:
                self.log_partition[low:high] = log_partition(rows)
            normaliser = self.log_partition[low:high]
            grad = scaled_softmax(rows, normaliser, mass[low:high]) if row_grad is not None else None
            for k, (request, bound) in enumerate(zip(self.requests, bounds, strict=True)):
                tokens = slice(bound[i], bound[i + 1])
                if tokens.stop > tokens.start:
                    factor = factors[k][tokens] if factors is not None and factors[k] is not None else None
                    original = originals[k]
                    if original is not None:
                        original = original[tokens.start - bound[0] : tokens.stop - bound[0]]
                    at = request.rows[tokens] - low
                    targets = request.targets[tokens]
                    values[k][tokens] = _token_chunk(
                        request.loss, rows, normaliser, at, targets, original, factor, grad
                    )
            if row_grad is not None:
                row_grad[low - start : high - start] = grad


def _token_chunk(loss: TokenLoss, rows, normaliser, at, targets, original, factor, grad) -> torch.Tensor:
    """Return the values (m,) of m tokens; add their gradient, times factor (m,), to grad (n, V) in place.

    rows (n, V) logits; normaliser (n,): their log partition; at (m,) in [0, n): each token's row. For NLL and KL, grad
    has the part of the model's own softmax already.
    """
    if loss is NLL:
        if factor is not None:
            grad.view(-1).scatter_add_(0, at * grad.shape[-1] + targets, -factor)
        return normaliser[at] - rows[at, targets].float()
    if loss is KL:
        probabilities, values = kl_of_rows(rows[at], normaliser[at], original)
        if factor is not None:
            grad.index_add_(0, at, probabilities.mul_(-factor[:, None]))
        return values
    original = original.float() if original is not None else None
    with torch.set_grad_enabled(factor is not None):
        chunk = rows[at].float().detach().requires_grad_(factor is not None)  # (m, V)
        values = loss.values(chunk, targets, original)
        if factor is not None:
            grad.index_add_(0, at, torch.autograd.grad(values, chunk, factor)[0])
    return values.detach()


class _TokenValues(torch.autograd.Function):
    """`token_values`: the gradient of the values is known in the backward only."""

    @staticmethod
    def forward(ctx, head, requests, needs_grad, states, *weights):
        one_pass = _Pass(head, requests, states.detach(), [w.detach() for w in weights])
        values, _, _ = one_pass.run(None, keep=needs_grad and any(ctx.needs_input_grad))
        ctx.one_pass = one_pass
        ctx.save_for_backward(states, *weights)  # refuses a backward after they were changed
        return tuple(values)

    @staticmethod
    def backward(ctx, *factors):
        states, *weights = ctx.saved_tensors
        one_pass, ctx.one_pass = ctx.one_pass, None
        one_pass.states, one_pass.weights = states.detach(), [w.detach() for w in weights]
        _, state_grad, weight_grads = one_pass.run(list(factors))
        return None, None, None, state_grad, *weight_grads


class _WeightedValues(torch.autograd.Function):
    """`weighted_values`: the gradients are made in the forward, which is the only pass."""

    @staticmethod
    def forward(ctx, head, requests, factors, states, *weights):
        one_pass = _Pass(head, requests, states.detach(), [w.detach() for w in weights])
        wanted = any(ctx.needs_input_grad) and any(factor is not None for factor in factors)
        values, state_grad, weight_grads = one_pass.run(factors if wanted else None)
        ctx.gradients = (state_grad, weight_grads) if wanted else None
        total = states.new_zeros((), dtype=torch.float32)
        for value, factor in zip(values, factors, strict=True):
            if factor is not None:
                total = total + (value * factor).sum()
        ctx.mark_non_differentiable(*values)
        return total, *values

    @staticmethod
    def backward(ctx, scale, *_):
        (state_grad, weight_grads), ctx.gradients = ctx.gradients, None
        return None, None, None, state_grad.mul_(scale), *(grad.mul_(scale) for grad in weight_grads)
