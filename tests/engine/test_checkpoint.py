"""How a run's folder is reserved and left, what a checkpoint holds, and which runs are the same one."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, make_tokenizer, run_python, tiny_model
from safetensors.torch import load_file

from engine.adapters import LoraSettings, add_lora
from engine.checkpoint import OutputDirLock, describe_leftovers, read_state, write_state
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.state import TrainingState
from prompts.tokenizer import load_tokenizer, save_tokenizer
from utils import UsageError


# ------------------------------------------------------------------------------------------------- the lock
def test_lock_after_a_block_leaves_nothing(tmp_path):
    """Not even the parent folders that the lock file needed."""

    def refused_run():
        with OutputDirLock(tmp_path / "models/mine/out"):
            assert (tmp_path / "models/mine/.out.lock").is_file()
            raise UsageError("refused")

    with pytest.raises(UsageError, match="refused"):
        refused_run()
    assert list(tmp_path.iterdir()) == []


def test_lock_keeps_folders_that_were_there_or_are_used(tmp_path):
    (tmp_path / "models").mkdir()
    lock = OutputDirLock(tmp_path / "models/mine/out")
    lock.close()
    lock.close()
    assert [f.name for f in tmp_path.iterdir()] == ["models"]
    assert list((tmp_path / "models").iterdir()) == []
    with OutputDirLock(tmp_path / "models/mine/out"):
        (tmp_path / "models/mine/out").mkdir()
    assert [f.name for f in (tmp_path / "models/mine").iterdir()] == ["out"]


def test_lock_held_by_another_is_refused_and_stays(tmp_path):
    with OutputDirLock(tmp_path / "out"):
        with pytest.raises(UsageError, match="another run is writing to it"):
            OutputDirLock(tmp_path / "out")
        assert (tmp_path / ".out.lock").is_file()
    OutputDirLock(tmp_path / "out").close()


def test_lock_of_a_process_that_ends_with_an_error_is_removed(tmp_path):
    """As a refusal ends a run: an exception that nobody catches, or sys.exit."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
            "from engine.checkpoint import OutputDirLock\nheld = OutputDirLock(Path('models/out'))\n"
            "assert Path('models/.out.lock').exists()\nsys.exit(2)")  # fmt: skip
    assert run_python("-c", code, cwd=tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_parent_survives_a_forked_child(tmp_path):
    with OutputDirLock(tmp_path / "out") as lock:
        if (child := os.fork()) == 0:
            lock.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert lock.path.is_file()


def test_describe_leftovers_names_folder_number_and_size(tmp_path):
    assert describe_leftovers(tmp_path / "out") is None
    (tmp_path / "out-checkpoints").mkdir()
    assert describe_leftovers(tmp_path / "out") is None
    for step in (2, 4):
        folder = tmp_path / f"out-checkpoints/step-{step:06d}"
        folder.mkdir()
        with open(folder / "model.safetensors", "wb") as file:
            file.truncate(3 * 2**28)  # 0.75 GiB, of which the disk holds nothing
    line = describe_leftovers(Path(tmp_path / "out"))
    assert line.startswith(f"{tmp_path / 'out-checkpoints'} still holds 2 checkpoints (1.50 GiB)")
    assert "can be deleted" in line


# ------------------------------------------------------------------------------------- masters, stored once
def trained(family: str, dtype, *, lora: bool = False, steps: int = 3, model=None):
    """(model, adapters, optimizer) after a few steps of random gradients."""
    torch.manual_seed(4)
    model = model or tiny_model(family)
    adapters = add_lora(model, LoraSettings(4, 8), None) if lora else None
    optimizer = MasterWeightAdamW(model, OptimizerSettings(lr=1e-3, total_steps=9, adapters=lora), dtype)
    draw = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        optimizer.step()
    return model, adapters, optimizer


def write_checkpoint(folder: Path, model, adapters, optimizer) -> None:
    """As a run does: the model or its adapters in fp32, then the state."""
    kept = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()
            if adapters is None or tensor.requires_grad}  # fmt: skip
    masters = {id(tensor): optimizer.master(tensor).clone() for tensor in kept.values()}  # a tied one stays one
    weights = {name: masters[id(tensor)] for name, tensor in kept.items()}
    folder.mkdir()
    if adapters is None:
        model.save_pretrained(folder, state_dict=dict(weights))  # it empties what it is given
    else:
        named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        adapters.save_pretrained(folder / "adapter", state_dict=named)
    write_state(folder, TrainingState(step=3), optimizer.state(masters=False), optimizer.progress(), {},
                weights=weights, names=optimizer.names)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "lora"), [("llama", False), ("opt", False), ("llama", True), ("mixtral", False)])
def test_checkpoint_stores_each_master_once_and_gives_it_back(tmp_path, family, lora, dtype):
    """Llama's and OPT's heads are tied; Mixtral is saved in another layout, so its experts' masters must be kept."""
    model, adapters, optimizer = trained(family, dtype, lora=lora)
    write_checkpoint(tmp_path / "step", model, adapters, optimizer)
    stored = load_file(tmp_path / "step/training_state.safetensors")
    twice = [optimizer.names[int(name.split(".")[1])][0] for name in stored if name.endswith(".master")]
    assert all("experts" in name or "gate" in name for name in twice), twice
    assert bool(twice) is (family == "mixtral")
    _, _, resumed = trained(family, dtype, lora=lora, steps=0)
    assert not all(torch.equal(a, b) for a, b in zip(optimizer.snapshot(), resumed.snapshot(), strict=True))
    assert read_state(tmp_path / "step", resumed, {}) == TrainingState(step=3)
    for a, b in zip(optimizer.snapshot(), resumed.snapshot(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert resumed.progress() == optimizer.progress()
    wanted, got = optimizer.state(), resumed.state()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_checkpoint_is_model_and_two_moments_large(tmp_path):
    """In fp32: 4 bytes a weight in the model's file, and 8 in the state's."""
    model, adapters, optimizer = trained("llama", torch.float32)
    write_checkpoint(tmp_path / "step", model, adapters, optimizer)
    count = sum(p.numel() for p in model.parameters())
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "step").iterdir()}
    assert sizes["model.safetensors"] == pytest.approx(4 * count, rel=0.05)
    assert sizes["training_state.safetensors"] == pytest.approx(8 * count, rel=0.05)


# -------------------------------------------------------------------------------------------- the tokenizer
def test_save_tokenizer_without_a_pad_token_keeps_it_so(tmp_path):
    """Written as the end-of-text token, it would be another tokenizer: its padding hides the end of an answer."""
    made = make_tokenizer("chat")
    made.pad_token = None
    made.save_pretrained(tmp_path / "base")
    transformers.LlamaConfig().save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    assert tokenizer.pad_token == tokenizer.eos_token
    tokenizer(["a long text", "text"], padding=True)  # which the tokenizer would remember in its file
    save_tokenizer(tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config["pad_token"] is None
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes(), name


def test_save_tokenizer_with_a_pad_token_saves_it(tmp_path):
    make_tokenizer("opt").save_pretrained(tmp_path / "base")
    transformers.LlamaConfig().save_pretrained(tmp_path / "base")
    save_tokenizer(load_tokenizer(str(tmp_path / "base")), tmp_path / "out")
    saved = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert [saved[name] for name in ("pad_token", "eos_token")] == ["<pad>", "</s>"]
