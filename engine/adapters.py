"""Choose what a run trains: freeze layers, add low-rank adapters, recompute activations, and check the save path.

Everything that asks which modules are the layers of the language model asks `decoder_layers`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import torch

from engine.loading import is_quantised
from options import POSITIVE, option
from utils import UsageError

# Their kernels read the weights of some layers past the module: peft refuses adapters there, or they learn nothing.
WITH_FUSED_KERNELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
# Spread of the values that `check_save_path` gives the adapters, and the largest difference of the logits, in units of
# their spread. In fp32, rounding gives 1e-6, and a merge into a tied weight 1e-1. In bf16, rounding gives up to 0.1; so
# the adapters are as large as the weights, and a merge into a tied weight gives about 1.
PROBE = {torch.float32: (0.02, 1e-3), torch.bfloat16: (0.1, 0.3)}


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
    _checkpointing_method(model, "enable")({"use_reentrant": False})
    model.disable_input_require_grads()
    for layer in decoder_layers(model)[1][:num_frozen] if num_frozen else ():
        for module in layer.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def disable_gradient_checkpointing(model) -> None:
    """Keep all activations for the backward again."""
    _checkpointing_method(model, "disable")()


def _checkpointing_method(model, name: str):
    """Return a method of transformers by its name: newer versions say activation, older ones gradient."""
    return getattr(model, f"activation_checkpointing_{name}", None) or getattr(model, f"gradient_checkpointing_{name}")


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
    targets: lora.targets, for the message. Call it while the model is whole on its device.

    The adapters get values of their own, and for each kind of adapted module (a name without its layer number) one
    module is merged in place: the logits must stay the same. They change, for instance, if a target shares its weight
    with another module. Of a quantised module, which is merged into weights that are loaded later, only that is asked.
    Adapters and weights are put back bit for bit. Cost: one forward of `ids` and one more a kind (about eight), and a
    copy of one module and of the adapters. Raises UsageError in one line.
    """
    if adapters is None:
        if is_quantised(model):
            raise UsageError(f"{type(model).__name__}: holds codes of a quantisation, so its whole weights cannot be "
                             "trained; take the model in fp32, bf16 or fp16")  # fmt: skip
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds: dict[str, tuple[str, BaseTunerLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(p.requires_grad for p in module.parameters()):
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), (name, module))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scale, tolerance = PROBE.get(model.dtype, PROBE[torch.bfloat16])
    kept = [parameter.detach().clone() for parameter in trained]
    was_training = model.training
    model.eval()
    draw = torch.Generator().manual_seed(0)  # of its own: the run's draws stay what they are
    try:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(scale * torch.randn(parameter.shape, generator=draw).to(parameter))
            expected = model(input_ids=ids, use_cache=False).logits.float()  # (R, T, V)
            for name, module in kinds.values():
                if is_quantised(module):
                    merges = not _shared_names(model, module)
                else:
                    difference = _merged_logits(model, module, ids) - expected
                    merges = difference.square().mean().sqrt() <= tolerance * expected.std()
                if not merges:
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


def _shared_names(model, module) -> set[str]:
    """Return the names of all modules that hold one of a module's weights, if they are several."""
    own = {id(weight) for weight in module.parameters()}
    uses: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in own:
            uses.setdefault(id(weight), set()).add(name.replace(".base_layer", "").rpartition(".")[0])
    return next((names for names in uses.values() if len(names) > 1), set())


def _why_not(model, module) -> str:
    shared = _shared_names(model, module)
    return f"{' and '.join(sorted(shared))} share one weight" if shared else "merging changes the logits"


def read_adapter(folder: str | Path, names: list[list[str]], settings: LoraSettings) -> list[torch.Tensor]:
    """Return the weights of adapters that a run saved, in the order of `names`: of each trained parameter its names.

    Raises UsageError if they are of another scale, or not those of these parameters, one for one.
    """
    import peft

    folder = Path(folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        saved = peft.load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UsageError(f"--start_adapter {folder}: holds no adapters that a run saved ({reason})") from error
    if (config.r, config.lora_alpha) != (settings.rank, settings.alpha):
        raise UsageError(f"--start_adapter {folder}: its rank and alpha are {config.r} and {config.lora_alpha}, this "
                         f"run's {settings.rank} and {settings.alpha}: --set lora.rank={config.r} "
                         f"lora.alpha={config.lora_alpha}")  # fmt: skip
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    wanted = [next((plain for name in some if (plain := name.replace(".default.", ".")) in found), some[0])
              for some in names]  # fmt: skip
    if missing := [name for name in wanted if name not in found]:
        raise UsageError(f"--start_adapter {folder}: has no {missing[0]}, which this run trains; give the recipe and "
                         "the settings of the run that saved it")  # fmt: skip
    if further := sorted(found.keys() - set(wanted)):
        raise UsageError(f"--start_adapter {folder}: has {further[0]}, which this run does not train; give the recipe "
                         "and the settings of the run that saved it")  # fmt: skip
    return [found[name].float() for name in wanted]
