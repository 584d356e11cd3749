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


def token_unlikelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-ln(1 - p(target)) of each token: logits (n, V), targets (n,) -> (n,) in nats; 0 for a token that is not likely.

    Worked out as ln(sum of all) - ln(sum of all others), in logits: at p = 1 in fp32 the gradient is still p there.
    Minimising it makes the token unlikely. Source: Welleck et al. 2020 (arXiv 1908.04319), eq. 4.
    """
    assert logits.shape[:1] == targets.shape, (logits.shape, targets.shape)
    is_target = F.one_hot(targets, logits.shape[-1]).bool()  # (n, V)
    others = logits.masked_fill(is_target, -torch.inf)
    return torch.logsumexp(logits, dim=-1) - torch.logsumexp(others, dim=-1)


def rmu(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared distance of hidden states to where they are steered, mean over the width: (M, D), (M, D) or (D,) -> (M,).

    On forget tokens `target` is a fixed random direction times a constant (`rmu_direction`); on retain tokens it is the
    original's states, and 0 where nothing has changed. Source: Li et al. 2024 (arXiv 2403.03218), section 4.
    """
    return (states.float() - target.detach().float()).square().mean(-1)


def rmu_direction(width: int, coefficient: float, seed: int) -> torch.Tensor:
    """A vector of length `coefficient`, (D,): uniform numbers in [0, 1), scaled (Li et al. 2024, section 4)."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return coefficient * drawn / drawn.norm()


def random_mismatch(nll: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Mean token NLL of each random answer after a harmful prompt: (M,), (M,) -> (S,). Minimising it
    teaches unrelated answers. Source: Yao et al. 2023, eq. 3; the caller averages over rows and the K."""
    return sequence_mean(nll, sequence, count)


def weighted_sum(values: torch.Tensor, weight: float, denominator: float) -> torch.Tensor:
    """weight * sum(values) / denominator as a scalar; 0 (with a gradient of 0) where nothing is counted."""
    return values.sum() * (weight / denominator if denominator else 0.0)
