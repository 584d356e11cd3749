"""Answers: what is drawn follows the model's probabilities, and a shared beginning changes nothing."""

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from scipy.stats import chisquare
from transformers import GenerationConfig

from engine.generation import TemperatureSampler, _row_draws, generate, generate_missing_responses
from prompts.formatter import PromptFormatter
from sources.rows import Row


def test_draws_follow_the_softmax_at_the_temperature():
    """20,000 prompts, one distribution: a chi-square test that a wrong temperature or a shifted index fails."""
    draws = _row_draws([[i // 50, i % 50] for i in range(20_000)], 3, 1)  # as an answer's first token has them
    logits = torch.tensor([2.0, -torch.inf, 0.5, 1.0, -1.0, -torch.inf])
    ids = torch.zeros(20_000, 2)  # the prompts alone: the first draw of each row
    drawn = TemperatureSampler(0.7, draws, 2)(ids, logits.expand(20_000, -1)).argmax(-1)  # (20000,)
    counts = torch.bincount(drawn, minlength=6)
    assert counts[1] == counts[5] == 0, "a token without probability was drawn"
    possible = [0, 2, 3, 4]

    def fits(temperature, order=possible):
        expected = torch.softmax(logits.double() / temperature, -1)[order] * 20_000
        return chisquare(counts[possible].tolist(), expected.tolist()).pvalue > 1e-3

    assert fits(0.7)
    assert not fits(1.0) and not fits(0.7, [4, 0, 2, 3])


def test_draws_of_a_row_depend_on_seed_prompt_and_repetition():
    a, b = [5, 6, 7], [5, 6]
    one = _row_draws([a, b, a], 1, 40)  # (P, new tokens)
    assert one.min() >= 0
    assert one.max() < 1
    assert not torch.equal(one[0], one[2]), "a prompt that is asked twice would give one answer twice"
    assert torch.equal(_row_draws([b, a, a], 1, 40)[[1, 0, 2]], one), "the order of other prompts counts for nothing"
    assert torch.equal(_row_draws([a], 1, 7)[0], one[0, :7]), "nor does the length of an answer"
    assert not torch.equal(_row_draws([a], 2, 40)[0], one[0])


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neo"])
def test_sampled_answers_do_not_depend_on_the_batch(family):
    """One prompt at a time, three, and eight; and each prompt alone, as a run with other rows beside it asks it."""
    tokenizer = make_tokenizer("opt" if family == "opt" else "chat")
    model, formatter = tiny_model(family, len(tokenizer)).eval(), PromptFormatter(tokenizer, "auto", 200, 40)
    prompts = [formatter.prompt(f"How do I open lock {i}{' and door' * (i % 3)}?") for i in range(8)]
    settings = {"max_new_tokens": 12, "temperature": 0.9, "seed": 7}
    eight = generate(model, formatter, prompts, batch_size=8, **settings)
    assert len(set(eight)) == 8, "the prompts must not all get one answer"
    for size in (1, 3):
        assert generate(model, formatter, prompts, batch_size=size, **settings) == eight
    assert [generate(model, formatter, [prompt], batch_size=1, **settings)[0] for prompt in prompts] == eight
    assert generate(model, formatter, prompts, batch_size=8, **{**settings, "seed": 8}) != eight
    twice = generate(model, formatter, prompts[:1] * 2, batch_size=8, **settings)
    assert twice[0] == eight[0] != twice[1]


def test_cached_answers_serve_another_batch_size(tmp_path, monkeypatch):
    tokenizer = make_tokenizer("chat")
    model, formatter = tiny_model("llama", len(tokenizer)), PromptFormatter(tokenizer, "auto", 200, 40)
    settings = {"fingerprint": "f", "tokens": 6, "temperature": 0.7, "seed": 1, "cache_dir": tmp_path}
    rows = [Row("One?"), Row("Two?")]
    found = generate_missing_responses(rows, model, formatter, batch_size=2, **settings)
    monkeypatch.setattr("engine.generation.generate", None)  # nobody is asked again
    assert generate_missing_responses(rows, model, formatter, batch_size=64, **settings) == found


@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "mpt", "gpt_neo", "mamba", "qwen3_next"])
def test_a_shared_beginning_changes_no_answer(family, monkeypatch):
    tokenizer = make_tokenizer("opt" if family == "opt" else "chat")
    model, formatter = tiny_model(family, len(tokenizer)).eval(), PromptFormatter(tokenizer, "auto", 200, 40)
    asked = [f"How do I open lock {i}?" for i in range(3)]
    prompts = [formatter.prompt(text, style) for style in (None, "qa") for text in asked]
    chat = [[5] * 9 + prompt for prompt in prompts]  # all begin alike, and differ in length
    for temperature in (0.0, 1.0):
        settings = {"max_new_tokens": 8, "batch_size": 2, "temperature": temperature}
        shared = generate(model, formatter, chat, **settings)
        with monkeypatch.context() as patched:
            patched.setattr("engine.generation._shared_prefix_cache", lambda model, prompts: (0, None))
            assert generate(model, formatter, chat, **settings) == shared


def test_a_folder_cannot_ask_for_another_decoding():
    """A repetition penalty in one of two folders would be taken for what unlearning did."""
    tokenizer = make_tokenizer("chat")
    model, formatter = tiny_model("llama", len(tokenizer)).eval(), PromptFormatter(tokenizer, "auto", 200, 40)
    prompts = [formatter.prompt(f"How do I open lock {i}?") for i in range(3)]
    plain = generate(model, formatter, prompts, max_new_tokens=12, batch_size=2)
    own = model.generation_config = GenerationConfig(repetition_penalty=1.7, no_repeat_ngram_size=2, num_beams=2)
    assert generate(model, formatter, prompts, max_new_tokens=12, batch_size=2) == plain
    assert model.generation_config is own, "the model is saved with what it came with"


def test_kept_answers_are_read_back_as_they_were(tmp_path, monkeypatch):
    """U+2028 and its like end a line for Python, not for a file of JSON lines: the second run read half an object."""
    formatter, rows = PromptFormatter(make_tokenizer("chat"), "auto", 200, 40), [Row("Two\u2028lines?"), Row("One?")]
    said = {"Two\u2028lines?": ("First.\u2028Then\x85last.", True), "One?": ("", False)}
    settings = {"fingerprint": "f", "tokens": 9, "temperature": 0.0, "seed": 1, "batch_size": 2, "cache_dir": tmp_path}
    model = tiny_model("llama")
    for asked in (lambda *_, **__: [said[prompt] for prompt in sorted(said)], None):  # the second time, nobody is asked
        monkeypatch.setattr("engine.generation.generate", asked)
        found = generate_missing_responses(rows, model, formatter, **settings)
        assert [(row.response, row.complete) for row in found] == [said[row.prompt] for row in rows]


def test_own_answers_follow_a_rows_earlier_turns_and_every_end_token(tmp_path, monkeypatch):
    """One question after two talks is two rows; an answer kept from a run that knew fewer end tokens ran on."""
    tokenizer, model = make_tokenizer("chat"), tiny_model("llama")
    rows = [Row("And then?", earlier=(("user", text), ("assistant", "Yes."))) for text in ("A wolf?", "A lake?")]
    asked = []

    def answer(model, formatter, prompts, **_):
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        return [(f"It {'howls' if 'wolf' in text else 'freezes'}.", True) for text in asked[-1]]

    monkeypatch.setattr("engine.generation.generate", answer)
    settings = {"fingerprint": "f", "tokens": 9, "temperature": 0.0, "seed": 1, "batch_size": 2, "cache_dir": tmp_path}
    for ends in ((), (), (300,)):
        formatter = PromptFormatter(tokenizer, "auto", 200, 40, ends=ends)
        found = generate_missing_responses(rows, model, formatter, **settings)
        assert [row.response for row in found] == ["It howls.", "It freezes."]
    assert len(asked) == 2, "the second run reads what the first one kept, the third one must ask"
    assert all("wolf" in text or "lake" in text for text in asked[0])
