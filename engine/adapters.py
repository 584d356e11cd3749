"""Choose what a run trains: freeze layers, add low-rank adapters, recompute activations, and check the save path.

Everything that asks which modules are the layers of the language model asks `decoder_layers`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings

import torch

from options import POSITIVE, option
from utils import UsageError

# Their kernels read the weights of some layers past the module: peft refuses adapters there, or they learn nothing.
WITH_FUSED_KERNELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
QUANTISED_CLASSES = {"Params4bit", "Int8Params"}  # bitsandbytes' own parameter classes
PROBE_SCALE = 0.02  # spread of the values that `check_save_path` gives the adapters: a few percent of a weight
SAVE_TOLERANCE = 1e-3  # of the logits' spread, in fp32: rounding gives 1e-6, a merge into a tied weight 1e-1


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): rank, scale as alpha / rank, names of the target layers."""

    rank: POSITIVE = option(16, "rank of the adapters")
    alpha: POSITIVE = option(32, "scale of the adapters, as alpha / rank")
    targets: tuple[str, ...] = option(("all-linear",), "names of the layers that get adapters")


# ------------------------------------------------------------------------------- layers, frozen or recomputed
def decoder_layers(model) -> tuple[str, torch.nn.ModuleList]:
    """Return the name within `model` and the list of the language model's layers.

    The search starts at the text decoder, because a vision tower may have as many layers. The largest list of the
    right length is taken, because a layer may hold a list of as many experts. Raises UsageError if there is none.
    """
    total = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        lists = [module for module in (root.modules() if root is not None else ())
                 if isinstance(module, torch.nn.ModuleList) and len(module) == total]  # fmt: skip
        if lists:
            layers = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))
            return next(name for name, module in model.named_modules() if module is layers), layers
    raise UsageError(f"{type(model).__name__}: has no list of {total} layers; leave out trainable.frozen_layers, "
                     "--gradient_checkpointing and --shard")  # fmt: skip


def freeze(model, count: int) -> str | None:
    """Freeze the first `count` layers, the token embeddings, the head, and all that feeds the first trained layer.

    Nothing below the first trained layer needs a gradient, so the backward stops there. Which weights feed that layer
    (position embeddings, input projections, norms) is read from the graph of one forward of two tokens, as far as
    that layer. Returns a regular expression for the names of what lies below the first trained layer, where no adapter
    may stand; None if `count` is 0. Raises UsageError if `count` leaves no layer to train.
    """
    if count == 0:
        return None
    total = model.config.get_text_config().num_hidden_layers
    if count >= total:
        raise UsageError(f"trainable.frozen_layers {count}: the model has {total} layers, so at most {total - 1} can "
                         "be frozen")  # fmt: skip
    name, layers = decoder_layers(model)
    for part in (*layers[:count], model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(False)
    before = _weights_before(model, layers[count])
    for weight in before:
        weight.requires_grad_(False)
    owners = [re.escape(owner) for owner, module in model.named_modules()
              if module is model.get_input_embeddings() or before & set(module.parameters(recurse=False))]  # fmt: skip
    return rf"{re.escape(name)}\.({'|'.join(map(str, range(count)))})\..*|({'|'.join(owners)})(\..*)?"


def restrict_trainable(model, pattern: str | None) -> None:
    """Freeze all parameters whose name `pattern`, a regular expression, does not find. Raises UsageError if it finds
    none that is trained, or is not one."""
    if pattern is None:
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        chosen = {name for name in trained if re.search(pattern, name)}
    except re.error as error:
        raise UsageError(f"trainable.parameters {pattern!r}: not a regular expression ({error})") from error
    if not chosen:
        names = ", ".join(list(trained)[-3:])
        raise UsageError(f"trainable.parameters {pattern!r}: finds none of this model's parameters, such as {names}")
    for name, parameter in trained.items():
        parameter.requires_grad_(name in chosen)


def check_layers(model, layers: tuple[int, ...]) -> None:
    """Raise UsageError if the model has not all of these layers, counted from 0, or if no weight that shapes their
    output is trained."""
    if not layers:
        return
    name, modules = decoder_layers(model)
    if layers[-1] >= len(modules):
        raise UsageError(f"layer {layers[-1]}: the model has {len(modules)} layers, 0 to {len(modules) - 1}; name "
                         "another one, for instance --set forget.layer=1")  # fmt: skip
    up_to = tuple(f"{name}.{i}." for i in range(layers[0] + 1))
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    if not any(p.requires_grad and (n.startswith(up_to) or id(p) in embeddings) for n, p in model.named_parameters()):
        raise UsageError(f"layer {layers[0]}: no weight up to it is trained, so its hidden states cannot move; change "
                         "trainable.frozen_layers, trainable.parameters or the layer")  # fmt: skip


class _Reached(Exception):
    """Ends a forward at the layer that was asked for."""


def _weights_before(model, layer: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Return the weights that would get a gradient through the input of `layer`."""
    inputs: list[torch.Tensor] = []

    def stop(_, args, kwargs):
        inputs.extend(_tensors((args, kwargs)))
        raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)  # (1, 2)
    try:
        with torch.enable_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    found, seen = set(), set()
    nodes = [tensor.grad_fn for tensor in inputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:  # an AccumulateGrad node: a weight
            found.add(leaf)
        nodes += [parent for parent, _ in node.next_functions]
    return found


def _tensors(value) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []


def enable_gradient_checkpointing(model, num_frozen: int = 0) -> None:
    """Recompute the activations of the trained layers in the backward; run the first `num_frozen` layers once.

    The checkpoints are not reentrant, so a layer's weights and adapters get their gradient although its input needs
    none. transformers makes the embeddings' output need one as well; that is undone here, because the backward would
    cross every frozen layer.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # < 5.2x
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
    for layer in decoder_layers(model)[1][:num_frozen] if num_frozen else ():
        for module in layer.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def add_lora(model, settings: LoraSettings, frozen: str | None):
    """Add trainable adapters to the target layers that are not frozen, in place; return peft's wrapper to save them by.

    frozen: the regular expression that `freeze` returned. Raises UsageError if no module has a target's name.
    """
    import peft

    targets, experts, exclude = list(settings.targets), [], [frozen] if frozen else []
    if targets == ["all-linear"]:
        targets = "all-linear"
        # A mixture's experts, stored as one tensor, are not linear layers; peft finds them in some families only.
        experts = [f"{module_name}.{name}" for module_name, module in model.named_modules()
                   for name, weight in module.named_parameters(recurse=False)
                   if weight.dim() == 3 and not type(module).__name__.startswith("Conv")]  # fmt: skip
        experts = [name for name in experts if not (frozen and re.fullmatch(frozen, name))]
        # A family's own linear layer may return more than one tensor (Llama 4's router).
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")  # `check_save_path` tries what it warns of
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's own call
            wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora.targets {' '.join(settings.targets)}: {str(error).splitlines()[0]}") from error
    for name, weight in model.named_parameters():  # peft adds adapters to the experts of every layer
        if frozen and re.fullmatch(frozen, name):
            weight.requires_grad_(False)
    return wrapped


# --------------------------------------------------------------------------------------------- the save path
def check_save_path(model, adapters, ids: torch.Tensor, targets: tuple[str, ...] = ()) -> None:
    """Check, before the first step, that the model which a run saves will be the model that it trains.

    adapters: what `add_lora` returned, or None for a run on whole weights; ids (R, T): a few token ids;
    targets: lora.targets, for the message. Call it while the model is in fp32 and whole on its device.

    Weights stored as codes (bitsandbytes and the like) are refused: nothing can be merged into them or saved from
    them. Then the adapters get small values, and for each kind of adapted module (a name without its layer number)
    one module is merged in place: the logits must stay the same. They change, for instance, if a target shares its
    weight with another module. Adapters and weights are put back bit for bit. Cost: one forward of `ids` and one more
    a kind (about eight), and a copy of one module and of the adapters. Raises UsageError in one line.
    """
    refuse_quantised(model)
    if adapters is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds: dict[str, tuple[str, BaseTunerLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(p.requires_grad for p in module.parameters()):
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), (name, module))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained]
    was_training = model.training
    model.eval()
    draw = torch.Generator().manual_seed(0)  # of its own: the run's draws stay what they are
    try:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(PROBE_SCALE * torch.randn(parameter.shape, generator=draw).to(parameter))
            expected = model(input_ids=ids, use_cache=False).logits.float()  # (R, T, V)
            for name, module in kinds.values():
                difference = _merged_logits(model, module, ids) - expected
                if not difference.square().mean().sqrt() <= SAVE_TOLERANCE * expected.std():
                    raise UsageError(f"lora.targets {' '.join(targets) or name}: the adapter of {name} cannot be "
                                     f"merged and saved ({_why_not(model, module)}); leave it out")  # fmt: skip
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        model.train(was_training)


def _merged_logits(model, module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (R, T, V) with the adapter of one module merged into its weight, which is then put back."""
    weights = list(module.parameters())
    kept = [weight.detach().clone() for weight in weights]
    module.merge()
    try:
        return model(input_ids=ids, use_cache=False).logits.float()
    finally:
        module.unmerge()
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)


def _why_not(model, module) -> str:
    own = {id(weight) for weight in module.parameters()}
    uses: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in own:
            uses.setdefault(id(weight), set()).add(name.replace(".base_layer", "").rpartition(".")[0])
    shared = next((names for names in uses.values() if len(names) > 1), None)
    return f"{' and '.join(sorted(shared))} share one weight" if shared else "merging changes the logits"


def refuse_quantised(model) -> None:
    """Raise UsageError if the model's weights are codes of a quantisation: they cannot be trained, merged or saved."""
    settings = getattr(model.config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    codes = next((type(p).__name__ if type(p).__name__ in QUANTISED_CLASSES else str(p.dtype)
                  for p in model.parameters()
                  if type(p).__name__ in QUANTISED_CLASSES or not p.is_floating_point()), None)  # fmt: skip
    if settings is not None or codes or getattr(model, "is_quantized", False):
        name, kind = model.config._name_or_path or type(model).__name__, getattr(method, "value", method) or codes
        raise UsageError(f"--model_name {name}: its weights are quantised ({kind}), so what is trained cannot be "
                         "merged or saved; take the model in fp32, bf16 or fp16")  # fmt: skip
