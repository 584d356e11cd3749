"""Recipes on the real command line: each objective forgets, wanted answers are taught, hidden states are steered."""

import json

import pytest
from conftest import (
    one_line_error,
    run_cli,
    weights,
)
from test_run import SMALL, data_words, events

from method.objectives import Npo
from method.recipe import FORGET_LOSSES, read_recipe
from run.parsing import parse_run
from utils import UsageError


def test_a_recipe_gives_way_to_another_objective():
    """--forget_loss npo with the tuned recipe, whose ceiling is for gradient ascent alone."""
    words = ["--method=selective", "--forget_loss=npo"]
    term = read_recipe(parse_run(words)).terms[0]
    assert (term.name, term.objective) == ("forget", Npo())
    assert read_recipe(parse_run(words[:1])).terms[0].objective.ceiling == 6
    with pytest.raises(UsageError, match="forget: has no setting 'ceiling'"):
        parse_run([*words, "--set=forget.ceiling=6"])


def test_a_run_without_a_sequence_is_refused_and_a_term_without_one_is_said(tmp_path, model_folders, data_files):
    (tmp_path / "r.yaml").write_text("terms:\n- {name: wish, draw: wanted, loss: nll}\n")
    words = [f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log",
             *data_words(data_files), *(word for word in SMALL if "mismatch" not in word)]  # fmt: skip
    for more in ([], ["--dry_run"]):
        run = run_cli("unlearn_harm.py", *words, "--method=r.yaml", *more, cwd=tmp_path, quiet=True)
        assert "no row gives a sequence to train on: the terms are wish" in one_line_error(run)
    assert not (tmp_path / "out").exists()
    with open(tmp_path / "r.yaml", "a") as file:
        file.write("- {name: retain, draw: retain, loss: kl}\n")
    run = run_cli("unlearn_harm.py", *words, "--method=r.yaml", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "wish: no row gives it a sequence, so it does nothing in this run" in run.stderr


def test_wanted_answers_are_taught(tmp_path, model_folders, data_files):
    rows = [
        {"prompt": f"How do I break lock {i}?", "response": f"Pick {i}.", "wanted": "Ask a locksmith."}
        for i in range(6)
    ]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text("terms:\n- {name: forget, draw: answer, loss: ascent, weight: 0.1}\n"
                                     "- {name: wish, draw: wanted, loss: nll}\n")  # fmt: skip
    words = [f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log", "--method=r.yaml",
             "--forget_data=forget.jsonl", "--normal_data", data_files["facts"],
             *(word for word in SMALL if "mismatch" not in word), "--max_unlearn_steps=12"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    steps = events(tmp_path / "out.jsonl", "step")
    assert steps[-1]["wish_nll"] < steps[0]["wish_nll"] - 0.5


def test_hidden_states_are_steered_and_the_others_held(tmp_path, model_folders, data_files):
    """RMU in a whole run: only the chosen matrices move, the forget answers are lost, both terms stand in the log."""
    small = [word for word in SMALL if "mismatch" not in word]
    words = [f"--model_name={model_folders['llama']}", *data_words(data_files), *small, "--method=rmu", "--lr=1e-2",
             "--max_unlearn_steps=8", "--set", "forget.layer=1", "retain.layer=1", "retain.weight=1",
             r"trainable.parameters=layers\.1\.mlp\.down_proj", "--log_file=out.log",
             "--model_save_dir=out"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    steps = events(tmp_path / "out.jsonl", "step")
    assert steps[0]["retain_distance"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["weighted_losses"]["forget"] < steps[0]["weighted_losses"]["forget"]
    found = [e["dev_nll"] for e in events(tmp_path / "out.jsonl", "eval")]
    assert found[-1] > found[0]
    start, saved = weights(model_folders["llama"]), weights(tmp_path / "out")
    assert {name for name in saved if (saved[name] != start[name]).any()} == {"model.layers.1.mlp.down_proj.weight"}
    run = run_cli("unlearn_harm.py", *words, "--set=forget.layer=7", "--overwrite", cwd=tmp_path, quiet=True)
    assert "layer 7: the model has 2 layers, 0 to 1" in one_line_error(run)
    run = run_cli("unlearn_harm.py", *words, "--set", "forget.layer=0", "retain.layer=0", "--overwrite", cwd=tmp_path,
                  quiet=True)  # fmt: skip
    assert "layer 0: no weight up to it is trained, so its hidden states cannot move" in one_line_error(run)
    run = run_cli("unlearn_harm.py", *words, "--set=trainable.parameters=nothing", "--overwrite", cwd=tmp_path,
                  quiet=True)  # fmt: skip
    assert "trainable.parameters 'nothing': finds none of this model's parameters" in one_line_error(run)


@pytest.mark.parametrize("loss", [loss for loss in FORGET_LOSSES if loss not in ("ascent", "rmu")])  # tested elsewhere
def test_every_forget_loss_forgets(tmp_path, model_folders, data_files, loss):
    """Each raises the harmful answers' NLL, by itself, in a whole run."""
    prefers = loss in ("dpo", "flat")
    settings = {"flat": ["--set=forget.prefers=mismatch"], "satimp": ["--set=forget.saturation=0.1"]}  # p is small here
    words = [f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log", *SMALL,
             *data_words(data_files), f"--forget_loss={loss}", "--max_unlearn_steps=8", "--bad_weight=1",
             f"--random_weight={1e-9 if prefers else 0}", "--normal_weight=0",
             *settings.get(loss, [])]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = [e["dev_nll"] for e in events(tmp_path / "out.jsonl", "eval")]
    assert found[-1] > found[0] + (0.05 if loss == "undial" else 0.1)  # it aims at the original's own, lowered
