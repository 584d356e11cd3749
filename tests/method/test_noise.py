"""UNDO's noise: by hand, and in a run that is distilled again."""

import json

import pytest
import torch
from conftest import one_line_error, run_cli
from test_run import SMALL, data_words

from method.noise import noised


def test_noise_takes_the_place_of_a_share_by_hand():
    weight = torch.full((200, 300), 2.0)
    found = noised(weight, 0.25, 10.0, torch.Generator().manual_seed(1))
    # three quarters of 2 are left; Xavier's deviation is sqrt(2 / 500), a fourth of ten times that is .158
    assert found.mean().item() == pytest.approx(1.5, abs=0.005)
    assert found.std().item() == pytest.approx(0.25 * 10 * (2 / 500) ** 0.5, rel=0.02)
    assert torch.equal(noised(weight, 0.0, 10.0, torch.Generator()), weight)
    assert torch.equal(found, noised(weight, 0.25, 10.0, torch.Generator().manual_seed(1)))


def test_a_run_is_distilled_from_what_it_was_before_the_noise(tmp_path, model_folders, data_files):
    words = [f"--model_name={model_folders['llama']}", "--log_file=out.log", *data_words(data_files), "--dtype=fp32",
             "--max_answer_tokens=8",
             "--max_unlearn_steps=24", "--save_every=0", "--lr=3e-3", "--method=undo", "--model_save_dir=out",
             "--set=noise.share=0.3", "--set=optimizer.warmup_steps=0"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "noise took the place of 0.3 of" in run.stderr
    log = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    kl = [line["retain_kl"] for line in log if line.get("event") == "step"]
    assert kl[0] > 0.01, "the first step is taken after the noise, and compares with the model before it"
    assert min(kl[-3:]) < 0.7 * kl[0], "what the original says is learned again"


@pytest.mark.parametrize(("words", "message"), [
    (["--use_lora"], "leave --use_lora out"),
    (["--kl_budget=0.1", "--eval_every=1"], "leave --kl_budget, which takes noise for a collapse out"),
    (["--normal_weight=0"], "no term brings normal rows back"),
])  # fmt: skip
def test_noise_that_nothing_takes_back_is_refused(tmp_path, model_folders, data_files, words, message):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=out.log", *SMALL, *data_words(data_files), "--method=yao", "--set=noise.share=0.3",
                  *words, cwd=tmp_path, quiet=True)  # fmt: skip
    assert message in one_line_error(run)
