"""A run's model on disk: the folder that it may use, the weights that are saved, and their form."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import torch

from engine import checkpoint
from engine.companions import copy_companions
from engine.loading import is_quantised, load_causal_model, merge_adapter, stored_dtype
from engine.optimizer import MasterWeightAdamW
from engine.paths import made_by_run, refuse_no_folder
from engine.processes import gather_to_main_cpu
from prompts.tokenizer import save_tokenizer
from utils import UsageError, write_json


def lock_output_dir(save_dir: Path, options, accelerator):
    """Lock the output folder; return the lock, to be closed. Raises UsageError if it is not empty or is in use."""
    if options.dry_run or not accelerator.is_main_process:
        return contextlib.ExitStack()
    if save_dir.resolve() in (here := Path.cwd(), *here.parents):
        raise UsageError(f"--model_save_dir {save_dir}: is where this runs, or a parent folder; choose another folder")
    refuse_no_folder("--model_save_dir", save_dir)
    lock = checkpoint.OutputDirLock(save_dir)
    if save_dir.exists() and any(save_dir.iterdir()) and not options.overwrite:
        lock.close()
        if options.resume and made_by_run(save_dir):
            raise UsageError(f"--resume: the run of --model_save_dir {save_dir} is finished; for more steps, start a "
                             f"run with --model_name {save_dir} and another --model_save_dir")  # fmt: skip
        raise UsageError(f"--model_save_dir {save_dir}: is not empty; pass --overwrite to replace it")
    checkpoints = checkpoint.folder_of(save_dir)
    if checkpoints.exists() and not (options.resume or options.overwrite):
        lock.close()
        raise UsageError(f"{checkpoints}: holds checkpoints of a run that was stopped; pass --resume to "
                         "continue it, or --overwrite to start again")  # fmt: skip
    return lock


@dataclasses.dataclass(frozen=True)
class SaveForm:
    """In which form a run saves its model: `dtype` of the weights; `adapter_only`: no base, but its name."""

    dtype: torch.dtype
    adapter_only: bool = False
    is_quantised: bool = False

    def line(self) -> str:
        """Say in one line what will be saved, and how to get another form."""
        if self.adapter_only:
            why = ", since the base is quantised (--merge_into_base merges them into its full weights)"
            return f"saved: the adapters alone{why if self.is_quantised else ''}"
        if self.dtype == torch.bfloat16:
            return "saved: bf16 weights, as the run computes with them (earlier versions: fp32; --save_dtype fp32)"
        return "saved: fp32 weights"


def choose_save_form(options, model, dtype: torch.dtype) -> SaveForm:
    """Return the form in which a run in `dtype` saves its model. Raises UsageError for --adapter_only without adapters.

    By default, bf16 if the run is in bf16 and its base is stored in 16 bits: what the file then answers is what the run
    measured last. With whole weights that holds bit for bit, with adapters but for the rounding of their sum.
    """
    quantised = is_quantised(model)
    if options.adapter_only and not options.use_lora:
        raise UsageError("--adapter_only: saves adapters, and this run trains whole weights; add --use_lora")
    if options.adapter_only and options.merge_into_base:
        raise UsageError("--adapter_only and --merge_into_base: choose one")
    adapter_only = options.adapter_only or (quantised and not options.merge_into_base)
    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(options.save_dtype)
    if chosen is None:
        in_16_bits = quantised or stored_dtype(options.model_name) in (torch.bfloat16, torch.float16)
        chosen = torch.bfloat16 if dtype == torch.bfloat16 and in_16_bits else torch.float32
    return SaveForm(chosen, adapter_only, quantised)


def came_rounded(name: str) -> bool:
    """Say whether a model is one that a run saved in bf16, without the fp32 rests of its weights."""
    folder = Path(name)
    if not made_by_run(folder) or not (folder / "config.json").is_file():
        return False
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype") == "bfloat16"


def gather_weights(
    model, optimizer: MasterWeightAdamW, adapters, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor | None]:
    """Return the weights to save as {name: full tensor}, on the main process. With adapters: only theirs, in fp32.

    dtype: fp32 gives the masters, bf16 the weights that the model computes with. Every process must call it.
    """
    tensors = model.state_dict(keep_vars=True)
    if adapters is not None:  # whole adapters: of one with a part that is not trained, that part is needed as well
        dtype = torch.float32
        trained = {name.partition(".lora_")[0] for name, tensor in tensors.items() if tensor.requires_grad}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad
                   or (".lora_" in name and name.partition(".lora_")[0] in trained)}  # fmt: skip
    saved: dict[int, torch.Tensor | None] = {}  # by id: a tied weight has two names and stays one tensor
    for tensor in tensors.values():
        if id(tensor) not in saved:
            is_weight = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
            content = tensor.detach().to(dtype) if is_weight and dtype != torch.float32 else optimizer.master(tensor)
            saved[id(tensor)] = gather_to_main_cpu(content)
    return {name: saved[id(tensor)] for name, tensor in tensors.items()}


def write_model(
    folder: Path, model, weights: dict, adapters, tokenizer, options, form: SaveForm | None = None
) -> None:  # fmt: skip
    """Write the model and its tokenizer to a folder in `form`; without one, as a checkpoint: fp32, adapters alone.

    Adapters are merged into a freshly loaded base.
    """
    if adapters is None:
        model.save_pretrained(folder, state_dict=dict(weights))  # a copy, since save_pretrained empties the dict
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # loading goes by the config: with another type than the weights', it would round them or fill memory
        dtype = form.dtype if form else torch.float32
        write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    else:
        named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        for config in adapters.peft_config.values():  # with an adapter as --model_name, its base is another
            config.base_model_name_or_path = options.model_name
        adapters.save_pretrained(folder if form and form.adapter_only else folder / "adapter", state_dict=named)
        if form and not form.adapter_only:
            base = load_causal_model(options.model_name, dtype=form.dtype, dequantise=True, **options.trust())
            merge_adapter(base, folder / "adapter").save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    copy_companions(options.model_name, folder)
