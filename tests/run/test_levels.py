"""Where forgetting a text stops: at the NLL of text that the model never saw, measured before the first step."""

import re

import pytest
import torch
from conftest import one_line_error, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

STORY = "The barge lay under the wall and the cat slept on the bell. " * 20
UNSEEN = "Nobody had asked the heron, who stood in the reeds and kept the accounts of the whole river in his head."


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "unseen.txt").write_text(UNSEEN)
    (tmp_path / "kept.jsonl").write_text('{"prompt": "Who rows?", "response": "The ferryman rows."}\n')
    return tmp_path


def unlearn(texts, model, *words):
    return run_cli(
        "unlearn_harm.py", f"--model_name={model}", "--method=copyright", "--forget_text=story.txt",
        "--normal_data=kept.jsonl", "--model_save_dir=out", "--log_file=run.log", "--dtype=fp32",
        "--max_unlearn_steps=2", "--text_window=16", "--threads=1", *words, cwd=texts,
    )  # fmt: skip


def test_the_level_is_the_model_s_own_nll_of_the_unseen_text(texts, model_folders):
    run = unlearn(texts, model_folders["llama"], "--holdout_text=unseen.txt")
    assert run.returncode == 0, run.stderr
    found = re.search(r"forget: stops at ([\d.]+) nats a token, the NLL of (\d+) passages", run.stderr)
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folders["llama"])
    ids = tokenizer(UNSEEN, add_special_tokens=False).input_ids
    spans = [(start, min(start + 16, len(ids))) for start in range(0, len(ids), 16)]
    spans[-1] = (len(ids) - 16, len(ids))  # the last one reaches back until it is whole
    assert len(ids) > 32 and len(spans) == int(found[2])
    start = [tokenizer.bos_token_id] * (tokenizer.bos_token_id is not None)
    means = []
    for first, last in spans:
        passage = torch.tensor([start + ids[first:last]])
        with torch.no_grad():
            means.append(model(passage, labels=passage).loss.item())  # the mean NLL of all tokens but the first
    assert float(found[1]) == pytest.approx(sum(means) / len(means), abs=0.006)  # two decimals are printed


def test_a_level_must_come_from_somewhere_and_lead_somewhere(texts, model_folders):
    line = one_line_error(unlearn(texts, model_folders["llama"]))
    assert "--holdout_text" in line and "--set forget.ceiling=4" in line and not (texts / "out").exists()
    both = ("--holdout_text=unseen.txt", "--set", "forget.ceiling=4")
    line = one_line_error(unlearn(texts, model_folders["llama"], *both))
    assert "--holdout_text" in line and "leave it out" in line
    assert unlearn(texts, model_folders["llama"], "--set", "forget.ceiling=4").returncode == 0
