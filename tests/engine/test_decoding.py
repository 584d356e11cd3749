"""Answers over buffers of fixed size are those of transformers' own generation (on a GPU a graph replays the step)."""

import pytest
import torch
from conftest import make_tokenizer, tiny_model

from engine import generation
from engine.decoding import LOOK, Decoder, decode, takes_buffers
from prompts.formatter import PromptFormatter


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox", "qwen2", "gemma"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_over_buffers_are_the_same(family, temperature, monkeypatch):
    """With and without a beginning that all prompts share; several lengths in a batch; answers that end."""
    tokenizer = make_tokenizer("opt" if family == "opt" else "chat")
    model, formatter = tiny_model(family, len(tokenizer)).eval(), PromptFormatter(tokenizer, "auto", 200, 40)
    plain = [formatter.prompt(f"How do I open lock {i}{' and door' * (i % 3)}?") for i in range(6)]
    ending = PromptFormatter(tokenizer, "auto", 200, 40, ends=tuple(range(5, len(tokenizer), 9)))  # a ninth of all
    for prompts in (plain, [[5] * 9 + prompt for prompt in plain]):
        settings = {"max_new_tokens": 3 * LOOK, "batch_size": 4, "temperature": temperature, "seed": 3}
        free = generation.generate(model, formatter, prompts, **settings)
        wanted = generation.generate(model, ending, prompts, **settings)
        with monkeypatch.context() as patched:
            patched.setattr(generation, "decodes_by_buffers", takes_buffers)
            assert generation.generate(model, formatter, prompts, **settings) == free
            assert generation.generate(model, ending, prompts, **settings) == wanted
        if temperature:
            assert any(complete for _, complete in wanted) and wanted != free


def test_a_batch_is_over_when_all_its_answers_have_ended(monkeypatch):
    model = tiny_model("llama").eval()
    ids = torch.randint(5, 50, (3, 7))
    steps = []
    settings = {"new_tokens": 5 * LOOK, "stop": list(range(model.config.vocab_size)), "pad": 0}
    decoder = Decoder(model, ids, torch.ones_like(ids), None, draws=None, temperature=0.0, **settings)
    monkeypatch.setattr(decoder, "step", lambda: steps.append(1))
    said = decode(decoder, capture=False)
    assert len(steps) == LOOK
    assert said.shape == (3, 5 * LOOK)
    assert not said[:, 1:].any(), "what comes after an end is padding"
    assert takes_buffers(model)


def test_models_whose_cache_is_another_are_asked_as_before():
    for family in ("mamba", "bloom", "mpt", "qwen3_next"):
        model = tiny_model(family)
        assert not (takes_buffers(model) and generation.keeps_all_tokens(model)), family
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # adds its mask to the scores, as GPT-J's only one does
    assert not takes_buffers(model)
