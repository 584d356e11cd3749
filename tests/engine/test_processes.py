"""Several processes act as one: started by accelerate on this machine, over gloo."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT, run_cli, share_of_update
from test_run import SMALL, data_words, events

from data_module import Sequence
from engine import processes
from options import UnlearnOptions
from utils import UsageError

LAUNCH_TWO = ("-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no")  # fmt: skip


def run_two(script: str, *words, cwd):
    launch = (*LAUNCH_TWO, "--multi_gpu", "--main_process_port=0")  # a free port
    run = run_cli(script, *words, cwd=cwd, launcher=launch, env={"ACCELERATE_USE_CPU": "true"})
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model_folders, data_files):
    """The same global batch in one process: (its folder, its words)."""
    cwd = tmp_path_factory.mktemp("alone")
    words = [f"--model_name={model_folders['llama']}", *data_words(data_files), *SMALL, "--batch_size=4",
             "--eval_every=3", "--model_save_dir=out", "--log_file=out.log"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return cwd, words


def test_what_one_process_writes_no_other_holds(monkeypatch):
    """Published: every rank wrote the checkpoint. Here the others have nothing to write, nor memory taken by it."""
    tensor = torch.ones(3)
    assert processes.gather_to_main_cpu(tensor) is tensor
    monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    assert processes.gather_to_main_cpu(tensor) is None


@pytest.mark.parametrize("split", [False, True])
def test_two_processes_give_the_run_of_one(alone, tmp_path, model_folders, split):
    """Each process gets its own rows, means are over all of them, and no draw depends on the rank; with `split`,
    each holds half of every parameter, and the gradients, whose norm is over both halves, are clipped alike."""
    cwd, words = alone
    run_two("unlearn_harm.py", *words, *["--shard", "--save_every=2"] * split, cwd=tmp_path)
    said = events(tmp_path / "out.jsonl", "model")[0]
    assert (said["processes"], said["shard"]) == (2, split)
    assert share_of_update(model_folders["llama"], cwd / "out", tmp_path / "out") <= 0.01
    for kind, fields in (("step", ("bad_loss", "normal_loss", "grad_norm")), ("eval", ("dev_nll", "dev_kl"))):
        for x, y in zip(events(cwd / "out.jsonl", kind), events(tmp_path / "out.jsonl", kind), strict=True):
            assert [x[f] for f in fields] == pytest.approx([y[f] for f in fields], rel=1e-2, abs=1e-6)
    assert any(e["grad_norm"] > 1 for e in events(tmp_path / "out.jsonl", "step")), "nothing was clipped"
    if split:  # and what it saved on the way is whole: a run that goes on from there ends in the same place
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out-checkpoints/step-000004")
        run_two("unlearn_harm.py", *words, "--shard", "--save_every=2", "--resume", cwd=tmp_path)
        assert events(tmp_path / "out.jsonl", "resume")[0]["step"] == 2
        assert share_of_update(model_folders["llama"], cwd / "out", tmp_path / "out") <= 0.01


@pytest.mark.parametrize(("slots", "count", "parts"), [(3, 2, 2), (4, 2, 2), (7, 3, 3), (5, 1, 9)])
def test_every_process_goes_through_a_step_in_as_many_parts(slots, count, parts):
    """A split model waits for all processes in every forward: one more on one of them would wait for good."""
    # slot 1 has no harmful answer, and harmful and normal rows are numbered apart
    pairs = [(kind, slot) for kind in ("forget", "random", "normal") for slot in range(slots)]
    step_sequences = [Sequence(kind, slot, (slot,), (slot,)) for kind, slot in pairs if (kind, slot) != ("forget", 1)]
    shares = [processes.local_microbatches(step_sequences, parts, SimpleNamespace(num_processes=count, process_index=p))
              for p in range(count)]  # fmt: skip
    assert {len(share) for share in shares} == {min(parts, slots // count)}
    flat = [s for share in shares for part in share for s in part.sequences]
    assert all(part.sequences and part.counts for share in shares for part in share)
    assert sorted(map(repr, flat)) == sorted(map(repr, step_sequences)), "a row is lost or repeated"
    for share in shares:  # a harmful row stays with its random answers
        owners = [{s.example_id for s in part.sequences} for part in share]
        assert sum(map(len, owners)) == len(set().union(*owners))


@pytest.mark.parametrize(("slots", "count", "parts"), [((0, 2), 2, 2), ((0,), 3, 4), ((1, 3, 5), 2, 8)])
def test_a_process_without_a_sequence_takes_part_in_the_step(slots, count, parts):
    """A forget row without an answer yields no sequences: all processes skipped the step because one had nothing."""
    step = [Sequence(kind, slot, (1,) * (9 - slot), (slot,)) for slot in slots for kind in ("forget", "random")]
    shares = [processes.local_microbatches(step, parts, SimpleNamespace(num_processes=count, process_index=p))
              for p in range(count)]  # fmt: skip
    busy = {slot % count for slot in slots}
    assert len({len(share) for share in shares}) == 1, "a process would wait for a forward of the others for good"
    assert len(shares[0]) == min(parts, len(slots))
    for process, share in enumerate(shares):
        assert all(part.sequences for part in share)
        assert all(part.counts is (process in busy) for part in share)
        if process not in busy:  # the shortest example, whole: dpo compares an example's sequences
            assert all([s.example_id for s in part.sequences] == [max(slots)] * 2 for part in share)
    counted = [s for share in shares for part in share if part.counts for s in part.sequences]
    assert sorted(map(repr, counted)) == sorted(map(repr, step)), "a row is lost or counted twice"


def test_a_step_without_any_sequence_has_no_part():
    two = SimpleNamespace(num_processes=2, process_index=1)
    assert processes.local_microbatches([], 3, two) == []


@pytest.mark.parametrize(("slots", "parts", "count", "possible"), [
    (2, 16, 1, 2), (2, 1, 1, 1), (4, 16, 2, 2), (5, 16, 2, 2), (0, 16, 2, 0), (1, 16, 2, 1),
])  # fmt: skip
def test_possible_parts_is_what_the_rows_fill(slots, parts, count, possible):
    """--gradient_accumulation 16 of 2 rows runs in 2 parts, which the log is to say."""
    step = [Sequence("normal", slot, (1,), (2,)) for slot in range(slots)]
    assert processes.possible_parts(step, parts, count) == possible


def averaged_gradient(step: list, weight: torch.Tensor, count: int, parts: int) -> torch.Tensor:
    """The gradient of a step's mean as the loop computes it: each process's sum, times the processes, averaged."""
    gradients = []
    for process in range(count):
        mine = weight.clone().requires_grad_()
        for part in processes.local_microbatches(
            step, parts, SimpleNamespace(num_processes=count, process_index=process)
        ):
            values = torch.stack([(mine * s.answer_ids[0]).square().sum() for s in part.sequences])
            (values.sum() / len(step) * part.counts * count).backward()
        gradients.append(mine.grad)
    assert all(gradient is not None for gradient in gradients), "a process ran no backward"
    return torch.stack(gradients).mean(0)


def test_a_silent_row_changes_no_gradient_of_the_others():
    """Slot 1 is silent, so process 1 of 2 has nothing; d/dw of mean((w * a)^2) is 2 * w * mean(a^2)."""
    step = [Sequence("normal", slot, (1,), (answer,)) for slot, answer in ((0, 3), (2, 5), (4, 1))]
    weight = torch.tensor([0.5, -2.0])
    wanted = 2 * weight * (9 + 25 + 1) / 3
    for count, parts in ((1, 1), (2, 1), (2, 3), (3, 2)):
        torch.testing.assert_close(averaged_gradient(step, weight, count, parts), wanted)


def test_two_processes_share_an_evaluation(alone, tmp_path):
    """Each answers its share of the prompts; the report is that of one process, and is written once."""
    cwd, _ = alone
    words = [f"--model_name={cwd / 'out'}", "--dtype=fp32", "--max_new_tokens=6", "--report_dir=report"]
    one = run_cli("evaluate_unlearning.py", *words, cwd=cwd)
    assert one.returncode == 0, one.stderr
    two = run_two("evaluate_unlearning.py", *words, cwd=tmp_path)
    assert two.stdout.count("report: ") == 1
    for name in ("report.json", "scores.jsonl"):
        assert (cwd / "report" / name).is_file()
    assert (cwd / "report/scores.jsonl").read_text() == (tmp_path / "report/scores.jsonl").read_text()


def test_a_launch_that_starts_fewer_processes_than_asked_is_refused(tmp_path, data_files):
    """accelerate starts one process for this line and says nothing; its run would quietly be another one."""
    run = run_cli("unlearn_harm.py", *data_words(data_files), "--model_save_dir=out", cwd=tmp_path,
                  launcher=(*LAUNCH_TWO, "--cpu", "--quiet"))  # fmt: skip
    assert run.returncode != 0
    assert "was asked for several processes and started one" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "splits"), [("ddp", False), ("fsdp2", True), ("zero3", True)])
def test_a_launch_file_starts_what_it_says(monkeypatch, name, splits):
    """accelerate reads the file, and the environment that it makes of it says whether the model is split."""
    file = ROOT / f"configs/accelerate/{name}.yaml"
    words = launch_command_parser().parse_args(["--config_file", str(file), "unlearn_harm.py"])
    words, _, _ = _validate_launch_command(words)
    assert words.num_processes == 8
    words.deepspeed_fields_from_accelerate_config = []  # the launcher fills it in between
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the launcher's function writes into it
    made = prepare_deepspeed_cmd_env(words)[1] if name == "zero3" else prepare_multi_gpu_env(words)
    monkeypatch.setattr(os, "environ", made)
    assert processes._asks_for_sharding() is splits


@pytest.mark.parametrize(("environment", "message"), [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1 is not supported"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO stage 2 is not supported"),
])  # fmt: skip
def test_what_splits_less_than_all_is_refused(monkeypatch, environment, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=message):
        processes.start_processes(UnlearnOptions())
