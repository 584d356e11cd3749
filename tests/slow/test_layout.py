"""The embedded model in bf16, as an evaluation loads it: rounding must not be taken for another layout's logits."""

import pytest
import torch
from conftest import ROOT

from engine.tree import wrap_model
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from sources.rows import read_rows
from utils import load_model

EMBEDDED = ROOT / "models/smollm2-135m-instruct"


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="the embedded model is not set up: make test-slow does it")
def test_the_embedded_model_is_packed_in_bf16_too():
    model = load_model(str(EMBEDDED), dtype=torch.bfloat16)
    formatter = PromptFormatter(load_tokenizer(str(EMBEDDED)), "auto", 256, 48)
    for name in ("benign", "harmful"):
        prompts = [row.prompt for row in read_rows(str(ROOT / f"data/{name}.jsonl"), "--forget_data")[:5]]
        forward, line = wrap_model(model, formatter, prompts)
        assert forward.packed, line
