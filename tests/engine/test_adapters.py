"""What a run trains: no graph below the first trained layer, frozen layers run once, what is saved is what trained."""

import copy
import re

import peft
import pytest
import torch
import transformers
from conftest import tiny_model

from engine.adapters import (
    LoraSettings,
    add_lora,
    check_save_path,
    decoder_layers,
    enable_gradient_checkpointing,
    freeze,
    read_adapter,
)
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from utils import UsageError

IDS = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1))  # (R, T)


def tiny_llava():
    """Two towers of two layers each; the vision tower comes first in the module tree."""
    text = transformers.LlamaConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_attention_heads=4,
                                    num_hidden_layers=2, tie_word_embeddings=False)  # fmt: skip
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
                                           num_hidden_layers=2, image_size=28, patch_size=14)  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=599)
    )


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def entering(layer) -> list[bool]:
    """A list that says, for each later forward of `layer`, whether its hidden states need a gradient."""
    seen = []
    layer.register_forward_pre_hook(lambda _, args, kw: seen.append((*args, *kw.values())[0].requires_grad),
                                    with_kwargs=True)  # fmt: skip
    return seen


# ------------------------------------------------------------------------------------------- frozen layers
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neo", "llama", "bloom", "gemma"])
def test_freeze_any_family_builds_no_graph_below_the_first_trained_layer(family):
    """Position embeddings (OPT, GPT-2, GPT-Neo), OPT's input projection and BLOOM's embedding norm stand there, too."""
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=4)
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pattern = freeze(model, 1)
    name, layers = decoder_layers(model)
    seen = entering(layers[1])
    got = gradients(model)
    assert seen == [False]
    for key in got:  # what stands above still learns: the second layer and the final norm
        assert key.startswith(f"{name}.1.") or "norm" in key or "ln_f" in key or "project_out" in key, key
    assert {key for key in before if key.startswith(f"{name}.1.")} <= got.keys()
    assert any(("norm" in key or "ln_f" in key) and not key.startswith(f"{name}.") for key in got), "the final norm"
    assert re.fullmatch(pattern, f"{name}.0.anything")
    assert not re.fullmatch(pattern, f"{name}.1.anything")
    assert all(torch.equal(before[key], p) for key, p in model.named_parameters())


def test_freeze_two_towers_of_one_depth_takes_the_language_model():
    model = tiny_llava()
    name, layers = decoder_layers(model)
    assert "language_model" in name
    assert all(type(layer).__name__ == "LlamaDecoderLayer" for layer in layers)
    pattern = freeze(model, 1)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert {key for key, _ in model.named_parameters() if key.startswith(f"{name}.0.")} <= frozen
    assert not any("vision" in key for key in frozen)
    assert not any(key.startswith(f"{name}.1.") for key in frozen)
    assert not re.fullmatch(pattern, "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1")


def test_decoder_layers_experts_as_many_as_layers_gives_the_layers():
    """A ModuleList inside a layer may be as long as the list of the layers."""
    model = torch.nn.Module()
    layer = torch.nn.Module()
    layer.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    model.small = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
    model.layers = torch.nn.ModuleList([layer, copy.deepcopy(layer)])
    model.config = transformers.LlamaConfig(num_hidden_layers=2)
    assert decoder_layers(model) == ("layers", model.layers)
    model.config.num_hidden_layers = 3
    with pytest.raises(UsageError, match="has no list of 3 layers"):
        decoder_layers(model)


# ------------------------------------------------------------------------------------------- checkpointing
@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("num_frozen", [0, 1])
def test_gradient_checkpointing_runs_frozen_layers_once_and_trained_ones_twice(family, lora, num_frozen):
    def make():
        model = tiny_model(family)
        pattern = freeze(model, num_frozen)
        if lora:
            torch.manual_seed(2)
            add_lora(model, LoraSettings(4, 8), pattern)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:  # they start at 0, which would leave A without a gradient
                        parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        return model

    wanted = gradients(make())
    model = make()
    enable_gradient_checkpointing(model, num_frozen)
    layers = decoder_layers(model)[1]
    calls = [0, 0]
    for i, layer in enumerate(layers):
        first = next(module for name, module in layer.named_modules() if name.endswith("q_proj"))

        def count(*_, i=i):
            calls[i] += 1

        first.register_forward_hook(count)
    seen = entering(layers[num_frozen])
    got = gradients(model)
    assert calls == [1 if i < num_frozen else 2 for i in range(2)]
    if num_frozen or (lora and family == "llama"):  # OPT's input projection is trained below its first layer
        assert seen[0] is False, "the backward would cross what is frozen"
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


# ------------------------------------------------------------------------------------------- the save path
def with_adapters(model, *targets: str):
    return model, add_lora(model, LoraSettings(4, 8, targets), None)


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("q_proj", "embed_tokens")])
def test_check_save_path_tied_target_is_refused(targets):
    """The merged weight would serve the embeddings as well as the head, which was not trained so."""
    model, adapters = with_adapters(tiny_model("llama"), *targets)
    with pytest.raises(UsageError) as error:
        check_save_path(model, adapters, IDS, targets)
    line = str(error.value)
    assert line.startswith(f"lora.targets q_proj {targets[1]}: the adapter of ")
    assert "lm_head and model.embed_tokens share one weight" in line
    assert "\n" not in line


@pytest.mark.parametrize(("family", "targets"), [
    ("llama", ("all-linear",)), ("opt", ("all-linear",)), ("mixtral", ("all-linear",)),
    ("qwen2", ("q_proj", "lm_head")),
])  # fmt: skip
def test_check_save_path_sound_targets_leave_every_bit(family, targets):
    """qwen2's head is not tied to its embeddings, so it may have an adapter."""
    model, adapters = with_adapters(tiny_model(family), *targets)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state, training = torch.get_rng_state(), model.training
    check_save_path(model, adapters, IDS, targets)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training == training


@pytest.mark.parametrize(("family", "sound"), [("llama", False), ("qwen2", True)])
def test_check_save_path_agrees_with_a_model_that_is_saved_and_loaded(tmp_path, family, sound):
    """Train the adapters, write them, merge them into a fresh base, save it, load it: are the logits the same?"""
    tiny_model(family).save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, adapters = with_adapters(load(tmp_path / "base").eval(), "q_proj", "lm_head")
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    adapters.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    off = (load(tmp_path / "out")(IDS).logits - model(IDS).logits).abs().max().item()
    assert (off < 1e-3) is sound
    try:
        check_save_path(model, adapters, IDS)
        passed = True
    except UsageError:
        passed = False
    assert passed is sound


def test_check_save_path_refusal_leaves_every_bit():
    model, adapters = with_adapters(tiny_model("llama"), "lm_head")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UsageError):
        check_save_path(model, adapters, IDS, ("lm_head",))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_check_save_path_codes_are_refused():
    model = tiny_model("llama")
    check_save_path(model, None, IDS)
    model.model.layers[0].codes = torch.nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UsageError, match="holds codes of a quantisation, so its whole weights cannot be trained"):
        check_save_path(model, None, IDS)


def test_check_save_path_tied_target_of_a_base_in_4_bits_is_refused(tmp_path):
    """It is merged into the full base, whose head shares its weight with the embeddings."""
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    for targets, sound in ((("q_proj",), True), (("q_proj", "lm_head"), False)):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # as load_for_training does
        model, adapters = with_adapters(model, *targets)
        if sound:
            check_save_path(model, adapters, IDS, targets)
            continue
        with pytest.raises(UsageError, match=r"lm_head and model\.embed_tokens share one weight"):
            check_save_path(model, adapters, IDS, targets)


def test_saved_adapters_are_read_back_in_the_order_of_the_weights(tmp_path):
    def trained(rank: int, targets=("all-linear",)):
        model = tiny_model("llama")
        lora = LoraSettings(rank=rank, alpha=2 * rank, targets=targets)
        wrapper = add_lora(model, lora, None)
        return wrapper, lora, MasterWeightAdamW(model, OptimizerSettings(lr=1e-3, total_steps=2), torch.float32)

    saved, lora, optimizer = trained(4)
    with torch.no_grad():
        for number, parameter in enumerate(optimizer.parameters):
            parameter.fill_(number / 64)
    saved.save_pretrained(tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter", optimizer.names, lora)
    assert [tensor.unique().tolist() for tensor in found] == [[number / 64] for number in range(len(found))]
    scale = "its rank and alpha are 4 and 8, this run's 8 and 16: --set lora.rank=4 lora.alpha=8"
    for other, message in (((8,), scale), ((4, ("q_proj",)), "which this run does not train")):
        _, other_lora, other_optimizer = trained(*other)
        with pytest.raises(UsageError, match=re.escape(message)):
            read_adapter(tmp_path / "adapter", other_optimizer.names, other_lora)
    with pytest.raises(UsageError, match="holds no adapters"):
        read_adapter(tmp_path, optimizer.names, lora)
    fewer, lora, optimizer = trained(4, ("q_proj",))
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.raises(UsageError, match="which this run trains"):
        read_adapter(tmp_path / "fewer", trained(4)[2].names, lora)
