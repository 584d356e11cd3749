"""--report_to: a tracker gets the log's numbers and nothing of the rows, and is never in the way of a run."""

import importlib.util
import json

import pytest
from accelerate import PartialState
from conftest import run_cli

from options import UnlearnOptions
from run import tracker
from run.tracker import TrackedLog

WORDS = ["--max_unlearn_steps=3", "--eval_every=2", "--max_answer_tokens=8", "--dtype=fp32", "--lr=1e-3", "--threads=1"]


def run(tmp_path, model_folders, data_files, *words):
    done = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", f"--forget_data={data_files['forget']}",
                   f"--normal_data={data_files['facts']}", *WORDS, *words, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed: make install")
def test_tensorboard_gets_every_number_of_the_log_and_no_text(tmp_path, model_folders, data_files):
    run(tmp_path, model_folders, data_files, "--report_to=tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = [path for path in (tmp_path / "logs").iterdir() if path.is_dir()]
    events = EventAccumulator(str(folder)).Reload()
    logged = [json.loads(line) for line in (tmp_path / "logs/unlearn.jsonl").read_text().splitlines()]
    for kind, name, place in (
        ("step", "bad_loss", "train"),
        ("step", "grad_norm", "train"),
        ("eval", "dev_kl", "eval"),
    ):
        expected = [(line["step"], pytest.approx(line[name], abs=1e-6)) for line in logged if line["event"] == kind]
        assert [(scalar.step, scalar.value) for scalar in events.Scalars(f"{place}/{name}")] == expected
        assert len(expected) == 3  # of the steps 1, 2, 3; looked at after 0, 2, 3
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"break lock" not in written and b"red pick" not in written


def test_off_by_default(tmp_path, model_folders, data_files):
    run(tmp_path, model_folders, data_files)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["unlearn.jsonl", "unlearn.log"]


class Breaking:
    """A tracker that fails at one of its calls."""

    at = ""

    def __init__(self, **_):
        self.calls = []

    def __getattr__(self, name):
        def call(*_, **__):
            self.calls.append(name)
            if self.calls.count(name) == (2 if name == "log" else 1) and name == self.at:
                raise ConnectionError("no network\nat all")

        return call


@pytest.mark.parametrize("at", ["import", "start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_log_goes_on(at, tmp_path, monkeypatch, capsys):
    PartialState()
    monkeypatch.setattr(tracker, "get_available_trackers", lambda: [] if at == "import" else ["wandb"])
    monkeypatch.setattr(Breaking, "at", at)
    monkeypatch.setitem(tracker.LOGGER_TYPE_TO_CLASS, "wandb", Breaking)
    log = TrackedLog(UnlearnOptions(log_file=str(tmp_path / "a.log"), report_to="wandb"), write=True, resume=False)
    for step in (1, 2, 3):
        log.event("step", f"step {step}", step=step, bad_loss=1.0)
    log.close()
    warned = [line for line in capsys.readouterr().err.splitlines() if "--report_to" in line]
    why = "the package wandb is not installed" if at == "import" else "no network at all"
    assert warned == [f"--report_to wandb: {why}; the run goes on without it"]
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3


def test_wandb_is_told_to_send_neither_what_is_printed_nor_the_command_line(tmp_path, monkeypatch):
    PartialState()
    given = []
    monkeypatch.setattr(tracker, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(tracker.LOGGER_TYPE_TO_CLASS, "wandb", lambda **words: given.append(words) or Breaking())
    TrackedLog(UnlearnOptions(log_file=str(tmp_path / "a.log"), report_to="wandb"), write=True, resume=False).close()
    assert given[0]["settings"] == {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True}
