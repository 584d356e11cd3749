"""The real command line on tiny random models: what it writes, when it stops, and what it refuses."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    SHARED,
    poison_losses,
    run_cli,
    run_python,
    share_of_update,
    tiny_model,
    weights,
)

import evaluate_unlearning
import unlearn_harm
from engine.saving import lock_output_dir
from engine.tree import AnswerLogitsModel
from evaluate_unlearning import report_folder
from evaluation.options import EvaluateOptions
from evaluation.parsing import parse_evaluation
from options import UnlearnOptions
from prompts.tokenizer import load_tokenizer
from utils import RunError, UsageError

SMALL = [
    "--dtype=fp32", "--max_unlearn_steps=5", "--lr=1e-3", "--max_answer_tokens=12", "--save_every=0", "--threads=1",
    "--set=mismatch.answers=2", "--set=dev.prompts=4", "--set=dev.tokens=6", "--dev_share=0.1", "--test_share=0.2",
]  # fmt: skip


def data_words(files):
    return ["--forget_data", files["forget"], "--normal_data", files["facts"], files["plain"]]


def keys_of(found) -> set[str]:
    """Every key of nested objects."""
    if isinstance(found, dict):
        return set(found) | set().union(*map(keys_of, found.values()))
    return set().union(*map(keys_of, found)) if isinstance(found, list) else set()


def events(path, kind):
    return [e for e in map(json.loads, path.read_text().splitlines()) if e["event"] == kind]


@pytest.fixture(scope="module", params=["opt", "llama"])
def finished(request, tmp_path_factory, model_folders, data_files):
    """One whole run and its evaluation, on a tiny OPT and on a tiny Llama."""
    cwd = tmp_path_factory.mktemp(f"run_{request.param}")
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders[request.param]}", "--model_save_dir=models/out",
        "--log_file=logs/out.log", *data_words(data_files), *SMALL, "--eval_every=2", "--save_every=3", cwd=cwd,
        own=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    evaluation = run_cli(
        "evaluate_unlearning.py", "--model_name=models/out", "--dtype=fp32", "--max_new_tokens=6",
        "--train_log=logs/out.jsonl", cwd=cwd, own=True,
    )  # fmt: skip
    assert evaluation.returncode == 0, evaluation.stderr
    return request.param, cwd, run, evaluation


def test_a_run_leaves_a_model_that_a_pipeline_loads(finished, model_folders):
    family, cwd, _, _ = finished
    folder = cwd / "models/out"
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md",
                     "unlearn_args.json", "run_manifest.json", "trained_on.json"}  # fmt: skip
    assert ("chat_template.jinja" in names) is (family == "llama")
    pipe = transformers.pipeline("text-generation", model=str(folder))
    assert pipe("### Question: Why?\n ### Answer: ", max_new_tokens=3)[0]["generated_text"].startswith("### Question")
    before, after = weights(model_folders[family]), weights(folder)
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in after.values())
    assert any((after[k] != before[k]).any() for k in after)
    # nothing is left lying beside it but the checkpoint that was asked for
    assert {f.name for f in (cwd / "models").iterdir()} == {"out", "out-checkpoints"}
    assert (cwd / "models/out-checkpoints/step-000003/tokenizer.json").is_file()


def test_the_log_tells_the_run(finished):
    _, cwd, run, _ = finished
    steps = events(cwd / "logs/out.jsonl", "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5]  # asked for 5, and not one more
    assert steps[0]["bad_loss"] > 0
    assert steps[0]["normal_loss"] == pytest.approx(0, abs=1e-6)  # nothing has changed yet
    assert steps[-1]["normal_loss"] > 1e-6
    assert set(steps[0]) >= {"random_loss", "grad_norm", "lr", "tokens_per_second", "seconds_left"}
    assert [e["step"] for e in events(cwd / "logs/out.jsonl", "eval")] == [0, 2, 4, 5]
    text = (cwd / "logs/out.log").read_text()
    assert re.search(r"step 5/5  bad_loss \d+\.\d+  random_loss .* normal_loss .* grad_norm .* lr .* tokens/s", text)
    assert "\r" not in run.stderr, "a progress bar has no place in a file"
    glossary = (ROOT / "docs/fields.md").read_text()
    assert not [f for kind in ("step", "eval") for e in events(cwd / "logs/out.jsonl", kind)
                for f in e if f"`{f}`" not in glossary]  # fmt: skip


def test_the_evaluation_asks_both_models_the_same(finished):
    family, cwd, _, evaluation = finished
    report = json.loads((cwd / "reports/out/report.json").read_text())
    lines = [json.loads(x) for x in (cwd / "reports/out/scores.jsonl").read_text().splitlines()]
    names = [g["name"] for g in report["groups"]]
    assert names[0] == "published prompt, published template"
    assert ("published prompt, chat template" in names) is (family == "llama")
    assert {"forget (unseen)", "forget (trained)", "facts (unseen)", "plain (unseen)"} <= set(names)
    assert sum(g["n"] for g in report["groups"]) == len(lines)
    for group in report["groups"]:
        figure = group["after"]["on_topic"]
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    glossary = (ROOT / "docs/fields.md").read_text()
    assert not [key for key in keys_of({k: v for k, v in report.items() if k != "options"}) | keys_of(lines)
                if f"`{key}`" not in glossary and f'"{key}"' not in glossary]  # fmt: skip
    shown = evaluation.stdout.splitlines()
    assert shown[0].split()[-3:] == ["before", "after", "verdict"]
    assert any(line.strip().startswith("forget (unseen)") for line in shown) and "reports/out/report.html" in shown[-1]
    assert max(map(len, shown)) <= 100
    assert "| forget (unseen) |" in (cwd / "models/out/README.md").read_text()


def test_nothing_of_the_rows_lies_in_the_models_folder_or_the_log(finished):
    """The model is passed on, and the log is shown: what was forgotten must not stand in them."""
    _, cwd, run, _ = finished
    caches = sorted((cwd / "data/cache").iterdir())
    answers = [json.loads(line)["response"] for cache in caches for line in cache.read_text().splitlines()]
    texts = ["break lock number", "Take the red pick", "line about tree", *(a for a in answers if len(a) > 20)]
    assert len(texts) > 3
    files = [file for place in ("models", "logs") for file in (cwd / place).rglob("*") if file.is_file()]
    assert len(files) > 15
    for file in files:
        content = file.read_bytes().decode(errors="replace")
        assert not [text for text in texts if text in content or json.dumps(text)[1:-1] in content], file
    assert caches
    assert all(f"prompts and answers are kept in data/cache/{cache.name}" in run.stderr for cache in caches)


@pytest.mark.parametrize("finished", ["llama"], indirect=True)
def test_a_report_goes_where_no_other_models_report_lies(finished):
    _, cwd, _, _ = finished
    shutil.copytree(cwd / "models/out", cwd / "copies/out")
    (cwd / "copies/out/answers.jsonl").write_text("of an earlier version")
    before = (cwd / "reports/out/report.json").read_bytes()
    words = ("--model_name=copies/out", "--dtype=fp32", "--max_new_tokens=3", "--prompts_per_group=2")
    for _ in range(2):  # the second goes where the first one's is
        run = run_cli("evaluate_unlearning.py", *words, cwd=cwd)
        assert run.returncode == 0, run.stderr
        assert "reports/out holds the report of another model, so this one goes to reports/out-2" in run.stderr
        assert "copies/out holds an earlier report with prompts and answers (answers.jsonl)" in run.stderr
        assert "report: reports/out-2/report.html" in run.stdout
    assert {folder.name for folder in (cwd / "reports").iterdir()} == {"out", "out-2"}
    assert (cwd / "reports/out/report.json").read_bytes() == before
    assert (cwd / "copies/out/answers.jsonl").read_text() == "of an earlier version"
    assert "| forget (unseen) | forget | 2 |" in (cwd / "copies/out/README.md").read_text()
    run = run_cli("evaluate_unlearning.py", *words, "--report_dir=copies/out", cwd=cwd)
    assert run.returncode == 0, run.stderr
    assert "earlier report" not in run.stderr
    assert (cwd / "copies/out/report.html").is_file()


def test_answers_are_used_again_only_where_nothing_has_changed(finished):
    _, cwd, _, evaluation = finished
    words = ("--model_name=models/out", "--dtype=fp32", "--max_new_tokens=6", "--train_log=logs/out.jsonl")
    files = [cwd / "reports/out" / name for name in ("answers/before.jsonl", "answers/after.jsonl", "scores.jsonl")]
    stamps = [file.stat().st_mtime_ns for file in files]
    again = run_cli("evaluate_unlearning.py", *words, cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert again.stdout.splitlines()[:-1] == evaluation.stdout.splitlines()[:-1]  # all but the time
    weights = cwd / "models/out/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-64] + bytes(64))  # other weights: another model, whose answers these are not
    other = run_cli("evaluate_unlearning.py", *words, "--report_dir=reports/out", cwd=cwd)
    weights.write_bytes(kept)
    assert other.returncode == 0, other.stderr
    before, after, scores = (file.stat().st_mtime_ns for file in files)
    assert before == stamps[0] and after != stamps[1] and scores != stamps[2]


def test_a_requirement_that_fails_ends_with_3(finished):
    _, cwd, _, _ = finished
    words = ("--model_name=models/out", "--dtype=fp32", "--max_new_tokens=6", "--prompts_per_group=2", "--attacks=all",
             "--quick", "--report_dir=judged")  # fmt: skip
    run = run_cli("evaluate_unlearning.py", *words, "--require", "forget.empty<=1", "keep.similarity>=9", cwd=cwd)
    assert run.returncode == 3, run.stderr
    assert "required  forget.empty at most 100 %" in run.stdout
    assert re.search(r"required  keep.similarity at least 9.*: .*, fails", run.stdout)


@pytest.mark.parametrize("finished", ["llama"], indirect=True)
def test_what_an_evaluation_refuses(finished, monkeypatch):
    """Each before a model is loaded."""
    _, cwd, _, _ = finished
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(evaluate_unlearning, "load_causal_model", None)
    for bad, message in (
        ("--require=x=3", "--require 'x=3': must look like"),
        ("--require=forget.ontopic<=1", "no figure is called forget.ontopic; did you mean forget.on_topic"),
        ("--require=keep.mc1_change>=0", "keep.mc1_change is not measured without --mc_data"),
        ("--seed=1", "--seed 1: the run that made models/out split its rows with 8888"),
        ("--train_log=logs/out.log", "--train_log logs/out.log: is not the log in JSON lines"),
        ("--train_log=nope.jsonl", "--train_log nope.jsonl: cannot be read"),
        ("--attacks=magic", "--attacks magic: must be all, none, or among"),
    ):
        monkeypatch.setattr("sys.argv", ["e", "--model_name=models/out", "--report_dir=none", bad])
        with pytest.raises(UsageError, match=re.escape(message)):
            evaluate_unlearning.main()
    (cwd / "models/out/chat_template.jinja").rename(cwd / "template")
    monkeypatch.setattr("sys.argv", ["e", "--model_name=models/out", "--report_dir=none"])
    with pytest.raises(UsageError, match="models/out: its tokenizer has no chat template"):
        evaluate_unlearning.main()
    (cwd / "template").rename(cwd / "models/out/chat_template.jinja")
    assert not (cwd / "none").exists()


def test_what_an_evaluation_takes_over_from_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {"model_name": "original", "forget_data": ["a.csv"], "normal_data": ["b.csv"], "harm_categories": ["theft"],
            "template": "qa", "dev_share": 0.1, "test_share": 0.1, "seed": 5}  # fmt: skip
    (tmp_path / "made").mkdir()
    (tmp_path / "made/unlearn_args.json").write_text(json.dumps({"options": made}))
    found = parse_evaluation(["--model_name=made"])
    assert (found.original_name, found.harm_categories, found.seed, found.split) == ("original", ["theft"], 5, "test")
    # the categories are those of the run's own data; and whose split is not known, of that no row is called unseen
    assert not parse_evaluation(["--model_name=made", "--forget_data=mine.csv"]).harm_categories
    assert parse_evaluation(["--model_name=other"]).split == "all"
    assert report_folder(EvaluateOptions(model_name="models/made/")) == Path("reports/made")
    assert report_folder(EvaluateOptions(model_name="someone/model")) == Path("reports/model")
    assert report_folder(EvaluateOptions(model_name="made", report_dir="made")) == Path("made")


# ------------------------------------------------------------------------------------------- stops, faults
def test_the_ceiling_stops_the_run_at_the_step_that_reaches_it(tmp_path, model_folders, data_files):
    """Published: looked at between passes only, and with the wrong sign, so that it never fired."""
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders['opt']}", "--model_save_dir=out", "--log_file=out.log",
        *data_words(data_files), *SMALL, "--max_unlearn_steps=60", "--lr=1e-2", "--random_weight=0",
        "--normal_weight=0", "--max_bad_loss=20", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses = [e["bad_loss"] for e in events(tmp_path / "out.jsonl", "step")]
    assert losses
    assert losses[-1] > losses[0] > 0, "gradient ascent makes the harmful rows less likely"
    assert all(loss < 20 for loss in losses)
    done = events(tmp_path / "out.jsonl", "done")[0]
    assert done["steps"] == len(losses) < 60
    assert "--max_bad_loss 20 reached" in done["stop_reason"]


def test_a_step_is_one_forward_and_a_run_without_a_step_saves_nothing(tmp_path, monkeypatch, model_folders, data_files):
    """Published: four forwards of two models a step. And the original is never saved as a model that forgot."""
    monkeypatch.chdir(tmp_path)
    forwards, real = [], AnswerLogitsModel.forward

    def counted(self, *given, **settings):
        forwards.append(torch.is_grad_enabled())
        return real(self, *given, **settings)

    monkeypatch.setattr(AnswerLogitsModel, "forward", counted)
    words = ["unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log",
             *map(str, data_words(data_files)), *SMALL]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    unlearn_harm.main()
    assert sum(forwards) == 5  # --max_unlearn_steps
    monkeypatch.setattr("sys.argv", [*words, "--model_save_dir=none", "--max_bad_loss=0.001"])
    with pytest.raises(RunError, match=r"--max_bad_loss 0.001 reached: .* before the first update"):
        unlearn_harm.main()
    assert not Path("none").exists()


def test_a_run_is_not_written_over_the_folder_it_runs_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "a/..", ".."):
        with pytest.raises(UsageError, match="is where this runs"):
            lock_output_dir(Path(folder), UnlearnOptions(overwrite=True), SimpleNamespace(is_main_process=True))


def test_what_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch, model_folders, data_files):
    """A NaN is put into the loss of the second step: that step is not taken, the run goes on."""
    monkeypatch.chdir(tmp_path)
    poison_losses(monkeypatch, {2}.__contains__)
    words = ["unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log",
             *map(str, data_words(data_files)), *SMALL]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    unlearn_harm.main()
    assert "step 2: loss nan" in (tmp_path / "out.log").read_text()
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "out").values())
    monkeypatch.setattr("sys.argv", [*words, "--overwrite", "--max_unlearn_steps=40"])
    poison_losses(monkeypatch, lambda call: True, float("inf"))
    with pytest.raises(RunError, match="after 5 times half the learning rate: lower --lr"):
        unlearn_harm.main()


def test_a_step_that_fills_fewer_parts_says_so(tmp_path, model_folders, data_files):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=out.log", *data_words(data_files), *SMALL, "--gradient_accumulation=16",
                  "--max_unlearn_steps=1", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "--gradient_accumulation 16: a step's rows fill 2 parts, so it runs in 2" in run.stderr


def test_the_padded_layout_says_that_it_holds_a_second_model(tmp_path, model_folders, data_files):
    tokenizer = load_tokenizer(str(model_folders["llama"]))
    tiny_model("bloom", len(tokenizer)).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    run = run_cli("unlearn_harm.py", "--model_name=./bloom", "--model_save_dir=out", *data_words(data_files), *SMALL,
                  "--dry_run", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "padded layout" in run.stdout
    assert "the original stays in memory as a second model" in run.stdout


def test_a_step_in_parts_is_the_step_in_one(tmp_path, model_folders, data_files):
    """Means are over the whole step's tokens: a mean of the parts' means would weigh short answers more."""
    for name, parts in (("one", 1), ("three", 3)):
        run = run_cli(
            "unlearn_harm.py", f"--model_name={model_folders['llama']}", f"--model_save_dir={name}",
            f"--log_file={name}.log", *data_words(data_files), *SMALL, "--batch_size=3", "--set=retain.rows=5",
            f"--gradient_accumulation={parts}", cwd=tmp_path,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    assert share_of_update(model_folders["llama"], tmp_path / "one", tmp_path / "three") <= 1e-3
    one, three = (events(tmp_path / f"{name}.jsonl", "step") for name in ("one", "three"))
    for x, y in zip(one, three, strict=True):
        fields = ("bad_loss", "random_loss", "normal_loss", "grad_norm")
        assert [x[f] for f in fields] == pytest.approx([y[f] for f in fields], rel=1e-3, abs=1e-6)


def test_what_a_run_looks_at_does_not_change_what_it_learns(tmp_path, model_folders, data_files):
    for looks in ("--set=dev.prompts=1", "--set=dev.prompts=4"):
        run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", f"--model_save_dir={looks[-1]}",
                      f"--log_file={looks[-1]}.log", *data_words(data_files), *SMALL, "--dtype=bf16", "--eval_every=2",
                      looks, cwd=tmp_path)  # fmt: skip
        assert run.returncode == 0, run.stderr
    few, many = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert all(torch.equal(few[name], many[name]) for name in few)


# ---------------------------------------------------------------------------------------------- real rows
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not beside this checkout")
def test_real_rows_run_end_to_end(tmp_path, model_folders):
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders['opt']}", "--model_save_dir=out", "--log_file=out.log",
        "--forget_data", SHARED / "pku_saferlhf_pairs.jsonl", "--normal_data", SHARED / "TruthfulQA.csv", *SMALL,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(events(tmp_path / "out.jsonl", "step")) == 5


# -------------------------------------------------------------------------------------------- what is sent
NO_NETWORK = """
import socket, sys
def refuse(*address, **_):
    print("TRIED TO REACH", address, file=sys.stderr)
    raise OSError("the network is blocked")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
sys.path.insert(0, {root!r})
sys.argv = ["unlearn_harm.py", *sys.argv[1:]]
import unlearn_harm
unlearn_harm.run_script(unlearn_harm.main)
"""


def test_nothing_is_sent_anywhere(tmp_path, model_folders, data_files):
    """The main job with every connection refused and no word to the libraries that they are offline."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))}
    run = run_python(
        "-c", NO_NETWORK.format(root=str(ROOT)), f"--model_name={model_folders['llama']}", *data_words(data_files),
        *SMALL, "--model_save_dir=out", "--log_file=out.log", cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "TRIED TO REACH" not in run.stderr


def test_files_are_no_wider_than_the_umask(finished):
    _, cwd, _, _ = finished
    mask = os.umask(0)
    os.umask(mask)
    for file in (cwd / "models/out").rglob("*"):
        assert file.stat().st_mode & 0o777 & mask == 0, file
    assert not list((cwd / "models").rglob("*.bin")), "a pickle"
    assert not list((cwd / "models").rglob("*.pt"))
