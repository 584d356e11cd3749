"""A run's model on disk: the folder that it may use, the weights that are saved, and their form."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from engine import checkpoint
from engine.companions import copy_companions
from engine.optimizer import MasterWeightAdamW
from engine.paths import refuse_no_folder
from engine.processes import gather_to_main_cpu
from prompts.tokenizer import save_tokenizer
from utils import UsageError, load_model, write_json


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
        if options.resume and (save_dir / "unlearn_args.json").is_file():
            raise UsageError(f"--resume: the run of --model_save_dir {save_dir} is finished; for more steps, start a "
                             f"run with --model_name {save_dir} and another --model_save_dir")  # fmt: skip
        raise UsageError(f"--model_save_dir {save_dir}: is not empty; pass --overwrite to replace it")
    checkpoints = checkpoint.folder_of(save_dir)
    if checkpoints.exists() and not (options.resume or options.overwrite):
        lock.close()
        raise UsageError(f"{checkpoints}: holds checkpoints of a run that was stopped; pass --resume to "
                         "continue it, or --overwrite to start again")  # fmt: skip
    return lock


def gather_weights(model, optimizer: MasterWeightAdamW, adapters) -> dict[str, torch.Tensor | None]:
    """Return the fp32 weights to save as {name: full tensor}, on the main process. With adapters: only theirs.

    Every process must call it.
    """
    tensors = model.state_dict(keep_vars=True)
    if adapters is not None:  # whole adapters: of one with a part that is not trained, that part is needed as well
        trained = {name.partition(".lora_")[0] for name, tensor in tensors.items() if tensor.requires_grad}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad
                   or (".lora_" in name and name.partition(".lora_")[0] in trained)}  # fmt: skip
    saved: dict[int, torch.Tensor | None] = {}  # by id: a tied weight has two names and stays one tensor
    for tensor in tensors.values():
        if id(tensor) not in saved:
            saved[id(tensor)] = gather_to_main_cpu(optimizer.master(tensor))
    return {name: saved[id(tensor)] for name, tensor in tensors.items()}


def write_model(folder: Path, model, weights: dict, adapters, tokenizer, options, *, merged: bool = True) -> None:
    """Write the model and its tokenizer to a folder. With `merged`, adapters are merged into a freshly loaded base."""
    if adapters is None:
        model.save_pretrained(folder, state_dict=dict(weights))  # a copy, since save_pretrained empties the dict
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # the weights are fp32; with a config that says bf16 they would be rounded on loading
        write_json(folder / "config.json", config | {"dtype": "float32"})
    else:
        import peft

        named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        adapters.save_pretrained(folder / "adapter", state_dict=named)
        if merged:
            base = load_model(options.model_name, **options.trust())
            peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    copy_companions(options.model_name, folder)
