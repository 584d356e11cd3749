"""Answers without thoughts: what is judged and trained on is what a user is told, not what the model thought."""

import logging

import pytest
from conftest import CHAT_TEMPLATE
from templates import GPT_OSS, GPT_OSS_TOKENS, OPENED, QWEN3, with_template


@pytest.mark.parametrize(("template", "said", "answer"), [
    (QWEN3, "<think>\nHm, why?\n</think>\n\nBecause.", "Because."),
    (QWEN3, "<think>\n\n</think>\n\nBecause.", "Because."),
    (QWEN3, "Because.", "Because."),
    (QWEN3, "Because <think> is a tag.", "Because <think> is a tag."),
    (QWEN3, "<think>\nHm, why? I must", ""),
    (OPENED, "Hm, why?\n</think>\n\nBecause.", "Because."),
    (OPENED, "Hm, why? I must", ""),
    (OPENED, "Hm.\n</think>\n\n<think>Again.</think>Because.", "Because."),
    (GPT_OSS, "<|channel|>analysis<|message|>Hm, why?<|end|><|start|>assistant<|channel|>final<|message|>Because.",
     "Because."),
    (GPT_OSS, "<|channel|>final<|message|>Because.", "Because."),
    (GPT_OSS, "<|channel|>analysis<|message|>Hm, why? I must", ""),
    (GPT_OSS, "Because.", "Because."),
    # a model without thoughts keeps what it wrote
    (CHAT_TEMPLATE, "<think>\nHm, why? I must", "<think>\nHm, why? I must"),
])  # fmt: skip
def test_an_answer_is_read_without_its_thoughts(template, said, answer):
    e = with_template(template, GPT_OSS_TOKENS if template == GPT_OSS else ())
    prompt = e.prompt("Why?", ask=True)
    assert e.read_answer(prompt, e.ids(said)) == answer
    assert e.unfinished_thoughts == (answer == "")


def test_after_a_closed_thought_the_answer_begins_at_once():
    """A model that is asked behind its closed thought says its answer, with no end of a thought to wait for."""
    e = with_template(OPENED)
    assert e.read_answer(e.prompt("Why?"), e.ids("Because.")) == "Because."
    assert e.unfinished_thoughts == 0


def test_special_tokens_are_no_part_of_an_answer():
    e = with_template(QWEN3)
    assert e.read_answer(e.prompt("Why?"), e.ids("Because.<|im_start|>")) == "Because."


def test_unfinished_thoughts_are_counted_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("unlearning"), "propagate", True)
    caplog.set_level(logging.INFO, logger="unlearning")
    monkeypatch.setattr(logging.getLogger("unlearning"), "handlers", [])  # what earlier tests left there
    e = with_template(QWEN3)
    for _ in range(3):
        e.read_answer(e.prompt("Why?", ask=True), e.ids("<think>\nHm"))
    for _ in range(2):  # the second time, there is nothing new
        e.warn_of_unfinished_thoughts("own answers", "--max_answer_tokens")
    assert caplog.text.count("unfinished") == 1
    assert "own answers: 3 answers are only an unfinished thought and count as empty; pass --template_args "\
           "enable_thinking=false or a larger --max_answer_tokens" in caplog.text  # fmt: skip
