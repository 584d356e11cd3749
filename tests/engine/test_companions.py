"""The files beside a base model that users of a saved model need are saved with it, and nothing else of its folder."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_tokenizer, tiny_model

from engine.companions import copy_companions
from engine.saving import write_model
from prompts.tokenizer import load_tokenizer
from utils import load_model

KEPT = {
    "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor"}', "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}", "tokenizer.model": "spm", "LICENSE.txt": "terms", "NOTICE": "names",
    "additional_chat_templates/tools.jinja": "TOOLS", "modeling_own.py": "import torch\n", "helper.py": "x = 1\n",
}  # fmt: skip
LEFT = {
    "README.md": "# base", "pytorch_model.bin": "w", "model-00001-of-00002.safetensors": "w", "report.json": "{}",
    "answers.jsonl": "{}", "trained_on.json": "{}", "training_args.bin": "p", "model.gguf": "w", "notes.txt": "mine",
    ".git/config": "x", "runs/vocab.txt": "x",
}  # fmt: skip


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)


def test_a_saved_model_has_the_companion_files_of_its_base(tmp_path, model_folders):
    base = shutil.copytree(model_folders["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "modeling_own.Own"}}))
    fill(base, KEPT | LEFT)
    tokenizer, model = load_tokenizer(str(base)), tiny_model("llama")
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", model, model.state_dict(), None, tokenizer, SimpleNamespace(model_name=str(base)))
    for name, text in KEPT.items():
        assert (tmp_path / "out" / name).read_text() == text, name
    for name in LEFT:
        assert not (tmp_path / "out" / name).exists(), name
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["dtype"] == "float32"  # what the save wrote is not replaced
    # without code of its own, no Python file is taken for it
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "plain").mkdir()
    assert not {"modeling_own.py", "helper.py"} & set(copy_companions(str(base), tmp_path / "plain"))


def test_companions_of_a_hub_model_come_from_its_cached_snapshot(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--something/snapshots/abc"
    fill(snapshot, {"config.json": "{}", "preprocessor_config.json": "{}", "README.md": "x"})
    fill(tmp_path / "models--someone--something", {"refs/main": "abc"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "out").mkdir()
    assert copy_companions("someone/something", tmp_path / "out") == ["preprocessor_config.json"]
    assert copy_companions("someone/else", tmp_path / "out") == []


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_model_with_a_vision_tower_works_with_its_language_model(tmp_path, family):
    """Llava's config is none of AutoModelForCausalLM's; Gemma 3's is."""
    size = len(make_tokenizer("chat"))
    text = dict(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                  patch_size=8)  # fmt: skip
    if family == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text), image_token_index=5,
            vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=32),
        )  # fmt: skip
        transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    else:
        config = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**text, head_dim=8), mm_tokens_per_image=1,
            vision_config=transformers.SiglipVisionConfig(**vision),
        )  # fmt: skip
        transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, size)
    assert any("vision" in name for name in model.state_dict())  # and it is saved whole
