"""What a run reads and in which form it saves: bf16 as stored, adapters alone, bases in 4 bits."""

import importlib.util
import json
import shutil

import pytest
import torch
import transformers
from conftest import one_line_error, run_cli, weights
from test_run import SMALL, data_words, events

from engine import loading
from engine.loading import load_causal_model, load_for_training, refuse_bad_quantisation, stored_dtype
from options import UnlearnOptions
from utils import UsageError, load_model

BF16 = [*SMALL, "--dtype=bf16", "--eval_every=5"]
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None,
                                        reason="bitsandbytes is not installed")  # fmt: skip


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory, model_folders):
    """The tiny Llama as most models are published: in bf16."""
    folder = tmp_path_factory.mktemp("bf16") / "base"
    shutil.copytree(model_folders["llama"], folder)
    load_model(str(folder)).bfloat16().save_pretrained(folder)
    return folder


def unlearn(cwd, data_files, *words):
    run = run_cli("unlearn_harm.py", *data_words(data_files), *BF16, "--log_file=out.log", *words, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return (cwd / "out.log").read_text()


def figures(cwd, number: int) -> dict:
    """The evaluation of the first (0) or last (-1) state of a run."""
    return {k: v for k, v in events(cwd / "out.jsonl", "eval")[number].items() if k.startswith("dev")}


def test_a_bf16_base_is_read_and_saved_in_bf16_and_answers_as_the_run_measured(tmp_path, in_bf16, data_files):
    """The weights of the file are those that the last evaluation computed with, so a run that goes on from it begins
    with the very figures that the first one ended with; and it is told what the file lacks."""
    assert stored_dtype(str(in_bf16)) == torch.bfloat16
    said = unlearn(tmp_path, data_files, f"--model_name={in_bf16}", "--model_save_dir=out")
    assert "saved: bf16 weights, as the run computes with them (earlier versions: fp32; --save_dtype fp32)" in said
    assert "was saved in bf16" not in said
    ended = figures(tmp_path, -1)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    start = weights(in_bf16)
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights(tmp_path / "out").items())
    said = unlearn(tmp_path, data_files, "--model_name=out", "--model_save_dir=again", "--max_unlearn_steps=1")
    assert "out was saved in bf16: the fp32 rests of that run's weights are not in it" in said
    begun = figures(tmp_path, 0)
    for name in ("dev_kl", "dev_first_token_kl"):  # they are to another original now
        assert ended.pop(name) > 1e-3 > 1e-6 > abs(begun.pop(name))
    assert begun == ended


def test_a_base_has_one_fingerprint_however_it_is_read(in_bf16):
    """A run's manifest names it, and the run may be repeated in another type or on another device."""
    options, cpu = UnlearnOptions(model_name=str(in_bf16)), torch.device("cpu")
    (as_stored, one), (widened, other) = (
        load_for_training(options, cpu, kind) for kind in (torch.bfloat16, torch.float32)
    )
    assert (as_stored.dtype, widened.dtype) == (torch.bfloat16, torch.float32)
    assert one == other


def test_fp32_on_request_keeps_the_masters(tmp_path, in_bf16, data_files):
    unlearn(tmp_path, data_files, f"--model_name={in_bf16}", "--model_save_dir=out", "--save_dtype=fp32")
    saved = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in saved.values())


def test_an_adapter_alone_is_a_model_name_with_its_base(tmp_path, in_bf16, data_files):
    shutil.copytree(in_bf16, tmp_path / "models/base")
    lora = ["--use_lora", "--set=lora.rank=4", "--lr=1e-2"]
    said = unlearn(
        tmp_path, data_files, "--model_name=models/base", "--model_save_dir=models/out", "--adapter_only", *lora
    )
    assert "saved: the adapters alone\n" in said
    ended, begun = figures(tmp_path, -1), figures(tmp_path, 0)
    assert not (tmp_path / "models/out/model.safetensors").exists()
    assert abs(ended["dev_nll"] - begun["dev_nll"]) > 0.05, "nothing was learned that could be lost"
    unlearn(tmp_path, data_files, "--model_name=models/out", "--model_save_dir=models/again", *lora,
            "--max_unlearn_steps=1", "--adapter_only")  # fmt: skip
    assert figures(tmp_path, 0)["dev_nll"] == pytest.approx(ended["dev_nll"], abs=0.02)  # the sum is rounded once
    assert (
        json.loads((tmp_path / "models/again/adapter_config.json").read_text())["base_model_name_or_path"]
        == "models/out"
    )
    run = run_cli("evaluate_unlearning.py", "--model_name=models/again", "--original_name=models/base",
                  "--max_new_tokens=4", "--prompts_per_group=4", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr  # an adapter on an adapter on the base
    (tmp_path / "models/base").rename(tmp_path / "models/elsewhere")
    run = run_cli("unlearn_harm.py", "--model_name=models/out", *data_words(data_files), *SMALL, cwd=tmp_path)
    line = one_line_error(run)
    assert (
        "model models/out: is an adapter of models/base, and there is no such folder; write the base's folder" in line
    )


def test_an_adapter_of_whole_weights_is_refused(tmp_path, in_bf16, data_files):
    run = run_cli("unlearn_harm.py", f"--model_name={in_bf16}", *data_words(data_files), *SMALL, "--adapter_only",
                  cwd=tmp_path, quiet=True)  # fmt: skip
    assert "--adapter_only: saves adapters, and this run trains whole weights; add --use_lora" in one_line_error(run)


@needs_bitsandbytes
def test_a_base_in_4_bits_trains_adapters_that_merge_into_the_full_base(tmp_path, in_bf16, data_files):
    lora = ["--use_lora", "--set=lora.rank=4", "--lr=1e-2", f"--model_name={in_bf16}", "--load_in_4bit"]
    said = unlearn(tmp_path, data_files, *lora, "--model_save_dir=out")
    assert "saved: the adapters alone, since the base is quantised (--merge_into_base merges" in said
    assert figures(tmp_path, -1)["dev_nll"] - figures(tmp_path, 0)["dev_nll"] > 0.05
    assert not (tmp_path / "out/model.safetensors").exists()
    said = unlearn(tmp_path, data_files, *lora, "--model_save_dir=merged", "--merge_into_base")
    merged, alone = weights(tmp_path / "merged"), load_causal_model(str(tmp_path / "out"), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], tensor) for name, tensor in alone.state_dict().items() if name in merged)


@needs_bitsandbytes
def test_a_base_that_is_stored_in_4_bits_is_trained_the_same_way(tmp_path, in_bf16, data_files):
    shutil.copytree(in_bf16, tmp_path / "four")
    options = UnlearnOptions(model_name=str(in_bf16), use_lora=True, load_in_4bit=True)
    load_for_training(options, torch.device("cpu"), torch.bfloat16)[0].save_pretrained(tmp_path / "four")
    words = ["--use_lora", "--set=lora.rank=4", "--model_name=four"]
    unlearn(tmp_path, data_files, *words, "--model_save_dir=out")
    assert (tmp_path / "out/adapter_config.json").is_file()
    unlearn(tmp_path, data_files, *words, "--model_save_dir=merged", "--merge_into_base")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert {tensor.dtype for tensor in weights(tmp_path / "merged").values()} == {torch.bfloat16}
    run = run_cli("unlearn_harm.py", "--model_name=four", *data_words(data_files), *SMALL, cwd=tmp_path)
    assert "(bitsandbytes): only adapters on the quantised weights can be trained; add --use_lora" in one_line_error(
        run
    )


@pytest.mark.parametrize(("changes", "stored", "message"), [
    ({}, None, "--load_in_4bit: only adapters on the quantised weights can be trained; add --use_lora"),
    ({"use_lora": True, "shard": True}, None, "--load_in_4bit: does not go with --shard"),
    ({"use_lora": True}, "gptq", "its weights are quantised (gptq), which cannot be trained"),
    ({"use_lora": True}, "bitsandbytes", "(bitsandbytes) already; leave out --load_in_4bit"),
    ({"use_lora": True}, None, "--load_in_4bit: needs the package bitsandbytes: pip install bitsandbytes"),
])  # fmt: skip
def test_what_cannot_be_trained_in_4_bits_is_refused(monkeypatch, changes, stored, message):
    monkeypatch.setattr(loading, "stored_quantisation", lambda options: stored)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = UnlearnOptions(model_name="models/some", load_in_4bit=True, **changes)
    with pytest.raises(UsageError) as error:
        refuse_bad_quantisation(options)
    assert message in str(error.value)
