"""RepSelect: the filter by hand, and before a run's first step on the real command line."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import one_line_error, run_cli, tiny_model
from test_run import SMALL, data_words, events

from method.selection import damp_shared
from run.selection import _damped, _mlp_weights


def test_the_shared_directions_are_damped_on_both_sides():
    """Of diag(8, 4, 1) the two largest are 8 and 4: over the smaller one, 2 and 1. Each side divides by them once."""
    gradient = torch.diag(torch.tensor([8.0, 4.0, 1.0]))
    expected = torch.diag(torch.tensor([8 / 2 / 2, 4.0, 1.0]))
    torch.testing.assert_close(damp_shared(gradient, 2), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(damp_shared(gradient, 1), gradient, atol=1e-3, rtol=0)  # over itself: nothing to damp
    # all directions of a matrix that is wider than high, turned into another basis
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    wide = turn @ torch.cat([gradient, torch.zeros(3, 2)], dim=1)
    # the smallest is 1: 1, 4 / 4 / 4 and 8 / 8 / 8
    assert torch.linalg.svdvals(damp_shared(wide, 9)).tolist() == pytest.approx([1.0, 1 / 4, 1 / 8], abs=1e-3)
    assert torch.isfinite(damp_shared(torch.zeros(4, 6), 2)).all()  # a weight that no row needs


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_forgets_within_its_budget_before_the_first_step(tmp_path, model_folders, data_files, family):
    words = [f"--model_name={model_folders[family]}", "--model_save_dir=out", "--log_file=out.log", *SMALL,
             *data_words(data_files), "--max_unlearn_steps=1", "--eval_every=1", "--lr=1e-12", "--save_every=0",
             "--set=selection.kl_budget=0.05", "--set=selection.directions=4", "--set=selection.step=0.02"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (told,) = events(tmp_path / "out.jsonl", "selection")
    before, after = events(tmp_path / "out.jsonl", "eval")[:2]
    assert told["steps"] > 1
    assert 0 < told["kl"] <= 0.05
    assert after["dev_nll"] > before["dev_nll"] + 0.05  # the rate is next to nothing: no step did this
    manifest = json.loads((tmp_path / "out/unlearn_args.json").read_text())
    assert manifest["options"]["recipe"]["selection"]["kl_budget"] == 0.05


def test_it_goes_on_after_a_roll_back_from_what_it_left(tmp_path, model_folders, data_files):
    """The state to roll back to is kept before the selection; going back to it would undo it unsaid."""
    words = [f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log", *SMALL,
             *data_words(data_files), "--max_unlearn_steps=4", "--eval_every=1", "--save_every=0", "--lr=1.0",
             "--kl_budget=0.06", "--set=optimizer.warmup_steps=0", "--set=selection.kl_budget=0.05",
             "--set=selection.directions=4", "--set=selection.step=0.02"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    evals = events(tmp_path / "out.jsonl", "eval")
    assert "rolls back to the state after step 0" in run.stderr
    after = next(e for e, before in zip(evals[1:], evals, strict=False) if before["dev_kl"] > 0.3 > e["dev_kl"])
    assert after["dev_nll"] > evals[0]["dev_nll"] + 0.05


def test_experts_are_mlps_and_what_chooses_among_them_is_none():
    model = tiny_model("mixtral", 64)
    names = {p: [n] for n, p in model.named_parameters()}
    optimizer = SimpleNamespace(parameters=list(names), names=list(names.values()))
    setup = SimpleNamespace(model=model, optimizer=optimizer)
    chosen = [names[optimizer.parameters[i]][0] for i in _mlp_weights(setup, skip=1)]
    assert chosen and all("experts" in name and ".layers.0." not in name for name in chosen)
    stacked = torch.stack([torch.diag(torch.tensor(values)) for values in ([8.0, 4.0, 1.0], [1.0, 3.0, 6.0])])
    expected = torch.stack([torch.diag(torch.tensor(values)) for values in ([2.0, 4.0, 1.0], [1.0, 3.0, 1.5])])
    torch.testing.assert_close(_damped(stacked, 2), expected, atol=1e-3, rtol=0)  # each expert by its own directions


def test_what_it_cannot_change_is_refused(tmp_path, model_folders, data_files):
    words = [f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log", *SMALL,
             *data_words(data_files), "--set=selection.kl_budget=0.05"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, "--use_lora", cwd=tmp_path, quiet=True)
    assert (
        "selection.kl_budget: the selection changes whole weights, in one process: leave --use_lora out"
        in one_line_error(run)
    )
    run = run_cli("unlearn_harm.py", *words, "--normal_weight=0", cwd=tmp_path, quiet=True)
    assert "selection.kl_budget: no term compares normal rows with the original" in one_line_error(run)
