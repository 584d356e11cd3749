"""Wrong use ends with exit code 2 and one line, before anything is trained, and nothing is written."""

import re

import pytest
from conftest import (
    one_line_error,
    run_cli,
)
from test_run import SMALL, data_words

from run.parsing import parse_run
from utils import UsageError


@pytest.mark.parametrize(("words", "message"), [
    (["--no_such_option=1"], "unrecognized arguments: --no_such_option=1 (--help lists every option)"),
    (["--max_step=1"], "unrecognized arguments: --max_step=1; did you mean --max_unlearn_steps?"),
    (["--forget_dta=a"], "; did you mean --forget_data?"),
    (["--retain_data=a"], "unrecognized arguments: --retain_data=a (--help lists every option)"),
    (["--lr=-1"], "--lr: must be a finite number above 0, got '-1'"),
    (["--lr=nan"], "--lr: must be a finite number"),
    (["--batch_size=0"], "must be a whole number at least 1, got '0'"),
    (["--max_unlearn_steps=2.5"], "must be a whole number"),
    (["--template=haiku"], "--template: invalid choice: 'haiku'"),
    (["--bad_weight=0", "--random_weight=0", "--normal_weight=0"], "the weights of all terms are 0"),
    (["--kl_budget=0.1"], "--kl_budget chooses among the states that are looked at: set --eval_every as well"),
    (["--log_file=run.jsonl"], "--log_file run.jsonl: that is where its twin in JSON lines goes"),
    (["--config=none.yaml"], "--config none.yaml: cannot be read"),
    (["--forget_data=none.jsonl"], "--forget_data none.jsonl: no such file"),
    (["--forget_data=a b c"], "--forget_data a b c: neither a"),
    (["--start_adapter=a"], "--start_adapter: adapters go on in a run that trains some: add --use_lora"),
    (["--use_lora", "--start_adapter=a"], "--start_adapter a: has no adapter_config.json"),
    (["--model_name=./nowhere"], "model ./nowhere: no such folder"),
    (["--model_name=someone/something"], "model someone/something is not in a local folder and cannot be downloaded"),
    (["--forget_data=someone/something"], "data set someone/something cannot be downloaded: save it as data/something"),
])  # fmt: skip
def test_wrong_use_ends_with_one_line_and_nothing_written(tmp_path, data_files, words, message):
    run = run_cli("unlearn_harm.py", *data_words(data_files), "--model_save_dir=out", *words, cwd=tmp_path)
    assert message in one_line_error(run)
    assert not (tmp_path / "out").exists()


def test_the_published_command_says_what_is_missing_and_where_to_put_it(tmp_path):
    run = run_cli("unlearn_harm.py", "--model_name=facebook/opt-1.3b", "--model_save_dir=models/opt1.3b_unlearned",
                  "--log_file=logs/opt-1.3b-unlearn.log", cwd=tmp_path)  # fmt: skip
    line = one_line_error(run)
    assert "PKU-Alignment/PKU-SafeRLHF cannot be downloaded" in line
    assert "data/PKU-SafeRLHF.jsonl" in line


def test_yaml_gives_way_to_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("lr: 1e-5\nbatch_size: 3\nuse_lora: true\nforget_data: [a.txt, b.txt]\nconfig:\n")
    with pytest.raises(UsageError, match="unknown option 'config'"):
        parse_run([f"--config={tmp_path / 'c.yaml'}"])
    (tmp_path / "c.yaml").write_text("lr: 1e-5\nbatch_size: 3\nuse_lora: true\nforget_data: [a.txt, b.txt]\n")
    found = parse_run(["--batch_size", "4", "--config", str(tmp_path / "c.yaml")])
    assert (found.lr, found.batch_size, found.use_lora, found.forget_data) == (1e-5, 4, True, ["a.txt", "b.txt"])
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-5\n")
    with pytest.raises(UsageError, match="unknown option 'learning_rate'"):
        parse_run(["--config", str(tmp_path / "c.yaml")])


def test_a_folder_with_something_in_it_is_not_replaced_unasked(tmp_path, model_folders, data_files):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    run = run_cli("unlearn_harm.py", *data_words(data_files), "--model_save_dir=out", cwd=tmp_path)
    assert "--model_save_dir out: is not empty; pass --overwrite" in one_line_error(run)
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def test_a_dry_run_shows_the_batch_and_writes_nothing(tmp_path, model_folders, data_files):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['opt']}", "--model_save_dir=out",
                  *data_words(data_files), *SMALL, "--dry_run", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "packed layout: logits equal" in run.stdout
    prompts_alone = run_cli("unlearn_harm.py", f"--model_name={model_folders['opt']}", "--model_save_dir=out",
                            "--forget_data", data_files["forget"], "--normal_data", data_files["plain"], *SMALL,
                            "--dry_run", cwd=tmp_path)  # fmt: skip
    assert prompts_alone.returncode == 0, prompts_alone.stderr  # the random answers would be the model's own
    assert re.search(r"forget +row 0: .*### Answer:\[ Take the red pick[^\]]*\]", run.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["unlearn_harm.py", "evaluate_unlearning.py", "sweep.py"])
def test_help_names_every_option(script, tmp_path):
    run = run_cli(script, "--help", cwd=tmp_path)
    assert run.returncode == 0 and "--config" in run.stdout, run.stderr
    assert "30 % pruned" in " ".join(run.stdout.split()) or script != "evaluate_unlearning.py"
