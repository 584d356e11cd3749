"""The model card: the hub's own parser reads it, and it holds no prompt and no answer."""

import json

import pytest
from huggingface_hub import ModelCard
from shown_reports import attack, full_report, group, make_report, part

from evaluation.report import write_model_card

MADE = {"model_name": "opt", "forget_data": ["a.csv"], "normal_data": ["b.csv"], "method": "yao",
        "forget_loss": "ascent", "bad_weight": 0.5, "random_weight": 1.0, "normal_weight": 1.0, "lr": 2e-6,
        "seed": 1}  # fmt: skip
RUN = {"steps": 5, "stop_reason": "done", "kept_step": 4, "seconds": 3.0}
EVIL_NAME = 'a: "b"\n---\nlicense: mit\n`| [x](http://x/) <b>\'#'


def card_of(folder, options: dict, terms: list[dict] | None = None, report: dict | None = None) -> str:
    made = {"options": options, "run": RUN} | ({"terms": terms} if terms else {})
    (folder / "unlearn_args.json").write_text(json.dumps(made))
    write_model_card(folder, report)
    return (folder / "README.md").read_text()


def metadata_of(folder, options: dict, report: dict | None = None) -> dict:
    """What huggingface_hub's own parser reads; it asks no server."""
    return ModelCard(card_of(folder, options, report=report)).data.to_dict()


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A hub cache that holds facebook/opt-1.3b with a card."""
    revision = tmp_path / "cache" / "models--facebook--opt-1.3b" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    (revision / "config.json").write_text("{}")
    (revision / "README.md").write_text("---\nlicense: other\nlicense_name: opt\ntags: [x]\n---\n# OPT\n")
    refs = revision.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("downloaded")
def test_the_hub_reads_base_model_licence_and_data_once_each(tmp_path):
    data = ["owner/set:train", "a.csv", "owner/set:train", "owner/set:config:test", "folder/b.jsonl"]
    found = metadata_of(tmp_path, MADE | {"model_name": "facebook/opt-1.3b", "forget_data": data})
    assert found == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["machine-unlearning"],
                     "base_model": "facebook/opt-1.3b", "base_model_relation": "finetune", "license": "other",
                     "license_name": "opt", "datasets": ["owner/set"]}  # fmt: skip
    text = (tmp_path / "README.md").read_text().partition("# ")[2]
    assert text.count("`a.csv`") == text.count("`owner/set:train`") == text.count("`folder/b.jsonl`") == 1


@pytest.mark.parametrize("name", ["models/mine", "opt", "/somewhere/opt"])
def test_what_is_not_known_is_left_out_and_said(tmp_path, name):
    """models/mine has the form of a hub name; no model of that name was ever downloaded here."""
    assert metadata_of(tmp_path, MADE | {"model_name": name}).keys() == {"library_name", "pipeline_tag", "tags"}
    text = (tmp_path / "README.md").read_text()
    assert f"`{name}`" in text
    assert "unknown origin" in text and "licence was not found" in text


@pytest.mark.usefixtures("downloaded")
def test_a_local_folder_has_the_base_and_licence_that_its_own_files_name(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"_name_or_path": "facebook/opt-1.3b"}')
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found = metadata_of(tmp_path, MADE | {"model_name": str(base)})
    assert (found["base_model"], found["license"]) == ("facebook/opt-1.3b", "apache-2.0")


@pytest.mark.parametrize("with_report", [False, True])
def test_no_name_breaks_the_card(tmp_path, with_report):
    report = full_report(EVIL_NAME)[0] if with_report else None
    options = MADE | {"model_name": EVIL_NAME, "forget_data": [EVIL_NAME, "o/x:train"], "normal_data": [EVIL_NAME]}
    found = metadata_of(tmp_path, options, report)
    assert "license" not in found and found["datasets"] == ["o/x"]
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n---\n") == 1  # the end of the metadata
    tables = [row for row in text.splitlines() if row.startswith("|")]
    assert all(row.endswith("|") for row in tables)


def test_the_card_holds_verdict_worst_attack_and_judge_but_no_prompt_and_no_answer(tmp_path):
    example = {"prompt": "SECRET", "answer": "SECRET", "label": "answered"}
    report = make_report([group("a (unseen)", "forget")], attacks=[
        attack("prefill", "Sure", 0.1), attack("quantise", "4 bits", 0.3, control=0.9, examples=[example]),
        attack("relearn", "50 steps", 0.8, judged=False)])  # fmt: skip
    report["verdict"]["parts"] = [part("forgotten", "too few rows to say", why="Of 20 rows 2 are answered.")]
    card = card_of(tmp_path, MADE, report=report)
    assert "**forgotten: too few rows to say.** Of 20 rows 2 are answered." in card
    assert "quantise (4 bits) brings back 30 % (20 to 40); the original: 90 % (80 to 100)" in card
    assert "Judged by `outcome` (outcome), weights `abababababab`. It cannot tell whether an answer is right." in card
    assert "| a (unseen) | forget | 20 | 90 % (80 to 100) | 10 % (0 to 20) |" in card
    assert "SECRET" not in card


def test_a_card_of_a_folder_without_a_recipe_names_method_and_weights(tmp_path):
    card = card_of(tmp_path, MADE)
    assert "| method | `yao`: gradient ascent + random mismatch + KL to the original" in card
    assert "| weights (bad / random / normal) | 0.5 / 1.0 / 1.0 |" in card
    assert "| term |" not in card


def test_a_card_of_a_recipe_has_a_row_a_term(tmp_path):
    """The terms that the run minimised, with the weights that they had; the paper is named for its own recipe alone."""
    terms = [{"name": "forget", "draw": "forget", "loss": "npo", "weight": 0.3},
             {"name": "retain", "draw": "retain", "loss": "kl", "weight": 28.0},
             {"name": "first", "draw": "retain", "loss": "kl", "weight": 12.04}]  # fmt: skip
    unset = dict.fromkeys(("bad_weight", "random_weight", "normal_weight", "forget_loss"))
    card = card_of(tmp_path, MADE | unset | {"method": "selective", "recipe": {"terms": [{"name": "off"}]}}, terms)
    assert "| recipe | `selective` |" in card
    assert "| term | sequences of | loss | weight |\n|---|---|---|---|\n| forget | forget | npo | 0.3 |\n" in card
    assert "| first | retain | kl | 12.04 |\n\n" in card
    assert "None" not in card
    assert "| off" not in card
    assert "Yao" not in card
    assert "Yao" in card_of(tmp_path, MADE | unset | {"method": "yao"}, terms)
