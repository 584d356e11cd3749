"""Which weights a run may move: frozen layers, and low-rank adapters in the others."""

from __future__ import annotations

import dataclasses
import re

import torch

from options import POSITIVE, option
from utils import UsageError

# they read the weights of some layers past the module: peft refuses adapters there, or they would learn nothing
WITH_FUSED_KERNELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): rank, scale as alpha / rank, names of the target layers."""

    rank: POSITIVE = option(16, "rank of the adapters")
    alpha: POSITIVE = option(32, "scale of the adapters, as alpha / rank")
    targets: tuple[str, ...] = option(("all-linear",), "names of the layers that get adapters")


def decoder_layers(model) -> tuple[str, torch.nn.ModuleList]:
    """The name and the list of a model's transformer layers."""
    total = model.config.get_text_config().num_hidden_layers
    return next((name, module) for name, module in model.named_modules()
                if isinstance(module, torch.nn.ModuleList) and len(module) == total)  # fmt: skip


def freeze(model, count: int) -> str | None:
    """Leave the first `count` layers as they are, and with them the embeddings: the backward stops above them.

    Returns a regular expression for the names of what lies in these layers; None where nothing is frozen.
    """
    if count == 0:
        return None
    total = model.config.get_text_config().num_hidden_layers
    if count >= total:
        raise UsageError(f"--frozen_layers {count}: the model has {total} layers, so at most {total - 1} can be frozen")
    name, layers = decoder_layers(model)
    for part in (*layers[:count], model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(False)
    return rf"{re.escape(name)}\.({'|'.join(map(str, range(count)))})\..*"


def add_lora(model, settings: LoraSettings, frozen: str | None):
    """Put trainable adapters into the model's layers but the frozen ones, in place; returns the wrapper that saves
    them."""
    import peft

    targets, experts, exclude = list(settings.targets), [], [frozen] if frozen else []
    if targets == ["all-linear"]:
        targets = "all-linear"
        # the experts of a mixture, stored as one tensor, are no linear layers; peft knows them in some families alone
        experts = [f"{module_name}.{name}" for module_name, module in model.named_modules()
                   for name, weight in module.named_parameters(recurse=False)
                   if weight.dim() == 3 and not type(module).__name__.startswith("Conv")]  # fmt: skip
        experts = [name for name in experts if not (frozen and re.fullmatch(frozen, name))]
        # a family's own kind of linear layer may return more than one tensor (Llama 4's router)
        exclude += [
            re.escape(name)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "transformers.models" in type(module).__module__
        ]
        if model.config.model_type in WITH_FUSED_KERNELS:
            exclude.append(r".*\.(out_proj|conv1d|dt_proj)")
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, task_type="CAUSAL_LM",
        exclude_modules="|".join(exclude) or None, target_parameters=experts or None,
    )  # fmt: skip
    try:
        wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"--lora_targets {' '.join(settings.targets)}: {str(error).splitlines()[0]}") from error
    for name, weight in model.named_parameters():  # peft gives experts adapters wherever they are
        if frozen and re.fullmatch(frozen, name):
            weight.requires_grad_(False)
    return wrapped
