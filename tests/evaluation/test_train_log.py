"""The log of a run, read for the curves: which terms it had, and what is no such log."""

import json

import pytest

from evaluation.plots import curves_plot, term_label
from evaluation.train_log import LoggedTerm, TrainLog, read_train_log
from utils import UsageError

FORGET = {"name": "forget", "field": "bad_loss", "measure": "nll", "side": "forget", "loss": "ascent",
          "draw": "answer", "weight": 0.5, "better": "rises"}  # fmt: skip
STEER = {"name": "steer", "field": "steer_distance", "measure": "distance", "side": "forget", "loss": "rmu",
         "draw": "answer", "weight": 1.0, "better": "falls"}  # fmt: skip
RETAIN = {"name": "retain", "field": "normal_loss", "measure": "kl", "side": "retain", "loss": "kl", "draw": "answer",
          "weight": 1.0, "better": "stays near 0"}  # fmt: skip


def write_log(path, *events) -> str:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(path)


def test_a_log_with_an_objective_has_its_terms(tmp_path):
    steps = [{"event": "step", "step": 1, "bad_loss": 2.0, "steer_distance": None},
             {"event": "step", "step": 2, "bad_loss": 2.5, "steer_distance": 7}]  # fmt: skip
    evaluation = {"event": "eval", "step": 0, "dev_kl": 0.1}
    objective = {"event": "objective", "terms": [FORGET, STEER, RETAIN]}
    log = read_train_log(write_log(tmp_path / "x.jsonl", {"event": "data", "rows": 3}, objective, evaluation, *steps))
    assert [(term.name, term.field, term.measure, term.better) for term in log.terms] == [
        ("forget", "bad_loss", "nll", "rises"), ("steer", "steer_distance", "distance", "falls"),
        ("retain", "normal_loss", "kl", "stays near 0")]  # fmt: skip
    assert (log.steps, log.evals) == (steps, [evaluation])
    plot = curves_plot(log)
    assert [f'id="term-{term.field}"' in plot for term in log.terms] == [True] * 3
    assert 'id="development-kl"' in plot
    assert plot.count('id="axes_') == 2


def test_a_resumed_run_that_tells_its_objective_twice_has_each_term_once(tmp_path):
    objective = {"event": "objective", "terms": [FORGET, RETAIN]}
    log = read_train_log(write_log(tmp_path / "x.jsonl", objective, {"event": "step", "step": 1}, objective))
    assert [term.field for term in log.terms] == ["bad_loss", "normal_loss"]


def test_a_log_without_an_objective_has_the_three_published_terms(tmp_path):
    step = {"event": "step", "step": 1, "bad_loss": 2.0, "random_loss": 3.0, "normal_loss": 0.1, "lr": 1e-5}
    log = read_train_log(write_log(tmp_path / "x.jsonl", step))
    assert [(term.field, term.measure) for term in log.terms] == [
        ("bad_loss", "nll"), ("random_loss", "nll"), ("normal_loss", "kl")]  # fmt: skip
    assert term_label(log.terms[0]) == "bad_loss (NLL, rises)"
    plot = curves_plot(log)
    assert all(f'id="term-{field}"' in plot for field in ("bad_loss", "random_loss", "normal_loss"))
    assert 'id="development-kl"' not in plot


def test_no_log_is_an_empty_one():
    assert read_train_log(None) == TrainLog()


def test_a_run_of_one_kind_of_term_has_one_panel():
    steps = [{"step": 1, "d": 1.0}]
    assert curves_plot(TrainLog([LoggedTerm("steer", "d", "distance")], steps)).count('id="axes_') == 1
    assert curves_plot(TrainLog([LoggedTerm("forget", "d", "nll")], steps)).count('id="axes_') == 1


def test_every_term_of_a_long_recipe_has_its_own_colour_and_style():
    terms = [LoggedTerm(f"t{i}", f"t{i}", "nll") for i in range(8)]
    plot = curves_plot(TrainLog(terms, [{"step": n, **{f"t{i}": n + i for i in range(8)}} for n in (1, 2)]))
    looks = [plot.split(f'id="term-t{i}"')[1].split('style="')[1].split('"')[0] for i in range(8)]
    assert len(set(looks)) == 8


@pytest.mark.parametrize("event", [
    {"step": 1, "bad_loss": 1.0}, {"event": "step", "step": 1, "bad_loss": 1.0},
    {"event": "step", "step": 1, "bad_loss": "1.0", "random_loss": 1.0, "normal_loss": 0.0},
    {"event": "objective", "terms": [{"name": "forget"}]}, {"event": "objective", "terms": None},
    {"event": "objective", "terms": ["forget"]}, {"event": "objective"},
])  # fmt: skip
def test_what_is_no_log_is_refused(tmp_path, event):
    path = write_log(tmp_path / "x.jsonl", event)
    with pytest.raises(UsageError, match=f"--train_log {path}: is not the log in JSON lines, x.jsonl"):
        read_train_log(path)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "x.log").write_text("2026-01-01 step 1/5  bad_loss 1.0\n")
    with pytest.raises(UsageError, match="is not the log in JSON lines"):
        read_train_log(str(tmp_path / "x.log"))
    with pytest.raises(UsageError, match=r"--train_log nope.jsonl: cannot be read \(No such file"):
        read_train_log("nope.jsonl")
