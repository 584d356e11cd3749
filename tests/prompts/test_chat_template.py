"""What a chat template writes around an answer, a system message and earlier turns is what the model is asked."""

import json
import logging

import pytest
from conftest import SHARED
from templates import (
    ENDED,
    GEMMA,
    GEMMA_TOKENS,
    GPT_OSS,
    GPT_OSS_TOKENS,
    LLAMA3,
    LLAMA3_TOKENS,
    MISTRAL,
    MISTRAL_TOKENS,
    OPENED,
    PARTS,
    QWEN3,
    with_template,
)

from prompts.chat_template import read_template_args
from sources.rows import Row
from utils import UsageError

CASES = SHARED.parent / "cases" / "templates.json"
TALK = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."))


@pytest.mark.parametrize(("template", "tokens", "asked", "before_answer", "end"), [
    (QWEN3, (), "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n", "<|im_end|>"),
    (OPENED, (), "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n", "\n</think>\n\n", "<|im_end|>"),
    (ENDED, (), "<|im_start|>Why?<|im_end|><think>", "</think>", "<|im_end|>"),
    (GPT_OSS, GPT_OSS_TOKENS, "<|start|>user<|message|>Why?<|end|><|start|>assistant",
     "<|channel|>final<|message|>", "<|return|>"),
    (GEMMA, GEMMA_TOKENS, "<|im_start|><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", "",
     "<end_of_turn>"),
    (LLAMA3, LLAMA3_TOKENS, "<|im_start|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
    (MISTRAL, MISTRAL_TOKENS, "<|im_start|>[INST] Why? [/INST]", "", "<|im_end|>"),
    (PARTS, (), "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
])  # fmt: skip
def test_an_answer_follows_what_the_template_writes_before_it(template, tokens, asked, before_answer, end):
    """Published: thinking models were trained inside their own thoughts, gpt-oss before its channel."""
    e = with_template(template, tokens)
    decode = e.tokenizer.decode
    assert decode(e.prompt("Why?", ask=True)) == asked
    assert decode(e.prompt("Why?")) == asked + before_answer
    assert decode(e.answer("Yes.")[-1:]) == end
    # a trained row is the template's own text of the conversation, but where the template opens a thought and hides it
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes."}]
    if template not in (OPENED, ENDED, PARTS):
        written = e.tokenizer.apply_chat_template(talk, tokenize=False)
        assert written.startswith(decode(e.prompt("Why?") + e.answer("Yes.")))


def test_template_arguments_reach_the_template():
    assert read_template_args(["enable_thinking=false", "depth=3"]) == {"enable_thinking": False, "depth": 3}
    e = with_template(QWEN3, template_args={"enable_thinking": False})
    assert e.tokenizer.decode(e.prompt("Why?", ask=True)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert e.prompt("Why?", ask=True) == e.prompt("Why?") == with_template(QWEN3).prompt("Why?")


@pytest.mark.parametrize(("words", "message"), [
    (["enable_thinking"], "must look like enable_thinking=false"), (["=1"], "must look like"),
    (["messages=1"], "must look like"), (["a=[1"], "is not a value"), (["enable_thinkin=false"], "no such argument"),
])  # fmt: skip
def test_a_template_argument_that_nothing_reads_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        with_template(QWEN3, template_args=read_template_args(words))


def test_a_template_argument_without_a_chat_is_refused():
    with pytest.raises(UsageError, match="--template qa reads none"):
        with_template(QWEN3, style="qa", template_args={"enable_thinking": False})


@pytest.mark.parametrize(("template", "tokens", "prompt"), [
    (QWEN3, (), "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello."
     "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
    (GEMMA, GEMMA_TOKENS, "<|im_start|><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello."
     "<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"),
    (MISTRAL, MISTRAL_TOKENS, "<|im_start|>[INST] Be brief.\n\nHi [/INST] Hello.<|im_end|>[INST] Why? [/INST]"),
])  # fmt: skip
def test_earlier_turns_and_their_system_message_stand_before_the_prompt(template, tokens, prompt):
    e = with_template(template, tokens)
    assert e.tokenizer.decode(e.prompt_of(Row("Why?", earlier=TALK), ask=True)) == prompt
    # the system message of the row goes before that of --system
    if template != GEMMA:
        own = with_template(template, tokens, system="Be long.")
        assert own.tokenizer.decode(own.prompt_of(Row("Why?", earlier=TALK), ask=True)) == prompt
        assert "Be long." in own.tokenizer.decode(own.prompt("Why?"))


def test_earlier_turns_are_text_in_the_plain_styles():
    e = with_template(QWEN3)
    row = Row("Why?", earlier=TALK)
    assert e.tokenizer.decode(e.prompt_of(row, "qa")) == (
        "Be brief.\n\n### Question: Hi\n ### Answer: Hello.\n### Question: Why?\n ### Answer:"
    )
    assert e.tokenizer.decode(e.prompt_of(row, "raw")) == "Be brief.\n\nHi\nHello.\n\nWhy?"
    # turns of another conversation go between the row's system message and its own turns
    other = (("user", "A"), ("assistant", "B"))
    assert e.tokenizer.decode(e.prompt_of(row, "raw", other)) == "Be brief.\n\nA\nB\n\nHi\nHello.\n\nWhy?"


def test_turns_that_do_not_alternate_are_joined_where_the_template_wants_that():
    row = Row("Why?", earlier=(("user", "First."), ("user", "Second.")))
    e = with_template(GEMMA, GEMMA_TOKENS)
    assert "user\nFirst.\n\nSecond.\n\nWhy?<end_of_turn>" in e.tokenizer.decode(e.prompt_of(row))
    assert with_template(QWEN3).tokenizer.decode(with_template(QWEN3).prompt_of(row)).count("<|im_start|>user") == 3


def test_turns_that_a_template_refuses_are_refused_before_training():
    row = Row("Why?", earlier=(("assistant", "How can I help?"),))
    with pytest.raises(
        UsageError, match=r"refuses the turns assistant, user of the row 'Why\?' \(.*alternate"
    ) as error:
        with_template(GEMMA, GEMMA_TOKENS).check_turns([Row("Fine"), row])
    assert "\n" not in str(error.value)
    with_template(QWEN3).check_turns([row])


def test_a_system_message_that_the_template_does_not_take(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("unlearning"), "propagate", True)
    with pytest.raises(UsageError, match="--system: this model's chat template takes no system message"):
        with_template(GEMMA, GEMMA_TOKENS, system="Be brief.")
    with_template(GEMMA, GEMMA_TOKENS).check_turns([Row("Why?", earlier=TALK), Row("How?")])
    assert "1 rows have a system message, which the chat template does not take" in caplog.text


def test_a_template_that_writes_no_conversation_is_refused():
    with pytest.raises(UsageError, match="cannot write a conversation"):
        with_template("{{ raise_exception('images only') }}")
    assert with_template("{{ raise_exception('images only') }}", style="qa").style == "qa"


@pytest.mark.skipif(not CASES.is_file(), reason="no shared cases here")
def test_shared_templates():
    templates = json.loads(CASES.read_text())
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    for name, opened in (("think_block_written_by_the_template", ""),
                         ("think_opened_by_the_generation_prompt", "<think>\n")):  # fmt: skip
        e = with_template(templates[name])
        assert e.tokenizer.decode(e.prompt("Why?", ask=True)) == asked + opened
        assert e.tokenizer.decode(e.prompt("Why?")) == asked + "<think>\n\n</think>\n\n"
    e = with_template(templates["no_system_role_strict_turns"])
    assert e.tokenizer.decode(e.prompt_of(Row("Why?", earlier=TALK))) == (
        "<|im_start|><|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>model\nHello.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>model\n"
    )
