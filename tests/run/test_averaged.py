"""Short runs whose weights are averaged: by hand, and refused where they would not be alike."""

import types

import pytest
import torch
from conftest import one_line_error, run_cli
from test_run import SMALL, data_words

from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.state import TrainingState
from run.averaged import average, begin_run


def setup_of(runs: int, steps: int):
    """A run of two weights, 1 and 2, at a rate of .1, and what takes a step of it with a gradient."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    settings = OptimizerSettings(lr=0.1, total_steps=steps // runs, schedule="constant", max_grad_norm=100.0)
    optimizer = MasterWeightAdamW(model, settings, torch.float32)
    setup = types.SimpleNamespace(
        optimizer=optimizer, options=types.SimpleNamespace(max_unlearn_steps=steps),
        recipe=types.SimpleNamespace(average=types.SimpleNamespace(runs=runs)),
    )  # fmt: skip

    def step(state: TrainingState, *gradient: float) -> None:
        begin_run(setup, state)
        model.weight.grad = torch.tensor([gradient])
        optimizer.step()
        state.step += 1

    return setup, model, step


def test_each_run_begins_with_the_first_weights_and_the_last_ones_are_averaged_by_hand():
    """AdamW's first step moves each weight by the rate, against the sign of its gradient."""
    (setup, model, step), state = setup_of(runs=2, steps=2), TrainingState()
    step(state, 3.0, -5.0)
    assert model.weight.data[0].tolist() == pytest.approx([0.9, 2.1])
    step(state, 1.0, 1.0)
    assert model.weight.data[0].tolist() == pytest.approx([0.9, 1.9]), (
        "from 1 and 2, and without the first run's moments"
    )
    average(setup, state)
    assert model.weight.data[0].tolist() == pytest.approx([0.9, 2.0])
    assert state.runs == 2 and setup.optimizer.num_updates == 2


def test_a_run_that_was_stopped_on_the_way_counts_if_it_took_a_step():
    (setup, model, step), state = setup_of(runs=3, steps=6), TrainingState()
    for gradient in (1.0, 1.0, -1.0):
        step(state, gradient, gradient)
    average(setup, state)
    assert model.weight.data[0].tolist() == pytest.approx([(0.8 + 1.1) / 2, (1.8 + 2.1) / 2], abs=1e-4)


def test_a_run_without_a_step_is_left_out_and_is_never_what_is_saved():
    """Its weights are the first ones: nothing is forgotten in them."""
    (setup, model, step), state = setup_of(runs=2, steps=2), TrainingState()
    step(state, 1.0, 1.0)
    begin_run(setup, state)
    assert model.weight.data[0].tolist() == [1.0, 2.0]
    average(setup, state)
    assert model.weight.data[0].tolist() == pytest.approx([0.9, 1.9]) and state.runs == 1


@pytest.mark.parametrize(("words", "message"), [
    (["--max_unlearn_steps=5"], "average.runs=2: does not divide the run's 5 steps"),
    (["--max_unlearn_steps=4", "--kl_budget=0.1", "--eval_every=1"], "does not go with --kl_budget"),
])  # fmt: skip
def test_runs_that_would_not_be_alike_are_refused(tmp_path, model_folders, data_files, words, message):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=out.log", *SMALL, *data_words(data_files), "--method=yao", "--set=average.runs=2",
                  *words, cwd=tmp_path, quiet=True)  # fmt: skip
    assert message in one_line_error(run)
