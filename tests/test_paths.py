"""A path of the wrong kind is refused in one line before anything is read; a finished run is called finished."""

import re
import sys
from types import SimpleNamespace

import pytest

import evaluate_unlearning
import sweep
import unlearn_harm
from engine.saving import lock_output_dir
from options import UnlearnOptions
from utils import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder and a file with plain names. Whatever reads rows or a tokenizer fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "file").write_text("mine")

    def fail(*_, **__):
        raise AssertionError("something was read")

    for place in ("run.setup.read_sides", "run.setup.load_tokenizer", "evaluate_unlearning.read_inputs"):
        monkeypatch.setattr(place, fail)
    yield tmp_path
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "folder.jsonl", "folder.yaml", "file"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("word", "message"), [
    ("--log_file=folder", "--log_file folder: is a folder; name a file"),
    ("--log_file=folder.log", "--log_file folder.jsonl: is a folder; name a file"),  # where its twin goes
    ("--log_file=file/logs/x.log", "--log_file file/logs/x.log: file is a file, so nothing can be written below it"),
    ("--cache_dir=file", "--cache_dir file: is a file; name a folder"),
    ("--cache_dir=file/cache", "--cache_dir file/cache: file is a file, so nothing can be written below it"),
    ("--model_save_dir=file", "--model_save_dir file: is a file; name a folder"),
    ("--model_save_dir=file/out", "--model_save_dir file/out: file is a file, so nothing can be written below it"),
    ("--from_manifest=folder", "--from_manifest folder: is not the run_manifest.json of a run"),
    ("--config=folder", "--config folder: cannot be read"),
    ("--method=folder.yaml", "--method folder.yaml: cannot be read"),
])  # fmt: skip
def test_a_run_refuses_a_path_of_the_wrong_kind(monkeypatch, word, message):
    monkeypatch.setattr(sys, "argv", ["unlearn_harm.py", word])
    with pytest.raises(UsageError, match=re.escape(message)):
        unlearn_harm.main()


@pytest.mark.parametrize(("words", "message"), [
    (["--report_dir=file"], "--report_dir file: is a file; name a folder"),
    (["--report_dir=file/report"], "--report_dir file/report: file is a file, so nothing can be written below it"),
    (["--perplexity_text=folder"], "--perplexity_text folder: is a folder; name a file"),
    (["--mc_data=folder"], "--mc_data folder: is a folder; name a file"),
    (["--train_log=folder"], "--train_log folder: is a folder; name a file"),
    (["--config=folder"], "--config folder: cannot be read"),
])  # fmt: skip
def test_an_evaluation_refuses_a_path_of_the_wrong_kind(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["evaluate_unlearning.py", *words])
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate_unlearning.main()


@pytest.mark.parametrize(("words", "message"), [
    (["--sweep_dir=file"], "--sweep_dir file: is a file; name a folder"),
    (["--grid=folder"], "--grid folder: cannot be read"),
])  # fmt: skip
def test_a_sweep_refuses_a_path_of_the_wrong_kind(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    with pytest.raises(UsageError, match=re.escape(message)):
        sweep.main()


def test_a_finished_run_that_is_resumed_is_called_finished(folder):
    """More steps are another run: with other steps the learning rate's schedule would be another one as well."""
    out, process = folder / "folder", SimpleNamespace(is_main_process=True)
    (out / "unlearn_args.json").write_text("{}")
    with pytest.raises(UsageError, match=f"is finished; for more steps, start a run with --model_name {out} and"):
        lock_output_dir(out, UnlearnOptions(resume=True), process)
    with pytest.raises(UsageError, match="is not empty; pass --overwrite to replace it"):
        lock_output_dir(out, UnlearnOptions(), process)
    (out / "unlearn_args.json").unlink()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty; pass --overwrite to replace it"):
        lock_output_dir(out, UnlearnOptions(resume=True), process)
    (out / "thesis.txt").unlink()
