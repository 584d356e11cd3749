"""The record of what runs trained on: it names no prompt, is carried on, and keeps prompts from being called unseen."""

import hashlib
import json

import pytest
import torch
from conftest import run_cli, tiny_model
from test_run import SMALL

from data_module import Shares
from engine.trained_on import TrainedOn
from prompts.tokenizer import load_tokenizer
from run.setup import read_chain
from sources.rows import Row
from utils import UsageError


def test_each_run_has_a_salt_of_its_own_and_the_record_grows(tmp_path):
    first = TrainedOn().with_run({"forget": ["How do I pick a lock?"], "normal": ["What is rain?"]})
    first.write(tmp_path)
    second = TrainedOn.read(tmp_path).with_run({"forget": ["How do I pick a lock?"], "normal": []})
    second.write(tmp_path)
    runs = json.loads((tmp_path / "trained_on.json").read_text())["runs"]
    assert len({run["salt"] for run in runs}) == 2
    assert all(len(run["salt"]) >= 32 for run in runs)
    assert runs[0]["forget"] != runs[1]["forget"], "the same prompt, told by two runs"
    salted = runs[0]["salt"] + "what is rain?"
    assert runs[0]["normal"] == [hashlib.sha256(salted.encode()).hexdigest()[:16]]
    found = TrainedOn.read(tmp_path)
    assert found.holds("forget", "how do i  pick a LOCK?")  # case and spacing tell no prompts apart
    assert found.holds("normal", "What is rain?")
    assert not found.holds("forget", "What is rain?")
    assert found.has_seen("What is rain?")
    assert not found.has_seen("What is snow?")


def test_a_record_of_an_earlier_version_is_read(tmp_path):
    assert TrainedOn.read(tmp_path) is None
    old = {"forget": [hashlib.sha256(b"how do i pick a lock?").hexdigest()[:16]]}
    (tmp_path / "trained_on.json").write_text(json.dumps(old))
    found = TrainedOn.read(tmp_path)
    assert found.holds("forget", "How do I pick a lock?")
    assert not found.holds("normal", "How do I pick a lock?")
    found.with_run({"forget": [], "normal": ["What is rain?"]}).write(tmp_path)
    runs = json.loads((tmp_path / "trained_on.json").read_text())["runs"]
    assert runs[0] == {"salt": "", "normal": [], **old}
    assert TrainedOn.read(tmp_path).holds("forget", "How do I pick a lock?")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"runs": [1]}', '{"runs": [{"salt": 1}]}', '{"forget": "abc"}',
                                     '{"runs": [{"salt": "", "forget": [[]], "normal": []}]}'])  # fmt: skip
def test_a_damaged_record_is_refused_and_not_taken_for_an_empty_one(tmp_path, content):
    (tmp_path / "trained_on.json").write_text(content)
    with pytest.raises(UsageError, match=r"trained_on.json: is not what a run writes"):
        TrainedOn.read(tmp_path)


def test_held_out_rows_that_a_run_trained_on_move_to_the_train_split():
    seen = TrainedOn().with_run({"forget": ["b"], "normal": ["d"]})
    parts = {"train": [Row("a")], "dev": [Row("b"), Row("c")], "test": [Row("d"), Row("e")]}
    moved = seen.move_to_train(parts)
    assert {split: [row.prompt for row in rows] for split, rows in moved.items()} == {
        "train": ["a", "b", "d"], "dev": ["c"], "test": ["e"]}  # fmt: skip


# ----------------------------------------------------------------------------------------------- a chain of runs
def write_rows(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def in_split(prompts, seed: int, split: str) -> list[str]:
    shares = Shares(seed, 0.2, 0.3)  # as run_of_chain
    return [prompt for prompt in prompts if shares.split_of(prompt) == split]


def run_of_chain(cwd, base, out: str, seed: int, data: list[str]):
    """One run with half of the rows of each side held out."""
    words = [*data, *SMALL, "--dev_share=0.2", "--test_share=0.3", "--max_unlearn_steps=12", "--eval_every=6"]
    run = run_cli("unlearn_harm.py", f"--model_name={base}", f"--model_save_dir={out}", f"--log_file={out}.log",
                  f"--seed={seed}", *words, cwd=cwd)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run


def test_what_the_first_run_of_a_chain_trained_on_is_unseen_in_none(tmp_path, model_folders):
    """Two runs with other seeds: many prompts that the first trained on fall into the second's held-out splits."""
    forget = [f"How do I break lock number {i}?" for i in range(40)]
    normal = [f"What is {i} plus {i}?" for i in range(40)]
    data = []
    for option, file, prompts in (("forget_data", "f.jsonl", forget), ("normal_data", "n.jsonl", normal)):
        rows = [{"prompt": prompt, "response": f"It is {prompt}"} for prompt in prompts]
        data.append(f"--{option}={write_rows(tmp_path / file, rows)}")
    run_of_chain(tmp_path, model_folders["llama"], "models/first", 1, data)
    second = run_of_chain(tmp_path, "models/first", "models/second", 2, data)
    # 12 steps of 2 rows a side: each row of the first run's train split may have been drawn; which were is recorded
    first = TrainedOn.read(tmp_path / "models/first")
    assert len(first.runs) == 1
    drawn, moved = {}, {}
    for side, prompts in (("forget", forget), ("normal", normal)):
        drawn[side] = {prompt for prompt in prompts if first.holds(side, prompt)}
        assert drawn[side]
        assert drawn[side] <= set(in_split(prompts, 1, "train"))
        moved[side] = drawn[side] - set(in_split(prompts, 2, "train"))
        assert moved[side], "the seeds are chosen so that the second run would hold some of them out"
    line = f"{len(moved['forget'])} forget and {len(moved['normal'])} normal rows are not held out but train"
    assert line in second.stderr
    assert TrainedOn.read(tmp_path / "models/second").runs[0] == first.runs[0]
    for split, label in (("test", "unseen"), ("dev", "dev")):
        evaluation = run_cli("evaluate_unlearning.py", "--model_name=models/second", "--dtype=fp32",
                             "--max_new_tokens=2", f"--split={split}", f"--report_dir={split}",
                             cwd=tmp_path)  # fmt: skip
        assert evaluation.returncode == 0, evaluation.stderr
        lines = [json.loads(line) for line in (tmp_path / split / "scores.jsonl").read_text().splitlines()]
        for side, name, prompts in (("forget", "f", forget), ("normal", "n", normal)):
            asked = {line["prompt"] for line in lines if line["group"] == f"{name} ({label})"}
            held_out = set(in_split(prompts, 2, split))
            assert asked == held_out - drawn[side]
            assert asked < held_out, "some of them were trained on by the first run"


def test_a_base_whose_record_is_lost_is_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("run.setup.log.warning", lambda line, *values: said.append(line % values))
    assert read_chain(str(tmp_path)).runs == ()
    assert said == [], "an original has no record"
    (tmp_path / "unlearn_args.json").write_text("{}")
    assert read_chain(str(tmp_path)).runs == ()
    assert "a run made it and trained_on.json is missing" in said[0]


def test_an_original_that_says_nothing_is_named_before_training(tmp_path, model_folders, data_files):
    """An OPT whose last norm gives one constant vector, along which the end token alone has a large logit."""
    model, tokenizer = tiny_model("opt"), load_tokenizer(str(model_folders["opt"]))
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.final_layer_norm.weight.zero_()
        decoder.final_layer_norm.bias.fill_(1.0)
        direction = decoder.project_out(torch.ones(32))
        decoder.embed_tokens.weight[tokenizer.eos_token_id] = 100 * direction / direction.norm()
    model.save_pretrained(tmp_path / "silent")
    tokenizer.save_pretrained(tmp_path / "silent")
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"How do I open door {i}?"} for i in range(8)])
    for base, is_silent in (("./silent", True), (model_folders["opt"], False)):
        run = run_cli("unlearn_harm.py", f"--model_name={base}", "--model_save_dir=out", "--overwrite",
                      "--log_file=out.log", f"--forget_data={prompts}", "--normal_data", data_files["facts"], *SMALL,
                      cwd=tmp_path)  # fmt: skip
        assert run.returncode == 0, run.stderr
        said, _, trained = run.stderr.partition("step 1/5")
        assert ("./silent: all of its own answers to" in said) is is_silent
        assert trained
