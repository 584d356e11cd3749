"""The objectives: pure functions of tensors. No model, tokenizer or option is known here.

Letters: N logit rows, M answer tokens, S sequences, V vocabulary. Several answer tokens may share a
logit row (the branches of one prompt share the row that predicts their first token).
Every function returns one value a sequence or a token; `weighted_sum` makes the mean, so that it is
exact over micro-batches and processes: its denominators are those of the whole step.
Signs: each returned value is to be *minimised*.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_nll(logits: torch.Tensor, target_to_logit: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each answer token, in nats.

    logits (N, V) any float type; target_to_logit (M,) in [0, N): the row that predicts the token; targets (M,).
    Returns (M,) fp32. Falls as the model learns the token.
    """
    assert logits.dim() == 2 and target_to_logit.shape == targets.shape, (
        logits.shape,
        target_to_logit.shape,
        targets.shape,
    )
    logits = logits.float()  # (N, V)
    log_partition = torch.logsumexp(logits, dim=-1)  # (N,)
    return log_partition[target_to_logit] - logits[target_to_logit, targets]  # (M,)


def token_kl(logits: torch.Tensor, original_logits: torch.Tensor) -> torch.Tensor:
    """Forward KL( original || model ) over the full vocabulary, in nats.

    logits, original_logits (M, V). Returns (M,) fp32, 0 where both agree. Gradient flows to `logits` only.
    Source: Yao, Xu and Liu 2023 (arXiv 2310.10683), eq. 4, with the model in the second place.
    """
    assert logits.shape == original_logits.shape, (logits.shape, original_logits.shape)
    log_model = F.log_softmax(logits.float(), dim=-1)
    log_original = F.log_softmax(original_logits.detach().float(), dim=-1)
    return F.kl_div(log_model, log_original, reduction="none", log_target=True).sum(-1)


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


def sequence_sum(values: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of token values a sequence: values (M,), sequence (M,) in [0, S) -> (S,); 0 for one without tokens."""
    assert values.shape == sequence.shape, (values.shape, sequence.shape)
    return values.new_zeros(count).index_add(0, sequence, values)


def sequence_mean(values: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of token values a sequence: (M,), (M,) -> (S,); 0 for a sequence without tokens (all masked)."""
    tokens = sequence_sum(torch.ones_like(values), sequence, count)
    return sequence_sum(values, sequence, count) / tokens.clamp(min=1)


def gradient_ascent(nll: torch.Tensor, sequence: torch.Tensor, count: int, ceiling: float = 0.0) -> torch.Tensor:
    """Minus the summed token NLL of each harmful answer: (M,), (M,) -> (S,). Minimising it forgets.

    Source: Yao et al. 2023, eq. 2. With `ceiling` > 0 (nats), a sequence whose *mean* NLL is above it
    counts as ceiling * tokens and gives no gradient: what is forgotten is pushed no further.
    """
    total = sequence_sum(nll, sequence, count)
    if ceiling > 0:
        total = torch.minimum(total, ceiling * sequence_sum(torch.ones_like(nll), sequence, count))
    return -total


def npo(
    nll: torch.Tensor, original_nll: torch.Tensor, sequence: torch.Tensor, count: int, beta: float = 0.1
) -> torch.Tensor:
    """Negative preference optimisation: -2/beta * ln sigmoid(beta * (NLL - NLL of the original)), (M,) -> (S,).

    NLLs are *summed* over a sequence's tokens, as in the paper (some published codes average them).
    2/beta * ln 2 where nothing has changed; falls to 0 as the answer is forgotten, so it is bounded below; for
    beta -> 0 its gradient is that of gradient ascent. Source: Zhang et al. 2024 (arXiv 2404.05868), eq. 3.
    """
    ratio = sequence_sum(nll - original_nll, sequence, count)
    return -2 / beta * F.logsigmoid(beta * ratio)


def simnpo(
    nll: torch.Tensor, sequence: torch.Tensor, count: int, beta: float = 2.5, gamma: float = 0.0
) -> torch.Tensor:
    """SimNPO: -2/beta * ln sigmoid(beta * mean token NLL - gamma), (M,) -> (S,); needs no original.

    Falls to 0 as the answer becomes unlikely. Source: Fan et al. 2024 (arXiv 2410.07163), eq. 4.
    """
    return -2 / beta * F.logsigmoid(beta * sequence_mean(nll, sequence, count) - gamma)


def dpo(preferred: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Direct preference optimisation: -1/beta * ln sigmoid(beta * (rejected - preferred)), (S,), (S,) -> (S,).

    preferred, rejected: a sequence's summed NLL minus the original's, of the answer to be given ("I don't know",
    or another harmless one) and of the one to be forgotten. ln 2 / beta where nothing has changed. The factor
    1/beta makes its gradient at the start independent of beta. Source: Rafailov et al. 2023 (arXiv 2305.18290),
    eq. 7; "IDK" as in Maini et al. 2024 (arXiv 2401.06121), section 4.
    """
    assert preferred.shape == rejected.shape, (preferred.shape, rejected.shape)
    return -F.logsigmoid(beta * (rejected - preferred)) / beta


def unlikelihood(nll: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of -ln(1 - p(token)) over each harmful answer: (M,), (M,) -> (S,); 0 once no token is likely.

    Source: Welleck et al. 2020 (arXiv 1908.04319), eq. 4. p = 1 counts as 1 - 1e-6, so that it stays finite.
    """
    probability = torch.exp(-nll).clamp(max=1 - 1e-6)
    return sequence_sum(-torch.log1p(-probability), sequence, count)


def rmu(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared distance of hidden states to where they are steered, mean over the width: (M, D), (M, D) or (D,) -> (M,).

    On harmful tokens `target` is a fixed random direction times a constant; on normal tokens it is the original's
    states, and 0 where nothing has changed. Source: Li et al. 2024 (arXiv 2403.03218), section 4.
    """
    return (states.float() - target.detach().float()).square().mean(-1)


def random_mismatch(nll: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Mean token NLL of each random answer after a harmful prompt: (M,), (M,) -> (S,). Minimising it
    teaches unrelated answers. Source: Yao et al. 2023, eq. 3; the caller averages over rows and the K."""
    return sequence_mean(nll, sequence, count)


def weighted_sum(values: torch.Tensor, weight: float, denominator: float) -> torch.Tensor:
    """weight * sum(values) / denominator as a scalar; 0 (with a gradient of 0) where nothing is counted."""
    return values.sum() * (weight / denominator if denominator else 0.0)
