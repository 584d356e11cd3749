"""Recipes: what a file gives, what --set changes, where old names went, and what is refused."""

import dataclasses
import json

import pytest
import yaml
from conftest import ROOT

from method.draws import DRAWS
from method.objectives import OBJECTIVES, Npo, SimNpo
from method.recipe import SECTIONS, read_recipe
from options import CommonOptions, DataOptions, UnlearnOptions
from run.parsing import old_names, parse_run
from utils import UsageError


def terms_of(*words):
    return {term.name: term for term in read_recipe(parse_run(list(words))).terms}


def test_the_published_recipe_by_its_name():
    """Weights .5, 1 and 1, K = 5, and the published names in the log."""
    terms = terms_of()
    assert {name: (t.weight, t.loss, t.over, t.field) for name, t in terms.items()} == {
        "forget": (0.5, "ascent", "tokens", "bad_loss"), "mismatch": (1.0, "nll", "sequences", "random_loss"),
        "retain": (1.0, "kl", "tokens", "normal_loss"), "retain_first": (0.0, "kl", "sequences", "first_token_kl"),
    }  # fmt: skip
    assert terms["mismatch"].draw.answers == 5
    assert terms_of("--bad_weight=2")["forget"].weight == 2
    assert "stop" in terms_of("--set=stop.rows=1"), "off until rows are given"
    assert "mismatch" not in terms_of("--random_weight=0"), "what has no weight is not drawn"
    assert "forget" in terms_of("--bad_weight=0"), "but the forget answers' NLL is always looked at"


def test_every_run_has_at_most_forty_options_each_with_a_text():
    shared = {
        field.name for kind in (CommonOptions, DataOptions) for field in dataclasses.fields(kind)
    }  # data, type and device, as an evaluation has
    fields = [field for field in dataclasses.fields(UnlearnOptions) if field.init and field.name not in shared]
    assert len(fields) <= 40
    kinds = [UnlearnOptions, *SECTIONS.values(), *DRAWS.values(), *OBJECTIVES.values()]
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if "help" in field.metadata:
                assert len(field.metadata["help"]) > 10, field.name


@pytest.mark.parametrize("old", sorted(old_names()))
def test_an_old_option_is_read_and_told_its_new_place(old, capsys):
    """Typed with another value than its default, on a recipe that has its place."""
    values = {"lr_schedule": "constant", "lora_targets": "q_proj", "forget_ceiling": "3"}
    method = "--method=yao" if old in ("num_random_answers", "empty_answer_share") else "--method=selective"
    beta = ["--forget_loss=npo"] if old == "forget_beta" else []
    value = values.get(old, "1" if old not in ("empty_answer_share", "forget_beta") else "0.5")
    value = "0.5" if old.endswith("_share") else value
    found = parse_run([method, *beta, f"--{old}={value}"]).recipe
    terms = {term["name"]: term for term in found["terms"]}
    for place in old_names()[old]:
        name, _, key = place.partition(".")
        got = (terms.get(name) or found.get(name))[key]
        assert got == ([value] if old == "lora_targets" else yaml.safe_load(value)), place
    said = capsys.readouterr().err
    assert f"--{old} is now --set {old_names()[old][0]}=" in said
    assert said.count(f"--{old} is now") == 1


def test_another_loss_does_not_inherit_the_settings_of_the_first(tmp_path):
    """Npo's beta is not simnpo's, wherever it was written out; and the loss may be set as any setting is."""
    made = parse_run(["--forget_loss=npo"])
    (tmp_path / "m.json").write_text(json.dumps({"arguments": dataclasses.asdict(made)}))
    words = [f"--from_manifest={tmp_path / 'm.json'}", "--forget_loss=simnpo"]
    assert terms_of(*words)["forget"].objective == SimNpo()
    assert terms_of("--method=selective", "--set=forget.loss=npo")["forget"].objective == Npo()
    # the rate for whole weights is that of a recipe without adapters, whoever says that there are none
    (tmp_path / "r.yaml").write_text("whole_weights: {lr: 1e-5}\nterms:\n- {name: a, draw: retain, loss: kl}\n")
    own = f"--method={tmp_path / 'r.yaml'}"
    assert (parse_run([own]).lr, parse_run([own, "--use_lora"]).lr) == (1e-5, UnlearnOptions.lr)


def test_names_may_be_spelled_with_hyphens():
    """As before: also those that became settings, and those that a recipe looks at."""
    options = parse_run(["--method=selective", "--frozen-layers", "3", "--use-lora", "no", "--lora-rank=4"])
    assert read_recipe(options).trainable.frozen_layers == 3
    assert (options.use_lora, options.lr) == (False, 1e-4)
    assert options.recipe["lora"]["rank"] == 4
    assert parse_run(["--set=trainable.parameters=a--b", "--log-file=x--y.log"]).log_file == "x--y.log"


def test_an_old_file_and_an_old_manifest_are_read(tmp_path):
    """Of a time when recipes were options: each goes to its place; a selective run's K and share of empty answers have
    become the term 'stop'."""
    (tmp_path / "c.yaml").write_text("method: selective\nfrozen_layers: 8\neval_prompts: 30\nnormal_weight: 2\n")
    recipe = read_recipe(parse_run([f"--config={tmp_path / 'c.yaml'}", "--eval_prompts=7"]))
    assert (recipe.trainable.frozen_layers, recipe.dev.prompts) == (8, 7)
    arguments = {"method": "selective", "num_random_answers": 1, "empty_answer_share": 1.0, "bad_weight": 0.3,
                 "random_weight": 2.5, "normal_weight": 28.0, "forget_loss": "ascent", "forget_beta": 0.0,
                 "forget_ceiling": 6.0, "empty_answer_rows": 4, "use_lora": True, "lora_rank": 8, "lr": 1e-3,
                 "model_save_dir": "gone"}  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps({"arguments": arguments}))
    options = parse_run([f"--from_manifest={tmp_path / 'm.json'}"])
    recipe, terms = read_recipe(options), {term.name: term for term in read_recipe(options).terms}
    assert (terms["stop"].weight, terms["stop"].draw.rows, recipe.lora.rank) == (2.5, 4, 8)
    assert options.model_save_dir == UnlearnOptions.model_save_dir
    # what an earlier run's list of options holds for another loss or another recipe was typed by nobody
    for loss, method in (("npo", "yao"), ("dpo", "yao"), ("unlikelihood", "selective")):
        file = tmp_path / f"{loss}.json"
        file.write_text(json.dumps({"arguments": {**arguments, "method": method, "forget_loss": loss}}))
        assert terms_of(f"--from_manifest={file}")["forget"].loss == loss
    assert terms_of(f"--from_manifest={tmp_path / 'm.json'}", "--forget_loss=npo")["forget"].objective == Npo()
    assert terms_of(f"--from_manifest={tmp_path / 'm.json'}", "--method=rmu")["forget"].loss == "rmu"
    assert terms_of("--forget_ceiling=0", "--forget_loss=npo")["forget"].objective == Npo()  # 0 meant: no ceiling


def test_a_manifest_repeats_the_recipe_and_gives_way_to_what_is_typed(tmp_path):
    """It used to fail on a ceiling that nobody had typed where another objective was."""
    made = parse_run(["--method=selective", "--set=stop.weight=1.5", "--normal_weight=3"])
    (tmp_path / "m.json").write_text(json.dumps({"arguments": dataclasses.asdict(made)}))
    words = [f"--from_manifest={tmp_path / 'm.json'}"]
    again = parse_run(words)
    assert again.recipe == made.recipe
    assert (again.lr, again.use_lora, again.method) == (made.lr, True, "selective")
    other = terms_of(*words, "--forget_loss=npo", "--set=stop.weight=9")
    assert (other["forget"].loss, other["stop"].weight, other["retain"].weight) == ("npo", 9, 3)


def test_the_recipe_that_is_kept_holds_every_setting(tmp_path):
    """A default that changes later must not change what a manifest repeats; a default that is typed is the same run."""
    made, typed = parse_run([]), parse_run(["--set", "optimizer.warmup_steps=0", "forget.weight=5e-1"])
    assert made.recipe == typed.recipe
    assert made.recipe["optimizer"] == {
        "schedule": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    assert made.recipe["terms"][1]["answers"] == 5
    assert parse_run(["--forget_loss=npo"]).recipe["terms"][0]["beta"] == 0.1
    # a method that a YAML file names is the method
    (tmp_path / "m.json").write_text(json.dumps({"arguments": dataclasses.asdict(made)}))
    (tmp_path / "c.yaml").write_text("method: selective\n")
    assert "stop" in terms_of(f"--from_manifest={tmp_path / 'm.json'}", f"--config={tmp_path / 'c.yaml'}")


def test_dpo_prefers_the_term_that_draws_replacement_answers(tmp_path):
    """By its draw, whatever the term is called."""
    (tmp_path / "r.yaml").write_text(
        "terms:\n- {name: forget, draw: answer, loss: dpo}\n- {name: mismatch, draw: wanted, loss: nll}\n"
        "- {name: idk, draw: mismatch, loss: nll, answers: 1}\n"
    )
    assert terms_of(f"--method={tmp_path / 'r.yaml'}")["forget"].preferred == "idk"


def test_a_recipe_of_ones_own(tmp_path, monkeypatch):
    """By its path; and the shipped ones from whatever folder one stands in."""
    (tmp_path / "mine.yaml").write_text(
        "options: {lr: 1e-4}\nterms:\n- {name: forget, draw: answer, loss: npo, beta: 0.2, weight: 3}\n"
        "- {name: hold, draw: retain, loss: kl, rows: 4}\n"
    )
    monkeypatch.chdir(tmp_path)
    options = parse_run(["--method=mine.yaml"])
    terms = {term.name: term for term in read_recipe(options).terms}
    assert options.lr == 1e-4
    assert (terms["forget"].objective.beta, terms["forget"].field) == (0.2, "forget_nll")
    assert (terms["hold"].draw.rows, terms["hold"].weight, terms["hold"].field) == (4, 1.0, "hold_kl")
    for file in (ROOT / "recipes").glob("*/recipe.yaml"):
        assert terms_of(f"--method={file.parent.name}")


@pytest.mark.parametrize(("words", "message"), [
    (["--method=magic"], "--method magic: no such recipe; there are consent, copyright, facts, finetune, people, rmu"),
    (["--set=stop.weight"], "--set stop.weight: must look like stop.weight=2"),
    (["--set=stopp.weight=2"], "--set stopp.weight: --method yao has no 'stopp'; its terms are forget, mismatch"),
    (["--set=forget.wieght=2"], "forget: has no setting 'wieght'; it has weight, back, ceiling"),
    (["--set=mismatch.answers=-1"], "mismatch.answers: must be a whole number at least 0, got '-1'"),
    (["--set=forget.weight=nan"], "forget.weight: must be a finite number at least 0"),
    (["--set=optimizer.schedule=steep"], "optimizer.schedule: must be one of linear, constant, got 'steep'"),
    (["--set=optimizer.lr=1"], "optimizer: has no 'lr'; it has max_grad_norm, schedule, warmup_steps, weight_decay"),
    (["--set=stop.after_batch=maybe"], "stop.after_batch: must be true or false, got 'maybe'"),
    (["--forget_loss=magic"], "--forget_loss magic: must be one of ascent, npo, simnpo, dpo, unlikelihood,"),
    (["--forget_loss=nll"], "--forget_loss nll: must be one of ascent"),  # it would teach the answers
    (["--forget_loss=dpo", "--random_weight=0"], "dpo prefers the answers of a draw 'mismatch', and no term"),
    (["--method=selective", "--forget_loss=dpo"], "forget: dpo prefers the answers of a draw 'mismatch'"),
    (["--set=forget.log=step"], "forget.log: 'step' is no word, or a field that every step has"),
    (["--set=forget.log=random_loss"], "mismatch.log: 'random_loss' is the field of the term 'forget' already"),
    (["--set=forget.log=[a]"], "forget.log: must be text, got ['a']"),
    (["--set=forget.loss=[npo]"], "forget.loss: must be text"),
    (["--set=forget.draw=[a]"], "forget.draw: must be text"),
    (["--set=retain_first.times=[a]"], "retain_first.times: must be text"),
    (["--set=forget.weight=2020-01-01"], "forget.weight: must be a finite number"),
    (["--set=forget.watch=maybe"], "forget.watch: must be true or false"),
    (["--set=mismatch.answers=" + "9" * 400], "mismatch.answers: must be a whole number"),
    (["--forget_beta=abc", "--forget_loss=npo"], "forget.beta: must be a finite number above 0, got 'abc'"),
    (["--set=forget.beta=1"], "forget: has no setting 'beta'"),  # of npo: it was ignored unsaid
    (["--set=retain.tokens=last"], "retain.tokens: must be one of all, first, telling, got 'last'"),
    (["--num_random_answers=2", "--method=selective"], "--method selective has no 'mismatch'"),
])  # fmt: skip
def test_what_is_no_recipe_is_one_line(words, message):
    with pytest.raises(UsageError) as error:
        read_recipe(parse_run(words))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("- 1\n", "must hold one 'name: value' a line"),
    ("terms: 3\n", "a recipe needs a list of terms"),
    ("lora: 5\nterms: [{}]\n", "lora must hold one 'name: value' a line"),
    ("options: [a]\nterms: [{}]\n", "options must hold one 'name: value' a line"),
    ("options: {method: rmu}\nterms: [{}]\n", "options holds 'method', which is no option that a recipe gives"),
    ("1: {}\nterms: [{}]\n", "unknown section 1"),
    ("terms:\n- {name: [a], draw: answer, loss: nll}\n", "term 1: needs a name of its own, a word, got ['a']"),
    ("terms:\n- {name: a, 1: 2, draw: answer, loss: nll}\n", "a: has no setting '1'"),
    ("terms:\n- {name: a, draw: answer, loss: nll, weight_option: b}\n", "a.weight_option: must be one of bad_weight"),
    ("termz: []\nterms: []\n", "unknown section 'termz'"),
    ("terms:\n- {draw: answer, loss: nll}\n", "term 1: needs a name of its own"),
    ("terms:\n- {name: lora, draw: answer, loss: nll}\n", "term 1: needs a name of its own, a word, got 'lora'"),
    ("terms:\n- {name: a, draw: answers, loss: nll}\n", "a: draw must be one of answer, mismatch"),
    ("terms:\n- {name: a, sequences_of: b, loss: nll}\n", "a: sequences_of must name a term that stands before it"),
    ("terms:\n- {name: a, draw: retain, loss: kl, weight: 0}\n", "the weights of all terms are 0 (a)"),
    ("terms:\n- {name: a, draw: retain, loss: kl, times: b}\n", "a: times must name a term that stands before it"),
])  # fmt: skip
def test_a_bad_recipe_file_is_one_line(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        parse_run([f"--method={tmp_path / 'bad.yaml'}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_that_are_not_trained_are_said(capsys):
    parse_run(["--set=lora.rank=4"])
    assert "lora.rank: not used, since adapters are trained with --use_lora only" in capsys.readouterr().err
    parse_run(["--set=lora.rank=4", "--use_lora"])
    assert "not used" not in capsys.readouterr().err


def test_dpo_prefers_the_draw_that_a_recipe_names(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "terms:\n- {name: forget, draw: answer, loss: dpo, prefers: wanted}\n- {name: right, draw: wanted, loss: nll}\n"
        "- {name: idk, draw: mismatch, loss: nll, answers: 1}\n"
    )
    assert terms_of(f"--method={tmp_path / 'r.yaml'}")["forget"].preferred == "right"
