"""Token losses from logits, computed a few logit rows at a time: the vocabulary is the largest axis of a step.

Letters: N logit rows, M answer tokens of a request, n tokens or rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

CHUNK = 16  # logit rows at a time; with a vocabulary of 50,000 they take 3 MiB in fp32, which fits the CPU cache


class TokenLoss:
    """One value a token, from its logit row. A subclass defines `values`; autograd computes the gradient."""

    needs_original = False

    def values(self, logits: torch.Tensor, targets: torch.Tensor, original: torch.Tensor | None) -> torch.Tensor:
        """Return (n,) in nats, from logits (n, V) fp32, targets (n,), and original (n, V) fp32 or None."""
        raise NotImplementedError


class NegativeLogLikelihood(TokenLoss):
    """-ln p(target). Its gradient is p minus the one-hot target; `_TokenValues` uses this closed form."""

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
    """A loss and its tokens: `rows` (M,) in [0, N) predict them; `targets` (M,); `original` (M, V) logits or None."""

    loss: TokenLoss
    rows: torch.Tensor
    targets: torch.Tensor
    original: torch.Tensor | None = None


def token_values(logits: torch.Tensor, requests: list[TokenRequest]) -> list[torch.Tensor]:
    """Return the values (M,) fp32 of each request, in one pass over logits (N, V). Gradient flows to `logits` only.

    Only a chunk of rows is ever held in fp32: fp32 copies of all logits and their gradients would cost more than the
    matrix product that computes the logits.
    """
    for request in requests:
        assert request.rows.shape == request.targets.shape, (request.rows.shape, request.targets.shape)
        if request.loss.needs_original:
            expected = (len(request.rows), logits.shape[-1])
            assert request.original.shape == expected, (request.original.shape, expected)
    tensors = [t for request in requests for t in (request.rows, request.targets, request.original)]
    return list(_TokenValues.apply(logits, [request.loss for request in requests], *tensors))


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


class _TokenValues(torch.autograd.Function):
    """`token_values` with its gradient. All NLL and KL requests of a row share one softmax, scaled once."""

    @staticmethod
    def forward(ctx, logits, losses, *tensors):
        requests = [TokenRequest(loss, *tensors[3 * i : 3 * i + 3]) for i, loss in enumerate(losses)]
        count = logits.shape[0]  # N
        log_partition = torch.empty(count, dtype=torch.float32, device=logits.device)  # (N,)
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            log_partition[part] = torch.logsumexp(logits[part].float(), dim=-1)
        out = []
        for request in requests:
            rows, targets = request.rows, request.targets
            if request.loss is NLL:
                out.append(log_partition[rows] - logits[rows, targets].float())  # (M,)
                continue
            values = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
            for start in range(0, len(rows), CHUNK):
                part = slice(start, start + CHUNK)
                if request.loss is KL:
                    log_model = logits[rows[part]].float() - log_partition[rows[part], None]  # (n, V)
                    log_original = F.log_softmax(request.original[part].float(), dim=-1)
                    values[part] = (log_original.exp() * (log_original - log_model)).sum(-1)
                else:
                    values[part] = request.loss.values(logits[rows[part]].float(), targets[part], _chunk(request, part))
            out.append(values)
        ctx.losses = losses
        ctx.save_for_backward(logits, log_partition, *tensors)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        logits, log_partition, *tensors = ctx.saved_tensors
        requests = [TokenRequest(loss, *tensors[3 * i : 3 * i + 3]) for i, loss in enumerate(ctx.losses)]
        grad = torch.empty_like(logits)  # (N, V)
        mass = torch.zeros_like(log_partition)  # (N,): factor of the model's own softmax in each row's gradient
        for request, value_grad in zip(requests, grads, strict=True):
            if request.loss in (NLL, KL):
                mass.index_add_(0, request.rows, value_grad)
        edges = torch.arange(0, logits.shape[0] + CHUNK, CHUNK, device=logits.device)
        orders = [request.rows.argsort() for request in requests]  # a request's tokens, sorted by logit row
        bounds = [
            torch.searchsorted(request.rows[order], edges).tolist()
            for request, order in zip(requests, orders, strict=True)
        ]
        for i, start in enumerate(edges[:-1].tolist()):
            part = slice(start, start + CHUNK)
            row_grad = (logits[part].float() - log_partition[part, None]).exp_().mul_(mass[part, None])  # (n, V)
            for request, value_grad, order, bound in zip(requests, grads, orders, bounds, strict=True):
                tokens = order[bound[i] : bound[i + 1]]
                if len(tokens):
                    _add_gradient(row_grad, start, logits, request, tokens, value_grad[tokens])
            grad[part] = row_grad
        return grad, None, *[None] * len(tensors)


def _add_gradient(row_grad, start: int, logits, request: TokenRequest, tokens, value_grad) -> None:
    """Add the gradient of a request's `tokens` to row_grad (n, V) in place; its first row is logit row `start`."""
    rows, targets = request.rows[tokens], request.targets[tokens]
    if request.loss is NLL:
        row_grad.index_put_((rows - start, targets), -value_grad, accumulate=True)
    elif request.loss is KL:
        original = torch.softmax(request.original[tokens].float(), dim=-1)
        row_grad.index_add_(0, rows - start, original.mul_(-value_grad[:, None]))
    else:
        with torch.enable_grad():
            chunk = logits[rows].float().detach().requires_grad_()  # (tokens, V)
            values = request.loss.values(chunk, targets, _chunk(request, tokens))
            (logit_grad,) = torch.autograd.grad(values, chunk, value_grad)
        row_grad.index_add_(0, rows - start, logit_grad)


def _chunk(request: TokenRequest, part) -> torch.Tensor | None:
    """Return the original's logits of some tokens in fp32, or None for a loss that does not use them."""
    return request.original[part].float() if request.loss.needs_original else None
