"""What a run tells of itself: what cannot be had is None, and a manifest that no run wrote is refused in one line."""

import importlib.metadata
import json
import math
import platform
import subprocess
from types import SimpleNamespace

import pytest
import torch

import utils
from engine import checkpoint, run_metadata
from engine.run_metadata import RunMetadata
from options import UnlearnOptions
from run.parsing import parse_run
from sources.rows import Row
from utils import UsageError

ROWS = {"forget": [Row("Bad?", "No.")], "normal": [Row("Good?", "Yes.")]}
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


def manifest_of(metadata: RunMetadata) -> dict:
    made = metadata.manifest([], ACCELERATOR, 1.23, 0, {"step": 0}, {"step": 5})
    return json.loads(json.dumps(made))  # what is written must be JSON


def refuse(*_, **__):
    raise PermissionError("not for you")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    return {"forget_data": ["a.jsonl"], "normal_data": ["b.jsonl", "someone/hub-name"]}


def test_manifest_whole_machine_tells_everything(files):
    metadata = RunMetadata(UnlearnOptions(**files), ROWS)
    metadata.set_base_model("abc", torch.bfloat16)
    made = manifest_of(metadata)
    assert made["packages"]["torch"] == importlib.metadata.version("torch")
    assert made["data"]["files_sha256"].keys() == {"a.jsonl", "b.jsonl"}
    # sha256 of "{}" and a newline, as sha256sum gives it
    assert made["data"]["files_sha256"]["a.jsonl"].startswith(
        "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e4"
    )
    assert made["base_model"]["fingerprint"] == "abc"
    assert (made["seconds"], made["seed"], made["after"]) == (1.2, 8888, {"step": 5})


def test_manifest_nothing_can_be_had_is_none_and_no_error(files, monkeypatch, tmp_path):
    """A package without metadata, no git, no energy counter, a data file that was removed while the run trained."""

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(run_metadata, "ENERGY", SimpleNamespace(read_text=refuse))
    metadata = RunMetadata(UnlearnOptions(**files), ROWS)
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(platform, "machine", refuse)
    (tmp_path / "a.jsonl").unlink()
    made = manifest_of(metadata)
    assert set(made["packages"].values()) == {None}
    assert made["data"]["files_sha256"]["a.jsonl"] is None
    assert made["data"]["files_sha256"]["b.jsonl"]
    assert (made["git_commit"], made["energy_joules"], made["processor"]) == (None, None, None)


@pytest.mark.parametrize(("start", "end", "joules"), [
    ("1000000\n", "3500000\n", 2),  # 2.5 J, rounded to the even number
    ("3500000\n", "1000000\n", None),  # the counter began anew
    ("garbage\n", "1\n", None),
    ("1\n", "", None),
])  # fmt: skip
def test_manifest_energy_is_the_difference_of_two_readings(files, tmp_path, monkeypatch, start, end, joules):
    counter = tmp_path / "energy_uj"
    monkeypatch.setattr(run_metadata, "ENERGY", counter)
    counter.write_text(start)
    metadata = RunMetadata(UnlearnOptions(**files), ROWS)
    counter.write_text(end)
    assert manifest_of(metadata)["energy_joules"] == joules


def test_git_that_hangs_or_fails_gives_none(monkeypatch):
    for error in (subprocess.TimeoutExpired("git", 10), subprocess.CalledProcessError(128, "git"), FileNotFoundError()):

        def failing(*_, error=error, **__):
            raise error

        monkeypatch.setattr(subprocess, "run", failing)
        assert run_metadata._or_none(run_metadata._git_commit) is None


@pytest.mark.parametrize("content", [
    "", "no json", "[]", "7", "null", '"text"', "{}", '{"data": []}', '{"data": {"rows_sha256": {}}}',
    '{"data": {"rows_sha256": []}, "base_model": {"fingerprint": "f"}}',
    '{"data": {"rows_sha256": {"forget": "x", "normal": "y"}}, "base_model": {"fingerprint": 3}}',
    '{"data": {"rows_sha256": null}, "base_model": null}', b"\xff\xfe\x00", "[" * 100_000,
])  # fmt: skip
def test_from_manifest_that_no_run_wrote_is_refused_in_one_line(files, tmp_path, content):
    name = tmp_path / "m.json"
    name.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=r"--from_manifest .*m.json: is not the run_manifest.json of a run") as error:
        RunMetadata(UnlearnOptions(**files, from_manifest=str(name)), ROWS)
    assert "\n" not in str(error.value)


def test_from_manifest_of_a_missing_file_is_refused(files):
    with pytest.raises(UsageError, match=r"--from_manifest none\.json: "):
        RunMetadata(UnlearnOptions(**files, from_manifest="none.json"), ROWS)


def test_from_manifest_names_the_side_that_differs(files, tmp_path):
    first = RunMetadata(UnlearnOptions(**files), ROWS)
    first.set_base_model("abc")
    (tmp_path / "m.json").write_text(json.dumps(manifest_of(first)))
    options = UnlearnOptions(**files, from_manifest="m.json")
    again = RunMetadata(options, ROWS)
    again.set_base_model("abc")
    with pytest.raises(UsageError, match="holds other weights than that run started from"):
        again.set_base_model("abd")
    with pytest.raises(UsageError, match="the forget rows are not those of that run"):
        RunMetadata(options, {**ROWS, "forget": [Row("Worse?", "No.")]})
    with pytest.raises(UsageError, match="the other rows are not those of that run"):
        RunMetadata(options, {"forget": ROWS["forget"]})


# ------------------------------------------------------------------------------------------ the same run
def resumed(tmp_path, then: RunMetadata, now: RunMetadata) -> None:
    """Check `now` against a checkpoint of `then`; UsageError if it is another run."""
    (tmp_path / checkpoint.STATE).write_text(json.dumps({"identity": then.identity()}))
    checkpoint.check_same_run(tmp_path, now.identity())


def run(used=torch.float32, answers=(), settings=(), **options) -> RunMetadata:
    """A run with these options and --set settings."""
    made = UnlearnOptions(**options)
    made.recipe = parse_run(["--set", *settings] if settings else []).recipe
    metadata = RunMetadata(made, ROWS)
    metadata.set_base_model("abc", used)
    if answers:
        metadata.add_answers(list(answers))
    return metadata


def test_resume_paths_written_otherwise_are_the_same_run(files, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    then = run(model_name="base", **files)
    for model, forget in (("./base", "./a.jsonl"), (str(tmp_path / "base"), str(tmp_path / "a.jsonl")),
                          ("base/", "link.jsonl")):  # fmt: skip
        resumed(tmp_path, then, run(model_name=model, forget_data=[forget], normal_data=files["normal_data"]))
    with pytest.raises(UsageError, match=r"options\.forget_data"):
        resumed(tmp_path, then, run(model_name="base", forget_data=["b.jsonl"], normal_data=files["normal_data"]))


def test_resume_project_that_moved_as_a_whole_is_the_same_run(files, tmp_path, monkeypatch):
    then = run(**files).identity()
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (other / name).write_text("{}\n")
    monkeypatch.chdir(other)
    (tmp_path / checkpoint.STATE).write_text(json.dumps({"identity": then}))
    checkpoint.check_same_run(tmp_path, run(**files).identity())


def test_resume_dtype_that_is_used_counts(files, tmp_path):
    """--dtype auto is bf16 on one machine and fp32 on another."""
    resumed(tmp_path, run(torch.bfloat16, dtype="auto", **files), run(torch.bfloat16, dtype="bf16", **files))
    with pytest.raises(UsageError, match=r"model\.dtype: 'bfloat16' then, 'float32' now"):
        resumed(tmp_path, run(torch.bfloat16, dtype="auto", **files), run(torch.float32, dtype="auto", **files))


@pytest.mark.parametrize("change", [
    {"settings": ["own_answers.batch_size=3"]}, {"cache_dir": "elsewhere"}, {"threads": 2}, {"model_save_dir": "new"},
    {"log_file": "x.log"}, {"save_every": 7}, {"settings": ["checkpoints.keep=9"]}, {"gradient_checkpointing": True},
    {"allow_pickle": True},
])  # fmt: skip
def test_resume_options_that_change_no_result_are_free(files, tmp_path, change):
    resumed(tmp_path, run(**files), run(**files, **change))


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"seed": 1}, {"batch_size": 3}, {"max_unlearn_steps": 7},
                                    {"settings": ["trainable.frozen_layers=1"]}, {"settings": ["dev.prompts=5"]},
                                    {"settings": ["mismatch.answers=2"]}])  # fmt: skip
def test_resume_options_that_change_the_result_are_not_free(files, tmp_path, change):
    name = change.get("settings", list(change))[0].partition("=")[0]
    with pytest.raises(UsageError, match=f"options.(recipe.)?{name}"):
        resumed(tmp_path, run(**files), run(**files, **change))


def test_resume_other_answers_of_the_model_are_refused(files, tmp_path):
    said = Row("Tree?", "A tree.")
    then = run(answers=[said], **files)
    resumed(tmp_path, then, run(answers=[said], **files))
    for other in (Row("Tree?", "A trees."), Row("Tree?", "A tree.", complete=False)):
        with pytest.raises(UsageError, match="the model's own answers are others now") as error:
            resumed(tmp_path, then, run(answers=[other], **files))
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize(("content", "gib"), [
    ("VmRSS:\t 1048576 kB\n", 1.0), ("VmRSS:\n", None), ("VmRSS: x kB\n", None), ("", None), (None, None),
])  # fmt: skip
def test_proc_field_that_cannot_be_read_is_nan(tmp_path, content, gib):
    if content is not None:
        (tmp_path / "status").write_text(content)
    found = utils._proc_gib(str(tmp_path / "status"), "VmRSS")
    assert found == gib or (gib is None and math.isnan(found))


def test_resume_other_wanted_answers_are_another_run(files, tmp_path):
    """What a row is to be answered with is trained on, as its answer is."""
    made = [RunMetadata(UnlearnOptions(**files), {"forget": [Row("Bad?", "No.", wanted=text)], "normal": []})
            for text in (None, "Ask a doctor.", "Ask a lawyer.")]  # fmt: skip
    assert len({metadata.rows_hash["forget"] for metadata in made}) == 3
