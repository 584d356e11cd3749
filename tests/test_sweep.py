"""The search over settings: what is run, what is not run again, and who is on the front."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, one_line_error, run_cli, run_python

import sweep
from method.recipe import read_recipe
from options import UnlearnOptions
from run.parsing import parse_run
from utils import RunError, UsageError


@pytest.mark.parametrize(("text", "message"), [
    ("lr: 1e-4\n", "option 'lr' needs a list of values"),
    ("no_such: [1]\n", "'no_such' is not an option that can be varied"),
    ("- 1\n", "must hold one 'option: [value, ...]' a line"),
    ("a: [{lr: 1}, {no_such: 1}]\n", "'no_such' is not an option that can be varied"),
    ("a: [{lr: 1}, 2]\n", "'a' must hold mappings of settings alone, or values alone"),
])  # fmt: skip
def test_a_bad_grid_is_named(tmp_path, text, message):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        sweep.combinations(str(tmp_path / "grid.yaml"))


def test_a_bad_grid_is_one_line_on_the_command_line(tmp_path):
    (tmp_path / "grid.yaml").write_text("lr: 1e-4\n")
    words = ("--config=c.yaml", f"--grid={tmp_path / 'grid.yaml'}")
    assert "option 'lr' needs a list" in one_line_error(run_python(ROOT / "sweep.py", *words, cwd=tmp_path))


def test_the_front_is_what_nothing_beats(tmp_path, monkeypatch, capsys):
    """Four runs of which two are finished; the others are run with --resume, and judged on the development split."""
    figures = {"a=1,b=x": (0.1, 0.9), "a=1,b=y": (0.2, 0.8), "a=2,b=x": (0.3, 0.95), "a=2,b=y": (0.1, 0.9)}
    called = []

    def run(script, *words):
        called.append((script, words))
        if script == "unlearn_harm.py":
            folder = next(word.partition("=")[2] for word in words if word.startswith("--model_save_dir"))
            finish(tmp_path / "sweep" / folder.rpartition("/")[2])

    def finish(folder):
        report = folder.parent / "reports" / folder.name
        for made in (folder, report):
            made.mkdir(parents=True)
        made_with = {"options": {"model_name": "m", "seed": 1}, "run": {"seconds": 1}}
        (folder / "unlearn_args.json").write_text(json.dumps(made_with))
        (report / "report.json").write_text("{}")

    def judged_figures(report):
        forget, keep = figures[sweep.slug(settings[len([c for c in called if c[0] != "unlearn_harm.py"]) - 1])]
        attacked = {"attack.relearn.counted": 0.3} if forget < 0.2 else {}
        return {"forget.answered": forget, "forget.answered.ratio": forget, "keep.worst.answered.ratio": keep,
                "keep.similarity": 0.5, **attacked}  # fmt: skip

    settings = [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]
    finish(tmp_path / "sweep" / "a=1,b=x")
    monkeypatch.setattr(sweep, "combinations", lambda path: settings)
    monkeypatch.setattr(sweep, "refuse_unknown_settings", lambda runs, config: None)  # the settings are made up
    monkeypatch.setattr(sweep, "held_out_words", lambda settings, config: ["--dev_share=0.1"])
    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "refuse_other_settings", lambda folder, words: None)
    monkeypatch.setattr(sweep, "point_values", judged_figures)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--config=c", "--grid=g", f"--sweep_dir={tmp_path / 'sweep'}"])
    sweep.main()
    trained = [words for script, words in called if script == "unlearn_harm.py"]
    assert len(trained) == 3, "what is finished is not run again"
    assert all("--resume" in words and "--dev_share=0.1" in words for words in trained)
    assert all("--split=dev" in words for script, words in called if script == "evaluate_unlearning.py")
    found = {one["run"]: one["on_front"] for one in json.loads((tmp_path / "sweep/sweep.json").read_text())}
    assert found == {"a=1,b=x": True, "a=2,b=y": True, "a=2,b=x": True, "a=1,b=y": False}
    assert "<svg" in (tmp_path / "sweep/front.svg").read_text()
    table = capsys.readouterr().out
    assert "worst kept ratio" in table and "comes back" in table
    assert re.search(r"a=1,b=y +0.200 +0.800 +0.500 +- ", table), "nothing was forgotten there, so nothing comes back"


def test_settings_that_go_together_are_varied_together(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("objective: [{forget_loss: npo, forget.beta: 0.5}, {forget_loss: wga}]\nseed: [1, 2]\n")
    assert sweep.combinations(str(grid)) == [
        {"forget_loss": "npo", "forget.beta": 0.5, "seed": 1}, {"forget_loss": "npo", "forget.beta": 0.5, "seed": 2},
        {"forget_loss": "wga", "seed": 1}, {"forget_loss": "wga", "seed": 2}]  # fmt: skip


def test_runs_may_be_judged_against_a_twin_whose_answers_are_asked_once(tmp_path, monkeypatch):
    called, folder, earlier = [], tmp_path / "a=1", tmp_path / "reports" / "a=0"
    (earlier / "answers").mkdir(parents=True)
    for label in ("before", "after", "retrained"):
        (earlier / "answers" / f"{label}.jsonl").write_text(label)
    (tmp_path / "reports/a=1").mkdir()
    (tmp_path / "reports/a=1/report.json").write_text("{}")
    monkeypatch.setattr(sweep, "run", lambda script, *words: called.append((script, words)))
    monkeypatch.setattr(sweep, "read_args", lambda path: {"run": {"seconds": 2}} if called else None)
    monkeypatch.setattr(sweep, "held_out_words", lambda settings, config: [])
    monkeypatch.setattr(sweep, "point_values", lambda report: {
        "forget.answered": 0.1, "forget.answered.ratio": 0.1, "keep.worst.answered.ratio": 0.9,
        "attack.relearn.counted": 0.3, "attack.prefill.counted": 0.1, "attack.relearn.control": 0.9})  # fmt: skip
    options = sweep.SweepOptions(evaluation="twin.yaml", attacks=["relearn", "prefill"])
    found = sweep.judged(folder, {"lr": 1}, options, earlier)
    assert (found["back"], found["similarity"], found["seconds"]) == (0.3, None, 2)
    _, words = called[-1]
    assert "--config=twin.yaml" in words and f"--train_log={tmp_path / 'logs/a=1.jsonl'}" in words
    assert "--split=dev" not in words and "--seed=1" in words
    assert not [word for word in words if word.startswith("--prompts_per_group")], "as the evaluation's file says"
    assert words[words.index("--attacks") + 1 :][:2] == ("relearn", "prefill")
    assert sorted(f.name for f in (tmp_path / "reports/a=1/answers").iterdir()) == ["before.jsonl", "retrained.jsonl"]


def test_runs_are_compared_on_prompts_that_none_of_them_trains_on(tmp_path):
    (tmp_path / "c.yaml").write_text("forget_data: a.jsonl\n")
    assert sweep.held_out_words({}, str(tmp_path / "c.yaml")) == ["--dev_share=0.1", "--test_share=0.2"]
    assert sweep.held_out_words({"test_share": 0.5}, str(tmp_path / "c.yaml")) == ["--dev_share=0.1"]
    (tmp_path / "c.yaml").write_text("dev_share: 0.3\ntest_share: 0\n")
    assert sweep.held_out_words({}, str(tmp_path / "c.yaml")) == []


def test_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    settings = [{"a": 1}, {"a": 2}]
    figures = {"run": None, "forget": 0.1, "keep": 0.9, "similarity": 0.8, "back": None, "seconds": 1.0}

    def judged(folder, chosen, options, earlier):
        if chosen["a"] == 1:
            raise RunError("unlearn_harm.py --a=1: ended with 1: lower --lr")
        return {k: v for k, v in figures.items() if k != "run"}

    monkeypatch.setattr(sweep, "combinations", lambda path: settings)
    monkeypatch.setattr(sweep, "refuse_unknown_settings", lambda runs, config: None)  # the settings are made up
    monkeypatch.setattr(sweep, "judged", judged)
    monkeypatch.setattr(sys, "argv", ["sweep.py", f"--sweep_dir={tmp_path}"])
    with pytest.raises(RunError, match="1 of 2 combinations failed: a=1"):
        sweep.main()
    assert [one["run"] for one in json.loads((tmp_path / "sweep.json").read_text())] == ["a=2"]
    assert "lower --lr" in capsys.readouterr().err


STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import sweep
sweep.HERE = sweep.Path({folder!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background is started without one
signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGINT))
signal.alarm(2)
sweep.run_script(lambda: sweep.run("slow.py"))
"""
SLOW = """
import signal, sys, time
def save(*_):
    time.sleep(1.5)
    open("saved", "w").close()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
time.sleep(60)
"""


def test_ctrl_c_gives_the_run_the_time_to_save(tmp_path):
    """subprocess.run would have killed it after a quarter of a second, and its steps with it."""
    (tmp_path / "slow.py").write_text(SLOW)
    code = STOPPED.format(root=str(ROOT), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                         start_new_session=True)  # fmt: skip
    assert run.returncode == 130, run.stderr
    assert (tmp_path / "saved").exists()


def test_a_setting_that_no_run_takes_is_refused_before_the_first_one(tmp_path):
    (tmp_path / "c.yaml").write_text("method: yao\n")
    sweep.refuse_unknown_settings([{"stop.weight": 1.0}], str(tmp_path / "c.yaml"))
    with pytest.raises(UsageError, match="stop: has no setting 'wieght'"):
        sweep.refuse_unknown_settings([{"stop.weight": 1.0}, {"stop.wieght": 1.0}], str(tmp_path / "c.yaml"))


def test_settings_and_lists_reach_the_run_as_they_stand_in_the_grid(tmp_path):
    """A list was written as one word, which no run could read; and a setting of the recipe is none of the options."""
    (tmp_path / "grid.yaml").write_text(
        "lora.targets: [[q_proj, v_proj]]\nforget_data: [[a.jsonl, b.jsonl]]\nstop.weight: [1.5]\nlr: [1e-4]\n"
    )
    (settings,) = sweep.combinations(str(tmp_path / "grid.yaml"))
    options = parse_run(["--method=selective", *sweep.words_for(settings)])
    recipe = read_recipe(options)
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert options.forget_data == ["a.jsonl", "b.jsonl"]
    assert {term.name: term.weight for term in recipe.terms}["stop"] == 1.5
    assert options.lr == 1e-4
    assert sweep.slug(settings) == "lora.targets=q_proj+v_proj,forget_data=a.jsonl+b.jsonl,stop.weight=1.5,lr=1e-4"
    (tmp_path / "grid.yaml").write_text("set: [[stop.weight=2]]\n")
    with pytest.raises(UsageError, match="'set' is not an option that can be varied"):
        sweep.combinations(str(tmp_path / "grid.yaml"))


def test_the_shipped_grid_is_one():
    assert len(sweep.combinations(str(ROOT / "configs/sweep.yaml"))) == 4


@pytest.mark.parametrize("name", ["demo", "opt-1.3b", "chat-7b-lora"])
def test_a_shipped_config_is_read_whole(name):
    """One that a renamed option or a bad value breaks would fail only on the GPU machine that it is made for."""
    found = parse_run([f"--config={ROOT / f'configs/{name}.yaml'}"])
    assert found.method == "selective"
    for data in (*found.forget_data, *found.normal_data):
        assert (ROOT / data).is_file() or data in ("data/harmbench.jsonl", *UnlearnOptions().forget_data,
                                                   *UnlearnOptions().normal_data)  # made or fetched # fmt: skip


def test_a_method_gives_what_is_not_named(tmp_path):
    """The recipe lies below the file, the file below the command line; yao is the defaults themselves."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"method": "selective", "normal_weight": 2}))
    found = parse_run([f"--config={file}", "--set=retain.first_token_rows=5"])
    terms = {term.name: term for term in read_recipe(found).terms}
    assert (terms["retain"].weight, terms["retain"].draw.first_token_rows) == (2, 5)
    assert terms["retain_first"].weight == 2 * 0.43  # counts in units of the retain term's
    assert terms["stop"].draw.rows == 9
    yao = parse_run(["--method=yao"])
    assert dataclasses.replace(yao) == UnlearnOptions()  # but for the recipe, which no option holds
    # by its name alone it is a whole recipe: at the published rate it would do next to nothing
    assert (found.use_lora, found.lr, found.max_unlearn_steps) == (True, 1e-3, 260)
    for no in ("false", "no", "0"):  # however it is said
        whole = parse_run([f"--config={file}", "--use_lora", no])
        assert (whole.use_lora, whole.lr) == (False, pytest.approx(1e-4))
    assert parse_run([f"--config={file}", "--use_lora=false", "--lr=3e-5"]).lr == 3e-5


def test_a_run_with_a_method_is_whole(tmp_path, model_folders, data_files):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--method=selective", "--dry_run",
                  "--model_save_dir=out", "--forget_data", data_files["forget"], "--normal_data", data_files["facts"],
                  cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    # each harmful prompt with the empty answer and with a begun one, of which the plan says what is to follow
    assert run.stdout.count("\n  stop") == 2 * (1 + 9)
    assert run.stdout.count("] each token to be followed by [") == 1 + 9


def test_a_run_of_other_settings_is_not_put_on_the_front(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-4\nmax_unlearn_steps: 9\n")
    made = dataclasses.asdict(parse_run([f"--config={tmp_path / 'c.yaml'}", "--bad_weight=2"]))
    made |= {"log_file": "elsewhere.log", "model_save_dir": "elsewhere"}
    (tmp_path / "unlearn_args.json").write_text(json.dumps({"options": made}))
    words = [f"--config={tmp_path / 'c.yaml'}", "--bad_weight=2"]
    sweep.refuse_other_settings(tmp_path, words)
    (tmp_path / "c.yaml").write_text("lr: 1e-4\nmax_unlearn_steps: 10\n")
    with pytest.raises(UsageError, match="max_unlearn_steps: 9 then, 10 now"):
        sweep.refuse_other_settings(tmp_path, words)
