"""What a run saves is what it trained: adapters, masters, frozen weights, and what is refused."""

import pytest
import torch
import transformers
from conftest import (
    one_line_error,
    run_cli,
    tiny_model,
    weights,
)
from safetensors.torch import load_file
from test_run import SMALL, data_words

from engine.adapters import LoraSettings, add_lora, freeze
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.saving import SaveForm, gather_weights, write_model
from options import UnlearnOptions
from prompts.tokenizer import load_tokenizer
from utils import load_model


def test_adapters_train_under_checkpointing_and_are_merged(tmp_path, model_folders, data_files):
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log",
        *data_words(data_files), *SMALL, "--use_lora", "--set=lora.rank=4", "--gradient_checkpointing",
        "--set=trainable.frozen_layers=1", "--dtype=bf16", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert all(".layers.1." in name for name in adapter), "a frozen layer has an adapter"
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values()), "the exact masters are what is kept"
    assert all((tensor != 0).any() for name, tensor in adapter.items() if "lora_B" in name)  # B starts at 0
    start, merged = weights(model_folders["llama"]), weights(tmp_path / "out")
    assert merged.keys() == start.keys()
    assert any((merged[k] != start[k]).any() for k in merged)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_bf16_run_saves_its_fp32_weights(tmp_path, model_folders, data_files, family):
    """Rounded to bf16, updates smaller than half its grid would be lost in what is saved."""
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders[family]}", "--model_save_dir=out",
                  "--log_file=out.log", *data_words(data_files), *SMALL, "--dtype=bf16", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    start, saved = weights(model_folders[family]), weights(tmp_path / "out")
    assert saved.keys() == start.keys(), "a tied head is saved once, as it was"
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # as a pipeline does
    assert loaded.dtype == torch.float32, "the config must not have them rounded"
    changed = [name for name in saved if (saved[name] != start[name]).any()]
    assert any((saved[name].bfloat16().float() != saved[name]).any() for name in changed)


def test_adapters_reach_experts_but_those_of_frozen_layers(tmp_path, model_folders):
    """A mixture keeps its experts in one tensor, no linear layer; and what is saved is what was trained."""
    tokenizer = load_tokenizer(str(model_folders["llama"]))
    tiny_model("mixtral", len(tokenizer)).save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base")).eval()
    options = UnlearnOptions(model_name=str(tmp_path / "base"), use_lora=True)
    adapters = add_lora(model, LoraSettings(), freeze(model, 1))
    stepper = MasterWeightAdamW(model, OptimizerSettings(lr=1e-1, total_steps=1000, adapters=True), torch.float32)
    ids = torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        stepper.step()
    (tmp_path / "out").mkdir()
    form = SaveForm(torch.float32)
    write_model(tmp_path / "out", model, gather_weights(model, stepper, adapters), adapters, tokenizer, options, form)
    saved, start = load_model(str(tmp_path / "out")).eval(), dict(load_model(str(tmp_path / "base")).named_parameters())
    torch.testing.assert_close(saved(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    changed = {name for name, weight in saved.named_parameters() if not torch.equal(weight, start[name])}
    assert any("layers.1." in name and "experts" in name for name in changed)
    assert all("layers.1." in name for name in changed)


def test_frozen_weights_are_saved_as_they_came(tmp_path, model_folders, data_files):
    """A bf16 run reads them rounded; written rounded, they would be another model's."""
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=out.log", *data_words(data_files), *SMALL, "--dtype=bf16",
                  "--set=trainable.frozen_layers=1", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    start, saved = weights(model_folders["llama"]), weights(tmp_path / "out")
    frozen = [name for name in saved if ".layers.0." in name or "embed" in name]
    assert frozen
    assert all(torch.equal(saved[name], start[name]) for name in frozen)
    assert any((saved[name] != start[name]).any() for name in saved)


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path, model_folders, data_files):
    """An adapter on a head that shares its weight with the embeddings: another model than was trained was saved."""
    words = ["--forget_data", data_files["forget"], "--normal_data", data_files["facts"], *SMALL, "--use_lora",
             "--model_save_dir=out"]  # fmt: skip
    assert transformers.AutoConfig.from_pretrained(model_folders["llama"]).tie_word_embeddings
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", *words,
                  "--set=lora.targets=[q_proj, lm_head]", cwd=tmp_path, quiet=True)  # fmt: skip
    assert "the adapter of lm_head cannot be merged and saved (lm_head and model.embed_tokens share one weight)" in (
        one_line_error(run)
    )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*")), "a lock is left"
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", *words, "--set=lora.targets=[q_proj]",
                  cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_adapters_of_which_a_part_is_trained_are_saved_whole(tmp_path, model_folders, data_files):
    """The other part is drawn at random: without it, what is loaded is another model than was trained."""
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=o.log", *data_words(data_files), *SMALL, "--use_lora",
                  "--set=trainable.parameters=lora_B", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    parts = {name.rpartition(".lora_")[0]: 0 for name in adapter}
    for name in adapter:
        parts[name.rpartition(".lora_")[0]] += 1
    assert set(parts.values()) == {2}
