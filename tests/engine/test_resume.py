"""A run that is stopped and taken up again: what must be the same, what is refused, what a fault may not harm."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, one_line_error, poison_losses, run_cli, run_python, weights
from safetensors.torch import load_file, save_file
from test_run import SMALL, data_words, events

import unlearn_harm
from engine.checkpoint import prune_checkpoints
from utils import RunError

# one more than --eval_every divides, so that checkpoints fall on and beside looks
RUN = [*SMALL, "--max_unlearn_steps=9", "--save_every=2", "--eval_every=4", "--kl_budget=0.5", "--log_file=out.log"]
ADVERSARY = ["--set=perturbed.adversary_steps=2", "--set=perturbed.adversary_lr=0.02"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folders, data_files):
    """An uninterrupted run: (its folder, its words)."""
    cwd = tmp_path_factory.mktemp("whole")
    words = [f"--model_name={model_folders['llama']}", *data_words(data_files), *RUN, "--model_save_dir=out"]
    run = run_cli("unlearn_harm.py", *words, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return cwd, words


def same_weights(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# a run that kills itself at a named place: before the n-th call of a function that every run passes
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import {module}
real, calls = {module}.{name}, []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **kwargs)
{module}.{name} = dying
sys.argv = ["unlearn_harm.py", *sys.argv[1:]]
import unlearn_harm
from utils import RunError
unlearn_harm.run_script(unlearn_harm.main)
"""


def run_killed(cwd, words, module, name, call, which="SIGKILL"):
    code = KILLED.format(root=str(ROOT), module=module, name=name, call=call, signal=which)
    return run_python("-c", code, *words, cwd=cwd)


def test_a_killed_run_ends_in_the_same_weights(whole, tmp_path):
    """Killed in the middle of a step, then inside a save, then resumed: bit for bit the run that was left alone."""
    cwd, words = whole
    first = run_killed(tmp_path, words, "engine.optimizer", "MasterWeightAdamW.step", 4)
    assert first.returncode == -signal.SIGKILL, first.stderr
    # the second checkpoint of this process is half written when it dies
    second = run_killed(tmp_path, [*words, "--resume"], "engine.checkpoint", "sha256", 20)
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out-checkpoints").glob(".*.part")), "it was to die while a save was half written"
    last = run_cli("unlearn_harm.py", *words, "--resume", cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert same_weights(cwd / "out", tmp_path / "out")
    told, then = (json.loads((run / "out/run_manifest.json").read_text()) for run in (tmp_path, cwd))
    for name in ("before", "after", "tokens"):
        assert told[name] == then[name], name
    assert {e["step"] for e in events(tmp_path / "out.jsonl", "resume")} == {2, 4}
    assert sorted(f.name for f in (tmp_path / "out-checkpoints").iterdir()) == ["step-000006", "step-000008"]


@pytest.mark.parametrize("words", [
    ["--dtype=bf16", "--set=retain.budget=0.001", "--set=retain.budget_rate=20"],  # the weight's multiplier is kept
    ["--dtype=bf16", "--set=trainable.frozen_layers=1", "--kl_budget=0"],
    ["--dtype=bf16", "--use_lora", "--gradient_checkpointing"],
    ["--dtype=bf16", "--kl_budget=0", "--set=average.runs=3"],  # the sum of the runs that have ended is kept
    ["--dtype=bf16", "--kl_budget=0", "--use_lora", "--set=average.runs=2", "--max_unlearn_steps=8"],  # at a boundary
    # an adversary that has learned once since it began anew, and one that goes on from before
    ["--dtype=bf16", "--kl_budget=0", *ADVERSARY, "--set=perturbed.adversary_turns=3", "--set=perturbed.agreeing=true"],
    ["--dtype=bf16", "--kl_budget=0", "--use_lora", *ADVERSARY, "--set=perturbed.every=2"],
])  # fmt: skip
def test_resume_in_bf16_with_whole_weights_and_adapters_is_exact(tmp_path, model_folders, data_files, words):
    """A master is a bf16 weight and the residual of its rounding; a checkpoint keeps their sum once."""
    words = [f"--model_name={model_folders['llama']}", *data_words(data_files), *RUN, "--model_save_dir=out", *words]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path / "one")
    assert run.returncode == 0, run.stderr
    assert "out-checkpoints still holds 2 checkpoints" in run.stderr.splitlines()[-1]
    killed = run_killed(tmp_path / "two", words, "engine.optimizer", "MasterWeightAdamW.step", 6)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = load_file(tmp_path / "two/out-checkpoints/step-000004/training_state.safetensors")
    assert not [name for name in kept if name.endswith(".master")]
    run = run_cli("unlearn_harm.py", *words, "--resume", cwd=tmp_path / "two")
    assert run.returncode == 0, run.stderr
    assert events(tmp_path / "two/out.jsonl", "resume")[0]["step"] == 4
    assert same_weights(tmp_path / "one/out", tmp_path / "two/out")
    multipliers = [[e.get("multipliers") for e in events(tmp_path / run / "out.jsonl", "step")][-4:]
                   for run in ("one", "two")]  # fmt: skip
    assert multipliers[0] == multipliers[1]
    assert (multipliers[0][-1] is not None) == ("--set=retain.budget=0.001" in words)


def test_a_refused_run_leaves_nothing(tmp_path, data_files):
    words = ["--model_name=./nowhere", *data_words(data_files), *RUN, "--model_save_dir=models/deep/out"]
    assert "no such folder" in one_line_error(run_cli("unlearn_harm.py", *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_sigterm_finishes_the_step_and_saves(whole, tmp_path):
    cwd, words = whole
    run = run_killed(tmp_path, words, "engine.optimizer", "MasterWeightAdamW.step", 3, "SIGTERM")
    assert run.returncode == 143, run.stderr
    assert "stopped by SIGTERM: 3 steps are saved; go on with --resume" in run.stderr
    assert sorted(f.name for f in (tmp_path / "out-checkpoints").glob("step-*")) == ["step-000002", "step-000003"]
    run = run_killed(tmp_path, [*words, "--resume"], "engine.optimizer", "MasterWeightAdamW.step", 2, "SIGINT")
    assert run.returncode == 130, run.stderr
    assert run_cli("unlearn_harm.py", *words, "--resume", cwd=tmp_path).returncode == 0
    assert same_weights(cwd / "out", tmp_path / "out")


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path):
    cwd, words = whole
    shutil.copytree(cwd / "out-checkpoints", tmp_path / "out-checkpoints")
    file = tmp_path / "out-checkpoints/step-000008/training_state.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # one bit
    file.write_bytes(content)
    run = run_cli("unlearn_harm.py", *words, "--resume", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "step-000008 is damaged (training_state.safetensors has changed) and is passed over" in run.stderr
    assert events(tmp_path / "out.jsonl", "resume")[0]["step"] == 6
    assert same_weights(cwd / "out", tmp_path / "out")


@pytest.mark.parametrize(("change", "message"), [
    (["--lr=2e-3"], "options.lr: 0.001 then, 0.002 now"),
    (["--seed=5"], "options.seed: 8888 then, 5 now"),
    (["--forget_data={other}"], "data.forget: "),
])  # fmt: skip
def test_another_run_is_not_taken_up(whole, tmp_path, change, message):
    cwd, words = whole
    shutil.copytree(cwd / "out-checkpoints", tmp_path / "out-checkpoints")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"Bad {i}?", "response": "No."}) + "\n" for i in range(12)))
    change = [word.format(other=other) for word in change]
    line = one_line_error(run_cli("unlearn_harm.py", *words, "--resume", *change, cwd=tmp_path))
    assert "--resume: out-checkpoints/step-000008 was made by another run" in line
    assert message in line
    if "--lr=2e-3" in change:  # as make demo calls it: its own checkpoints are gone on with, others give way
        run = run_cli("unlearn_harm.py", *words, "--resume", "--overwrite", *change, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert len(events(tmp_path / "out.jsonl", "step")) == 9


def test_a_mistyped_command_takes_nothing_away(whole, tmp_path):
    """--overwrite throws away what a run replaces, once it is one: not for a file's name that does not exist."""
    cwd, words = whole
    shutil.copytree(cwd / "out-checkpoints", tmp_path / "out-checkpoints")
    for name in ("out.log", "out.jsonl"):
        shutil.copy(cwd / name, tmp_path / name)
    line = one_line_error(run_cli("unlearn_harm.py", *words, "--overwrite", "--forget_data=typo.jsonl", cwd=tmp_path))
    assert "--forget_data typo.jsonl: no such file" in line
    assert len(list((tmp_path / "out-checkpoints").glob("step-*"))) == 2
    assert (tmp_path / "out.jsonl").read_bytes() == (cwd / "out.jsonl").read_bytes()


def test_what_is_damaged_has_no_place_among_the_newest(tmp_path):
    """Of a later step than the run has come to again, it would have stayed, and every new one gone at once."""
    for step in (100, 200, 300, 500):
        (tmp_path / f"step-{step:06d}").mkdir()
    prune_checkpoints(tmp_path, 2, tmp_path / "step-000300")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000200", "step-000300"]
    prune_checkpoints(tmp_path, 5, tmp_path / "step-000300")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000200", "step-000300"]


def test_a_run_that_was_stopped_is_not_thrown_away_unasked(whole, tmp_path):
    cwd, words = whole
    shutil.copytree(cwd / "out-checkpoints", tmp_path / "out-checkpoints")
    line = one_line_error(run_cli("unlearn_harm.py", *words, cwd=tmp_path))
    assert "out-checkpoints: holds checkpoints of a run that was stopped; pass --resume" in line


def test_two_runs_cannot_write_to_one_folder(whole, tmp_path):
    _, words = whole
    long = [sys.executable, str(ROOT / "unlearn_harm.py"), *map(str, words), "--max_unlearn_steps=500"]
    first = subprocess.Popen(long, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if (tmp_path / ".out.lock").exists():
                break
            time.sleep(0.1)
        line = one_line_error(run_cli("unlearn_harm.py", *words, cwd=tmp_path))
        assert "--model_save_dir out: another run is writing to it" in line
    finally:
        first.kill()
        first.wait()


def test_a_manifest_repeats_the_run(whole, tmp_path, data_files):
    cwd, _ = whole
    manifest = json.loads((cwd / "out/run_manifest.json").read_text())
    assert manifest["data"]["files_sha256"].keys() == {str(data_files[k]) for k in ("forget", "facts", "plain")}
    assert manifest["tokens"] > 0
    assert manifest["before"]["step"] == 0
    kept = json.loads((cwd / "out/unlearn_args.json").read_text())["run"]["kept_step"]
    assert manifest["after"]["step"] == kept, "figures of a state that was not saved"
    run = run_cli("unlearn_harm.py", f"--from_manifest={cwd / 'out/run_manifest.json'}", "--model_save_dir=again",
                  cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert same_weights(cwd / "out", tmp_path / "again")
    assert not (tmp_path / "out.log").exists(), "the log of the run that is repeated would be written over"
    changed = shutil.copytree(manifest["arguments"]["model_name"], tmp_path / "changed")
    save_file({name: tensor * 1.1 for name, tensor in weights(changed).items()}, changed / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    run = run_cli("unlearn_harm.py", f"--from_manifest={cwd / 'out/run_manifest.json'}", f"--model_name={changed}",
                  "--model_save_dir=third", cwd=tmp_path, quiet=True)  # fmt: skip
    assert "holds other weights than that run started from" in one_line_error(run)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Bad?", "response": "No."}\n')
    run = run_cli("unlearn_harm.py", f"--from_manifest={cwd / 'out/run_manifest.json'}", f"--forget_data={other}",
                  "--model_save_dir=third", cwd=tmp_path, quiet=True)  # fmt: skip
    assert "the forget rows are not those of that run" in one_line_error(run)


FULL_DISK = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, {root!r})
sys.argv = ["unlearn_harm.py", *sys.argv[1:]]
import unlearn_harm
from utils import RunError
unlearn_harm.run_script(unlearn_harm.main)
"""


def test_a_full_disk_leaves_the_last_checkpoint_whole(whole, tmp_path):
    """A limit on file size stands for the full disk: the run ends with one line and exit code 1."""
    cwd, words = whole
    size = max(f.stat().st_size for f in (cwd / "out").iterdir())
    shutil.copytree(cwd / "out-checkpoints", tmp_path / "out-checkpoints")
    shutil.rmtree(tmp_path / "out-checkpoints/step-000008")
    run = run_python("-c", FULL_DISK.format(root=str(ROOT), size=size // 2), *words, "--resume", cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert "File too large" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out-checkpoints").glob(".*.part"))
    assert "step-000006" in {f.name for f in (tmp_path / "out-checkpoints").iterdir()}
    assert run_cli("unlearn_harm.py", *words, "--resume", cwd=tmp_path).returncode == 0
    assert same_weights(cwd / "out", tmp_path / "out")


# a run under whose hands the folder that it saves into is removed
VANISHING = """
import shutil, sys
sys.path.insert(0, {root!r})
from engine import checkpoint
real = checkpoint.write_state
def vanishing(beside, state, *rest, **named):
    if state.step == 4:
        shutil.rmtree(beside)
    return real(beside, state, *rest, **named)
checkpoint.write_state = vanishing
sys.argv = ["unlearn_harm.py", *sys.argv[1:]]
import unlearn_harm
from utils import RunError
unlearn_harm.run_script(unlearn_harm.main)
"""


def test_a_folder_that_vanishes_under_a_save(whole, tmp_path):
    cwd, words = whole
    run = run_python("-c", VANISHING.format(root=str(ROOT)), *words, cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert "No such file or directory" in run.stderr.splitlines()[-1]
    assert "step-000004" in run.stderr.splitlines()[-1]
    assert [f.name for f in (tmp_path / "out-checkpoints").iterdir()] == ["step-000002"]
    assert run_cli("unlearn_harm.py", *words, "--resume", cwd=tmp_path).returncode == 0
    assert same_weights(cwd / "out", tmp_path / "out")


def test_a_folder_that_cannot_be_written_to(whole, tmp_path):
    """Said before the model is loaded. /proc takes no files from anyone, so that the test means the same for root."""
    _, words = whole
    line = one_line_error(run_cli("unlearn_harm.py", *words, "--model_save_dir=/proc/none/out", cwd=tmp_path), 1)
    assert "/proc/none" in line


def test_a_collapse_of_the_retain_side_rolls_back(tmp_path, monkeypatch, model_folders, data_files):
    """A learning rate far too high: the development KL passes its budget many times over, and the run goes back."""
    monkeypatch.chdir(tmp_path)
    words = ["unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", *RUN,
             *map(str, data_words(data_files)), "--lr=0.05", "--kl_budget=0.01", "--set=optimizer.schedule=constant",
             "--eval_every=3", "--normal_weight=0", "--save_every=0"]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(RunError, match="no evaluated state is within --kl_budget"):
        unlearn_harm.main()
    said = (tmp_path / "out.log").read_text()
    assert "is far past --kl_budget: rolls back to the state after step 0, with half the learning rate (x 0.5)" in said
    assert [e["lr"] for e in events(tmp_path / "out.jsonl", "step")] == [0.05] * 3 + [0.025] * 3 + [0.0125] * 3
    assert not (tmp_path / "out").exists(), "the original itself would have been saved as the unlearned model"


def test_three_faults_in_a_row_roll_back_with_half_the_rate(tmp_path, monkeypatch, model_folders, data_files):
    monkeypatch.chdir(tmp_path)
    poison_losses(monkeypatch, {3, 4, 5}.__contains__)
    words = ["unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", *RUN,
             *map(str, data_words(data_files)), "--set=optimizer.schedule=constant"]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    unlearn_harm.main()
    assert (
        "3 steps in a row were not finite: rolls back to the state after step 4, with half the learning rate"
        in (tmp_path / "out.log").read_text()
    )
    rates = [e["lr"] for e in events(tmp_path / "out.jsonl", "step")]
    assert rates == [1e-3] * 5 + [5e-4] * 4
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "out/model.safetensors").values())


def test_a_roll_back_past_its_limit_keeps_the_best_state(tmp_path, monkeypatch, model_folders, data_files):
    """From the sixth step on nothing is finite. The state of step 4 is sound and within the budget: it is saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unlearn_harm, "MAX_ROLLBACKS", 0)
    poison_losses(monkeypatch, lambda call: call > 5)
    words = ["unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", *RUN,
             *map(str, data_words(data_files)), "--save_every=0"]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    unlearn_harm.main()
    done = events(tmp_path / "out.jsonl", "done")[0]
    assert done["kept_step"] == 4
    assert "3 steps in a row were not finite, after 0 times half the learning rate" in done["stop_reason"]
    start, saved = weights(model_folders["llama"]), weights(tmp_path / "out")
    assert any((saved[name] != start[name]).any() for name in saved)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_without_a_budget_nothing_rolls_back_and_the_log_does_not_say_so(
    tmp_path, monkeypatch, model_folders, data_files
):
    """What is not finite never reached the weights: they stay, and only the learning rate is halved."""
    monkeypatch.chdir(tmp_path)
    poison_losses(monkeypatch, {3, 4, 5}.__contains__)
    words = ["unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log",
             *map(str, data_words(data_files)), *SMALL, "--max_unlearn_steps=7"]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    unlearn_harm.main()
    said = (tmp_path / "out.log").read_text()
    assert "3 steps in a row were not finite: the weights stay as they are, with half the learning rate (x 0.5)" in said
    assert "rolls back" not in said


def test_what_is_only_told_cannot_take_the_model_away(tmp_path, monkeypatch, model_folders, data_files):
    """A package without a version, a card whose template is gone: the weights are final before either is written."""
    monkeypatch.chdir(tmp_path)

    def broken(*_, **__):
        raise LookupError("no such package")

    monkeypatch.setattr(unlearn_harm, "write_model_card", broken)
    monkeypatch.setattr("engine.run_metadata.RunMetadata.manifest", broken)
    words = ["unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log",
             *map(str, data_words(data_files)), *SMALL]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    unlearn_harm.main()
    assert weights(tmp_path / "out").keys() == weights(model_folders["llama"]).keys()
    assert json.loads((tmp_path / "out/unlearn_args.json").read_text())["run"]["steps"] == 5
    said = (tmp_path / "out.log").read_text()
    assert "run_manifest.json could not be written (LookupError: no such package)" in said
    assert "the model card could not be written (LookupError: no such package)" in said
