"""Limits, end tokens and vocabularies: what a formatter makes of a model's folder and of long rows."""

import json
import logging
import shutil

import pytest
from conftest import SHARED, make_tokenizer, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import LLAMA3, LLAMA3_TOKENS, QWEN3, with_template

from engine.generation import generate
from prompts.end_tokens import read_end_tokens
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from sources.rows import Row
from utils import UsageError

CASE = SHARED.parent / "cases" / "long_prompt.jsonl"
LONG = "Once there was a keeper of the gate. " * 40 + "What did he write down at the end?"
TALK = (("system", "Be brief."), ("user", "Tell me a long story. " * 30), ("assistant", "Once."))


# ------------------------------------------------------------------------------------------- long prompts
@pytest.mark.parametrize("style", ["chat", "qa", "qa_space", "raw"])
def test_a_long_prompt_is_cut_inside_the_users_text(style):
    """Published: the turn's own markers and the system message were cut off first."""
    e = with_template(QWEN3, prompt_tokens=70, system="Be brief.", style=style)
    ids = e.prompt(LONG)
    text = e.tokenizer.decode(ids)
    assert 60 <= len(ids) <= 70
    assert "Be brief." in text
    assert "What did he write down at the end?" in text
    if style == "chat":
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("at the end?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    elif style == "qa":
        assert text.startswith("Be brief.\n\n### Question: ")
        assert text.endswith("at the end?\n ### Answer:")
    assert e.cut == {LONG}


def test_of_a_long_talk_the_oldest_turns_go_first():
    e = with_template(QWEN3, prompt_tokens=80)
    text = e.tokenizer.decode(e.prompt_of(Row("And then?", earlier=TALK)))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("Once.<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
                         "</think>\n\n")  # fmt: skip
    assert "long story." in text
    # what is not enough room for both is room for the last turn
    e = with_template(QWEN3, prompt_tokens=60)
    text = e.tokenizer.decode(e.prompt_of(Row(LONG, earlier=TALK)))
    assert "Once" not in text.replace("Once there", "")
    assert "Be brief." in text
    assert "at the end?<|im_end|>" in text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=400), limit=st.integers(30, 90))
def test_no_prompt_is_longer_than_its_limit_whatever_it_holds(text, limit):
    e = with_template(QWEN3, prompt_tokens=limit)
    ids = e.prompt(text)
    assert len(ids) <= limit
    assert e.tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert len(ids) == len(with_template(QWEN3).prompt(text)) or len(ids) > limit - 12  # no more is lost than need be


def test_a_limit_that_leaves_no_room_for_a_prompt_is_refused():
    config = tiny_model("llama").config
    with pytest.raises(UsageError, match=r"--max_prompt_tokens 12: the template around a prompt .* take \d+ tokens"):
        with_template(QWEN3, prompt_tokens=12).fit(config, 16)


def test_cut_rows_are_counted_as_they_are_cut():
    e = with_template(QWEN3, prompt_tokens=60, answer_tokens=10)
    texts = ["word " * n for n in range(1, 80, 3)]
    rows = [Row(text, text, earlier=TALK[:1] * (i % 2)) for i, text in enumerate(texts)] + [Row("Own answer?")]
    counted = e.count_cut(rows)
    for row in rows:
        e.prompt_of(row)
    assert 0 < counted.prompts == sum(row.prompt in e.cut for row in rows) < len(rows)
    assert counted.answers == sum(len(e.ids(text)) > 10 for text in texts) > 0
    assert not counted.is_estimate
    assert e.count_cut(rows, answer_tokens=500).answers == 0


@pytest.mark.skipif(not CASE.is_file(), reason="no shared cases here")
def test_shared_long_prompts_keep_markers_and_their_end():
    e = with_template(QWEN3, prompt_tokens=300, system="Be brief.")
    rows = [Row(json.loads(line)["prompt"]) for line in CASE.read_text().splitlines()]
    assert e.count_cut(rows).prompts == len(rows)
    for row in rows:
        text = e.tokenizer.decode(e.prompt_of(row))
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert f"{row.prompt[-200:]}<|im_end|>\n<|im_start|>assistant\n" in text


# --------------------------------------------------------------------------------------------- end tokens
@pytest.fixture
def folder(tmp_path, model_folders):
    """A copy of a small model's folder, to be changed."""
    return shutil.copytree(model_folders["llama"], tmp_path / "model")


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_end_tokens_of_all_files_end_an_answer(folder):
    change(folder / "config.json", eos_token_id=[2, 17])
    change(folder / "generation_config.json", eos_token_id=[2, 40])
    assert read_end_tokens(str(folder)) == [2, 17, 40]
    tokenizer = load_tokenizer(str(folder))
    e = PromptFormatter(tokenizer, "auto", 64, 16, ends=read_end_tokens(str(folder)))
    assert e.stop_ids() == [2, 17, 40]
    assert e.answer("Yes.")[-1] == 2  # the one that the template writes
    change(folder / "config.json", eos_token_id=None, text_config={"eos_token_id": 5})
    (folder / "generation_config.json").unlink()
    assert read_end_tokens(str(folder)) == [5]


def test_generation_stops_at_an_end_token_that_only_the_folder_names(monkeypatch):
    """Published: the second end token of a chat model was ignored, and its answers ran on."""
    tokenizer = make_tokenizer("chat")
    model, said = tiny_model("llama", len(tokenizer)).eval(), []
    for ends in ((), None):
        e = PromptFormatter(tokenizer, "auto", 64, 16, ends=said[0][5:6] if ends is None else ())
        monkeypatch.setattr(e, "read_answer", lambda prompt, tokens: said.append(tokens) or "")
        ((_, complete),) = generate(model, e, [e.prompt("Name a tree.")], max_new_tokens=12, batch_size=1)
        assert complete == (ends is None)
    assert len(said[0]) == 12
    assert said[1] == said[0][: said[0].index(said[0][5])]


def test_a_damaged_generation_config_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"generation_config.json: cannot be read as JSON"):
        read_end_tokens(str(folder))


# -------------------------------------------------------------------------- tokens past the embedding
def test_a_pad_token_past_the_embedding_is_not_needed(caplog, monkeypatch, tmp_path):
    """Published: IndexError. A pad token fills rows up and is never read, so that the end of text does as well."""
    monkeypatch.setattr(logging.getLogger("unlearning"), "propagate", True)
    tokenizer = make_tokenizer("chat")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    e = PromptFormatter(tokenizer, "qa", 64, 16)
    e.fit(tiny_model("llama", size).config, 16)
    assert tokenizer.pad_token_id < size
    assert e.chat_template  # which needs none of them
    assert f"1 tokens that the model's embedding of {size} rows does not have: '[PAD]' ({size})" in caplog.text
    assert tokenizer.as_loaded.pad_token_id == size  # and it is saved as it was
    with pytest.raises(UsageError, match=r"a row holds '\[PAD\]', a token that the model's embedding does not have"):
        e.prompt("What is [PAD] for?")


def test_template_tokens_past_the_embedding_are_refused():
    e = with_template(LLAMA3, LLAMA3_TOKENS)
    with pytest.raises(UsageError, match=r"embedding of 600 rows does not have: '<\|start_header_id\|>'"):
        e.fit(tiny_model("llama", 600).config, 16)
    plain = with_template(LLAMA3, LLAMA3_TOKENS, style="qa")
    plain.fit(tiny_model("llama", 600).config, 16)
    assert not plain.chat_template  # so that nothing else asks in it
    assert max(plain.stop_ids()) < 600
