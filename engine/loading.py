"""Load the model of a run or an evaluation: as it is stored, with an adapter merged in, or quantised to 4 bits.

And give back the memory of one that was let go."""

from __future__ import annotations

import gc
import importlib.util
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig

from utils import UsageError, adapter_base, fingerprint, load_config, load_model, trim_cpu_heap

QUANTISED_CLASSES = {"Params4bit", "Int8Params"}  # bitsandbytes' own parameter classes


def load_for_training(options, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, str]:
    """Load --model_name for a run in `dtype`, on `device`, or with --shard on the CPU, where it is split; return (the
    model, the fingerprint of its weights as they are stored).

    Weights that are stored in bf16 are read in bf16 if the run is. They stay in pages of the file until they are moved,
    and processes of one machine share those: with --shard, each makes copies of its own part alone. What is stored
    otherwise is read in fp32, which the optimizer rounds; under adapters, a GPU gets its frozen base rounded.
    Raises UsageError for a quantised base that cannot be trained.
    """
    name = options.model_name
    if options.load_in_4bit or stored_quantisation(options):
        model = _load_quantised(options, device, dtype)
        return model, fingerprint(model)
    stored = stored_dtype(name) or torch.float32
    rounds = dtype == torch.bfloat16 and options.use_lora and device.type == "cuda" and not options.shard
    as_stored = options.shard or rounds or stored == dtype == torch.bfloat16
    model = load_causal_model(name, dtype=stored if as_stored else torch.float32, **options.trust())
    weights = fingerprint(model)
    if rounds:
        for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as they are
            parameter.data = parameter.data.to(dtype)
    return (model if options.shard else model.to(device)), weights


def load_causal_model(name: str, *, dtype: torch.dtype, dequantise: bool = False, **trust: bool):
    """Load a causal language model in `dtype`, as `load_model` does; of an adapter's folder, the base with the adapter
    merged into it. dequantise: turn the codes of a base that is stored quantised into weights."""
    if base := adapter_base(name):
        return merge_adapter(load_causal_model(base, dtype=dtype, dequantise=True, **trust), name).train()
    model = load_model(name, dtype=dtype, **trust)
    if dequantise and getattr(model, "is_quantized", False):
        model = model.dequantize(dtype)
        model._weight_conversions = None  # what read the codes; transformers would undo it on saving
    return model


# ---------------------------------------------------------------------------------------------- quantised bases
def stored_quantisation(options) -> str | None:
    """Return the method by which the stored weights of --model_name are quantised; None if they are not."""
    if adapter_base(options.model_name):
        return None
    settings = getattr(load_config(options.model_name, trust_remote_code=options.trust_remote_code),
                       "quantization_config", None)  # fmt: skip
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def refuse_bad_quantisation(options) -> None:
    """Raise UsageError if a quantised base cannot be trained as the options say. Call it before anything is loaded."""
    stored = stored_quantisation(options)
    if not (stored or options.load_in_4bit):
        return
    what = f"--model_name {options.model_name}: its weights are quantised ({stored})" if stored else "--load_in_4bit"
    if stored and stored != "bitsandbytes":
        raise UsageError(f"{what}, which cannot be trained; take the model in fp32, bf16 or fp16, or quantised by "
                         "bitsandbytes")  # fmt: skip
    if stored and options.load_in_4bit:
        raise UsageError(f"{what} already; leave out --load_in_4bit")
    if not options.use_lora:
        raise UsageError(f"{what}: only adapters on the quantised weights can be trained; add --use_lora")
    if options.shard:
        raise UsageError(f"{what}: does not go with --shard; use DDP, each process holds the whole base")
    if not stored and adapter_base(options.model_name):
        raise UsageError(f"{what}: --model_name {options.model_name} is an adapter, and its sum with the base would be "
                         "quantised; train on from a model that they are merged into")  # fmt: skip
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{what}: needs the package bitsandbytes: pip install bitsandbytes")


def _load_quantised(options, device: torch.device, dtype: torch.dtype):
    """Load a base in 4 bits (QLoRA's NF4 with quantised scales, Dettmers et al. 2023, arXiv 2305.14314), or as it is
    stored; it computes in `dtype`. Each weight is quantised as it is read, so the whole is never on the device."""
    refuse_bad_quantisation(options)
    settings = {"device_map": {"": device}}
    if options.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = load_model(options.model_name, dtype=dtype, **options.trust(), **settings)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # on a CPU, it would pack its codes, for answering alone
    return model


def is_quantised(model) -> bool:
    """Say whether some of a model's weights are codes of a quantisation."""
    return any(type(p).__name__ in QUANTISED_CLASSES or not p.is_floating_point() for p in model.parameters())


# ------------------------------------------------------------------------------------------ adapters and types
def merge_adapter(model, folder: str | Path):
    """Merge the adapter in a folder into a model, in place; return the model. Each sum is made in fp32, then rounded to
    the model's type. Raises UsageError if the adapter does not fit the model."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"model {folder}: its adapter does not fit {model.name_or_path} ({reason})") from error
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            stored = {name: parameter.dtype for name, parameter in base.named_parameters(recurse=False)}
            base.float()
            module.merge()
            for name, parameter in base.named_parameters(recurse=False):
                parameter.data = parameter.data.to(stored[name])
    return wrapped.unload()


def stored_dtype(name: str) -> torch.dtype | None:
    """Return the floating type that most of a model's stored weights have; None if files and config do not tell."""
    name = adapter_base(name) or name
    counts: dict[str, int] = {}
    for file in Path(name).glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            for key in content.keys():  # noqa: SIM118 - no dict
                piece = content.get_slice(key)
                counts[piece.get_dtype()] = counts.get(piece.get_dtype(), 0) + math.prod(piece.get_shape())
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if found := [kind for kind in sorted(counts, key=counts.get) if kind in kinds]:
        return kinds[found[-1]]
    said = getattr(load_config(name), "dtype", None)
    return said if said in kinds.values() else None


def release_memory(device: torch.device) -> None:
    """Give the memory of models that nothing refers to any more back to the system and the GPU: other processes need
    it, and torch would keep it."""
    gc.collect()  # models hold cycles
    trim_cpu_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
