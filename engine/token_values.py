"""Token values from logits, a few logit rows at a time: the vocabulary is the largest axis of a step.

Letters: N logit rows, M answer tokens, Q answer tokens with the original's logits, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class _AnswerTerms(torch.autograd.Function):
    """`token_nll` and `token_kl` of one set of logits, a few logit rows at a time.

    The vocabulary is the largest axis: full-size fp32 copies of (N, V) and their gradients cost more
    than the matrix product that made them. Here only a chunk of rows is ever held in fp32.
    """

    CHUNK = 16  # logit rows at a time: at a vocabulary of 50,000, 3 MiB in fp32, which stays in the cache

    @staticmethod
    def forward(ctx, logits, target_to_logit, targets, kl_row, original_logits):
        rows = logits.shape[0]  # N
        log_partition = torch.empty(rows, dtype=torch.float32, device=logits.device)  # (N,)
        for start in range(0, rows, _AnswerTerms.CHUNK):
            part = slice(start, start + _AnswerTerms.CHUNK)
            log_partition[part] = torch.logsumexp(logits[part].float(), dim=-1)
        nll = log_partition[target_to_logit] - logits[target_to_logit, targets].float()  # (M,)
        kl = torch.empty(len(kl_row), dtype=torch.float32, device=logits.device)
        for start in range(0, len(kl_row), _AnswerTerms.CHUNK):
            part = slice(start, start + _AnswerTerms.CHUNK)
            log_model = logits[kl_row[part]].float() - log_partition[kl_row[part], None]  # (chunk, V)
            log_original = F.log_softmax(original_logits[part].float(), dim=-1)
            kl[part] = (log_original.exp() * (log_original - log_model)).sum(-1)
        ctx.save_for_backward(logits, target_to_logit, targets, kl_row, original_logits, log_partition)
        return nll, kl

    @staticmethod
    def backward(ctx, grad_nll, grad_kl):
        logits, target_to_logit, targets, kl_row, original_logits, log_partition = ctx.saved_tensors
        grad = torch.empty_like(logits)  # (N, V)
        mass = torch.zeros_like(log_partition)  # (N,): how much of the model's own softmax each row gets
        mass.index_add_(0, target_to_logit, grad_nll).index_add_(0, kl_row, grad_kl)
        nll_order, kl_order = target_to_logit.argsort(), kl_row.argsort()
        edges = torch.arange(0, logits.shape[0] + _AnswerTerms.CHUNK, _AnswerTerms.CHUNK, device=logits.device)
        nll_edges = torch.searchsorted(target_to_logit[nll_order], edges).tolist()
        kl_edges = torch.searchsorted(kl_row[kl_order], edges).tolist()
        for i, start in enumerate(edges[:-1].tolist()):
            part = slice(start, start + _AnswerTerms.CHUNK)
            slope = (logits[part].float() - log_partition[part, None]).exp_().mul_(mass[part, None])  # (chunk, V)
            tokens = nll_order[nll_edges[i] : nll_edges[i + 1]]
            slope.index_put_((target_to_logit[tokens] - start, targets[tokens]), -grad_nll[tokens], accumulate=True)
            tokens = kl_order[kl_edges[i] : kl_edges[i + 1]]
            if len(tokens):
                original = torch.softmax(original_logits[tokens].float(), dim=-1)
                slope.index_add_(0, kl_row[tokens] - start, original.mul_(-grad_kl[tokens, None]))
            grad[part] = slope
        return grad, None, None, None, None


def fused_nll_and_kl(
    logits: torch.Tensor, target_to_logit: torch.Tensor, targets: torch.Tensor, kl_row: torch.Tensor,
    original_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(token_nll(logits, target_to_logit, targets), token_kl(logits[kl_row], original_logits)) in one pass.

    logits (N, V); target_to_logit, targets (M,); kl_row (Q,) in [0, N); original_logits (Q, V).
    Returns fp32 (M,) and (Q,); equal to the two functions, values and gradients.
    """
    assert original_logits.shape == (len(kl_row), logits.shape[-1]), (original_logits.shape, kl_row.shape)
    return _AnswerTerms.apply(logits, target_to_logit, targets, kl_row, original_logits)
