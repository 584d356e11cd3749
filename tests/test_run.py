"""The real command line on tiny random models: what it writes, when it stops, and what it refuses."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    SHARED,
    one_line_error,
    poison_losses,
    run_cli,
    run_python,
    share_of_update,
    tiny_model,
    weights,
)
from safetensors.torch import load_file

import evaluate_unlearning
import unlearn_harm
from engine.adapters import LoraSettings, add_lora, freeze
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.saving import gather_weights, lock_output_dir, write_model
from engine.tree import AnswerLogitsModel
from evaluate_unlearning import load_cached_report, report_folder
from method.objectives import Npo
from method.recipe import read_recipe
from method.run_options import parse_run
from options import EvaluateOptions, UnlearnOptions, parse
from utils import RunError, UsageError, load_model, load_tokenizer

SMALL = [
    "--dtype=fp32", "--max_unlearn_steps=5", "--lr=1e-3", "--max_answer_tokens=12", "--save_every=0", "--threads=1",
    "--set=mismatch.answers=2", "--set=dev.prompts=4", "--set=dev.tokens=6",
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
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    evaluation = run_cli(
        "evaluate_unlearning.py", "--model_name=models/out", "--dtype=fp32", "--max_new_tokens=6",
        "--train_log=logs/out.jsonl", cwd=cwd,
    )  # fmt: skip
    assert evaluation.returncode == 0, evaluation.stderr
    return request.param, cwd, run, evaluation


def test_a_run_leaves_a_model_that_a_pipeline_loads(finished, model_folders):
    family, cwd, _, _ = finished
    folder = cwd / "models/out"
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md",
                     "unlearn_args.json", "run_manifest.json", "report.json", "report.html",
                     "answers.jsonl"}  # fmt: skip
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
    report = json.loads((cwd / "models/out/report.json").read_text())
    lines = [json.loads(x) for x in (cwd / "models/out/answers.jsonl").read_text().splitlines()]
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
    assert "on topic before" in evaluation.stdout
    assert "before: " in evaluation.stdout
    assert "| forget (unseen) |" in (cwd / "models/out/README.md").read_text()


def test_a_report_is_reused_only_where_nothing_has_changed(finished, monkeypatch):
    _, cwd, _, evaluation = finished
    words = ("--model_name=models/out", "--dtype=fp32", "--max_new_tokens=6", "--train_log=logs/out.jsonl", "--reuse")
    stamp = (cwd / "models/out/report.json").stat().st_mtime_ns
    again = run_cli("evaluate_unlearning.py", *words, cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert "(as it was" in again.stdout
    assert (cwd / "models/out/report.json").stat().st_mtime_ns == stamp
    assert again.stdout.splitlines()[:-1] == evaluation.stdout.splitlines()[:-1]
    report = json.loads((cwd / "models/out/report.json").read_text())
    monkeypatch.chdir(cwd)
    options = parse(EvaluateOptions, list(words))
    assert load_cached_report(Path("models/out"), options, report["inputs"])
    assert not load_cached_report(Path("models/out"), options, "of other rows under the same names")
    file = cwd / "models/out/model.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-64] + bytes(64))  # other weights: another model, whose report this is not
    other = run_cli("evaluate_unlearning.py", *words, cwd=cwd)
    file.write_bytes(kept)
    assert other.returncode == 0, other.stderr
    assert "(as it was" not in other.stdout


def test_a_requirement_that_fails_ends_with_3(finished):
    _, cwd, _, _ = finished
    words = ("--model_name=models/out", "--dtype=fp32", "--max_new_tokens=6", "--prompts_per_group=2", "--attacks=all",
             "--quick", "--report_dir=judged")  # fmt: skip
    run = run_cli("evaluate_unlearning.py", *words, "--require", "forget.empty<=1", "keep.similarity>=9", cwd=cwd)
    assert run.returncode == 3, run.stderr
    assert "1 of 2 requirements hold" in run.stdout
    assert "fails  keep.similarity >= 9" in run.stdout


@pytest.mark.parametrize("finished", ["llama"], indirect=True)
def test_what_an_evaluation_refuses(finished, monkeypatch):
    """Each before a model is loaded."""
    _, cwd, _, _ = finished
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(evaluate_unlearning, "load_model", None)
    for bad, message in (
        ("--require=x=3", "--require 'x=3': must look like"),
        ("--require=forget.ontopic<=1", "forget.ontopic is not measured; measured with these options"),
        ("--require=keep.mc1_change>=0", "keep.mc1_change is not measured; measured with these options"),
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
    found = parse(EvaluateOptions, ["--model_name=made"])
    assert (found.original_name, found.harm_categories, found.seed, found.split) == ("original", ["theft"], 5, "test")
    # the categories are those of the run's own data; and whose split is not known, of that no row is called unseen
    assert not parse(EvaluateOptions, ["--model_name=made", "--forget_data=mine.csv"]).harm_categories
    assert parse(EvaluateOptions, ["--model_name=other"]).split == "all"
    assert report_folder(EvaluateOptions(model_name="made")) == Path("made")
    # a folder called as a hub model would be taken for it the next time
    assert report_folder(EvaluateOptions(model_name="someone/model")) == Path("reports/model")


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

    def counted(self, batch, **settings):
        forwards.append(torch.is_grad_enabled())
        return real(self, batch, **settings)

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


def test_a_recipe_gives_way_to_another_objective():
    """--forget_loss npo with the tuned recipe, whose ceiling is for gradient ascent alone."""
    words = ["--method=selective", "--forget_loss=npo"]
    term = read_recipe(parse_run(words)).terms[0]
    assert (term.name, term.objective) == ("forget", Npo())
    assert read_recipe(parse_run(words[:1])).terms[0].objective.ceiling == 6
    with pytest.raises(UsageError, match="forget: has no setting 'ceiling'"):
        parse_run([*words, "--set=forget.ceiling=6"])


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


def test_adapters_train_under_checkpointing_and_are_merged(tmp_path, model_folders, data_files):
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log",
        *data_words(data_files), *SMALL, "--use_lora", "--set=lora.rank=4", "--gradient_checkpointing",
        "--set=trainable.frozen_layers=1", "--dtype=bf16", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert all(".layers.1." in name for name in adapter), "a frozen layer has an adapter"
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values()), "the exact masters are what is kept"
    assert all((tensor != 0).any() for name, tensor in adapter.items() if "lora_B" in name)  # B starts at 0
    start, merged = weights(model_folders["llama"]), weights(tmp_path / "out")
    assert merged.keys() == start.keys()
    assert any((merged[k] != start[k]).any() for k in merged)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_bf16_run_saves_its_fp32_weights(tmp_path, model_folders, data_files, family):
    """Rounded to bf16, updates smaller than half its grid would be lost in what is saved."""
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders[family]}", "--model_save_dir=out",
                  "--log_file=out.log", *data_words(data_files), *SMALL, "--dtype=bf16", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    start, saved = weights(model_folders[family]), weights(tmp_path / "out")
    assert saved.keys() == start.keys(), "a tied head is saved once, as it was"
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # as a pipeline does
    assert loaded.dtype == torch.float32, "the config must not have them rounded"
    changed = [name for name in saved if (saved[name] != start[name]).any()]
    assert any((saved[name].bfloat16().float() != saved[name]).any() for name in changed)


def test_adapters_reach_experts_but_those_of_frozen_layers(tmp_path, model_folders):
    """A mixture keeps its experts in one tensor, no linear layer; and what is saved is what was trained."""
    tokenizer = load_tokenizer(str(model_folders["llama"]))
    tiny_model("mixtral", len(tokenizer)).save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base")).eval()
    options = UnlearnOptions(model_name=str(tmp_path / "base"), use_lora=True)
    adapters = add_lora(model, LoraSettings(), freeze(model, 1))
    stepper = MasterWeightAdamW(model, OptimizerSettings(lr=1e-1, total_steps=1000, adapters=True), torch.float32)
    ids = torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        stepper.step()
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", model, gather_weights(model, stepper, adapters), adapters, tokenizer, options)
    saved, start = load_model(str(tmp_path / "out")).eval(), dict(load_model(str(tmp_path / "base")).named_parameters())
    torch.testing.assert_close(saved(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    changed = {name for name, weight in saved.named_parameters() if not torch.equal(weight, start[name])}
    assert any("layers.1." in name and "experts" in name for name in changed)
    assert all("layers.1." in name for name in changed)


def test_frozen_weights_are_saved_as_they_came(tmp_path, model_folders, data_files):
    """A bf16 run reads them rounded; written rounded, they would be another model's."""
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=out.log", *data_words(data_files), *SMALL, "--dtype=bf16",
                  "--set=trainable.frozen_layers=1", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    start, saved = weights(model_folders["llama"]), weights(tmp_path / "out")
    frozen = [name for name in saved if ".layers.0." in name or "embed" in name]
    assert frozen
    assert all(torch.equal(saved[name], start[name]) for name in frozen)
    assert any((saved[name] != start[name]).any() for name in saved)


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path, model_folders, data_files):
    """An adapter on a head that shares its weight with the embeddings: another model than was trained was saved."""
    words = ["--forget_data", data_files["forget"], "--normal_data", data_files["facts"], *SMALL, "--use_lora",
             "--model_save_dir=out"]  # fmt: skip
    assert transformers.AutoConfig.from_pretrained(model_folders["llama"]).tie_word_embeddings
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", *words,
                  "--set=lora.targets=[q_proj, lm_head]", cwd=tmp_path, quiet=True)  # fmt: skip
    assert "the adapter of lm_head cannot be merged and saved (lm_head and model.embed_tokens share one weight)" in (
        one_line_error(run)
    )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*")), "a lock is left"
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", *words, "--set=lora.targets=[q_proj]",
                  cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_adapters_of_which_a_part_is_trained_are_saved_whole(tmp_path, model_folders, data_files):
    """The other part is drawn at random: without it, what is loaded is another model than was trained."""
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=o.log", *data_words(data_files), *SMALL, "--use_lora",
                  "--set=trainable.parameters=lora_B", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    parts = {name.rpartition(".lora_")[0]: 0 for name in adapter}
    for name in adapter:
        parts[name.rpartition(".lora_")[0]] += 1
    assert set(parts.values()) == {2}


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


# ---------------------------------------------------------------------------------------------- wrong use
@pytest.mark.parametrize(("words", "message"), [
    (["--no_such_option=1"], "unrecognized arguments: --no_such_option=1"),
    (["--lr=-1"], "--lr: must be a finite number above 0, got '-1'"),
    (["--lr=nan"], "--lr: must be a finite number"),
    (["--batch_size=0"], "must be a whole number at least 1, got '0'"),
    (["--max_unlearn_steps=2.5"], "must be a whole number"),
    (["--template=haiku"], "--template: invalid choice: 'haiku'"),
    (["--bad_weight=0", "--random_weight=0", "--normal_weight=0"], "the weights of all terms are 0"),
    (["--kl_budget=0.1"], "--kl_budget chooses among the states that are looked at: set --eval_every as well"),
    (["--log_file=run.jsonl"], "--log_file run.jsonl: that is where its twin in JSON lines goes"),
    (["--config=none.yaml"], "--config none.yaml: cannot be read"),
    (["--forget_data=none.jsonl"], "--forget_data none.jsonl: no such file"),
    (["--forget_data=a b c"], "--forget_data a b c: neither a"),
    (["--model_name=./nowhere"], "model ./nowhere: no such folder"),
    (["--model_name=someone/something"], "model someone/something is not in a local folder and cannot be downloaded"),
    (["--forget_data=someone/something"], "data set someone/something cannot be downloaded: save it as data/something"),
])  # fmt: skip
def test_wrong_use_ends_with_one_line_and_nothing_written(tmp_path, data_files, words, message):
    run = run_cli("unlearn_harm.py", *data_words(data_files), "--model_save_dir=out", *words, cwd=tmp_path)
    assert message in one_line_error(run)
    assert not (tmp_path / "out").exists()


def test_the_published_command_says_what_is_missing_and_where_to_put_it(tmp_path):
    run = run_cli("unlearn_harm.py", "--model_name=facebook/opt-1.3b", "--model_save_dir=models/opt1.3b_unlearned",
                  "--log_file=logs/opt-1.3b-unlearn.log", cwd=tmp_path)  # fmt: skip
    line = one_line_error(run)
    assert "PKU-Alignment/PKU-SafeRLHF cannot be downloaded" in line
    assert "data/PKU-SafeRLHF.jsonl" in line


def test_yaml_gives_way_to_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("lr: 1e-5\nbatch_size: 3\nuse_lora: true\nforget_data: [a.txt, b.txt]\nconfig:\n")
    with pytest.raises(UsageError, match="unknown option 'config'"):
        parse_run([f"--config={tmp_path / 'c.yaml'}"])
    (tmp_path / "c.yaml").write_text("lr: 1e-5\nbatch_size: 3\nuse_lora: true\nforget_data: [a.txt, b.txt]\n")
    found = parse_run(["--batch_size", "4", "--config", str(tmp_path / "c.yaml")])
    assert (found.lr, found.batch_size, found.use_lora, found.forget_data) == (1e-5, 4, True, ["a.txt", "b.txt"])
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-5\n")
    with pytest.raises(UsageError, match="unknown option 'learning_rate'"):
        parse_run(["--config", str(tmp_path / "c.yaml")])


def test_a_folder_with_something_in_it_is_not_replaced_unasked(tmp_path, model_folders, data_files):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    run = run_cli("unlearn_harm.py", *data_words(data_files), "--model_save_dir=out", cwd=tmp_path)
    assert "--model_save_dir out: is not empty; pass --overwrite" in one_line_error(run)
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def test_a_dry_run_shows_the_batch_and_writes_nothing(tmp_path, model_folders, data_files):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['opt']}", "--model_save_dir=out",
                  *data_words(data_files), *SMALL, "--dry_run", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "packed layout: logits equal" in run.stdout
    prompts_alone = run_cli("unlearn_harm.py", f"--model_name={model_folders['opt']}", "--model_save_dir=out",
                            "--forget_data", data_files["forget"], "--normal_data", data_files["plain"], *SMALL,
                            "--dry_run", cwd=tmp_path)  # fmt: skip
    assert prompts_alone.returncode == 0, prompts_alone.stderr  # the random answers would be the model's own
    assert re.search(r"forget +row 0: .*### Answer:\[ Take the red pick[^\]]*\]", run.stdout)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("loss", ["npo", "simnpo", "dpo", "unlikelihood"])
def test_every_forget_loss_forgets(tmp_path, model_folders, data_files, loss):
    """Each raises the harmful answers' NLL, by itself, in a whole run."""
    words = [f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log", *SMALL,
             *data_words(data_files), f"--forget_loss={loss}", "--max_unlearn_steps=8", "--bad_weight=1",
             f"--random_weight={1e-9 if loss == 'dpo' else 0}", "--normal_weight=0"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = [e["dev_nll"] for e in events(tmp_path / "out.jsonl", "eval")]
    assert found[-1] > found[0] + 0.1
