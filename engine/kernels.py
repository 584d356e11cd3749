"""The elementwise passes over logit rows. On a GPU each is compiled into one kernel, if `fuse_kernels` was called.

Letters: n logit rows, V vocabulary.
"""

from __future__ import annotations

import torch

_compiled: dict[str, object] = {}  # name -> compiled function; empty: not fused


def log_partition(logits: torch.Tensor) -> torch.Tensor:
    """Return ln of the sum of exp of each row: (n, V) -> (n,) fp32."""
    return _run(_log_partition, logits)


def scaled_softmax(logits: torch.Tensor, normaliser: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return each row's softmax times its factor: (n, V), log partition (n,), (n,) -> (n, V) fp32."""
    return _run(_scaled_softmax, logits, normaliser, factor)


def kl_of_rows(
    logits: torch.Tensor, normaliser: torch.Tensor, original: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the original's probabilities (n, V) fp32, KL( original || model ) (n,) fp32) of n rows.

    logits, original (n, V) any float type; normaliser (n,): log partition of `logits`.
    """
    return _run(_kl_of_rows, logits, normaliser, original)


def fuse_kernels() -> None:
    """From now on, compile each pass on a GPU: one kernel reads the logits once and holds no fp32 copy of them."""
    for function in (_log_partition, _scaled_softmax, _kl_of_rows):
        _compiled[function.__name__] = torch.compile(function)


def _run(function, *tensors: torch.Tensor):
    if tensors[0].device.type == "cuda" and function.__name__ in _compiled:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # n, so that one kernel serves all chunks
        return _compiled[function.__name__](*tensors)
    return function(*tensors)


def _log_partition(logits):
    return torch.logsumexp(logits.float(), dim=-1)


def _scaled_softmax(logits, normaliser, factor):
    return (logits.float() - normaliser[:, None]).exp_().mul_(factor[:, None])


def _kl_of_rows(logits, normaliser, original):
    log_model = logits.float() - normaliser[:, None]
    log_original = torch.log_softmax(original.float(), dim=-1)
    probabilities = log_original.exp()
    return probabilities, (probabilities * (log_original - log_model)).sum(-1)
