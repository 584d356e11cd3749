"""The losses: pure functions of tensors. Nothing here knows a model, a tokenizer or an option.

Letters: N logit rows, M answer tokens, S sequences, V vocabulary. Several answer tokens may share a logit row: all
continuations of one prompt share the row that predicts their first token.
Every loss returns one value a sequence or a token. `weighted_sum` takes the mean over the whole step, so that the mean
is exact over micro-batches and processes.
Signs: each returned value is to be *minimised*.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def token_nll(logits: torch.Tensor, target_to_logit: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each answer token, in nats.

    logits (N, V) any float type; target_to_logit (M,) in [0, N): the row that predicts each token; targets (M,).
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
    """Return the forward KL( original || model ) over the full vocabulary, in nats.

    logits, original_logits (M, V). Returns (M,) fp32, 0 where both agree. Gradient flows to `logits` only.
    Source: Yao, Xu and Liu 2023 (arXiv 2310.10683), eq. 4, with the model as second argument.
    """
    assert logits.shape == original_logits.shape, (logits.shape, original_logits.shape)
    log_model = F.log_softmax(logits.float(), dim=-1)
    log_original = F.log_softmax(original_logits.detach().float(), dim=-1)
    return F.kl_div(log_model, log_original, reduction="none", log_target=True).sum(-1)


def sequence_sum(values: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Sum token values by sequence: values (M,), sequence (M,) in [0, S) -> (S,); 0 for a sequence without tokens."""
    assert values.shape == sequence.shape, (values.shape, sequence.shape)
    return values.new_zeros(count).index_add(0, sequence, values)


def sequence_mean(values: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Average token values by sequence: (M,), (M,) -> (S,); 0 for a sequence without tokens (all masked)."""
    tokens = sequence_sum(torch.ones_like(values), sequence, count)
    return sequence_sum(values, sequence, count) / tokens.clamp(min=1)


def gradient_ascent(
    nll: torch.Tensor, sequence: torch.Tensor, count: int, ceiling: float = 0.0, *, back: bool = False
) -> torch.Tensor:  # fmt: skip
    """Return minus the summed token NLL of each forget answer: (M,), (M,) -> (S,). Minimising it forgets.

    Source: Yao et al. 2023, eq. 2. With `ceiling` > 0 (nats), a sequence whose *mean* NLL is above the ceiling counts
    as ceiling * tokens and gives no gradient, so a forgotten answer is pushed no further. With `back`, what it is above
    the ceiling is held against it: the value rises again, and the answer is pulled back to the ceiling.
    """
    total = sequence_sum(nll, sequence, count)
    if ceiling > 0:
        cap = ceiling * sequence_sum(torch.ones_like(nll), sequence, count)
        return (total - cap).abs() - cap if back else -torch.minimum(total, cap)
    return -total


def npo(nll: torch.Tensor, original_nll: torch.Tensor, sequence: torch.Tensor, count: int, beta: float) -> torch.Tensor:
    """Return the NPO loss: -2/beta * ln sigmoid(beta * (NLL - NLL of the original)), (M,) -> (S,).

    NLLs are *summed* over a sequence's tokens, as in the paper (some published codes average them).
    It is 2/beta * ln 2 for an unchanged model and falls to 0 as the answer is forgotten, so it is bounded below. For
    beta -> 0 its gradient is that of gradient ascent. Source: Zhang et al. 2024 (arXiv 2404.05868), eq. 3.
    """
    ratio = sequence_sum(nll - original_nll, sequence, count)
    return -2 / beta * F.logsigmoid(beta * ratio)


def simnpo(nll: torch.Tensor, sequence: torch.Tensor, count: int, beta: float, gamma: float) -> torch.Tensor:
    """Return the SimNPO loss: -2/beta * ln sigmoid(beta * mean token NLL - gamma), (M,) -> (S,); needs no original.

    Falls to 0 as the answer becomes unlikely. Source: Fan et al. 2024 (arXiv 2410.07163), eq. 4.
    """
    return -2 / beta * F.logsigmoid(beta * sequence_mean(nll, sequence, count) - gamma)


def dpo(preferred: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the DPO loss: -1/beta * ln sigmoid(beta * (rejected - preferred)), (S,), (S,) -> (S,).

    preferred, rejected: summed NLL minus the original's, of the replacement answer ("I don't know", or another harmless
    answer) and of the forget answer. It is ln 2 / beta for an unchanged model. The factor
    1/beta makes its gradient at the start independent of beta. Source: Rafailov et al. 2023 (arXiv 2305.18290),
    eq. 7; "IDK" as in Maini et al. 2024 (arXiv 2401.06121), section 4.
    """
    assert preferred.shape == rejected.shape, (preferred.shape, rejected.shape)
    return -F.logsigmoid(beta * (rejected - preferred)) / beta


def token_unlikelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -ln(1 - p(target)) of each token: logits (n, V), targets (n,) -> (n,) in nats; 0 for p = 0.

    Computed as ln(sum of all) - ln(sum of all others) from the logits, so that the gradient is also right where p
    rounds to 1 in fp32. Minimising it makes the token unlikely. Source: Welleck et al. 2020 (arXiv 1908.04319), eq. 4.
    """
    assert logits.shape[:1] == targets.shape, (logits.shape, targets.shape)
    is_target = F.one_hot(targets, logits.shape[-1]).bool()  # (n, V)
    other_logits = logits.masked_fill(is_target, -torch.inf)
    return torch.logsumexp(logits, dim=-1) - torch.logsumexp(other_logits, dim=-1)


def weighted_ascent(nll: torch.Tensor, beta: float, other_beta: float = 0.0) -> torch.Tensor:
    """Return -w * NLL of each token, w = p^beta * (1 - p)^other_beta: (M,) -> (M,). Minimising it forgets.

    p is the token's probability; no gradient flows through w. With other_beta = 0 it is WGA (Wang et al. 2025, arXiv
    2502.19301): a token that is unlikely already is pushed no further. With both it is SatImp (Yang et al. 2025, arXiv
    2505.11953, section 5): nor is one that is known by heart.
    """
    log_p = -nll.detach()
    return -(log_p * beta).exp() * (-torch.expm1(log_p)).clamp(min=0) ** other_beta * nll


def token_adjusted_kl(
    logits: torch.Tensor, targets: torch.Tensor, original: torch.Tensor, strength: float
) -> torch.Tensor:  # fmt: skip
    """Return KL( original with `strength` taken off the target's logit || model ): logits, original (n, V) -> (n,).

    In nats, 0 where the model says so. Its gradient is that of the published cross-entropy, which is larger by the
    entropy of what is aimed at. Source: UNDIAL, Dong et al. 2025 (arXiv 2402.10052), section 3.
    """
    adjusted = original.scatter_add(-1, targets[:, None], original.new_full((len(targets), 1), -strength))
    return token_kl(logits, adjusted)


def token_ce_u(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy from the model's own distribution without the target: (n, V), (n,) -> (n,) in nats.

    No gradient flows through what is aimed at. The gradient is then that of `token_unlikelihood`: p of the target on
    its own logit, and -p * p_j / (1 - p) on another's. Source: CE-U, Yang 2025 (arXiv 2503.01224).
    """
    is_target = F.one_hot(targets, logits.shape[-1]).bool()  # (n, V)
    aim = torch.softmax(logits.detach().masked_fill(is_target, -torch.inf), dim=-1)  # (n, V)
    return F.cross_entropy(logits, aim, reduction="none")


def token_margin(logits: torch.Tensor) -> torch.Tensor:
    """Return (largest logit - mean logit)^2: (n, V) -> (n,); 0 where all tokens are equally likely.

    Source: the logit-margin flattening loss of PDU, Entesari et al. 2025 (arXiv 2506.05314).
    """
    return (logits.amax(-1) - logits.mean(-1)).square()


def token_scale_slope(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the slope of each token's NLL in a scale of its logits, at scale 1: sum p z - z of the target.

    logits (n, V), targets (n,) -> (n,), in nats. Its square is IRMv1's penalty of an environment (Arjovsky et al. 2019,
    arXiv 1907.02893, section 3.1), which ILU takes for unlearning (Wang et al. 2025, arXiv 2506.01339).
    """
    own = logits.gather(-1, targets[:, None])[:, 0]
    return (logits.softmax(-1) * logits).sum(-1) - own


def flat(preferred: torch.Tensor, forget: torch.Tensor, divergence: str) -> torch.Tensor:
    """Return FLAT's loss -g(preferred) + f*(g(forget)): (S,), (S,) in [0, 1] -> (S,).

    preferred, forget: mean probability of the tokens of the answer to prefer ("I don't know", or another) and of the
    forget answer. g and f* are the variational function and the conjugate of the f-divergence that is maximised
    between them. Source: Wang et al. 2025 (arXiv 2410.11143), table of f-divergences.
    """
    of_preferred, of_forget = FLAT_DIVERGENCES[divergence]
    return of_forget(forget) - of_preferred(preferred)


LN2 = math.log(2)
# g(v), and f*(g(v)) written out
FLAT_DIVERGENCES = {
    "kl": (lambda v: v, lambda v: torch.exp(v - 1)),
    "pearson": (lambda v: v, lambda v: v.square() / 4 + v),
    "total_variation": (lambda v: torch.tanh(v) / 2, lambda v: torch.tanh(v) / 2),
    "jensen_shannon": (lambda v: LN2 - F.softplus(-v), lambda v: v + F.softplus(-v) - LN2),
}


def rmu(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of hidden states and their target: (M, D), (M, D) or (D,) -> (M,).

    On forget tokens `target` is a fixed random direction times a constant (`rmu_direction`). On retain tokens it is
    the original's states, so the value is 0 for an unchanged model.
    Source: Li et al. 2024 (arXiv 2403.03218), section 4.
    """
    return (states.float() - target.detach().float()).square().mean(-1)


def rmu_direction(width: int, coefficient: float, seed: int) -> torch.Tensor:
    """Return a vector (D,) of length `coefficient`: uniform numbers in [0, 1), scaled (Li et al. 2024, section 4)."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return coefficient * drawn / drawn.norm()


def weighted_sum(values: torch.Tensor, weight: float, denominator: float) -> torch.Tensor:
    """Return weight * sum(values) / denominator, a scalar; 0 with a gradient of 0 for a denominator of 0."""
    return values.sum() * (weight / denominator if denominator else 0.0)
