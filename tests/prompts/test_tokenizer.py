"""Tokenizers whose folder holds less or more than others."""

import importlib.util
import io

import pytest
from conftest import tiny_model

from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from utils import UsageError

HAS_PACKAGES = all(importlib.util.find_spec(name) for name in ("sentencepiece", "google"))


def write_sentencepiece(folder):
    """Write a tiny model whose tokenizer is a SentencePiece file alone, as early Llama models come."""
    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The river runs by the old mill.", "A keeper of the gate turns the dial."] * 20),
        model_writer=content, vocab_size=320, model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    tiny_model("llama", 320).save_pretrained(folder)


@pytest.mark.skipif(not HAS_PACKAGES, reason="needs sentencepiece and protobuf")
def test_a_sentencepiece_file_alone_is_read(tmp_path, monkeypatch):
    write_sentencepiece(tmp_path)
    formatter = PromptFormatter(load_tokenizer(str(tmp_path)), "auto", 64, 16)
    assert formatter.tokenizer.decode(formatter.ids("The river runs.")) == "The river runs."


@pytest.mark.parametrize("missing", [["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"]])
def test_a_sentencepiece_file_without_its_package_names_the_package(tmp_path, monkeypatch, missing):
    """Published: transformers asks for tiktoken, which cannot read the file."""
    tiny_model("llama", 320).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr("prompts.tokenizer._is_installed", lambda module: not any(
        module.endswith(package) for package in missing))  # fmt: skip
    with pytest.raises(UsageError) as error:
        load_tokenizer(str(tmp_path))
    names = " and ".join(missing)
    assert f"tokenizer.model: cannot be read without {names}: pip install {' '.join(missing)}" in str(error.value)


def test_a_tiktoken_file_names_tiktoken(tmp_path, monkeypatch):
    tiny_model("llama", 320).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setattr("prompts.tokenizer._is_installed", lambda module: module != "tiktoken")
    with pytest.raises(UsageError, match=r"tokenizer.model: cannot be read without tiktoken: pip install tiktoken"):
        load_tokenizer(str(tmp_path))
