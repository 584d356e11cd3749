"""The real commands on models whose folders ask for more than a tokenizer: thinking, end tokens, processors, a system
message that the template does not take."""

import json

import pytest
from conftest import make_tokenizer, one_line_error, run_cli, tiny_model
from templates import GEMMA, GEMMA_TOKENS, OPENED
from test_run import SMALL, data_words
from tokenizers import AddedToken

from prompts.end_tokens import read_end_tokens


def make_folder(folder, template, tokens=(), rows=None):
    """Save a small model with this chat template; `rows`: of its embedding, if not one a token."""
    tokenizer = make_tokenizer("chat")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    tokenizer.chat_template = template
    tiny_model("llama", rows or len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_thinking_model_is_trained_behind_its_thoughts_and_judged_without_them(tmp_path, data_files):
    base = make_folder(tmp_path / "base", OPENED)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 300]}))
    (base / "preprocessor_config.json").write_text("{}")
    run = run_cli("unlearn_harm.py", "--model_name=base", "--model_save_dir=out", "--log_file=logs/u.log", *SMALL,
                  f"--forget_data={data_files['forget']}", f"--normal_data={data_files['plain']}",
                  "--set", "mismatch.answers=1", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "unfinished thought" not in run.stderr  # its own answers are asked for behind the closed thought
    kept = [json.loads(line)["response"] for file in (tmp_path / "data/cache").glob("*.jsonl")
            for line in file.read_text(encoding="utf-8").split("\n") if line]  # fmt: skip
    assert any(kept)
    assert (tmp_path / "out/preprocessor_config.json").exists()
    assert read_end_tokens(str(tmp_path / "out")) == [2, 300]
    looked = run_cli("evaluate_unlearning.py", "--model_name=out", "--report_dir=report", "--max_new_tokens=4",
                     "--prompts_per_group=3", cwd=tmp_path)  # fmt: skip
    assert looked.returncode in (0, 3), looked.stderr  # 3: the random model fails the criteria
    lines = [json.loads(line) for line in (tmp_path / "report/scores.jsonl").read_text().splitlines()]
    asked = [line for line in lines if line["style"] == "chat"]
    # four tokens end no thought: each such answer is empty, and the log counts them
    assert {line["after"]["answer"] for line in asked} == {""}
    assert f"model after unlearning: {len(asked)} answers are only an unfinished thought" in looked.stderr


@pytest.mark.parametrize(("words", "change", "message"), [
    (["--system=Be brief."], {}, "--system: this model's chat template takes no system message"),
    (["--template_args", "enable_thinking=false"], {}, "the chat template has no such argument"),
    ([], {"rows": 600}, "embedding of 600 rows does not have: '<start_of_turn>' (600), '<end_of_turn>' (601)"),
])  # fmt: skip
def test_what_a_folder_cannot_do_is_one_line_before_training(tmp_path, data_files, words, change, message):
    make_folder(tmp_path / "base", GEMMA, GEMMA_TOKENS, **change)
    run = run_cli("unlearn_harm.py", *data_words(data_files), "--model_name=base", "--model_save_dir=out", *SMALL,
                  *words, cwd=tmp_path, quiet=True)  # fmt: skip
    assert message in one_line_error(run)
    assert not (tmp_path / "out").exists()
