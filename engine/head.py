"""The output head as the fused losses use it: the logits of a chunk of states, and the gradient back through them.

Letters: n logit rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch.func import functional_call


class WholeLogits:
    """No head: the `states` are the logits already."""

    may_overwrite = False  # whether the logits of a chunk are read by nothing but the losses

    def weights(self) -> list[torch.nn.Parameter]:
        return []

    def vocabulary(self, states: torch.Tensor) -> int:
        return states.shape[-1]

    def forward(self, states: torch.Tensor, weights: list[torch.Tensor], needs_grad: bool):
        return states, lambda grad, sums: grad


WHOLE_LOGITS = WholeLogits()


class OutputHead:
    """A model's output head: any module, with what its family does to the logits afterwards.

    A plain linear layer has its gradient in closed form. Adapters on it, a scale or a cap of the logits are left to
    autograd, a chunk at a time.
    """

    def __init__(self, model):
        self._module, self._config = model.get_output_embeddings(), model.config
        self._names = [name for name, p in self._module.named_parameters() if p.requires_grad]
        self._is_plain = type(self._module) is torch.nn.Linear and not finishes_logits(self._config)
        self.may_overwrite = self._is_plain  # autograd may have kept them

    def weights(self) -> list[torch.nn.Parameter]:
        """Return the trained weights, as they are now: a sharded model swaps them for whole ones in its forward."""
        return [self._module.get_parameter(name) for name in self._names]

    def vocabulary(self, states: torch.Tensor) -> int:
        weight = self._module.weight  # an adapted layer passes on its base's
        return weight.shape[0] if weight.dim() == 2 and weight.is_floating_point() else self._module.out_features

    def forward(self, states: torch.Tensor, weights: list[torch.Tensor], needs_grad: bool):
        """Return (logits (n, V) of states (n, D), pull). pull(gradient (n, V), sums) returns the gradient of the states
        and adds those of the weights to `sums`, a list of tensors or, before the first chunk, None."""
        if self._is_plain:
            given = dict(zip(self._names, weights, strict=True))
            weight, bias = given.get("weight", self._module.weight), given.get("bias", self._module.bias)
            return F.linear(states, weight, bias), lambda grad, sums: self._pull(states, weight, grad, sums)
        with torch.set_grad_enabled(needs_grad):
            inputs = [tensor.detach().requires_grad_(needs_grad) for tensor in (states, *weights)]
            given = dict(zip(self._names, inputs[1:], strict=True))
            logits = finish_logits(self._config, functional_call(self._module, given, (inputs[0],)))

        def pull(grad: torch.Tensor, sums: list[torch.Tensor]) -> torch.Tensor:
            state_grad, *weight_grads = torch.autograd.grad(logits, inputs, grad)
            for i, weight_grad in enumerate(weight_grads):
                sums[i] = weight_grad if sums[i] is None else sums[i].add_(weight_grad)
            return state_grad

        return logits.detach(), pull

    def _pull(self, states, weight, grad, sums) -> torch.Tensor:
        for i, name in enumerate(self._names):
            if name == "weight":
                sums[i] = grad.t() @ states if sums[i] is None else sums[i].addmm_(grad.t(), states)
            else:
                sums[i] = grad.sum(0) if sums[i] is None else sums[i].add_(grad.sum(0))
        return grad @ weight


@dataclasses.dataclass(frozen=True)
class FrozenHead:
    """The output head as it was before training: weight (V, D), bias (V,) or None, and the model's config."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    config: object

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the original's logits (n, V) of its states (n, D)."""
        bias = None if self.bias is None else self.bias.to(states.dtype)
        return finish_logits(self.config, F.linear(states, self.weight.to(states.dtype), bias))


# ---------------------------------------------------------------------------- what a family does to its logits
def finish_logits(config, logits: torch.Tensor) -> torch.Tensor:
    """Return the head's output (..., V) as the family finishes it: Cohere and Granite scale it, Gemma 2 caps it.

    `check_packing` detects a family that does something else.
    """
    config = config.get_text_config()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def finishes_logits(config) -> bool:
    """Say whether a family does something to its head's output."""
    config = config.get_text_config()
    return any(getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
